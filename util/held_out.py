"""The loss on images that are never trained on, by time and by frequency.

    L_b  mean of (v - v_pred)^2 over the held-out images, at one time per image in bin b: t = (b + u) / 10
    L    sum_b w_b L_b, with w_b the mass of the training density in bin b: its times, spread evenly within each bin
    R_k  mean of |FFT(v - v_pred)|^2, orthonormal, over channels and ring k: modes with floor(sqrt(fu^2 + fv^2)) = k
    L_b = sum_k n_k R_bk / (H W), with n_k modes in ring k (Parseval)

Image, time and noise of a measurement are functions of (seed, bin, number of the image in its data set) alone: the
same in every epoch, for the weights and both of their averages, for any batch size and number of processes. The loss
is training's (Denoiser.error), without label drop, flips and dropout. A network that is told schedules is told each
image's own; w_b is then the mean over images.

Shapes: N held-out images that are measured, B of a batch, T = 10 bins, K rings, W = 3 sets of weights.
"""

import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from denoiser import Denoiser, Density
from util import rng
from util.acceleration import no_more_graphs
from util.bad_images import report as report_bad_images
from util.data import DataError, Images, build_dataset, to_float
from util.distributed import World, all_reduce_mean, share
from util.ema import EMA
from util.errors import UserError
from util.loader import ImageLoader, build_loader
from util.logger import RunLog
from util.parallel import gathered
from util.rng import Stream
from util.spectrum import num_rings, rapsd

if TYPE_CHECKING:
    from engine_jit import Recipe, Training

BINS = 10
WEIGHTS = ("model", "ema1", "ema2")
SPLITS = ("val", "test")
ORDER, TIMES, NOISE = 0, 1, 2  # the steps of Stream.VALIDATION: which images, their times, and (+ bin) their noise


class Part(Images):
    """The images `numbers` (M,) of another data set, with everything else as it is there."""

    def __init__(self, whole: Images, numbers: np.ndarray):
        super().__init__(whole.img_size, whole.class_names, whole.labels[numbers])
        self.name, self.in_memory, self.flip = whole.name, whole.in_memory, whole.flip
        self.replaced, self.whole, self.numbers = whole.replaced, whole, numbers

    def path(self, i: int) -> str:
        return self.whole.path(int(self.numbers[i]))

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.whole[int(self.numbers[i])]


def random_order(count: int, seed: int) -> np.ndarray:
    """(count,) int64: the numbers 0 .. count - 1 in an order that depends on (seed, count) alone."""
    u = rng.uniform(seed, Stream.VALIDATION, ORDER, torch.arange(count))[:, 0]
    return np.argsort(u.numpy(), kind="stable")


def parse_split(text: str) -> float | str:
    """A fraction in (0, 1) or the name of a split. Raises UserError for anything else."""
    try:
        fraction = float(text)
    except ValueError:
        if text in SPLITS:
            return text
        raise UserError(
            f"--val_split {text}: it must be a fraction of the training images between 0 and 1, or the name of a "
            f"split that the data set has ({' or '.join(SPLITS)})"
        ) from None
    if not 0 < fraction < 1:
        raise UserError(f"--val_split {text}: a fraction of the training images must be above 0 and below 1")
    return fraction


def hold_out(
    dataset: Images, args: Namespace, saved: Mapping[str, Any] | None = None
) -> tuple[Images, "HeldOut | None"]:
    """The images to train on, and those that measure the loss. Without --val_split the data set itself, and None.

    A fraction f of N images holds out round(f N) of them, which depend on (seed, N) and f alone; a larger fraction
    holds out a smaller one's images and others. A named split leaves the training images as they are.

    Args:
        dataset: the training images.
        args: val_split, val_images, val_rings, seed, batch_size, num_workers, data_path are read.
        saved: settings of the checkpoint that training goes on from.

    Raises:
        UserError: a fraction that is none or leaves one side empty, a split that the data set does not have or
            without images, a checkpoint that was trained on all images.
    """
    if args.val_split is None:
        return dataset, None
    split = parse_split(args.val_split)
    if isinstance(split, str):
        try:
            whole = build_dataset(dataset.name, args.data_path, dataset.img_size, split)
        except DataError as error:
            raise UserError(
                f"--val_split {split}: {error} A fraction, such as 0.05, holds out training images"
            ) from error
        if len(whole) == 0:
            raise UserError(f"--val_split {split}: there are no images in that split")
        whole.replaced = dataset.replaced
        numbers = random_order(len(whole), args.seed)
    else:
        if saved is not None and saved.get("val_split") != args.val_split:
            raise UserError(
                f"--val_split {args.val_split}: the checkpoint was trained without, on all images, so none of them can "
                "be held out any more. Leave it out, or name a split of the data set"
            )
        count = round(split * len(dataset))
        if not 0 < count < len(dataset):
            raise UserError(f"--val_split {args.val_split} holds out {count} of {len(dataset)} images: choose another")
        order = random_order(len(dataset), args.seed)
        whole, numbers, dataset = dataset, order[:count], Part(dataset, np.sort(order[count:]))
    numbers = np.sort(numbers[: args.val_images])
    return dataset, HeldOut(Part(whole, numbers), args.seed, args.batch_size, args.num_workers, args.val_rings)


