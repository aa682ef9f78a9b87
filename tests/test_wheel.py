"""What `pip install .` gives: the operators alone, typed, which import torch and nothing else."""

import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import spectral_forcing

ROOT = Path(spectral_forcing.__file__).parent
MODULES = ("spectral_forcing", *(f"spectral_ops.{path.stem}" for path in (ROOT / "spectral_ops").glob("[!_]*.py")))
PROGRAM = f"""
import json, sys
import torch
before = set(sys.modules)
import {", ".join(MODULES)}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
out = spectral_forcing.SpectralForcing()(torch.zeros(1, 4, 6, 8), 0.5)
print(json.dumps([sorted(new - sys.stdlib_module_names), list(out.shape), spectral_forcing.__file__]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_it_holds_the_operators_and_says_what_they_need(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "spectral_ops").glob("*.py")}
    package = {"spectral_forcing/__init__.py", "spectral_forcing/py.typed", "spectral_ops/py.typed"}
    assert files == sources | package
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    fields = Parser().parsestr(wheel.read(metadata).decode())
    needed = [requirement for requirement in fields.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert needed == ["torch>=2.4"] and set(fields.get_all("Provides-Extra")) == {
        "diffusers",
        "data",
        "tensorboard",
        "explorer",
    }


def test_all_of_it_imports_torch_alone(wheel, tmp_path):
    """In an isolated interpreter that sees the installed wheel before this folder's files."""
    wheel.extractall(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + PROGRAM
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    new, shape, file = json.loads(done.stdout)
    assert new == ["spectral_forcing", "spectral_ops"] and shape == [1, 4, 6, 8] and Path(file).is_relative_to(tmp_path)
