"""The notebook is executed from top to bottom, on a network that has hardly been trained."""

import re
from pathlib import Path

import pytest

import main_jit
from tests.conftest import train
from tools.export import export

nbformat = pytest.importorskip("nbformat", reason="needs requirements-dev.txt")
NOTEBOOK = Path(main_jit.__file__).parent / "notebooks" / "digits.ipynb"


def test_no_output_is_stored():
    """Pictures depend on the training run, and would grow old without anybody noticing."""
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.usefixtures("tiny")
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    train(tmp_path / "run", model="JiT-Demo/8", epochs=1)
    export(tmp_path / "run", tmp_path / "digits.safetensors")
    monkeypatch.setenv("DIGITS_MODEL", str(tmp_path / "digits.safetensors"))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # whoever imports Streamlit sets it
    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where Jupyter starts it
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert len(re.findall(r"^(as trained|none|snr, .*|power, .*?)((\s+\d+\.\d{4}){5})$", text, re.MULTILINE)) == 5
    assert "equal to the model's own prediction: True" in text
