"""The latents of a data set, encoded once by a VAE, for training in its latent space. util/data/encode.py writes them.

    OUT/train/latents.npy   float16, or bfloat16 as uint16 (numpy has none), (N, V, S, C, h, w)
    OUT/train/files.json    {class: names of its files, or numbers of its images in a data set without files}
    OUT/train/latents.json  the index: what the latents were made from, and which blocks of them are finished
    OUT/val/...             the same, where the data set has validation images

The index is a dictionary:

    version, img_size, num_images    layout of these files; pixels per side of the images; N
    channels, size, views            C; h = w; V
    content, dtype                   "moments" (mean, std) or "samples" (one draw); float16 or bfloat16
    dataset, class_num, files_hash   name of the data set; its classes; hash of files.json
    source, made                     the folder of class folders or the data set; date, command, commit and versions
    vae                              name, sha256, channels, factor, scaling_factor, shift_factor
    block_size, sha256, sums         images in a block; its checksum, and [count, sum, sum of squares] of z, by block
    bad                              {image: why it cannot be read}; its latents are zeros
    statistics                       {mean, std} of z = mean + std * noise, for each channel, over images and views

A block is listed once it is on the disk, so that an interrupted command can be continued, on any number of ranks.

Shapes: N images in V views: as it is, then mirrored if V = 2. S = 2 for moments, 1 for samples. A batch has B images.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoiser import RandomNumbers
from util.data import cache
from util.data.cache import FILES, blocks, read_files, read_item
from util.data.images import BadImage, DataError, FileImages, NoSplitError
from util.io import read_json

INDEX, LATENTS = "latents.json", "latents.npy"
VERSION = 1
CONTENTS = {"moments": 2, "samples": 1}  # S
DTYPES = {"float16": (torch.float16, np.float16), "bfloat16": (torch.bfloat16, np.uint16)}  # in torch, on the disk
AGAIN = "run the same `python -m tools.prepare_data latents` again"


def find(data_path: str | os.PathLike | None, split: str = "train") -> Path | None:
    """Return the folder of a split where data_path holds latents, or is the train folder of some; else None."""
    return cache.find(data_path, split, INDEX)


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of latents. Raises DataError for another version, and for one that is damaged."""
    index = read_json(folder / INDEX)
    version = index.get("version") if isinstance(index, dict) else "unknown"
    try:
        sizes = [index[name] for name in ("img_size", "num_images", "channels", "size", "class_num", "block_size")]
        whole = all(isinstance(n, int) and n > 0 for n in sizes) and index["views"] in (1, 2)
        whole &= index["content"] in CONTENTS and index["dtype"] in DTYPES and {"statistics", "bad"} <= index.keys()
        whole &= {"name", "sha256", "factor"} <= index["vae"].keys() and index["sha256"].keys() <= blocks(index).keys()
    except (KeyError, TypeError, AttributeError):
        whole = False
    if version != VERSION or not whole:
        raise DataError(
            f"the latents {folder} are damaged or have another layout (version {version}, expected {VERSION}): make "
            "them again with `python -m tools.prepare_data latents`, under another --out."
        )
    return index


def shape(index: dict[str, Any]) -> tuple[int, ...]:
    """Return (V, S, C, h, w)."""
    return index["views"], CONTENTS[index["content"]], index["channels"], index["size"], index["size"]


def open_latents(folder: Path, index: dict[str, Any], mode: str = "r") -> np.memmap:
    """Return the latents (N, V, S, C, h, w) as on the disk. Raises DataError unless latents.npy fits the index."""
    expected, dtype = (index["num_images"], *shape(index)), DTYPES[index["dtype"]][1]
    with suppress(FileNotFoundError, ValueError):
        latents = np.lib.format.open_memmap(folder / LATENTS, mode, dtype, expected)
        if latents.dtype == dtype and latents.shape == expected:
            return latents
    raise DataError(f"{folder / LATENTS} is missing, damaged or not {dtype.__name__} {expected}: copy it, or {AGAIN}.")


def damaged_blocks(folder: Path, index: dict[str, Any]) -> list[str]:
    """Return the blocks that are not finished, or whose latents do not have the checksum in the index."""
    latents, found = open_latents(folder, index), index["sha256"]
    return [
        k
        for k, block in blocks(index).items()
        if k not in found or hashlib.sha256(latents[block.start : block.stop]).hexdigest() != found[k]
    ]


class LatentImages(FileImages):
    """One split of latents: item i is (latents (V, S, C, h, w) as they are stored, label int).

    To the network they are images of h = `img_size` pixels with C = `channels`; those they were made from had `pixels`
    per side. DataError for latents that are unfinished, damaged or of another version. Opening reads no latents.
    """

    max_workers = 4  # as of CachedImages

    def __init__(self, folder: Path):
        if not os.path.isfile(folder / INDEX):
            raise NoSplitError(
                f"the latents {folder.parent} have no {folder.name} images: {folder / INDEX} is missing."
            )
        index = read_index(folder)
        if missing := len(blocks(index)) - len(index["sha256"]):
            raise DataError(f"the latents {folder} are not finished, {missing} blocks are missing: {AGAIN}.")
        names, labels, paths = read_files(folder, index, AGAIN)
        if not np.isfinite([*index["statistics"]["mean"], *index["statistics"]["std"]]).all():
            raise DataError(f"the statistics of the latents {folder} are not finite: remove the folder, and {AGAIN}.")
        if len(names) != index["class_num"]:
            raise DataError(f"{folder / FILES} does not fit the index: copy it again, or {AGAIN}.")
        super().__init__(index["size"], names, labels, index["source"], paths)
        self.bad = {int(i): reason for i, reason in index["bad"].items()}
        self.channels, self.views, self.pixels = index["channels"], index["views"], index["img_size"]
        self.content, self.vae, self.statistics = index["content"], index["vae"], index["statistics"]
        self._shape, self._dtype = shape(index), DTYPES[index["dtype"]][0]
        self._offset = open_latents(folder, index).offset
        self._file = open(folder / LATENTS, "rb", buffering=0)  # noqa: SIM115 (open as long as the data set)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i in self.bad:
            raise BadImage.at(self.path(i), self.bad[i], f"Replace it and {AGAIN}")
        latents = torch.empty(self._shape, dtype=self._dtype)
        read_item(self._file, self._offset, i, latents)
        return latents, int(self.labels[i])

    def prepare(self, batch: Tensor, rng: RandomNumbers | None = None, flip: bool = False) -> Tensor:
        """Return z = mean + std * noise of a batch (B, V, S, C, h, w), on its device: float32 (B, C, h, w).

        With `flip` a random half is of the mirrored images: those that `random_flip` would mirror. Nothing is random
        without `rng`: z is the mean of the first view. DataError for `flip` where there is one view.
        """
        if flip and self.views == 1:
            raise DataError("these latents have no mirrored images: train with --no-flip, or make them without it.")
        chosen = batch[:, 0]  # (B, S, C, h, w)
        if flip and rng is not None:
            mirrored = rng.uniform("flip")[:, 0] < 0.5
            chosen = torch.where(mirrored[:, None, None, None, None], batch[:, 1], chosen)
        mean = chosen[:, 0].float()
        if rng is None or self.content == "samples":
            return mean
        return mean + chosen[:, 1].float() * rng.normal("latent", mean[0].numel()).view_as(mean)
