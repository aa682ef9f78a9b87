"""Items of a data set in one array on the disk: crops of images (cache.py) or latents (latents.py).

    FOLDER/<array>      (N, ...), an item for each image
    FOLDER/files.json   {class: names of its files, below the folder of the class}, in the order of the images, or the
                        numbers of its images, in a data set without class folders
    FOLDER/<index>      what the items were made from, and which blocks of them are finished

The index is a dictionary, of which each layout has further entries:

    version, num_images              of the layout of these files; N
    files_hash, source, made         of files.json; folder of class folders or data set; date, command, commit, versions
    block_size, sha256               images in a block; {block: checksum of its items} of each finished block
    bad                              {image: why it cannot be read}; its item is zeros

A block is listed once it is on the disk, so an interrupted command can be continued, on any number of ranks. Items are
read and written by system calls: with a memory map, a failing or full disk would kill the process.

Shapes: N images, n of them in a block.
"""

import hashlib
import math
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data.bad_images import check_bad_count
from util.data.images import BadImage, DataError, FileImages, Images, NoSplitError, Subset
from util.dist.context import DistContext, all_gather, raise_on_all_ranks, run_on_rank0
from util.io import json_hash, read_json, wait_for_file, write_json
from util.log import ImageProgress

FILES = "files.json"
Index = dict[str, Any]
Block = tuple[Tensor, Sequence[str], Index]


@dataclass(frozen=True)
class Layout:
    """The files of one kind of items."""

    task: str  # of tools/prepare_data.py, which writes them
    what: str  # in messages
    index: str
    array: str
    version: int
    item: Callable[[Index], tuple[type, tuple[int, ...]]]  # type and shape of an item on the disk

    @property
    def again(self) -> str:
        return f"run the same `python -m tools.prepare_data {self.task}` again"

    def find(self, data_path: str | os.PathLike | None, split: str = "train") -> Path | None:
        """Return the folder of a split where data_path holds such items, or is the train folder of some; else None."""
        if data_path:
            root = Path(data_path).expanduser().absolute()
            for train in (root, root / "train"):
                if (train / self.index).is_file():
                    return train if split == "train" else train.parent / split
        return None

    def read_index(self, folder: Path) -> Index:
        """Read the index. Raises DataError for another version, and for one that is damaged."""
        index = read_json(folder / self.index)
        version = index.get("version") if isinstance(index, dict) else "unknown"
        if version != self.version:
            raise DataError(
                f"{folder / self.index} is damaged or has another layout (version {version}, expected {self.version}): "
                f"make it again with `python -m tools.prepare_data {self.task}`, under another --out."
            )
        return index

    def open(self, folder: Path, index: Index, mode: str = "r") -> np.memmap:
        """Return the items (N, ...) as on the disk. Raises DataError unless the array fits the index."""
        dtype, item = self.item(index)
        shape = (index["num_images"], *item)
        with suppress(FileNotFoundError, ValueError):
            items = np.lib.format.open_memmap(folder / self.array, mode, dtype, shape)
            if items.dtype == dtype and items.shape == shape:
                return items
        path = folder / self.array
        raise DataError(f"{path} is missing, damaged or not {dtype.__name__} {shape}: copy it again, or {self.again}.")

    def damaged_blocks(self, folder: Path, index: Index) -> list[str]:
        """Return the blocks that are not finished, or whose items do not have the checksum in the index."""
        items, damaged = self.open(folder, index), []
        for k, block in blocks(index).items():
            expected = index["sha256"].get(k)
            if expected is None or hashlib.sha256(items[block.start : block.stop]).hexdigest() != expected:
                damaged.append(k)
        return damaged


def blocks(index: Index) -> dict[str, range]:
    """Return the images of each block."""
    images = range(index["num_images"])
    starts = images[:: index["block_size"]]
    return {str(k): images[start : start + index["block_size"]] for k, start in enumerate(starts)}


def unfinished(index: Index) -> dict[str, range]:
    return {k: block for k, block in blocks(index).items() if k not in index["sha256"]}


# ---- reading ---------------------------------------------------------------------------------------------------------


