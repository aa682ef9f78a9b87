"""What files may not do: execute anything when they are read, or decide where something is written."""

import argparse
import ast
import io
import pickle
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main_jit
from tests.conftest import Payload, arguments, flags, listing, raw, train
from util.checkpoint.files import NAME
from util.errors import UserError
from util.evaluation.reference import load_reference
from util.io import REPOSITORY

EXTRACTOR = SimpleNamespace(name="inception", sha256="0" * 64)
SOURCES = [
    path for path in REPOSITORY.rglob("*.py") if not {"tests", ".venv"} & set(path.relative_to(REPOSITORY).parts)
]
SAFE = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
UNSAFE = {"pickle.load", "pickle.loads", "torch.hub.load", "os.system", "marshal.loads"}

pytestmark = pytest.mark.usefixtures("tiny")


def test_every_file_is_read_without_unpickling():
    seen = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name not in UNSAFE, path
                if name in SAFE:
                    key, value = SAFE[name]
                    assert keywords.get(key) == value, f"{path}: {name} without {key}={value}"
                    seen.add(name)
    assert seen == set(SAFE)


@pytest.mark.parametrize("task", ["train", "evaluate_gen", "sample", "init_from"])
def test_a_malicious_checkpoint_executes_nothing(trained, tmp_path, capsys, task):
    """Also test_published.py, with more kinds of files."""
    marker = tmp_path / "executed"
    content = raw(trained)
    content["args"].extra = Payload(marker)
    folder = tmp_path / "bad"
    folder.mkdir()
    torch.save(content, folder / NAME)
    if task == "train":
        argv = arguments(output_dir=folder, epochs=4)
    elif task == "init_from":
        argv = arguments(output_dir=tmp_path / "new", init_from=folder)
    else:
        argv = [f"--{task}", *flags(resume=folder, device="cpu")]
    assert main_jit.main(argv) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the test can fail
    assert marker.exists()


def test_a_malicious_statistics_file_executes_nothing(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "bad.npz"

    def refused():
        with pytest.raises(UserError):
            load_reference(path, "digits", 32, EXTRACTOR)

    np.savez(path, mu=np.array([Payload(marker)], dtype=object), sigma=np.eye(2), metadata=np.array("{}"))
    refused()
    buffer = io.BytesIO(pickle.dumps(Payload(marker)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", buffer.getvalue())
    refused()
    path.write_bytes(buffer.getvalue())
    refused()
    assert not marker.exists()


def test_paths_in_a_checkpoint_are_never_written_to(tmp_path):
    """A checkpoint from elsewhere, whose settings name folders: they are read at most, and no file appears in them."""
    folder, elsewhere = train(tmp_path / "run", epochs=1), tmp_path / "elsewhere"
    elsewhere.mkdir()
    content = raw(folder)
    where = str(elsewhere / "x")
    names = ("output_dir", "resume", "save_images", "fid_stats", "inception_weights", "init_from", "checkpoint")
    content["args"] = argparse.Namespace(**{**vars(content["args"]), **dict.fromkeys(names, where)})
    content["run"] |= dict.fromkeys(("path", "output_dir", "folder"), where)
    torch.save(content, folder / NAME)
    train(folder, epochs=2)
    common = {"resume": folder, "num_sampling_steps": 2, "device": "cpu"}
    assert main_jit.main(["--sample", *flags(**common, labels="0", num_per_class=1)]) == 0
    assert main_jit.main(["--evaluate_gen", *flags(**common, num_images=100)]) == 0
    assert listing(elsewhere) == {}
