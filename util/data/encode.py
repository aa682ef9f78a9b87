"""Writes the latents of a data set (util/data/latents.py has their layout): images -> VAE -> blocks on the disk.

A block is listed in the index once it is on the disk, so that an interrupted command can be continued, on any number of
ranks, which all write into the same folder.

Shapes: a batch has B images uint8 (B, 3, H, W); latents (B, V, S, C, h, w) as in util/data/latents.py.
"""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from util.data.bad_images import check_bad_count
from util.data.cache import FILES, blocks, list_files
from util.data.images import BadImage, DataError, Images
from util.data.latents import AGAIN, DTYPES, INDEX, LATENTS, VERSION, damaged_blocks, open_latents, read_index, shape
from util.data.loader import ImageLoader
from util.data.vae import Vae
from util.dist.context import DistContext, raise_on_all_ranks, run_on_rank0
from util.io import json_hash, provenance, wait_for_file, write_json
from util.log import ImageProgress
from util.rng import CounterRNG

BLOCK_BYTES = 2**25  # 1024 images of 256 pixels, for a factor of 8 and 4 channels
SEED = 0  # of the draws of "samples"


class _Readable(Images):
    """Images whose item is (image, why it is bad, or ""). With `skip_bad` zeros are in the place of a bad one."""

    def __init__(self, images: Images, skip_bad: bool):
        self.images, self.labels, self.skip_bad = images, images.labels, skip_bad
        self.img_size, self.in_memory, self.max_workers = images.img_size, images.in_memory, images.max_workers

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        try:
            return self.images[i][0], ""
        except BadImage as error:
            if not self.skip_bad:
                raise
            return torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8), error.reason


def _name(images: Images, i: int) -> str:
    return images.path(i) if hasattr(images, "folder") else f"{images.name} {i}"


