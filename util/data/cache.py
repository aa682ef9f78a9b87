"""An image folder after its crop, in one large file: read instead of decoded, and the same pixels to the bit.

    CACHE/train/images.npy   uint8 (N, 3, H, W)
    CACHE/train/files.json   {class: names of its files, below the folder of the class}, in the order of the images
    CACHE/train/cache.json   the `Index`: what the images were made from, and which blocks of them are finished
    CACHE/val/...            the same, where the image folder has val/ or test/

The index lists a block of images once it is on the disk, so an interrupted cache can be continued. Pixels are read and
written by system calls: with a memory map, a failing disk would kill the process.

Shapes: N images, each uint8 (3, H, W), H = W = img_size.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import features
from torch import Tensor

from util.data.bad_images import check_bad_count
from util.data.images import BadImage, DataError, Images
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

    def blocks(self) -> list[range]:
        """The images of each block."""
        starts = range(0, self.num_images, self.block_size)
        return [range(start, min(start + self.block_size, self.num_images)) for start in starts]

    def offset(self, folder: Path, mode: str = "r") -> int:
        """Return where the pixels start in images.npy, which mode "w+" creates; DataError unless its size is right."""
        shape = (self.num_images, 3, self.img_size, self.img_size)
        with suppress(FileNotFoundError, ValueError):
            images = np.lib.format.open_memmap(folder / IMAGES, mode, np.uint8, shape)
            if (images.dtype, images.shape) == (np.uint8, shape):
                return images.offset
        raise DataError(f"{folder / IMAGES} is missing, damaged or not uint8 {shape}: copy it again, or {AGAIN}.")


def find(data_path: str | os.PathLike | None, split: str = "train") -> Path | None:
    """Return the folder of a split where data_path is a cache, or the train folder of one; None for anything else."""
    root = Path(data_path or "").expanduser().absolute()
    for train in (root, root / "train") if data_path else ():
        if os.path.isfile(train / INDEX):
            return train if split == "train" else train.parent / split
    return None


class CachedImages(Images):
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
        super().__init__(img_size, list(files), labels)
        self.source, self.bad = index.source, {int(i): reason for i, reason in index.bad.items()}
        # One array of bytes, not a list of strings: workers that only read it do not copy its pages.
        self._paths = np.array([os.fsencode(f"{name}/{file}") for name, names in files.items() for file in names])
        self._offset = index.offset(folder)
        self._file = open(folder / IMAGES, "rb", buffering=0)  # noqa: SIM115 (open as long as the data set)

    def path(self, i: int) -> str:
        """The file that image i was read from when the cache was made."""
        return os.path.join(self.source, os.fsdecode(bytes(self._paths[i])))

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        i = range(len(self))[i]
        if i in self.bad:
            raise BadImage.at(self.path(i), self.bad[i], f"Replace it and {AGAIN}")
        image = torch.empty(3, self.img_size, self.img_size, dtype=torch.uint8)
        try:
            size = os.preadv(self._file.fileno(), [image.numpy()], self._offset + i * image.nbytes)
        except OSError as e:
            raise DataError(f"cannot read {self._file.name}: {e.strerror}. Check the disk, and start again.") from None
        if size != image.nbytes:
            raise DataError(f"{self._file.name} ends within image {i}: it was changed while in use.")
        return image, int(self.labels[i])


def damaged_blocks(folder: Path, index: Index) -> list[int]:
    """Return the numbers of the blocks that are not finished or do not have the checksum in the index."""
    offset, blocks, image_bytes = index.offset(folder), index.blocks(), 3 * index.img_size**2

    def is_whole(k: int) -> bool:
        if str(k) not in index.sha256:
            return False
        with open(folder / IMAGES, "rb") as file:
            file.seek(offset + blocks[k].start * image_bytes)
            return hashlib.sha256(file.read(len(blocks[k]) * image_bytes)).hexdigest() == index.sha256[str(k)]

    with ThreadPoolExecutor(4) as pool:
        return [k for k, whole in enumerate(pool.map(is_whole, range(len(blocks)))) if not whole]


def _open_index(images: Images, folder: Path) -> Index:
    """Return the index of the cache that was begun in `folder` for these images; begin one where there is none."""
    files = {name: [] for name in images.class_names}
    for i, label in enumerate(images.labels):
        name = images.class_names[label]
        files[name].append(os.path.relpath(images.path(i), images.folder / name))
    decoder = {name: features.version(name) for name in ("pil", "libjpeg_turbo", "zlib")}
    wanted = {"img_size": images.img_size, "files_hash": json_hash(files), "decoder": decoder}
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.isfile(folder / INDEX):
        index = Index.load(folder)
        if (found := {name: getattr(index, name) for name in wanted}) != wanted:
            raise DataError(
                f"{folder} was made from other images or by another decoder: it has {found}, expected {wanted}. "
                "Name another folder in --out, or remove this one."
            )
    elif odd := [p.name for p in folder.iterdir() if p.suffix != ".tmp" and p.name not in (FILES, IMAGES)]:
        raise DataError(f"{folder} holds {odd[0]}, which is no part of an image cache: name an empty folder in --out.")
    else:
        size = max(1, BLOCK_BYTES // (3 * images.img_size**2))
        index = Index(
            **wanted, num_images=len(images), source="", made=provenance(torch.device("cpu")), block_size=size
        )
    try:
        index.offset(folder)
    except DataError:
        index.offset(folder, mode="w+")
        index.sha256.clear()
    index.source = str(images.folder)
    write_json(folder / FILES, files)
    write_json(folder / INDEX, asdict(index))
    return index


def write_cache(images: Images, folder: Path, num_threads: int | None = None, skip_bad: bool = False) -> Index:
    """Write the missing and damaged blocks of a cache of an ImageFolderImages; return its index.

    num_threads decode; None: one for each core. skip_bad: note bad images in the index; False: raise at the first one,
    and decode blocks with bad images again. DataError for a file that cannot be read, a disk that is too small, and a
    folder that holds something else; OSError if writing fails.
    """
    index, image_bytes = _open_index(images, folder), 3 * images.img_size**2
    missing = len(images) * image_bytes - 512 * os.stat(folder / IMAGES).st_blocks  # the file is sparse at first
    if missing > shutil.disk_usage(folder).free:
        raise DataError(f"the disk of {folder} is too small: it needs {missing / 1e9:.3g} GB more. Name another --out.")

    def decode(i: int, out: np.ndarray) -> str:
        try:
            out[:] = images[i][0].numpy()
            return ""
        except BadImage as error:
            if skip_bad:
                return error.reason
            raise

    with_bad = set() if skip_bad else {int(i) // index.block_size for i in index.bad}
    blocks = {k: index.blocks()[k] for k in sorted(with_bad.union(damaged_blocks(folder, index)))}
    index.sha256 = {k: digest for k, digest in index.sha256.items() if int(k) not in blocks}
    done = len(images) - sum(map(len, blocks.values()))
    progress = ImageProgress(f"cache {folder.name}", len(images), done, DistContext())
    threads = max(1, len(os.sched_getaffinity(0)) if num_threads is None else num_threads)
    with open(folder / IMAGES, "r+b") as file, ThreadPoolExecutor(threads) as pool:
        for k, block in blocks.items():
            pixels = np.zeros((len(block), 3, images.img_size, images.img_size), np.uint8)
            reasons = dict(zip(map(str, block), pool.map(decode, block, pixels), strict=True))
            file.seek(index.offset(folder) + block.start * image_bytes)
            file.write(pixels)
            file.flush()
            os.fsync(file.fileno())
            index.sha256[str(k)] = hashlib.sha256(pixels).hexdigest()
            index.bad = {i: reason for i, reason in (index.bad | reasons).items() if reason}
            write_json(folder / INDEX, asdict(index))
            check_bad_count(len(index.bad), len(images), images.path(int(next(iter(index.bad), 0))))
            progress.update(progress.done + len(block))
    progress.close()
    return index
