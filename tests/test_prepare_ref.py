"""prepare_ref.py: what it writes, by one process and by several, and every refusal."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_ref
from tests.test_reference import DIM, Colours
from util.data import build_dataset
from util.distributed import World
from util.features import MetricError
from util.reference import load_reference
from util.spectrum import grey_spectrum, rapsd

ROOT = Path(prepare_ref.__file__).parent
PROGRAM = """
import sys
import prepare_ref
from tests.test_reference import Colours
prepare_ref.InceptionV3, prepare_ref.ensure_inception_weights = Colours, lambda path: None
sys.exit(prepare_ref.main())
"""


@pytest.fixture
def fake_extractor(monkeypatch):
    monkeypatch.setattr(prepare_ref, "InceptionV3", Colours)
    monkeypatch.setattr(prepare_ref, "ensure_inception_weights", lambda path: None)


def test_prepare_ref_writes_what_numpy_computes(tmp_path, fake_extractor, capsys):
    out = tmp_path / "digits.npz"
    arguments = ["--dataset", "digits", "--num_images", "70", "--batch_size", "32", "--device", "cpu"]
    arguments += ["--num_features", "20", "--out", str(out)]
    assert prepare_ref.main(arguments) == 0
    indices = prepare_ref.choose_indices(1797, 70)
    assert (
        len(set(indices)) == 70
        and indices == sorted(indices)
        and set(indices) < set(prepare_ref.choose_indices(1797, 90))
    )
    dataset = build_dataset("digits", None, 32, "train")
    images = torch.stack([dataset[i][0] for i in indices])
    x = Colours()(images)["inception_2048"].double().numpy()
    reference = load_reference(out, DIM, Colours(), 32)
    np.testing.assert_allclose(reference.mu, x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(reference.sigma, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-12)
    assert reference.meta["num_images"] == 70 and reference.meta["subset_seed"] == 0
    assert reference.meta["dataset"] == "digits" and "torch" in reference.meta["versions"]
    kept = prepare_ref.choose_features(70, 20)
    np.testing.assert_array_equal(reference.features, x[kept].astype(np.float32))
    assert reference.meta["num_features"] == 20 and reference.meta["features_seed"] == 1
    y = images.double() / 127.5 - 1
    spectra = {
        "grey_spectrum": grey_spectrum(images).mean(dim=0),
        "rapsd": rapsd(y).mean(dim=0),
        "rapsd_centred": rapsd(y - y.mean(dim=0)).mean(dim=0),
    }
    assert reference.spectra.keys() == spectra.keys()
    for name, values in spectra.items():
        np.testing.assert_allclose(reference.spectra[name], values, rtol=1e-9, err_msg=name)
    printed = capsys.readouterr().out
    assert str(out) in printed and reference.sha256 in printed

    assert prepare_ref.main(arguments) == 2  # it exists
    assert "--overwrite" in capsys.readouterr().err
    assert prepare_ref.main([*arguments, "--overwrite", "--num_features", "0"]) == 0
    again = load_reference(out, DIM, Colours(), 32)
    assert again.features is None and again.spectra and again.meta["num_features"] == 0


def test_the_images_whose_features_are_kept():
    """A fixed random subset, of which a smaller one is a part; all images where there are fewer."""
    kept = prepare_ref.choose_features(1000, 50)
    assert kept == sorted(set(kept)) and len(kept) == 50 and kept[0] >= 0 and kept[-1] < 1000
    assert abs(np.mean(kept) - 500) < 150 and set(prepare_ref.choose_features(1000, 20)) < set(kept)
    assert prepare_ref.choose_features(30, 10_000) == list(range(30)) and prepare_ref.choose_features(30, 0) == []
    with pytest.raises(MetricError, match="at least 4, not 3"):
        prepare_ref.choose_features(30, 3)


@pytest.mark.parametrize(("size", "count"), [(3, 70), (5, 60)])
def test_parts_are_the_whole(monkeypatch, size, count):
    """Any number of processes, more than there are batches included; what they send is gathered here by hand."""
    dataset = build_dataset("digits", None, 32, "train")
    indices, kept = prepare_ref.choose_indices(1797, count), prepare_ref.choose_features(count, 25)
    work = (dataset, indices, kept, Colours(), "inception_2048", 16, 0)
    whole = prepare_ref.extract(*work, World())
    assert prepare_ref.merge(whole, kept, count, 16, World()) is whole
    sent = {rank: [] for rank in range(size)}

    def gather(rows, n, world):
        sent[world.rank].append(rows)
        if not world.main:
            return None
        turn = len(sent[0]) - 1
        return torch.cat([sent[rank][turn] for rank in range(size)])

    monkeypatch.setattr(prepare_ref, "gather_by_index", gather)
    for rank in reversed(range(size)):  # rank 0 last: it reads what the others have sent
        world = World(rank, size)
        merged = prepare_ref.merge(prepare_ref.extract(*work, world), kept, count, 16, world)
        assert (merged is None) == (rank > 0)
    assert merged.moments.n == merged.spectra.count == count
    for ours, theirs in zip(merged.moments.finish(), whole.moments.finish(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    expected = whole.spectra.finish()
    for name, values in merged.spectra.finish().items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-9)
    assert torch.equal(merged.features, whole.features) and len(whole.features) == 25


def start(folder, arguments, rank, port):
    """One of two processes as torchrun would start it, with the stand-in extractor."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment = os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_write_what_one_writes(tmp_path, fake_extractor):
    arguments = ["--dataset", "digits", "--num_images", "100", "--num_features", "40", "--batch_size", "16"]
    arguments += ["--device", "cpu", "--out"]
    port = free_port()
    processes = [start(tmp_path, [*arguments, "two.npz"], rank, port) for rank in (0, 1)]
    assert prepare_ref.main([*arguments, str(tmp_path / "one.npz")]) == 0
    (out, err), (nothing, _) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err
    assert "two.npz" in out and nothing == ""
    one, two = (load_reference(tmp_path / f"{name}.npz", DIM, Colours(), 32) for name in ("one", "two"))
    assert (one.meta["processes"], two.meta["processes"]) == (1, 2)
    np.testing.assert_allclose(two.mu, one.mu, rtol=1e-9)
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(two.features, one.features)
    for name, values in one.spectra.items():
        np.testing.assert_allclose(two.spectra[name], values, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 11])
