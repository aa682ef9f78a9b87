"""Imports go down only: layers 0 to 4, the order of the packages in util, no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("spectral_forcing", "spectral_ops"),
    ("model_jit", "denoiser", "sampler"),
    ("util",),
    ("engine_jit",),
    ("main_jit", "prepare_ref", "tools"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGES = ("util.dist", "util.data", "util.checkpoint", "util.evaluation")  # a later one may import an earlier one
PLAIN = [f"util.evaluation.{name}" for name in ("features", "metrics", "reference", "plots")]
NO_CONFIG = ("util.data", "util.dist", "util.checkpoint.files", *PLAIN)
LIGHT = {"torch", "math", "collections", "typing", "dataclasses", "spectral_forcing", "spectral_ops"}
FILES = [f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0].removesuffix(".py") in LEVEL]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES if f.name != "__init__.py"}


def imported(module: str) -> set[str]:
    """Names of all modules that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def top(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    inside = [i for i, name in enumerate(PACKAGES) if module.startswith(name)] or [len(PACKAGES)]
    for other in imported(module):
        assert LEVEL.get(top(other), 0) <= LEVEL[top(module)], other
        assert not other.startswith(PACKAGES[inside[0] + 1 :]), other
        assert other != "util.config" or not module.startswith(NO_CONFIG)
        assert LEVEL[top(module)] > 0 or top(other) in LIGHT, other
    assert module != "spectral_forcing" or not any(top(other) == "spectral_ops" for other in imported(module))


def test_no_import_is_circular():
    graph = {module: imported(module) & set(MODULES) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)