def seen_before(args: Namespace, init: Mapping[str, Any]) -> list[str]:
    """A warning where a new run starts from weights (with settings `init`) that may know its held-out images."""
    if args.val_split is None or args.val_split in SPLITS:
        return []
    if all(init.get(name) == getattr(args, name) for name in ("val_split", "seed", "dataset", "data_path")):
        return []
    return [
        f"--val_split {args.val_split} with --init_from: those weights may have been trained on the held-out images"
    ]


def bin_weights(density: Density) -> Tensor:
    """(T,) float64: the mass of the density of training times in each bin; they add up to 1."""
    return density.cdf(torch.linspace(0, 1, BINS + 1, dtype=torch.float64)).diff()


@dataclass(frozen=True)
class Loss:
    """Means over the held-out images, on the CPU in float64: by_time (W, T); by_ring (W, T, K) where asked for."""

    by_time: Tensor
    by_ring: Tensor | None

    def values(self, density: Density) -> dict[str, Any]:
        """For the log. `loss_ema1` is L, `loss_ema1_t3` is L_b of t in 0.3 .. 0.4, `rings_ema1` is R (T lists of K)."""
        total = self.by_time @ bin_weights(density)  # (W,)
        out: dict[str, Any] = {f"loss_{name}": float(value) for name, value in zip(WEIGHTS, total, strict=True)}
        for name, row in zip(WEIGHTS, self.by_time, strict=True):
            out |= {f"loss_{name}_t{b}": float(value) for b, value in enumerate(row)}
        if self.by_ring is not None:
            out |= {f"rings_{name}": table.tolist() for name, table in zip(WEIGHTS, self.by_ring, strict=True)}
        return out


@dataclass(frozen=True)
class HeldOut:
    """The images (a Part, with N numbers) that measure the loss, and how."""

    images: Part
    seed: int
    batch_size: int
    num_workers: int | None
    by_ring: bool

    def measure(self, denoiser: Denoiser, emas: tuple[EMA, EMA], world: World) -> Loss:
        """The loss of the weights and of both averages, the same on all processes. No state of training changes."""
        mine = share(len(self.images), world)
        starts = range(mine.start, mine.stop, self.batch_size)
        batches = [list(range(start, min(start + self.batch_size, mine.stop))) for start in starts]
        width = 1 + (num_rings(self.images.img_size) if self.by_ring else 0)
        sums = torch.zeros(len(WEIGHTS), BINS, width, dtype=torch.float64, device=world.device)
        was_training, loader = denoiser.training, self._loader(batches, world)
        denoiser.eval()
        try:
            for row, average in enumerate((None, *emas)):
                with average.applied_to(denoiser) if average else gathered(denoiser), denoiser.fixed_weights():
                    for batch, (x, y) in zip(batches, loader, strict=True):
                        number = torch.as_tensor(self.images.numbers[batch], device=world.device)
                        x, y = to_float(x.to(world.device)), y.to(world.device)
                        with no_more_graphs(len(x) < self.batch_size):
                            for b in range(BINS):
                                sums[row, b] += self._one_bin(denoiser, x, y, number, b)
        finally:
            loader.end_workers()
            denoiser.train(was_training)
        means = (all_reduce_mean(sums, world) * (world.size / len(self.images))).cpu()
        return Loss(means[..., 0], means[..., 1:] if self.by_ring else None)

    def _loader(self, batches: list[list[int]], world: World) -> ImageLoader:
        workers = self.num_workers if batches else 0
        return build_loader(self.images, batches, workers, pin_memory=world.device.type == "cuda")

    @torch.no_grad()
    def _one_bin(self, denoiser: Denoiser, x: Tensor, y: Tensor, number: Tensor, b: int) -> Tensor:
        """(1 or 1 + K) float64: sums over a batch of the loss and of the power in each ring, at times in bin b."""
        t = times(self.seed, number)[:, b]
        noise = rng.normal(self.seed, Stream.VALIDATION, NOISE + b, number, x[0].numel()).view_as(x)
        error = denoiser.error(x, y, t, noise)  # (B, C, H, W)
        loss = error.square().flatten(1).double().mean(1, keepdim=True)  # (B, 1)
        return (torch.cat([loss, rapsd(error)], 1) if self.by_ring else loss).sum(0)

    def record(self, training: "Training", epoch: int, recipe: "Recipe", world: World, log: RunLog) -> Loss:
        """Measure after `epoch`, write the event `val` and say it."""
        start = time.perf_counter()
        loss = self.measure(training.denoiser, training.emas, world)
        values = loss.values(recipe.density)
        seconds = time.perf_counter() - start
        about = {"epoch": epoch, "num_images": len(self.images), "seconds": round(seconds, 3)}
        step = (epoch + 1) * recipe.steps_per_epoch
        report_bad_images(self.images.replaced, world, log, step)
        log.record("val", step, {**about, **values})
        text = "  ".join(f"{name} {values[f'loss_{name}']:.4f}" for name in WEIGHTS)
        log.say(
            f"epoch {epoch + 1}/{recipe.epochs}: held-out loss {text}  ({len(self.images)} images, {seconds:.1f} s)"
        )
        return loss


def times(seed: int, number: Tensor) -> Tensor:
    """(B, T) float32: the time of each image in each bin, uniform in (b / 10, (b + 1) / 10)."""
    u = rng.uniform(seed, Stream.VALIDATION, TIMES, number, BINS)
    return (torch.arange(BINS, device=number.device) + u) / BINS