def _begin(images: Images, vae: Vae, folder: Path, content: str, dtype: str, flip: bool) -> dict[str, Any]:
    """Return the index in `folder`, without blocks to write; begin one where there is none. Make room for latents."""
    if images.img_size % vae.factor:
        raise DataError(
            f"--img_size {images.img_size} is no multiple of {vae.factor}, the factor of the VAE {vae.name}."
        )
    files = list_files(images)
    expected = {
        "img_size": images.img_size,
        "views": 1 + flip,
        "content": content,
        "dtype": dtype,
        "source": images.source or str(getattr(images, "folder", images.name)),
        "files_hash": json_hash(files),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.isfile(folder / INDEX):
        index = read_index(folder)
        found, wanted = index | {"vae": index["vae"]["sha256"]}, expected | {"vae": vae.sha256}
        if different := [f"{k} {found[k]}, expected {v}" for k, v in wanted.items() if found[k] != v]:
            raise DataError(
                f"{folder} has other latents ({'; '.join(different)}). Name another --out, or remove this folder."
            )
    elif other := [path.name for path in folder.iterdir() if path.suffix not in (".tmp", ".json")]:
        raise DataError(f"{folder} holds {other[0]} and no latents: name an empty folder in --out.")
    else:
        index = {"version": VERSION, **expected, "num_images": len(images), "class_num": images.num_classes}
        index |= {"dataset": images.full_name, "channels": vae.channels, "size": images.img_size // vae.factor}
        index |= {"vae": vae.describe(), "made": provenance(vae.model.device)}
        index["block_size"] = max(1, BLOCK_BYTES // (2 * math.prod(shape(index))))
        index |= {"sha256": {}, "sums": {}, "bad": {}, "statistics": None}
    write_json(folder / FILES, files)
    try:
        todo = damaged_blocks(folder, index)
    except DataError:  # there is no latents.npy, or another one
        todo = list(blocks(index))
    todo = {*todo, *(str(int(i) // index["block_size"]) for i in index["bad"])}
    for name in ("sha256", "sums"):
        index[name] = {k: value for k, value in index[name].items() if k not in todo}
    index["bad"] = {}
    write_json(folder / INDEX, index)  # before latents are changed
    latents = open_latents(folder, index, "r" if index["sha256"] else "w+")
    missing = latents.nbytes - 512 * os.stat(folder / LATENTS).st_blocks  # the file is sparse at first
    if missing > shutil.disk_usage(folder).free:
        raise DataError(f"the disk of {folder} is too small: it needs {missing / 1e9:.3g} GB more. Name another --out.")
    return index


def encode_views(vae: Vae, x: Tensor, numbers: list[int], index: dict[str, Any]) -> Tensor:
    """Return the latents (B, V, S, C, h, w), in the type of the index, of the images x uint8 (B, 3, H, W) `numbers`."""
    x = x.to(vae.model.device, non_blocking=True)
    views = [vae.encode(view) for view in (x, x.flip(-1))[: index["views"]]]
    mean, std = (torch.stack(parts, dim=1) for parts in zip(*views, strict=True))  # (B, V, C, h, w)
    if index["content"] == "samples":
        rng = CounterRNG(SEED, 0, torch.tensor(numbers, device=mean.device))
        latents = (mean + std * rng.normal("latent", mean[0].numel()).view_as(mean))[:, :, None]
    else:
        latents = torch.stack([mean, std], dim=2)
    return latents.to(DTYPES[index["dtype"]][0]).cpu()


def sums(latents: Tensor) -> tuple[int, list[float], list[float]]:
    """Return count, sum and sum of squares of z, for each channel, over latents (B, V, S, C, h, w) as stored."""
    mean, std = latents[:, :, 0].double(), latents[:, :, 1:].double()
    squares = mean.square() + std.square().sum(2)  # E[z^2] = mean^2 + std^2
    return mean[:, :, 0].numel(), *(part.sum((0, 1, 3, 4)).tolist() for part in (mean, squares))


def statistics(index: dict[str, Any]) -> dict[str, list[float]]:
    """Return mean and std of each channel over the finished blocks."""
    parts = [index["sums"][k] for k in blocks(index) if k in index["sums"]]  # in the same order on any number of ranks
    total, square = (np.array([part[n] for part in parts]).sum(0) for n in (1, 2))  # (C,)
    count = max(1, sum(part[0] for part in parts))
    mean = total / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square / count - mean**2, 0)).tolist()}


def _encode_block(
    batches: Iterator, images: Images, vae: Vae, index: dict[str, Any], block: range, batch_size: int
) -> tuple[Tensor, dict[str, str]]:
    """Return the latents (n, V, S, C, h, w) of a block, as stored, and its bad images. Raises DataError."""
    parts, bad = [], {}
    for first in block[::batch_size]:
        x, reasons = next(batches)
        numbers = range(first, first + len(x))
        part = encode_views(vae, x, list(numbers), index)
        holes = [j for j, reason in enumerate(reasons) if reason]
        part[holes] = 0
        bad |= {str(numbers[j]): reasons[j] for j in holes}
        if wrong := (~part.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
            raise DataError(
                f"the latents of {_name(images, numbers[wrong[0]])} are not finite in {index['dtype']}. bfloat16 has a "
                "larger range than float16; if that does not help, the VAE is damaged."
            )
        parts.append(part)
    return torch.cat(parts), bad


def _write_block(folder: Path, offset: int, block: range, latents: Tensor) -> str:
    """Write latents (n, V, S, C, h, w) to the disk; return their checksum. Raises DataError."""
    content = latents.view(torch.uint8).numpy()
    try:
        with open(folder / LATENTS, "r+b") as file:
            file.seek(offset + block.start * latents[0].nbytes)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"cannot write {folder / LATENTS}: {error.strerror}. Repair that, and {AGAIN}.") from None
    return hashlib.sha256(content).hexdigest()


def write_latents(
    images: Images,
    vae: Vae,
    folder: Path,
    ctx: DistContext,
    batch_size: int = 64,
    num_workers: int | None = None,
    content: str = "moments",
    dtype: str = "float16",
    flip: bool = True,
    skip_bad: bool = False,
) -> tuple[dict[str, Any], float]:
    """Write what the latents in `folder` lack: missing, damaged and bad images. Return the index, and images/s.

    All ranks call it. Each encodes whole blocks, in rounds; then rank 0 writes the index. So the latents do not depend
    on the number of ranks. skip_bad: note bad images in the index; False: raise at the first one.
    DataError on all ranks for files that cannot be read or written, a folder that holds something else, a disk that is
    too small, and latents that are not finite.
    """
    index = run_on_rank0(ctx, lambda: _begin(images, vae, folder, content, dtype, flip))
    wait_for_file(folder / LATENTS)
    offset = open_latents(folder, index).offset
    todo = [(k, block) for k, block in blocks(index).items() if k not in index["sha256"]]
    mine = todo[ctx.rank :: ctx.world_size]
    order = [list(block[i : i + batch_size]) for _, block in mine for i in range(0, len(block), batch_size)]
    loader = ImageLoader(_Readable(images, skip_bad), order, num_workers, pin_memory=ctx.device.type == "cuda")
    done = len(images) - sum(len(block) for _, block in todo)
    progress, start = ImageProgress(f"latents {folder.name}", len(images), done, ctx), time.perf_counter()

    def counted() -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        for x, reasons in loader:
            yield x, reasons
            progress.update(min(len(images), progress.done + ctx.world_size * len(x)))

    def work(k: str, block: range) -> tuple[str, str, tuple, dict[str, str]]:
        """Return the name, checksum, sums and bad images of a block, when it is on the disk."""
        latents, bad = _encode_block(batches, images, vae, index, block, batch_size)
        good = [j for j, i in enumerate(block) if str(i) not in bad]
        return k, _write_block(folder, offset, block, latents), sums(latents[good]), bad

    batches = counted()
    for n in range(-(-len(todo) // ctx.world_size)):
        part = raise_on_all_ranks(ctx, lambda n=n: work(*mine[n]) if n < len(mine) else None)
        parts = [part]
        if ctx.world_size > 1:
            parts = [None] * ctx.world_size
            dist.all_gather_object(parts, part)
        for k, digest, total, bad in filter(None, parts):
            index["sha256"][k], index["sums"][k] = digest, total
            index["bad"] |= bad
        index["statistics"] = statistics(index)
        if ctx.is_main:
            write_json(folder / INDEX, index)
        check_bad_count(len(index["bad"]), len(images), _name(images, min(map(int, index["bad"]), default=0)))
    progress.close()
    loader.close()
    return index, (len(images) - done) / (time.perf_counter() - start)
