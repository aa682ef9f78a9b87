"""Fashion-MNIST, against torchvision's reader. The four files are made here: the real ones may not be installed."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from util.data import fashion_mnist
from util.data.datasets import DATASETS, build_dataset
from util.data.images import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for part, n in {"train": 7, "t10k": 3}.items():
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
        for name, header, array in (
            ("images-idx3", struct.pack(">4i", 0x803, n, 28, 28), images),
            ("labels-idx1", struct.pack(">2i", 0x801, n), labels),
        ):
            content = header + array.tobytes()
            monkeypatch.setitem(fashion_mnist.SHA256, f"{part}-{name}-ubyte", hashlib.sha256(content).hexdigest())
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(content)
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return tmp_path


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("val", "t10k"), ("test", "t10k")])
def test_images_are_torchvisions_and_zeros_around_them(folder, split, part):
    images = build_dataset("fashion_mnist", folder, 32, split)
    pixels = read_image_file(str(folder / f"{part}-images-idx3-ubyte"))
    assert images.labels.tolist() == read_label_file(str(folder / f"{part}-labels-idx1-ubyte")).tolist()
    assert images.class_names == FashionMNIST.classes == list(DATASETS["fashion_mnist"].class_names)
    for i, expected in enumerate(pixels):
        x, y = images[i]
        assert x.shape == (3, 32, 32) and x.dtype == torch.uint8 and y == images.labels[i]
        assert all(torch.equal(grey[2:30, 2:30], expected) for grey in x) and x.sum() == 3 * expected.sum()
    grey = build_dataset("fashion_mnist", folder, 28, split, channels=1)
    x = grey.prepare(grey[0][0][None])
    assert torch.allclose(x[0, 0], pixels[0] / 127.5 - 1, atol=1e-6)


def test_what_is_refused(folder):
    with pytest.raises(DataError, match="no split 'trian'; expected one of train, val, test"):
        build_dataset("fashion_mnist", folder, 32, "trian")
    for size in (26, 29):
        with pytest.raises(DataError, match=f"img_size is {size}; .* even one of at least 28"):
            build_dataset("fashion_mnist", folder, size)
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    damaged = whole[:500] + bytes([whole[500] ^ 255]) + whole[501:]
    other = gzip.compress(gzip.decompress(whole)[:-1] + b"x")  # of MNIST, say
    for content in (whole[:500], damaged, gzip.compress(gzip.decompress(whole)[:-1]), other, b"<html>"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no complete Fashion-MNIST in .*dataset-fashion-mnist.*--data_path"):
            build_dataset("fashion_mnist", folder, 32)
