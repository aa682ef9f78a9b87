"""Features of generated images on disk, block by block, so that an evaluation goes on where it was interrupted.

The images 0 .. N - 1 are cut into blocks of BLOCK, whatever batch size and number of processes. A folder belongs to
one fingerprint, which holds all that decides its features; its name carries the digest of it.

    <folder>/fingerprint.json
    <folder>/block-000000.npz        {stream: float32 (rows of the block, F)}; whole or not there

Shapes: N images in all, F features of one stream.
"""

import hashlib
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError
from util.images import numbered, write_numbered
from util.provenance import write_json
from util.sharded_checkpoint import SETTINGS

BLOCK = 64  # images; 50,000 are 782 blocks, so that even 64 processes are at most 6% apart
FINGERPRINT = "fingerprint.json"
PATIENCE = 60.0  # seconds until a file that another process wrote must be seen on a shared file system


def digest(content: Any) -> str:
    """Ten hexadecimal digits that differ wherever two JSON values differ."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def weights_identity(path: Path) -> str:
    """A SHA-256 that changes with any content of a checkpoint: of its zip directory's names, sizes and CRC-32s.

    A file in torch's old format, which is no zip, is read as a whole; of shards that which holds their checksums.
    """
    path = path / SETTINGS if path.is_dir() else path
    stat = path.stat()
    return _weights_identity(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _weights_identity(path: Path, mtime: int, size: int) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = [(e.filename.partition("/")[2], e.file_size, e.CRC) for e in archive.infolist()]
        return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shards:
    """The blocks of one evaluation.

    Args:
        folder: where they are; it is made by `prepare`.
        fingerprint: {"images": what decides the images, "features": what decides their features}, ready for JSON.
        num_images: N.
        streams: {stream: F}.
        images: folder that PNGs of the images go to as well, or None.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        num_images: int,
        streams: Mapping[str, int],
        images: Path | None = None,
    ):
        self.folder, self.fingerprint, self.num_images = folder, dict(fingerprint), num_images
        self.streams, self.images = dict(streams), images

    def __len__(self) -> int:
        return -(-self.num_images // BLOCK)

    def block(self, b: int) -> range:
        """Indices of the images in block b."""
        return range(b * BLOCK, min((b + 1) * BLOCK, self.num_images))

    def path(self, b: int) -> Path:
        return self.folder / f"block-{b:06d}.npz"

    def prepare(self) -> tuple[list[int], list[str]]:
        """Make or take over the folders. For one process, before the others call `seen`.

        Returns:
            The blocks that have to be made, and sentences on what was found.
        Raises:
            UserError: a folder that cannot be written; PNGs of other images in the folder for them.
        """
        notes = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if _read_json(self.folder / FINGERPRINT) != self.fingerprint:
                if any(self.folder.glob("block-*.npz")):
                    notes.append(f"{self.folder} does not say what its features are of: all are made again")
                    shutil.rmtree(self.folder)
                    self.folder.mkdir()
                write_json(self.folder / FINGERPRINT, self.fingerprint)
            self._prepare_images()
            found = set(self.folder.iterdir())
            pictures = {entry.name for entry in os.scandir(self.images)} if self.images else set()
        except OSError as error:
            raise UserError(f"the features of the evaluation cannot be written: {error}") from error
        missing = []
        for b in range(len(self)):
            if self.path(b) in found:
                try:
                    self.read(b)
                except UserError as error:
                    notes.append(f"{error}; its {len(self.block(b))} images are made again")
                else:
                    if self.images is None or all(numbered(self.images, i).name in pictures for i in self.block(b)):
                        continue
            missing.append(b)
        if len(missing) < len(self):
            left = sum(len(self.block(b)) for b in missing)
            notes.append(f"features of {self.num_images - left} of {self.num_images} images are there: going on")
        return missing, notes

    def _prepare_images(self) -> None:
        """PNGs are taken over where the same settings made them, or none are there."""
        if self.images is None:
            return
        self.images.mkdir(parents=True, exist_ok=True)
        known = self.images / FINGERPRINT
        if _read_json(known) == self.fingerprint["images"]:
            return
        if any(self.images.glob("*.png")):
            raise UserError(
                f"--save_images {self.images}: there are PNGs of other weights or settings in it; name another folder"
            )
        write_json(known, self.fingerprint["images"])

    def seen(self) -> None:
        """What `prepare` made is there for this process too.

        Raises:
            UserError: it is not, so that this process's features would not be found.
        """
        for path in [self.folder / FINGERPRINT] + ([self.images / FINGERPRINT] if self.images else []):
            if not appears(path):
                raise UserError(f"{path.parent} must be a folder that all processes share: one of them does not see it")

    def write(self, b: int, features: Mapping[str, Tensor], images: Tensor | None = None) -> None:
        """Block b: its PNGs first, since the shard says that all of it is there.

        Args:
            features: {stream: (rows, F)} on the CPU.
            images: uint8 (rows, 3, H, W), where a folder for PNGs was named.
        """
        path = self.path(b)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        if not all(bool(features[stream].isfinite().all()) for stream in self.streams):
            of = self.block(b)
            raise UserError(f"features of the images {of.start} to {of.stop - 1} are not finite: none are kept of them")
        try:
            if self.images is not None:
                write_numbered(images, self.block(b).start, self.images)
            with open(aside, "wb") as file:
                np.savez(file, **{stream: features[stream].numpy() for stream in self.streams})
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            raise UserError(f"the features of the evaluation cannot be written to {path}: {error}") from error

    def read(self, b: int) -> dict[str, Tensor]:
        """{stream: float32 (rows, F)} of block b. Raises UserError if its shard is not there or damaged."""
        path, rows = self.path(b), len(self.block(b))
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {stream: file[stream] for stream in self.streams}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is damaged ({reason})") from error
        for stream, array in arrays.items():
            if array.dtype != np.float32 or array.shape != (rows, self.streams[stream]):
                raise UserError(f"{path} is damaged ({stream} is {array.dtype} {array.shape})")
        return {stream: torch.from_numpy(array) for stream, array in arrays.items()}

    def read_all(self) -> dict[str, Tensor]:
        """{stream: float32 (N, F)}, row i that of image i. Raises UserError if a block is not there or damaged."""
        out = {stream: torch.empty(self.num_images, width) for stream, width in self.streams.items()}
        for b in range(len(self)):
            if not appears(self.path(b)):
                raise UserError(
                    f"{self.path(b)} is not there: start the evaluation again, and it makes what is missing"
                )
            rows = self.block(b)
            for stream, part in self.read(b).items():
                out[stream][rows.start : rows.stop] = part
        return out

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def appears(path: Path) -> bool:
    """Wait for a file that another process has written: shared file systems show it late."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
