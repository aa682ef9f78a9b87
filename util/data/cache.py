"""Images of files after their crop, in one large file: read instead of decoded, and the same pixels to the bit.

    CACHE/train/images.npy   uint8 (N, 3, H, W)
    CACHE/train/files.json   {class: names of its files, below the folder of the class}, in the order of the images, or
                             the numbers of its images, in a data set without class folders
    CACHE/train/cache.json   the index: what the images were made from, and which blocks of them are finished
    CACHE/val/...            the same, where there are validation images

The index is a dictionary:

    version, img_size, num_images    layout of these files; pixels per side; N
    files_hash, source, made         of files.json; folder of class folders or data set; date, command, commit, versions
    decoder                          versions of the libraries that decide the pixels of a file
    block_size, sha256               images in a block; {block: checksum of its pixels} of each finished block
    bad                              {image: why it cannot be read}; its pixels are zeros

A block is listed once it is on the disk, so an interrupted cache can be continued. Items are read and blocks written by
system calls: with a memory map, a failing or full disk would kill the process.

Shapes: N images, each uint8 (3, H, W), H = W = img_size.
"""

import hashlib
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import features
from torch import Tensor

from util.data.bad_images import check_bad_count
from util.data.images import BadImage, DataError, FileImages, Images, NoSplitError
from util.dist.context import DistContext
from util.io import json_hash, provenance, read_json, write_json
from util.log import ImageProgress

INDEX, FILES, IMAGES = "cache.json", "files.json", "images.npy"
VERSION = 2
BLOCK_BYTES = 2**27  # 682 images at 256 x 256
AGAIN = "run the same `python -m tools.prepare_data cache` again"


def find(data_path: str | os.PathLike | None, split: str = "train", index: str = INDEX) -> Path | None:
    """Return the folder of a split where data_path is a cache, or the train folder of one; None for anything else.

    `index` is the file that tells a cache: latents (util/data/latents.py) have another one.
    """
    if data_path:
        root = Path(data_path).expanduser().absolute()
        for train in (root, root / "train"):
            if os.path.isfile(train / index):
                return train if split == "train" else train.parent / split
    return None


def read_index(folder: Path) -> dict:
    index = read_json(folder / INDEX)
    version = index.get("version") if isinstance(index, dict) else "unknown"
    if version != VERSION:
        raise DataError(
            f"the image cache {folder} is damaged or has another layout (version {version}, expected {VERSION}): "
            "make it again with `python -m tools.prepare_data cache`, under another --out."
        )
    return index


def blocks(index: dict) -> dict[str, range]:
    """Return the images of each block."""
    images = range(index["num_images"])
    starts = images[:: index["block_size"]]
    return {str(k): images[start : start + index["block_size"]] for k, start in enumerate(starts)}


def list_files(images: Images) -> dict[str, list[str | int]]:
    """Return the files of each class in the order of the images, or the numbers of images not from class folders."""
    files = {name: [] for name in images.class_names}
    in_folders = hasattr(images, "folder") and (np.diff(images.labels) >= 0).all()
    for i, label in enumerate(images.labels):
        name = images.class_names[label]
        files[name].append(os.path.relpath(images.path(i), Path(images.folder, name)) if in_folders else i)
    return files


def read_files(folder: Path, index: dict, again: str) -> tuple[list[str], np.ndarray, list[str]]:
    """Return the classes, and the labels (N,) and paths of the images, from what `list_files` returned."""
    files = read_json(folder / FILES)
    if json_hash(files) != index["files_hash"]:
        raise DataError(f"{folder / FILES} is missing or damaged: copy it again, or {again}.")
    labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(names) for names in files.values()])
    paths = [f"{name}/{file}" for name, names in files.items() for file in names]
    numbers = [file for names in files.values() for file in names]
    in_order = isinstance(numbers[0], int)
    if len(numbers) != index["num_images"] or (in_order and sorted(numbers) != list(range(len(numbers)))):
        raise DataError(f"{folder / FILES} does not fit the index: copy it again, or {again}.")
    if in_order:  # the order is not that of the classes
        order = np.argsort(numbers)
        labels, paths = labels[order], [paths[i] for i in order]
    return list(files), labels, paths


def open_pixels(folder: Path, index: dict, mode: str = "r") -> np.memmap:
    """Return the pixels (N, 3, H, W). Raises DataError unless images.npy fits the index."""
    shape = (index["num_images"], 3, index["img_size"], index["img_size"])
    with suppress(FileNotFoundError, ValueError):
        pixels = np.lib.format.open_memmap(folder / IMAGES, mode, np.uint8, shape)
        if pixels.dtype == np.uint8 and pixels.shape == shape:
            return pixels
    raise DataError(f"{folder / IMAGES} is missing, damaged or not uint8 {shape}: copy it again, or {AGAIN}.")


def damaged_blocks(folder: Path, index: dict) -> list[str]:
    """Return the blocks that are not finished, or whose pixels do not have the checksum in the index."""
    pixels, damaged = open_pixels(folder, index), []
    for k, block in blocks(index).items():
        expected = index["sha256"].get(k)
        if expected is None or hashlib.sha256(pixels[block.start : block.stop]).hexdigest() != expected:
            damaged.append(k)
    return damaged


def read_item(file: io.FileIO, offset: int, i: int, item: Tensor) -> None:
    """Fill a tensor with item i of a file of such items after `offset` bytes. DataError if it cannot be read."""
    try:
        size = os.preadv(file.fileno(), [item.view(torch.uint8).numpy()], offset + i * item.nbytes)
    except OSError as e:
        raise DataError(f"cannot read {file.name}: {e.strerror}. Check the disk, and start again.") from None
    if size != item.nbytes:
        raise DataError(f"{file.name} ends within image {i}: it was changed while in use. Copy it again.")


