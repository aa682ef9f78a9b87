"""The loss on images that training never sees, by time and by frequency.

    L_b  mean of (v - v_pred)^2 over the validation images, at one time per image in bin b: t = (b + u) / 10
    L    sum_b w_b L_b, with w_b the mass of the density of training times in bin b
    R_k  mean of |FFT(v - v_pred)|^2, orthonormal, over channels and ring k: modes with floor(sqrt(fu^2 + fv^2)) = k
    L_b = sum_k n_k R_bk / (H W), with n_k modes in ring k (Parseval)

Time and noise are functions of (seed, bin, number of the image in its data set) alone: the same in every epoch, for the
weights and both EMAs, for any batch size and number of ranks. The loss is that of training, without label drop, flips
and dropout.

Shapes: N validation images that are measured, B of a batch, T = 10 bins, K rings, W = 3 sets of weights.
"""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoiser import Denoiser, TimeSampler
from spectral_forcing import num_rings
from spectral_ops.spectrum import rapsd
from util.compile import no_recompile
from util.data.datasets import DataError, build_dataset
from util.data.images import Images, Subset
from util.data.loader import ImageLoader
from util.dist.context import DistContext, all_reduce_mean, local_range
from util.errors import UserError
from util.evaluation.generate import sampling_mode
from util.optim import EMA
from util.rng import CounterRNG

BINS = 10
WEIGHTS = ("model", "ema1", "ema2")
SPLITS = ("val", "test")
ORDER, TIMES, NOISE = 0, 1, 2  # steps of the stream "validation": which images, their times, and (+ bin) their noise


def random_order(count: int, seed: int) -> np.ndarray:
    """Return a permutation of 0 .. count - 1 that depends on (seed, count) alone."""
    u = CounterRNG(seed, ORDER, torch.arange(count)).uniform("validation")[:, 0]
    return np.argsort(u.numpy(), kind="stable")


def parse_split(text: str) -> float | str:
    """Return a fraction in (0, 1) or the name of a split. Raises UserError for anything else."""
    if text in SPLITS:
        return text
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise UserError(f"--val_split {text} must be a fraction of the training images (above 0, below 1), val or test.")


def hold_out(dataset: Images, config: Any) -> tuple[Images, "Validation | None"]:
    """Return the images to train on and those that measure the loss, or the data set and None without --val_split.

    A fraction f of M images holds out round(f M) of them, which depend on (seed, M, f) alone; a larger fraction holds
    out those of a smaller one and more. A named split leaves the training images as they are.

    Raises:
        UserError: a fraction that leaves one side empty, a split that is missing or empty.
    """
    if config.val_split is None:
        return dataset, None
    flag = f"--val_split {config.val_split}"
    split = parse_split(config.val_split)
    if isinstance(split, str):
        try:
            kind = dataset.name, config.data_path, dataset.img_size, split, dataset.channels, config.labels_file
            whole = build_dataset(*kind)
        except DataError as error:
            raise UserError(f"{flag}: {error} A fraction, such as 0.05, holds out training images.") from error
        if len(whole) == 0:
            raise UserError(f"{flag}: that split has no images. Name another one, or a fraction such as 0.05.")
        whole.bad_image_log = dataset.bad_image_log
        numbers = random_order(len(whole), config.seed)
    else:
        count = round(split * len(dataset))
        order = random_order(len(dataset), config.seed)
        if not 0 < count < len(dataset):
            raise UserError(f"{flag} holds out {count} of {len(dataset)} images. Both sides need at least one.")
        whole, numbers = dataset, order[:count]
        dataset = Subset(dataset, np.sort(order[count:]))
    images = Subset(whole, np.sort(numbers[: config.val_images]))
    return dataset, Validation(images, config.seed, config.batch_size, config.num_workers, config.val_rings)


