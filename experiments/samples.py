"""Samples of a trained network and what they are worth: for the arms of a study, and for solvers and grids.

    fd_effnet_lite0     Fréchet distance to 2,000 test images; of so few images, to be compared within a table alone
    precision, recall   on the same features, those of EfficientNet-Lite0, with k = 3
    spectrum_gap        to the grey spectrum of 5,000 training images

Image i has class i mod classes, and start noise that depends on i alone: the same in all arms.

Shapes: B images; grid (S + 1,) or (S + 1, B).
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from denoiser import Denoiser
from experiments.data import HELD_OUT_SEED, fft_ring_power, open_data
from experiments.train import Run
from sampler import guided, sample, uniform_grid
from spectral_ops.schedule import TightSchedule, latest_time
from spectral_ops.spectrum import grey_spectrum, image_fits, rapsd, spectrum_gap
from util.data.images import quantise
from util.evaluation.features import EffNetLite0
from util.evaluation.formulas import frechet_distance, precision_recall
from util.optim import EMA
from util.rng import CounterRNG

GRIDS = ("uniform", "logsnr", "mixed", "class", "instance")  # the last two: mixed, by the spectrum of class or image
REAL, BATCH = 2000, 100


def grid_of(name: str, steps: int, index: Tensor, y: Tensor) -> Tensor:
    """Return the times of a grid; for `class` and `instance` those of the images `index` with classes y.

    A class has the mean spectrum of its training images, and an image that of one training image of its class.
    """
    if name == "uniform":
        return uniform_grid(steps)
    if name not in ("class", "instance"):
        power, centred = fft_ring_power("cifar10")
        return TightSchedule.of_spectrum(power, centred, 32, variant=name).sampling_grid(steps)
    x, labels = open_data("cifar10").batch(HELD_OUT_SEED, 0, 5000)
    if name == "class":
        power, centred = rapsd(x), rapsd(x - x.mean(0))  # (M, K)
        present, of_image = y.unique(return_inverse=True)
        of_class = [torch.stack([part[labels == c].mean(0) for c in present]) for part in (power, centred)]
        return TightSchedule.of_spectrum(*of_class, 32, variant="mixed").sampling_grid(steps)[:, of_image]
    which = index // open_data("cifar10").classes  # the i-th image of a class takes the spectrum of the i-th one here
    chosen = torch.stack([x[labels == c][i] for i, c in zip(which.tolist(), y.tolist(), strict=True)])
    fits = image_fits(rapsd(chosen), chosen.mean((2, 3)), x.mean((0, 2, 3)), 32)
    return TightSchedule.of_fits(fits, 32, variant="mixed").sampling_grid(steps)


@torch.no_grad()
def generate(
    denoiser: Denoiser, count: int, steps: int, solver: str = "heun", grid: str = "uniform", cfg: float = 1.0
) -> Tensor:
    """Return images uint8 (count, 3, 32, 32) of a network of CIFAR-10, on the CPU."""
    images, classes, device = [], open_data("cifar10").classes, next(denoiser.parameters()).device
    t_eps = None if grid == "uniform" else min(denoiser.loss.t_eps, 1 - latest_time())
    for index in torch.arange(count).split(BATCH):
        y = index % classes
        noise = CounterRNG(0, 0, index).normal("start_noise", 3 * 32 * 32).view(-1, 3, 32, 32).to(device)

        def of_step(i: int, index: Tensor = index, noise: Tensor = noise) -> Tensor:
            return CounterRNG(0, i, index).normal("solver", noise[0].numel()).view(noise.shape).to(device)

        def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return denoiser.velocity(z, t, y, t_eps)

        v = guided(velocity, y.to(device), classes, cfg, (0.1, 1.0))
        images.append(quantise(sample(v, noise, grid_of(grid, steps, index, y), solver, of_step)).cpu())
    return torch.cat(images)


@cache
def extractor() -> EffNetLite0:
    return EffNetLite0()


def features_of(images: Tensor) -> Tensor:
    return torch.cat([extractor()(part)["effnet_lite0"] for part in images.split(BATCH)])  # (M, F)


@cache
def real_features(count: int) -> Tensor:
    return features_of(quantise(open_data("cifar10").held_out(count)[0]))


@cache
def real_spectrum() -> Tensor:
    return grey_spectrum(quantise(open_data("cifar10").batch(HELD_OUT_SEED, 0, 5000)[0])).mean(0)


def quality(images: Tensor, real: int = REAL) -> dict[str, float]:
    """Return the metrics of generated images uint8 (B, 3, 32, 32)."""
    found, features = features_of(images), real_features(real)
    mu, sigma = features.double().mean(0), torch.cov(features.double().T)
    precision, recall = precision_recall(found, features)
    values = {
        "fd_effnet_lite0": frechet_distance(found, mu, sigma),
        "precision": precision,
        "recall": recall,
        "spectrum_gap": spectrum_gap(real_spectrum(), grey_spectrum(images).mean(0)),
    }
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def sweep(denoiser: Denoiser, ema: EMA, run: Run) -> Iterator[dict[str, Any]]:
    """Yield the quality of `run.samples` images for each setting, with the weights and with their average, if any."""
    for steps, cfg, weights in product(run.sampling_steps, run.cfgs, ("model", "ema") if run.ema else ("model",)):
        with ema.applied() if weights == "ema" else nullcontext():
            images = generate(denoiser, run.samples, steps, cfg=cfg)
        found = quality(images, min(REAL, 10 * run.samples))
        yield {"steps": steps, "cfg": cfg, "weights": weights, **found}
