"""The data of the studies: batches for training, images to measure on, and their power in the DCT and the FFT.

A data set has classes, channels, size; batch(seed, step, B) -> images (B, C, n, n) in [-1, 1] and classes (B,);
held_out(count); mode_power() -> variance and second moment of DCT modes along colour axes, (A, n, n) each; and, where
the best prediction is known, posterior_mean(z, t, y) and least_loss(t) (experiments/synthetic.py).
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from experiments import synthetic
from spectral_forcing import dct_matrix, dct_rings, separable_transform
from spectral_ops.spectrum import rapsd
from util.data import cifar10
from util.data.images import to_float
from util.data.loader import GlobalBatchSampler
from util.evaluation.validation import random_order

DATA = (*synthetic.KINDS, "cifar10")
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

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        sampler = GlobalBatchSampler(len(self.images), size, 0, 1, 1, seed)
        epoch, within = divmod(step, sampler.steps_per_epoch)
        index = self._order(seed, epoch, size)[within * size : (within + 1) * size]
        return to_float(self.images[index]), self.labels[index]

    @cache  # noqa: B019 (one object for each process)
    def _order(self, seed: int, epoch: int, size: int) -> Tensor:
        sampler = GlobalBatchSampler(len(self.images), size, 0, 1, 1, seed)
        sampler.set_epoch(epoch)
        return torch.from_numpy(sampler.permutation())

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """Return test images (M, 3, 32, 32) and their classes (M,), the same for each run."""
        images, labels = self._load("test")
        index = torch.from_numpy(random_order(len(images), seed=0)[:count].copy())
        return to_float(images[index]), labels[index]

    @cache  # noqa: B019
    def mode_power(self) -> tuple[Tensor, Tensor]:
        """Return variance and second moment of DCT modes along the axes of the channels' covariance, (3, n, n) each."""
        dct = dct_matrix(self.size).float()
        x = torch.cat([separable_transform(dct, to_float(part)) for part in self.images.split(5000)])  # (M, 3, n, n)
        mean, products = x.mean(0).double(), torch.einsum("mcuv,mduv->cduv", x, x).double() / len(x)
        covariance = products - mean[:, None] * mean
        axes = torch.linalg.eigh(covariance.sum((2, 3)))[1]

        def along(matrix: Tensor) -> Tensor:
            return torch.einsum("ca,cduv,da->auv", axes, matrix, axes)

        return along(covariance), along(products)


class Synthetic(synthetic.GaussianImages):
    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        return self.batch(HELD_OUT_SEED, 0, count)


@cache
def open_data(name: str) -> Cifar10 | Synthetic:
    """Return a data set; opened once in each process. Raises ValueError for a name that is not in DATA."""
    if name not in DATA:
        raise ValueError(f"The data {name!r} must be one of {', '.join(DATA)}.")
    return Cifar10() if name == "cifar10" else Synthetic(name)


@cache
def dct_ring_power(name: str) -> Tensor:
    """Return the variance of DCT modes in each ring, float64 (A, K), along A colour axes."""
    data = open_data(name)
    ring, modes = dct_rings(data.size)
    variance = data.mode_power()[0].flatten(1)
    return variance.new_zeros(len(variance), len(modes)).index_add_(1, ring.flatten(), variance) / modes


@cache
def fft_ring_power(name: str) -> tuple[Tensor, Tensor]:
    """Return P_k and P^c_k of 5,000 training images, float64 (K,): what spectrum files hold of all of them."""
    x, _ = open_data(name).batch(HELD_OUT_SEED, 0, 5000)
    return rapsd(x).mean(0), rapsd(x - x.mean(0)).mean(0)