def init_overlap_warnings(config: Any, init_args: Mapping[str, Any]) -> list[str]:
    """Warn if weights with settings `init_args` may have been trained on the images that a new run holds out."""
    if config.val_split is None or config.val_split in SPLITS:
        return []
    if all(init_args.get(name) == getattr(config, name) for name in ("val_split", "seed", "dataset", "data_path")):
        return []
    return [
        f"--val_split {config.val_split} with --init_from: its weights may have been trained on the held-out images"
    ]


def bin_weights(time_sampler: TimeSampler) -> Tensor:
    """Return the mass of the density of training times in each bin, (T,) float64; the sum is 1."""
    return time_sampler.cdf(torch.linspace(0, 1, BINS + 1, dtype=torch.float64)).diff()


def log_values(by_time: Tensor, by_ring: Tensor | None, time_sampler: TimeSampler) -> dict[str, Any]:
    """Return by_time (W, T) and by_ring (W, T, K) for the log.

    `loss_ema1` is L, `loss_ema1_t3` is L_b of t in 0.3 .. 0.4, `rings_ema1` is R, T lists of K numbers.
    """
    total = by_time @ bin_weights(time_sampler)  # (W,)
    values: dict[str, Any] = {f"loss_{name}": float(value) for name, value in zip(WEIGHTS, total, strict=True)}
    for name, row in zip(WEIGHTS, by_time, strict=True):
        values |= {f"loss_{name}_t{b}": float(value) for b, value in enumerate(row)}
    if by_ring is not None:
        values |= {f"rings_{name}": table.tolist() for name, table in zip(WEIGHTS, by_ring, strict=True)}
    return values


@dataclass(frozen=True)
class Validation:
    """The N images that measure the loss, and how."""

    images: Subset
    seed: int
    batch_size: int
    num_workers: int | None
    by_ring: bool

    def measure(self, denoiser: Denoiser, emas: tuple[EMA, EMA], ctx: DistContext, time_sampler: TimeSampler) -> dict:
        """Return `log_values` of the weights and both EMAs, on all ranks. No state of training changes."""
        index = list(local_range(len(self.images), ctx))
        batches = [index[i : i + self.batch_size] for i in range(0, len(index), self.batch_size)]
        loader = ImageLoader(self.images, batches, self.num_workers if batches else 0, ctx.device.type == "cuda")
        width = 1 + (num_rings(self.images.img_size) if self.by_ring else 0)
        sums = torch.zeros(len(WEIGHTS), BINS, width, dtype=torch.float64, device=ctx.device)
        try:
            for row, ema in zip(sums, (None, *emas), strict=True):
                with ema.applied() if ema else nullcontext(), sampling_mode(denoiser):
                    for batch, (x, y) in zip(batches, loader, strict=True):
                        numbers = torch.as_tensor(self.images.numbers[batch], device=ctx.device)
                        x, y = self.images.prepare(x.to(ctx.device)), y.to(ctx.device)
                        with no_recompile(len(x) < self.batch_size):
                            row += torch.stack([self._one_bin(denoiser, x, y, numbers, b) for b in range(BINS)])
        finally:
            loader.close()
        means = (all_reduce_mean(sums, ctx) * (ctx.world_size / len(self.images))).cpu()
        return log_values(means[..., 0], means[..., 1:] if self.by_ring else None, time_sampler)

    def _one_bin(self, denoiser: Denoiser, x: Tensor, y: Tensor, numbers: Tensor, b: int) -> Tensor:
        """Return (1 or 1 + K) float64: sums over a batch of the loss and the power in each ring, at times in bin b."""
        u = CounterRNG(self.seed, TIMES, numbers).uniform("validation", BINS)[:, b]  # (B,)
        noise = CounterRNG(self.seed, NOISE + b, numbers).normal("validation", x[0].numel()).view_as(x)
        residual = denoiser.residual(x, y, (b + u) / BINS, noise)  # (B, C, H, W)
        loss = residual.square().flatten(1).double().mean(1, keepdim=True)  # (B, 1)
        return (torch.cat([loss, rapsd(residual)], 1) if self.by_ring else loss).sum(0)