class StoredImages(FileImages):
    """One split of stored items, in the place of the images that they were made from: same order, labels and paths.

    An image that could not be read when they were made is a BadImage here too, and known from the start (`bad`).
    DataError for items that are unfinished, damaged or of another version. Opening reads none of them.
    """

    max_workers = 4  # one would do, thousands of images a second at 256 pixels, except for slow disks

    def __init__(self, layout: Layout, folder: Path):
        if not (folder / layout.index).is_file():
            raise NoSplitError(
                f"{folder.parent} has no {folder.name} images: {folder / layout.index} is missing. Where the data set "
                f"has them, {layout.again}."
            )
        self.layout, self.index = layout, layout.read_index(folder)
        if missing := unfinished(self.index):
            raise DataError(f"{folder} is not finished, {len(missing)} blocks are missing: {layout.again}.")
        names, labels, paths = self._read_files(folder)
        super().__init__(self.index["img_size"], names, labels, self.index["source"], paths)
        self.bad = {int(i): reason for i, reason in self.index["bad"].items()}
        items = layout.open(folder, self.index)
        self._array, self._offset = folder / layout.array, items.offset
        self._shape, self._dtype = items.shape[1:], items.dtype

    @cached_property
    def _descriptor(self) -> int:
        """Open the array for as long as the data set is used."""
        descriptor = os.open(self._array, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _read_files(self, folder: Path) -> tuple[list[str], np.ndarray, list[str]]:
        """Return the classes, and the labels (N,) and paths of the images, from what `list_files` returned."""
        files = read_json(folder / FILES)
        if json_hash(files) != self.index["files_hash"]:
            raise DataError(f"{folder / FILES} is missing or damaged: copy it again, or {self.layout.again}.")
        labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(names) for names in files.values()])
        paths = [f"{name}/{file}" for name, names in files.items() for file in names]
        numbers = [file for names in files.values() for file in names]
        if isinstance(numbers[0], int):  # the order is not that of the classes
            order = np.argsort(numbers)
            labels, paths = labels[order], [paths[i] for i in order]
        return list(files), labels, paths

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i in self.bad:
            raise BadImage.at(self.path(i), self.bad[i], f"Replace it and {self.layout.again}")
        item = np.empty(self._shape, self._dtype)
        try:
            size = os.preadv(self._descriptor, [item], self._offset + i * item.nbytes)
        except OSError as e:
            raise DataError(f"cannot read {self._array}: {e.strerror}. Check the disk, and start again.") from None
        if size != item.nbytes:
            raise DataError(f"{self._array} ends within image {i}: it was changed while in use. Copy it again.")
        return torch.from_numpy(item), int(self.labels[i])


# ---- writing ---------------------------------------------------------------------------------------------------------


class Readable(Subset):
    """All of `images`, whose item is (image, why it is bad, or ""). With `skip_bad` a bad one is replaced by zeros."""

    def __init__(self, images: Images, skip_bad: bool):
        super().__init__(images, np.arange(len(images)))
        self.skip_bad = skip_bad

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        try:
            return self.whole[i][0], ""
        except BadImage as error:
            if not self.skip_bad:
                raise
            return torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8), error.reason


def list_files(images: Images) -> dict[str, list[str | int]]:
    """Return the files of each class in the order of the images, or the numbers of images not from class folders."""
    files = {name: [] for name in images.class_names}
    in_folders = hasattr(images, "folder") and (np.diff(images.labels) >= 0).all()
    for i, label in enumerate(images.labels):
        name = images.class_names[label]
        files[name].append(os.path.relpath(images.path(i), Path(images.folder, name)) if in_folders else i)
    return files


def source_of(images: Images) -> str:
    return images.source or str(getattr(images, "folder", images.name))


def name_of(images: Images, i: int) -> str:
    return images.path(i) if hasattr(images, "folder") else f"{images.name} {i}"