def test_an_error_on_any_process_ends_all_with_its_sentence(tmp_path, broken):
    """torchrun, and an image that one of two processes cannot read."""
    folder = tmp_path / "data" / "train" / "class0"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(folder / f"{i:02d}.png")
    (folder / f"{broken:02d}.png").write_bytes(b"no image")
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = ["--dataset", "imagefolder", "--data_path", "data", "--img_size", "32", "--num_workers", "0"]
    arguments += ["--batch_size", "2", "--device", "cpu", "--out", "r.npz"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, "program.py", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0 and not (tmp_path / "r.npz").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("prepare_ref.py: ")]
    assert len(said) == 1 and f"{broken:02d}.png" in said[0], done.stderr
    assert 'prepare_ref.py", line' not in done.stderr  # torchrun prints a traceback of its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digits", "--num_images", "1798"], "from 2 to 1797"),
        (["--dataset", "digits", "--num_images", "1"], "from 2 to 1797"),
        (["--dataset", "digits", "--batch_size", "0"], "--batch_size must be"),
        (["--dataset", "digits", "--num_features", "-1"], "--num_features must be at least 0"),
        (["--dataset", "digits", "--num_features", "2"], "--num_features must be 0 or at least 4"),
        (["--dataset", "digits", "--device", "abacus"], "--device abacus"),
        (["--dataset", "digits", "--split", "test"], "no split"),
        (["--dataset", "digits", "--out", "statistics"], r"end in \.npz"),
        (["--dataset", "imagefolder"], "--data_path"),
        (["--dataset", "imagefolder", "--data_path", "nowhere"], "does not exist"),
    ],
)
def test_prepare_ref_errors_are_one_sentence(tmp_path, monkeypatch, fake_extractor, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "r.npz")]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert prepare_ref.main([*arguments, *device, *out]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(message, error[0]), error[0]
    assert list(tmp_path.iterdir()) == []


def test_another_split_needs_a_name(fake_extractor, capsys):
    assert prepare_ref.main(["--dataset", "cifar10", "--split", "val", "--device", "cpu"]) == 2
    assert "give --out" in capsys.readouterr().err


def test_prepare_ref_as_a_program(tmp_path):
    """No traceback and exit code 2, from another working directory."""
    environment = os.environ | {"INCEPTION_WEIGHTS": str(tmp_path / "none.pth")}
    arguments = ["--dataset", "digits", "--device", "cpu", "--out", str(tmp_path / "r.npz")]
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_ref.py", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "INCEPTION_WEIGHTS" in done.stderr
