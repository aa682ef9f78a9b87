"""An image folder after its crop, in one large file: read instead of decoded, and the same pixels to the bit.

    CACHE/train/images.npy   uint8 (N, 3, H, W)
    CACHE/train/files.json   {class: names of its files, below the folder of the class}, in the order of the images
    CACHE/train/cache.json   the `Index`: what the images were made from, and which blocks of them are finished
    CACHE/val/...            the same, where the image folder has val/ or test/

The index lists a block of images once it is on the disk, so an interrupted cache can be continued. Pixels are read and
written by system calls: with a memory map, a failing disk would kill the process.

Shapes: N images, each uint8 (3, H, W), H = W = img_size.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import features
from torch import Tensor

from util.data.bad_images import check_bad_count
from util.data.images import BadImage, DataError, FileImages
from util.dist.context import DistContext
from util.io import json_hash, provenance, read_json, write_json
from util.log import ImageProgress

INDEX, FILES, IMAGES = "cache.json", "files.json", "images.npy"
VERSION = 2
BLOCK_BYTES = 2**27  # 682 images at 256 x 256
AGAIN = "run the same `python -m tools.prepare_data cache` again"


@dataclass
class Index:
    """The content of cache.json."""

    img_size: int
    num_images: int
    files_hash: str
    decoder: dict  # versions that decide the pixels of a file
    source: str  # the folder of class folders
    made: dict  # date, command, commit, versions
    block_size: int  # in images
    sha256: dict[str, str] = field(default_factory=dict)  # of each finished block
    bad: dict[str, str] = field(default_factory=dict)  # {image: why it cannot be read}; its pixels are zeros
    version: int = VERSION

    @classmethod
    def load(cls, folder: Path) -> "Index":
        content = read_json(folder / INDEX)
        version = content.get("version") if isinstance(content, dict) else "unknown"
        if version != VERSION:
            raise DataError(
                f"the image cache {folder} is damaged or has another layout (version {version}, expected {VERSION}): "
                "make it again with `python -m tools.prepare_data cache`, under another --out."
            )
        return cls(**content)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.num_images, 3, self.img_size, self.img_size

    def blocks(self) -> list[range]:
        """The images of each block."""
        images = range(self.num_images)
        return [images[start : start + self.block_size] for start in images[:: self.block_size]]

    def offset(self, folder: Path) -> int:
        """Return where the pixels start in images.npy. Raises DataError unless its shape is right."""
        with suppress(FileNotFoundError, ValueError):
            images = np.lib.format.open_memmap(folder / IMAGES, mode="r")
            if images.dtype == np.uint8 and images.shape == self.shape:
                return images.offset
        raise DataError(f"{folder / IMAGES} is missing, damaged or not uint8 {self.shape}: copy it again, or {AGAIN}.")

    def damaged_blocks(self, folder: Path) -> list[int]:
        """Return the numbers of the blocks that are not finished, or whose pixels do not have their checksum."""
        damaged, offset, image_bytes = [], self.offset(folder), 3 * self.img_size**2
        with open(folder / IMAGES, "rb") as file:
            for k, block in enumerate(self.blocks()):
                file.seek(offset + block.start * image_bytes)
                finished = str(k) in self.sha256
                if not finished or sha256(file.read(len(block) * image_bytes)).hexdigest() != self.sha256[str(k)]:
                    damaged.append(k)
        return damaged


def find(data_path: str | os.PathLike | None, split: str = "train") -> Path | None:
    """Return the folder of a split where data_path is a cache, or the train folder of one; None for anything else."""
    root = Path(data_path or "").expanduser().absolute()
    for train in (root, root / "train") if data_path else ():
        if os.path.isfile(train / INDEX):
            return train if split == "train" else train.parent / split
    return None


class CachedImages(FileImages):
    """One split of a cache, in the place of the ImageFolderImages that it was made from: same items, order and paths.

    An image that could not be read when the cache was made is a BadImage here too, and known from the start (`bad`).
    DataError for a cache that is unfinished, damaged, or of another size or version. Opening reads no pixels.
    """

    max_workers = 4  # one would do, thousands of images a second at 256 pixels, except for slow disks

    def __init__(self, folder: Path, img_size: int):
        if not os.path.isfile(folder / INDEX):
            raise DataError(f"the image cache {folder.parent} has no {folder.name} images: no {folder / INDEX}.")
        index, files = Index.load(folder), read_json(folder / FILES)
        if index.img_size != img_size:
            raise DataError(f"the image cache {folder} holds images of {index.img_size} pixels, not of {img_size}.")
        if missing := len(index.blocks()) - len(index.sha256):
            raise DataError(f"the image cache {folder} is not finished, {missing} blocks are missing: {AGAIN}.")
        if json_hash(files) != index.files_hash:
            raise DataError(f"{folder / FILES} is missing or damaged: copy it again, or {AGAIN}.")
        labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(names) for names in files.values()])
        paths = [f"{name}/{file}" for name, names in files.items() for file in names]
        super().__init__(img_size, list(files), labels, index.source, paths)
        self.bad = {int(i): reason for i, reason in index.bad.items()}
        self._offset = index.offset(folder)
        self._file = open(folder / IMAGES, "rb", buffering=0)  # noqa: SIM115 (open as long as the data set)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i in self.bad:
            raise BadImage.at(self.path(i), self.bad[i], f"Replace it and {AGAIN}")
        image = torch.empty(3, self.img_size, self.img_size, dtype=torch.uint8)
        try:
            size = os.preadv(self._file.fileno(), [image.numpy()], self._offset + i * image.nbytes)
        except OSError as e:
            raise DataError(f"cannot read {self._file.name}: {e.strerror}. Check the disk, and start again.") from None
        if size != image.nbytes:
            raise DataError(f"{self._file.name} ends within image {i}: it was changed while in use. Copy it again.")
        return image, int(self.labels[i])


def _open_index(images: FileImages, folder: Path) -> Index:
    """Return the index of the cache that was begun in `folder` for these images; begin one where there is none."""
    files = {name: [] for name in images.class_names}
    for i, label in enumerate(images.labels):
        name = images.class_names[label]
        files[name].append(os.path.relpath(images.path(i), images.folder / name))
    decoder = {name: features.version(name) for name in ("pil", "libjpeg_turbo", "zlib")}
    expected = {"img_size": images.img_size, "files_hash": json_hash(files), "decoder": decoder}
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.isfile(folder / INDEX):
        index = Index.load(folder)
        if (found := {name: getattr(index, name) for name in expected}) != expected:
            raise DataError(
                f"{folder} was made from other images or by another decoder: it has {found}, expected {expected}. "
                "Name another folder in --out, or remove this one."
            )
    elif other := [path.name for path in folder.iterdir() if path.suffix != ".tmp"]:
        raise DataError(f"{folder} holds {other[0]} and no image cache: name an empty folder in --out.")
    else:
        block_size = max(1, BLOCK_BYTES // (3 * images.img_size**2))
        made = provenance(torch.device("cpu"))
        index = Index(**expected, num_images=len(images), source="", made=made, block_size=block_size)
    index.source = str(images.folder)
    try:
        index.offset(folder)
        write_json(folder / INDEX, asdict(index))
    except DataError:
        index.sha256 = {}
        write_json(folder / INDEX, asdict(index))  # first: no index may list blocks of an empty file
        np.lib.format.open_memmap(folder / IMAGES, "w+", np.uint8, index.shape)
    write_json(folder / FILES, files)
    return index


def write_cache(images: FileImages, folder: Path, num_threads: int | None = None, skip_bad: bool = False) -> Index:
    """Write the missing and damaged blocks of a cache of an ImageFolderImages, and those with bad images; return its index.

    num_threads decode; None: one for each core. skip_bad: note bad images in the index; False: raise at the first one.
    DataError for a file that cannot be read, a disk that is too small, and a folder that holds something else; OSError
    if writing fails.
    """
    index, image_bytes = _open_index(images, folder), 3 * images.img_size**2
    missing = len(images) * image_bytes - 512 * os.stat(folder / IMAGES).st_blocks  # the file is sparse at first
    if missing > shutil.disk_usage(folder).free:
        raise DataError(f"the disk of {folder} is too small: it needs {missing / 1e9:.3g} GB more. Name another --out.")

    def decode(i: int, out: np.ndarray) -> str:
        """Write the pixels of image i to `out` (3, H, W); return why it is bad, or an empty text."""
        try:
            out[:] = images[i][0].numpy()
        except BadImage as error:
            if not skip_bad:
                raise
            return error.reason
        return ""

    todo = sorted({int(i) // index.block_size for i in index.bad}.union(index.damaged_blocks(folder)))
    index.sha256 = {k: digest for k, digest in index.sha256.items() if int(k) not in todo}
    blocks, offset = [index.blocks()[k] for k in todo], index.offset(folder)
    progress = ImageProgress(f"cache {folder.name}", len(images), len(images) - sum(map(len, blocks)), DistContext())
    threads = max(1, len(os.sched_getaffinity(0)) if num_threads is None else num_threads)
    with open(folder / IMAGES, "r+b") as file, ThreadPoolExecutor(threads) as pool:
        for k, block in zip(todo, blocks, strict=True):
            pixels = np.zeros((len(block), *index.shape[1:]), np.uint8)
            reasons = dict(zip(map(str, block), pool.map(decode, block, pixels), strict=True))
            file.seek(offset + block.start * image_bytes)
            file.write(pixels)
            file.flush()
            os.fsync(file.fileno())
            index.sha256[str(k)] = sha256(pixels).hexdigest()
            index.bad = {i: reason for i, reason in (index.bad | reasons).items() if reason}
            write_json(folder / INDEX, asdict(index))
            check_bad_count(len(index.bad), len(images), images.path(int(next(iter(index.bad), 0))))
            progress.update(progress.done + len(block))
    progress.close()
    return index