class CachedImages(FileImages):
    """One split of a cache, in the place of the images that it was made from: same items and order.

    An image that could not be read when the cache was made is a BadImage here too, and known from the start (`bad`).
    DataError for a cache that is unfinished, damaged, or of another size or version. Opening reads no pixels.
    """

    max_workers = 4  # one would do, thousands of images a second at 256 pixels, except for slow disks

    def __init__(self, folder: Path, img_size: int):
        if not os.path.isfile(folder / INDEX):
            raise NoSplitError(
                f"the image cache {folder.parent} has no {folder.name} images: {folder / INDEX} is missing. Where the "
                f"image folder has them, {AGAIN}."
            )
        index = read_index(folder)
        if index["img_size"] != img_size:
            raise DataError(
                f"the image cache {folder} holds images of {index['img_size']} pixels, not of {img_size}. Make another "
                "cache, with that --img_size."
            )
        if missing := len(blocks(index)) - len(index["sha256"]):
            raise DataError(f"the image cache {folder} is not finished, {missing} blocks are missing: {AGAIN}.")
        names, labels, paths = read_files(folder, index, AGAIN)
        super().__init__(img_size, names, labels, index["source"], paths)
        self.bad = {int(i): reason for i, reason in index["bad"].items()}
        self._offset = open_pixels(folder, index).offset
        self._file = open(folder / IMAGES, "rb", buffering=0)  # noqa: SIM115 (open as long as the data set)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i in self.bad:
            raise BadImage.at(self.path(i), self.bad[i], f"Replace it and {AGAIN}")
        image = torch.empty(3, self.img_size, self.img_size, dtype=torch.uint8)
        read_item(self._file, self._offset, i, image)
        return image, int(self.labels[i])


def _begin(images: Images, folder: Path) -> dict:
    """Return the index of the cache that was begun in `folder` for these images; begin one where there is none."""
    files = list_files(images)
    decoder = {name: features.version(name) for name in ("pil", "libjpeg_turbo", "zlib")}
    expected = {"img_size": images.img_size, "files_hash": json_hash(files), "decoder": decoder}
    if images.source:
        expected["source"] = images.source
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.isfile(folder / INDEX):
        index = read_index(folder)
        if (found := {name: index[name] for name in expected}) != expected:
            raise DataError(
                f"{folder} was made from other images or by another decoder: it has {found}, expected {expected}. "
                "Name another folder in --out, or remove this one."
            )
    elif other := [path.name for path in folder.iterdir() if path.suffix not in (".tmp", ".json")]:
        raise DataError(f"{folder} holds {other[0]} and no image cache: name an empty folder in --out.")
    else:
        index = {**expected, "num_images": len(images), "version": VERSION, "sha256": {}, "bad": {}}
        index["block_size"] = max(1, BLOCK_BYTES // (3 * images.img_size**2))
        index["made"] = provenance(torch.device("cpu"))
    index["source"] = images.source or str(images.folder)
    write_json(folder / FILES, files)
    return index


def write_cache(images: Images, folder: Path, num_threads: int | None = None, skip_bad: bool = False) -> dict:
    """Write what a cache of images lacks: missing, damaged and bad images. Return its index.

    num_threads decode; None: one for each core. skip_bad: note bad images in the index; False: raise at the first one.
    DataError for a file that cannot be read, a disk that is too small, and a folder that holds something else; OSError
    if writing fails.
    """
    index = _begin(images, folder)
    try:
        damaged = damaged_blocks(folder, index)
    except DataError:  # there is no images.npy, or another one
        damaged = list(blocks(index))
    with_bad = {str(int(i) // index["block_size"]) for i in index["bad"]}
    todo = {k: block for k, block in blocks(index).items() if k in with_bad or k in damaged}
    index["sha256"] = {k: digest for k, digest in index["sha256"].items() if k not in todo}
    write_json(folder / INDEX, index)  # before a pixel is changed
    pixels = open_pixels(folder, index, "r" if index["sha256"] else "w+")
    missing = pixels.nbytes - 512 * os.stat(folder / IMAGES).st_blocks  # the file is sparse at first
    if missing > shutil.disk_usage(folder).free:
        raise DataError(f"the disk of {folder} is too small: it needs {missing / 1e9:.3g} GB more. Name another --out.")

    def decode(i: int) -> np.ndarray:
        index["bad"].pop(str(i), None)
        try:
            return images[i][0].numpy()
        except BadImage as error:
            if not skip_bad:
                raise
            index["bad"][str(i)] = error.reason
            return np.zeros(pixels.shape[1:], np.uint8)

    done = len(images) - sum(map(len, todo.values()))
    progress = ImageProgress(f"cache {folder.name}", len(images), done, DistContext())
    threads = num_threads or len(os.sched_getaffinity(0))
    with open(folder / IMAGES, "r+b") as file, ThreadPoolExecutor(threads) as pool:
        for k, block in todo.items():
            crops = np.stack(list(pool.map(decode, block)))
            file.seek(pixels.offset + block.start * crops[0].nbytes)
            file.write(crops)
            file.flush()
            os.fsync(file.fileno())
            index["sha256"][k] = hashlib.sha256(crops).hexdigest()
            write_json(folder / INDEX, index)
            first_bad = min(map(int, index["bad"]), default=0)
            check_bad_count(len(index["bad"]), len(images), images.path(first_bad))
            progress.update(progress.done + len(block))
    progress.close()
    return index