def _begin(layout: Layout, images: Images, folder: Path, expected: Index, new: Index, block_bytes: int) -> Index:
    """Return the index in `folder`, or a new one, without the blocks that are to be written; make room for these."""
    files = list_files(images)
    expected = {**expected, "files_hash": json_hash(files)}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / layout.index).is_file():
        index = layout.read_index(folder)
        found = {**index, "vae": index.get("vae", {}).get("sha256")}
        if different := [f"{k} {found[k]}, expected {v}" for k, v in expected.items() if found[k] != v]:
            raise DataError(
                f"{folder} was made from other images or settings ({'; '.join(different)}). Name another --out, or "
                "remove this folder."
            )
    elif other := [path.name for path in folder.iterdir() if path.suffix not in (".tmp", ".json")]:
        raise DataError(f"{folder} holds {other[0]} and no {layout.what}: name an empty folder in --out.")
    else:
        index = {"version": layout.version, **expected, "num_images": len(images), **new, "sha256": {}, "bad": {}}
        dtype, shape = layout.item(index)
        index["block_size"] = max(1, block_bytes // (np.dtype(dtype).itemsize * math.prod(shape)))
    index["source"] = source_of(images)
    write_json(folder / FILES, files)
    try:
        todo = layout.damaged_blocks(folder, index)
    except DataError:  # there is no array, or another one
        todo = list(blocks(index))
    todo = {*todo, *(str(int(i) // index["block_size"]) for i in index["bad"])}
    index["sha256"] = {k: digest for k, digest in index["sha256"].items() if k not in todo}
    index["bad"] = {}
    write_json(folder / layout.index, index)  # before an item is changed
    items = layout.open(folder, index, "r" if index["sha256"] else "w+")
    missing = items.nbytes - 512 * os.stat(folder / layout.array).st_blocks  # the file is sparse at first
    if missing > shutil.disk_usage(folder).free:
        raise DataError(f"the disk of {folder} is too small: it needs {missing / 1e9:.3g} GB more. Name another --out.")
    return index


def write_blocks(
    layout: Layout,
    images: Images,
    folder: Path,
    expected: Index,
    new: Index,
    block_bytes: int,
    make: Callable[[list[range], Callable[[int], None]], Iterator[Block]],
    ctx: DistContext,
    summarise: Callable[[Index], Index] = lambda index: {},
) -> tuple[Index, float]:
    """Write the blocks that `folder` lacks: missing, damaged, and with bad images. Return the index, and images/s.

    All ranks call it. Each makes whole blocks, in rounds; then rank 0 writes the index. So the items do not depend on
    the number of ranks.

    Args:
        expected: entries that must be those of an index that is there; of a VAE its checksum.
        new: further entries of a new index.
        block_bytes: of a block, which has at least one image.
        make: called with the blocks of this rank, and a function that is to be told how many more images are done.
            Yields for each block its items (n, ...), why each image is bad, or "", and further entries of the
            index.
        summarise: returns entries of the index that follow from those of all finished blocks.

    Raises:
        DataError: on all ranks, for a folder that holds something else, a disk that fails or is too small, too many bad
            images, and what `make` raises.
    """
    index = run_on_rank0(ctx, lambda: _begin(layout, images, folder, expected, new, block_bytes))
    wait_for_file(folder / layout.array)
    offset, todo = layout.open(folder, index).offset, list(unfinished(index).items())
    done = len(images) - sum(len(block) for _, block in todo)
    progress, start = ImageProgress(f"{layout.task} {folder.name}", len(images), done, ctx), time.perf_counter()
    mine = todo[ctx.rank :: ctx.world_size]

    def advance(count: int) -> None:
        progress.update(min(len(images), progress.done + ctx.world_size * count))

    made = make([block for _, block in mine], advance)

    def write_next(k: str, block: range) -> tuple[str, dict[str, str], Index]:
        """Write a block. Return its name, its bad images and its entries of the index."""
        items, reasons, entries = next(made)
        content = items.view(torch.uint8).numpy()
        try:
            with open(folder / layout.array, "r+b") as file:
                file.seek(offset + block.start * items[0].nbytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise DataError(
                f"cannot write {folder / layout.array}: {e.strerror}. Repair that, and {layout.again}."
            ) from None
        bad = {str(i): reason for i, reason in zip(block, reasons, strict=True) if reason}
        return k, bad, {"sha256": hashlib.sha256(content).hexdigest(), **entries}

    for n in range(-(-len(todo) // ctx.world_size)):
        part = raise_on_all_ranks(ctx, lambda n=n: write_next(*mine[n]) if n < len(mine) else None)
        for k, bad, entries in filter(None, all_gather(part, ctx)):
            for name, value in entries.items():
                index[name][k] = value
            index["bad"] |= bad
        index |= summarise(index)
        if ctx.is_main:
            write_json(folder / layout.index, index)
        first_bad = min(map(int, index["bad"]), default=0)
        check_bad_count(len(index["bad"]), len(images), name_of(images, first_bad))
    progress.close()
    return index, (len(images) - done) / (time.perf_counter() - start)
