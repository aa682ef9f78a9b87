"""The data of the studies: batches for training, images to measure on, and their power in the DCT and the FFT.

A data set has classes, channels, size; batch(seed, step, B) -> images (B, C, n, n) in [-1, 1] and classes (B,);
held_out(count); mode_power() -> variance and second moment of DCT modes along colour axes, (A, n, n) each; and, where
the best prediction is known, posterior_mean(z, t, y) and least_loss(t) (experiments/synthetic.py).
"""

from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from experiments import photographs, synthetic
from spectral_forcing import dct_matrix, dct_rings, separable_transform
from spectral_ops.spectrum import rapsd, ring_means
from util.data import cifar10
from util.data.datasets import build_dataset
from util.data.images import DataError, to_float
from util.data.loader import GlobalBatchSampler
from util.evaluation.validation import random_order
from util.io import REPOSITORY
from util.rng import CounterRNG

DATA = (*synthetic.KINDS, "cifar10", "cifar10_latents", "photographs")
LATENTS = REPOSITORY / "data" / "cifar10_latents"  # made by `make cifar10-latents`
HELD_OUT_SEED = 2**40  # no run has it


class Cifar10:
    """CIFAR-10: training images in the order of training runs, and test images to measure on."""

    classes, channels, size = 10, 3, 32

    def __init__(self):
        self.images, self.labels = self._load("train")

    @staticmethod
    def _load(split: str) -> tuple[Tensor, Tensor]:
        images, labels = cifar10.load(cifar10.FOLDER, split)
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels)

    def _floats(self, stored: Tensor, seed: int, step: int) -> Tensor:
        """Return images in [-1, 1] of what `_load` returns; what is random about them depends on (seed, step)."""
        return to_float(stored)

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        sampler = GlobalBatchSampler(len(self.images), size, 0, 1, 1, seed)
        epoch, within = divmod(step, sampler.steps_per_epoch)
        index = self._order(seed, epoch, size)[within * size : (within + 1) * size]
        return self._floats(self.images[index], seed, step), self.labels[index]

    @cache  # noqa: B019 (one object for each process)
    def _order(self, seed: int, epoch: int, size: int) -> Tensor:
        sampler = GlobalBatchSampler(len(self.images), size, 0, 1, 1, seed)
        sampler.set_epoch(epoch)
        return torch.from_numpy(sampler.permutation())

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """Return test images (M, C, n, n) and their classes (M,), the same for each run."""
        images, labels = self._load("test")
        index = torch.from_numpy(random_order(len(images), seed=0)[:count].copy())
        return self._floats(images[index], HELD_OUT_SEED, 0), labels[index]

    @cache  # noqa: B019
    def mode_power(self) -> tuple[Tensor, Tensor]:
        return power_along_axes(self._floats(self.images, HELD_OUT_SEED, 1))


def power_along_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and second moment of DCT modes along the axes of the channels' covariance, (C, n, n) each."""
    x = separable_transform(dct_matrix(x.shape[-1]).float(), x)  # (M, C, n, n)
    mean, products = x.mean(0).double(), torch.einsum("mcuv,mduv->cduv", x, x).double() / len(x)
    covariance = products - mean[:, None] * mean
    axes = torch.linalg.eigh(covariance.sum((2, 3)))[1]

    def along(matrix: Tensor) -> Tensor:
        return torch.einsum("ca,cduv,da->auv", axes, matrix, axes)

    return along(covariance), along(products)


class Cifar10Latents(Cifar10):
    """CIFAR-10 in the latent space of experiments/tiny_vae.py: z = mean + std * noise, drawn anew for each batch."""

    channels, size = 4, 8

    def __init__(self):
        super().__init__()
        if len(self.images) != len(self.labels) or self.images.shape[2:] != (2, self.channels, self.size, self.size):
            raise DataError(f"{LATENTS} does not hold moments of {self.channels} x {self.size} x {self.size} latents.")

    @staticmethod
    def _load(split: str) -> tuple[Tensor, Tensor]:
        """Return moments (M, V, 2, C, n, n) as they are stored, and classes (M,)."""
        images = build_dataset("latents", LATENTS, Cifar10Latents.size, {"test": "val"}.get(split, split))
        return torch.stack([images[i][0] for i in range(len(images))]), torch.from_numpy(images.labels)

    def _floats(self, stored: Tensor, seed: int, step: int) -> Tensor:
        mean, std = stored[:, 0].float().unbind(1)  # of the images as they are; (B, C, n, n) each
        rng = CounterRNG(seed, step, torch.arange(len(mean)))
        return mean + std * rng.normal("latent", mean[0].numel()).view_as(mean)


class Photographs(Cifar10):
    """64 x 64 pictures cut out of photographs (experiments/photographs.py), all of one class."""

    classes, size = 1, 64
    pictures: ClassVar = {"train": 10_000, "test": 1_000}

    @staticmethod
    def _load(split: str) -> tuple[Tensor, Tensor]:
        pictures = photographs.cut(split, Photographs.pictures[split], Photographs.size)
        return torch.from_numpy(pictures), torch.zeros(len(pictures), dtype=torch.long)


class Synthetic(synthetic.GaussianImages):
    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        return self.batch(HELD_OUT_SEED, 0, count)


@cache
def open_data(name: str) -> Cifar10 | Synthetic:
    """Return a data set; opened once in each process. Raises ValueError for a name that is not in DATA."""
    if name not in DATA:
        raise ValueError(f"The data {name!r} must be one of {', '.join(DATA)}.")
    kinds = {"cifar10": Cifar10, "cifar10_latents": Cifar10Latents, "photographs": Photographs}
    return kinds[name]() if name in kinds else Synthetic(name)


@cache
def dct_ring_power(name: str) -> Tensor:
    """Return the variance of DCT modes in each ring, float64 (A, K), along A colour axes."""
    data = open_data(name)
    return ring_means(data.mode_power()[0], *dct_rings(data.size))


@cache
def fft_ring_power(name: str) -> tuple[Tensor, Tensor]:
    """Return P_k and P^c_k of 5,000 training images, float64 (K,): what spectrum files hold of all of them."""
    x, _ = open_data(name).batch(HELD_OUT_SEED, 0, 5000)
    return rapsd(x).mean(0), rapsd(x - x.mean(0)).mean(0)
