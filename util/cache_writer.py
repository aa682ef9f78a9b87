"""Writes an image cache (util/image_cache.py) and reads it back.

    ImageFolderImages -> loader processes -> shards, one after the other, each with its checksum -> cache.json

A shard gets its name when it is whole and on the disk, and enters the index after that. So the work can end at any
moment, and the next call does what is missing: at most one shard twice.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from PIL import features
from torch import Tensor

from util.bad_images import FEW, MOST
from util.data import BadImage, DataError, ImageFolderImages, Images, NoSplit
from util.distributed import World
from util.files import replacing
from util.image_cache import FILES, INDEX, MAKE_AGAIN, Index, files_sha256, find, read_files, write_files
from util.loader import build_loader
from util.progress import ImageProgress
from util.provenance import provenance

SHARD_BYTES = 2 * 2**30  # of a file: ImageNet at 256 x 256 makes 118 of them, and one takes minutes at most
BATCH = 16  # images that a loader process hands over at once
READERS = 8  # threads that verify, each a shard
SPLITS = ("train", "val")


def write_cache(
    data_path: str, img_size: int, out: Path, num_workers: int | None = None, on_bad_image: str = "error"
) -> list[str]:
    """Cache the training images below `data_path`, and its validation images where there are any.

    Args:
        num_workers: processes that decode; None: one for each core.
        on_bad_image: "skip" leaves a hole where an image cannot be read, which the index names; "error" stops there,
            and makes those shards again that have holes.

    Returns:
        A sentence for each split.

    Raises:
        DataError: what cannot be read or written, and a folder that holds something else.
    """
    if find(data_path):
        raise DataError(
            f"--data_path {data_path} is an image cache already: name the folder of image files that it was made from."
        )
    found = {}
    for split in SPLITS:  # all are looked at before hours go into the first
        with suppress(NoSplit):
            found[split] = ImageFolderImages(data_path, img_size, split)
    return [_write_split(images, out / split, num_workers, on_bad_image) for split, images in found.items()]


def _write_split(images: ImageFolderImages, folder: Path, num_workers: int | None, on_bad_image: str) -> str:
    try:
        index = _begin(images, folder)
        todo = set(index.faults(folder))
        if on_bad_image == "error":
            todo |= {k for k, name in enumerate(index.names()) if index.shards.get(name, {}).get("bad")}
        if todo:
            _check_decoder(index, folder)
            _say_size(index, folder, todo)
            _fill(images, folder, index, sorted(todo), num_workers, on_bad_image)
    except OSError as e:
        raise DataError(
            f"the cache cannot be written to {folder}: {e.strerror or e}. Make that good, or name another folder in "
            "--out; the same command goes on, and the shards that are whole stay."
        ) from e
    bad = len(index.bad())
    return (
        f"{folder}: {'written' if todo else 'complete already'}, {index.num_images} images of {index.img_size} pixels, "
        f"{_size(index.num_images * index.image_bytes)} in {len(index.names())} shards"
        f"{f'; {bad} of them cannot be read, {INDEX} names them and training needs --on_bad_image skip' if bad else ''}"
    )


def _begin(images: ImageFolderImages, folder: Path) -> Index:
    """The index of a cache that was begun for these images, or of a new one, which is then written."""
    files: dict[str, list[str]] = {name: [] for name in images.class_names}
    for i, label in enumerate(images.labels):
        name = images.class_names[label]
        files[name].append(images.path(i)[len(str(images.folder)) + len(name) + 2 :])
    folder.mkdir(parents=True, exist_ok=True)
    ours = {INDEX, FILES}
    odd = [p.name for p in folder.iterdir() if p.name not in ours and p.suffix not in (".bin", ".tmp")]
    if odd:
        raise DataError(f"{folder} holds {odd[0]}, which is no part of an image cache: name an empty folder in --out.")
    for left in folder.glob(".*.tmp"):
        left.unlink()
    if not (folder / INDEX).exists():
        write_files(folder, files)
        index = Index(
            img_size=images.img_size,
            images_per_shard=max(1, SHARD_BYTES // (3 * images.img_size**2)),
            num_images=len(images),
            class_names=images.class_names,
            source=str(images.folder),
            files_sha256=files_sha256(files),
            made={**provenance(torch.device("cpu")), "decoder": decoder()},
        )
        index.save(folder)
        return index
    index = Index.load(folder)
    if index.img_size != images.img_size:
        raise DataError(
            f"{folder} holds images of {index.img_size} pixels, not of {images.img_size}: name another folder in --out."
        )
    if index.files_sha256 != files_sha256(files):
        raise DataError(
            f"{folder} was made from other files: those below {index.source} as they were on {index.made['date']}, "
            f"{index.num_images} images; below {images.folder} there are {len(images)} now. Name another folder in "
            "--out, or remove this one."
        )
    index.source = str(images.folder)
    if not (folder / FILES).exists():
        write_files(folder, files)
    return index


def decoder() -> dict[str, str | None]:
    """What decides the pixels of a file: another version may round in another way."""
    return {name: features.version(name) for name in ("pil", "libjpeg_turbo", "zlib")}


def _check_decoder(index: Index, folder: Path) -> None:
    """Refuse to mix the pixels of two decoders."""
    if index.shards and index.made["decoder"] != decoder():
        raise DataError(
            f"{folder} was begun with the decoder {index.made['decoder']} and this is {decoder()}, whose pixels may "
            "differ: go on with that one (pillow in requirements.txt), or name another folder in --out."
        )


def _say_size(index: Index, folder: Path, todo: set[int]) -> None:
    """Print what the cache takes, and refuse a disk that has not so much."""
    total = index.num_images * index.image_bytes
    missing = sum(len(index.images(k)) for k in todo) * index.image_bytes
    free = shutil.disk_usage(folder).free
    there = sum((folder / index.names()[k]).stat().st_size for k in todo if (folder / index.names()[k]).exists())
    print(
        f"{folder}: {index.num_images} images of {index.img_size} pixels take {_size(total)} in "
        f"{len(index.names())} shards; {_size(missing)} are to be written, {_size(free)} are free",
        flush=True,
    )
    if missing - there > free:
        raise DataError(
            f"{folder} needs {_size(missing)} more and {_size(free)} are free on its disk: make room, or name a folder "
            "on another disk in --out."
        )


def _size(count: int) -> str:
    """Bytes, in three digits: 768 bytes, 13.8 kB, 252 GB."""
    for unit, one in {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}.items():
        if count >= 0.9995 * one:  # what is rounded to it
            return f"{count / one:.3g} {unit}"
    return f"{count} bytes"


class _Marked(Images):
    """Item i is (image (3, H, W) uint8, ""); with `holes`, for a bad image, (zeros, why it cannot be read)."""

    in_memory = False

    def __init__(self, images: Images, holes: bool):
        super().__init__(images.img_size, images.class_names, images.labels)
        self.images, self.holes = images, holes

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        try:
            return self.images[i][0], ""
        except BadImage as error:
            if not self.holes:
                raise
            return torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8), error.reason


def _fill(
    images: Images, folder: Path, index: Index, todo: Sequence[int], num_workers: int | None, on_bad_image: str
) -> None:
    """Make the shards `todo`."""
    batches = [batch for k in todo for batch in _batches(index.images(k))]
    count = sum(map(len, batches))
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    marked = _Marked(images, holes=on_bad_image == "skip")
    loaded = iter(build_loader(marked, [list(batch) for batch in batches], workers, pin_memory=False))
    progress = ImageProgress(f"cache {folder.name}", index.num_images, index.num_images - count, World())
    for k in todo:
        name, sha256, bad = index.names()[k], hashlib.sha256(), {}
        with replacing(folder / name) as file:
            for batch in _batches(index.images(k)):
                x, reasons = next(loaded)  # (B, 3, H, W)
                file.write(x.numpy())
                sha256.update(x.numpy())
                bad |= {str(i): reason for i, reason in zip(batch, reasons, strict=True) if reason}
                progress.update(progress.done + len(batch))
        index.shards[name] = {"sha256": sha256.hexdigest(), "bad": bad}
        index.save(folder)
        _refuse_too_many(index)
    progress.close()


def _batches(numbers: range) -> Iterator[range]:
    return (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))


def _refuse_too_many(index: Index) -> None:
    """As training does, which would not go on with such a data set."""
    bad = index.bad()
    if len(bad) > max(FEW, MOST * index.num_images):
        raise DataError(
            f"{len(bad)} of {index.num_images} images below {index.source} are bad so far, more than {MOST:.0%}: the "
            "copy of the data set seems to be broken. Make it whole, and start again without --on_bad_image skip."
        )


def verify(cache: Path) -> list[str]:
    """Read all shards of a cache and compare them with their checksums. Returns a sentence for each split.

    Raises:
        DataError: no cache, or the shards that are missing or not what was written.
    """
    try:
        folders = [folder for folder in (cache, *(cache / split for split in SPLITS)) if (folder / INDEX).is_file()]
        if not folders:
            what = "holds no image cache" if cache.is_dir() else "is no folder" if cache.exists() else "does not exist"
            raise DataError(
                f"{cache} {what}. Expected {INDEX} in it, or in {' or '.join(SPLITS)} below it: name the folder that "
                "was --out of `python prepare_data.py cache`."
            )
        return [_verify_split(folder, Index.load(folder)) for folder in folders]
    except OSError as e:
        raise DataError(
            f"{e.filename or cache} cannot be read: {e.strerror or e}. Check the disk and permissions."
        ) from e


def _verify_split(folder: Path, index: Index) -> str:
    read_files(folder, index)
    faults = index.faults(folder)
    whole = [k for k in range(len(index.names())) if k not in faults]
    progress = ImageProgress(f"verify {folder.name}", index.num_images, 0, World())
    with ThreadPoolExecutor(READERS) as pool:
        for k, fault in zip(whole, pool.map(partial(_fault, folder, index), whole), strict=True):
            if fault:
                faults[k] = fault
            progress.update(progress.done + len(index.images(k)))
    progress.close()
    if faults:
        said = [faults[k] for k in sorted(faults)]
        raise DataError(
            f"{'; '.join(said[:5])}{f'; and {len(said) - 5} more' if said[5:] else ''}. Remove what is damaged and "
            f"copy it again, or {MAKE_AGAIN}."
        )
    return f"{folder}: {index.num_images} images in {len(index.names())} shards are what was written"


def _fault(folder: Path, index: Index, k: int) -> str | None:
    """What is wrong with the content of shard k."""
    path = folder / index.names()[k]
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        return f"{path} cannot be read: {e.strerror or e} (check the disk and permissions)"
    if found != index.shards[path.name]["sha256"]:
        return f"{path} is damaged: it has another SHA-256 than when it was written"
    return None
