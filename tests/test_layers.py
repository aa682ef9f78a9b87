"""Imports go down only: layers 0 to 4, the order of the packages in util, no circles."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVEL = dict.fromkeys(["spectral_forcing", "spectral_ops"], 0) | dict.fromkeys(["model_jit", "denoiser", "sampler"], 1)
LEVEL |= {"util": 2, "engine_jit": 3} | dict.fromkeys(["main_jit", "prepare_ref", "tools"], 4)
PACKAGES = ("util.dist", "util.data", "util.checkpoint", "util.evaluation")  # a later one may import an earlier one
PLAIN = ("weights", "features", "formulas", "metrics", "protocols", "reference", "plots")
PLAIN = [f"util.evaluation.{name}" for name in PLAIN]
NO_CONFIG = ("util.data", "util.dist", "util.checkpoint.files", *PLAIN)
LIGHT = {*sys.stdlib_module_names, "torch", "spectral_forcing", "spectral_ops"}
FILES = [f.relative_to(ROOT) for f in ROOT.rglob("*.py") if f.name != "__init__.py"]
MODULES = {".".join(f.with_suffix("").parts): f for f in FILES if f.parts[0].removesuffix(".py") in LEVEL}


def imported(module: str) -> set[str]:
    """Names of all modules that a module imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / MODULES[module]).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parent = getattr(node, "module", None)
            found |= {parent} - {None} | {f"{parent}.{a.name}" if parent else a.name for a in node.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    level = LEVEL[module.split(".")[0]]
    later = next((PACKAGES[i + 1 :] for i, name in enumerate(PACKAGES) if module.startswith(name)), ())
    for other in imported(module):
        top = other.split(".")[0]
        assert LEVEL.get(top, 0) <= level and not other.startswith(later), other
        assert other != "util.config" or not module.startswith(NO_CONFIG)
        assert level > 0 or top in LIGHT, other
        assert module != "spectral_forcing" or top != "spectral_ops"


def test_no_import_is_circular():
    graph = {module: imported(module) & set(MODULES) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)
