"""Writes the latents of a data set (util/data/latents.py has their layout): images -> VAE -> blocks on the disk.

Shapes: a batch has B images uint8 (B, 3, H, W); latents (B, V, S, C, h, w) as in util/data/latents.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.blocks import Block, Index, Readable, blocks, name_of, source_of, write_blocks
from util.data.images import DataError, Images
from util.data.latents import DTYPES, LATENTS
from util.data.loader import ImageLoader
from util.data.vae import Vae
from util.dist.context import DistContext
from util.io import provenance
from util.rng import CounterRNG

BLOCK_BYTES = 2**25  # 1024 images of 256 pixels, for a factor of 8 and 4 channels
SEED = 0  # of the draws of "samples"


def encode_views(vae: Vae, x: Tensor, numbers: list[int], index: Index) -> Tensor:
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


def statistics(index: Index) -> dict[str, list[float]]:
    """Return mean and std of each channel over the finished blocks."""
    parts = [index["sums"][k] for k in blocks(index) if k in index["sha256"]]  # in one order on any number of ranks
    total, square = (np.array([part[n] for part in parts]).sum(0) for n in (1, 2))  # (C,)
    count = max(1, sum(part[0] for part in parts))
    mean = total / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square / count - mean**2, 0)).tolist()}


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
) -> tuple[Index, float]:
    """Write what the latents in `folder` lack: missing, damaged and bad images. Return the index, and images/s.

    All ranks call it. skip_bad: note bad images in the index; False: raise at the first one.
    DataError on all ranks for files that cannot be read or written, a folder that holds something else, a disk that is
    too small, and latents that are not finite.
    """
    if images.img_size % vae.factor:
        raise DataError(
            f"--img_size {images.img_size} is no multiple of {vae.factor}, the factor of the VAE {vae.name}."
        )
    expected = {"img_size": images.img_size, "views": 1 + flip, "content": content, "dtype": dtype}
    expected |= {"source": source_of(images), "vae": vae.sha256}
    new = {"dataset": f"{images.name}-{images.part}" if images.part else images.name}
    new |= {"class_num": images.num_classes, "channels": vae.channels}
    new |= {"size": images.img_size // vae.factor, "vae": vae.describe(), "made": provenance(vae.model.device)}
    new |= {"sums": {}, "statistics": None}

    def encoded(todo: list[range], advance: Callable[[int], None]) -> Iterator[Block]:
        batches = [block[i : i + batch_size] for block in todo for i in range(0, len(block), batch_size)]
        loader = ImageLoader(Readable(images, skip_bad), batches, num_workers, pin_memory=ctx.device.type == "cuda")
        loaded = zip(batches, loader, strict=True)
        for block in todo:
            parts, reasons = [], []
            for _ in block[::batch_size]:
                numbers, (x, why_bad) = next(loaded)
                parts.append(encode_views(vae, x, list(numbers), expected))
                if wrong := (~parts[-1].isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
                    raise DataError(
                        f"the latents of {name_of(images, numbers[wrong[0]])} are not finite in {dtype}. bfloat16 has "
                        "a larger range than float16; if that does not help, the VAE is damaged."
                    )
                reasons += why_bad
                advance(len(x))
            latents = torch.cat(parts)
            is_bad = torch.tensor([reason != "" for reason in reasons])
            latents[is_bad] = 0
            yield latents, reasons, {"sums": sums(latents[~is_bad])}

    def summarise(index: Index) -> Index:
        return {"statistics": statistics(index)}

    return write_blocks(LATENTS, images, folder, expected, new, BLOCK_BYTES, encoded, ctx, summarise)
