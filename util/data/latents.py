"""The latents of a data set, encoded once by a VAE, for training in its latent space. util/data/encode.py writes them.

    OUT/train/latents.npy   float16, or bfloat16 as uint16 (numpy has none), (N, V, S, C, h, w)
    OUT/train/files.json    {class: names of its files, or numbers of its images in a data set without files}
    OUT/train/latents.json  the index: what the latents were made from, and which blocks of them are finished
    OUT/val/...             the same, where the data set has validation images

The index has the entries of every index (blocks.py), and these:

    img_size, dataset, class_num     pixels per side of the images; name of the data set; its classes
    channels, size, views            C; h = w; V
    content, dtype                   "moments" (mean, std) or "samples" (one draw); float16 or bfloat16
    vae                              name, sha256, channels, factor, scaling_factor, shift_factor
    sums                             {block: [count, sum, sum of squares] of z}
    statistics                       {mean, std} of z = mean + std * noise, for each channel, over images and views

Shapes: N images in V views: as it is, then mirrored if V = 2. S = 2 for moments, 1 for samples. A batch has B images.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from denoiser import RandomNumbers
from util.data.blocks import Index, Layout, StoredImages
from util.data.images import DataError

CONTENTS = {"moments": 2, "samples": 1}  # S
DTYPES = {"float16": (torch.float16, np.float16), "bfloat16": (torch.bfloat16, np.uint16)}  # in torch, on the disk


def shape(index: Index) -> tuple[int, ...]:
    """Return (V, S, C, h, w)."""
    return index["views"], CONTENTS[index["content"]], index["channels"], index["size"], index["size"]


LATENTS = Layout(
    task="latents",
    what="latents",
    index="latents.json",
    array="latents.npy",
    version=1,
    item=lambda index: (DTYPES[index["dtype"]][1], shape(index)),
)


class LatentImages(StoredImages):
    """One split of latents: item i is (latents (V, S, C, h, w) as they are stored, label int).

    To the network they are images of h = `img_size` pixels with C = `channels`; those they were made from had `pixels`
    per side.
    """

    def __init__(self, folder: Path):
        super().__init__(LATENTS, folder)
        index = self.index
        self.img_size, self.pixels = index["size"], index["img_size"]
        self.channels, self.views = index["channels"], index["views"]
        self.content, self.vae, self.statistics = index["content"], index["vae"], index["statistics"]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        latents, label = super().__getitem__(i)
        return latents.view(DTYPES[self.index["dtype"]][0]), label

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
