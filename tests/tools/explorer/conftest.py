"""What the page of tools.explorer is shown in its tests."""

import shutil

import pytest
from PIL import Image

from tests.tools.test_report import made_up, write
from tools.export import export, export_folder


@pytest.fixture(scope="module")
def output(trained, tmp_path_factory):
    """A folder with a run, its samples and an evaluation, and both forms of export. Read it, do not write to it."""
    root = tmp_path_factory.mktemp("explorer")
    run = shutil.copytree(trained, root / "run")
    export(run, root / "exported.safetensors")
    export_folder(run, root / "hub")
    write(run, "eval/x.json", made_up())
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(run / "samples" / "epoch0003-ema1.png")
    return root
