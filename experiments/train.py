"""One run of a study: train a small JiT, then measure it by time and by ring of frequency.

    excess   mean of |x_hat - E[x | z, y]|^2 / max(1 - t, t_eps)^2 per pixel, where the best prediction is known
    loss     mean of |v - v_pred|^2 per pixel, elsewhere

Both are tables (T, K) over T times, the middles of equal bins, and K rings of DCT frequency, on held-out images and
noise that are the same for all runs. Their sum over rings, weighted by modes, is the value at t.
"""

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from denoiser import Denoiser, LogitNormal, sample_step
from experiments.arms import ARMS, block_operators, input_operator, resolution, share_layers, time_sampler
from experiments.data import open_data
from model_jit import JiT
from spectral_forcing import dct_matrix, dct_rings, separable_transform
from spectral_ops.spectrum import ring_means
from util.cpu_layers import speed_up_on_cpu
from util.optim import EMA, build_optimizer
from util.profile import forward_flops, levels_of
from util.rng import CounterRNG

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """The settings of a run: everything that decides its numbers."""

    data: str
    patch: int
    arm: str
    seed: int
    steps: int = 600
    lr: float = 3e-3  # falls to 0 along a cosine
    batch: int = 64
    width: int = 96
    depth: int = 4
    heads: int = 4
    bottleneck: int = 48
    images: int = 256  # held out
    times: int = 20
    label_drop: float = 0.0  # guidance needs some
    ema: float = 0.0  # decay of an average of the weights
    samples: int = 0  # draw so many images and measure those, instead of the loss
    cfgs: tuple[float, ...] = (1.0, 2.0)  # guidance scales of the samples
    sampling_steps: tuple[int, ...] = (20,)

    def __post_init__(self):  # JSON has lists alone
        for name in ("cfgs", "sampling_steps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


def build_denoiser(run: Run) -> Denoiser:
    """Build the denoiser of a run with fresh weights, the same in all arms with the same seed."""
    data, arm = open_data(run.data), ARMS[run.arm]
    operator = input_operator(arm, run.data)
    torch.manual_seed(run.seed)
    net = JiT(
        data.size,
        run.patch,
        data.channels,
        data.channels,
        run.width,
        run.depth,
        run.heads,
        num_classes=data.classes,
        bottleneck_dim=run.bottleneck,
        in_context_len=0,
        block_operators=block_operators(arm),
        levels=arm.get("levels", 0),
    )
    if not arm.get("own_layers", True):
        share_layers(net)
    return Denoiser(net, operator, resolution=resolution(arm, run.data))


def train(run: Run, device: torch.device = CPU) -> tuple[Denoiser, EMA, float]:
    """Train. Return the denoiser, its average, and the mean training loss of the last tenth of the steps.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    data, sampler = open_data(run.data), time_sampler(ARMS[run.arm], run.data, device)
    denoiser = build_denoiser(run).train().to(device)
    if device == CPU:
        speed_up_on_cpu(denoiser)
    optimizer, ema, losses = build_optimizer(denoiser, 0.0, (0.9, 0.95)), EMA(denoiser, run.ema), []
    shape, index = (data.channels, data.size, data.size), torch.arange(run.batch, device=device)
    for step in range(run.steps):
        x, y = (part.to(device) for part in data.batch(run.seed, step, run.batch))
        s = sample_step(CounterRNG(run.seed, step, index), y, shape, sampler, run.label_drop, data.classes)
        loss = denoiser(x, s.y, s.t, s.noise, s.level, s.weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.lr * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        optimizer.step()
        optimizer.zero_grad()
        if run.ema:
            ema.update()
        losses.append(loss.detach())
        if (step % 100 == 99 or step == run.steps - 1) and not losses[-1].isfinite():
            raise FloatingPointError(f"the loss is not finite at step {step}")
    return denoiser.eval(), ema, float(torch.stack(losses[-max(1, run.steps // 10) :]).mean())


def by_ring(residual: Tensor) -> Tensor:
    """Return the mean power of each ring of DCT modes over images and channels: (B, C, n, n) -> (K,) float64."""
    n = residual.shape[-1]
    return ring_means(separable_transform(dct_matrix(n), residual.double()).square().mean((0, 1)), *dct_rings(n))


@torch.no_grad()
def measure(denoiser: Denoiser, run: Run, device: torch.device = CPU) -> dict[str, Any]:
    """Return {"excess" or "loss": table (T, K), "least": (T,) or None}, ready for JSON."""
    data, rows = open_data(run.data), []
    x, y = data.held_out(run.images)
    exact = hasattr(data, "posterior_mean")
    times = (torch.arange(run.times) + 0.5) / run.times
    for b, middle in enumerate(times):
        noise = CounterRNG(0, b, torch.arange(len(x))).normal("validation", x[0].numel()).view_as(x)
        t = middle.expand(len(x))
        z, v = denoiser.noisy_images(x, noise, t)
        predicted = denoiser.velocity(z.to(device), t.to(device), y.to(device)).cpu()
        if exact:
            v = (data.posterior_mean(z, t, y) - z) / (1 - middle).clamp_min(denoiser.loss.t_eps)
        rows.append(by_ring(v - predicted))
    table = [[float(f"{value:.5g}") for value in row] for row in torch.stack(rows).tolist()]
    if not exact:
        return {"loss": table, "least": None}
    least = data.least_loss(times) / (1 - times.double()).clamp_min(denoiser.loss.t_eps).square()
    return {"excess": table, "least": least.tolist()}


def operations(run: Run) -> float:
    """Return the operations of the matrix products of training, two per multiply-add; a backward pass counts twice."""
    net, levels = build_denoiser(run).net, levels_of(time_sampler(ARMS[run.arm], run.data, CPU))
    return 3 * mean(forward_flops(net, level) for level in levels) * run.batch * run.steps


def density(times: int) -> Tensor:
    """Return the mass of the default density of training times in each of `times` equal bins, (T,) float64."""
    return LogitNormal().cdf(torch.linspace(0, 1, times + 1, dtype=torch.float64)).diff()
