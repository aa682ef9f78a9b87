"""From noise to images: solvers of dz/dt = v(z, t) from t = 0 to t = 1, and classifier-free guidance.

A velocity is any function v(z, t). Guidance takes one that also depends on the label and returns one that does not.
Times live on the host, so that what a step costs is known without waiting for the device.

Shapes: z, v (B, C, H, W); y (B,); t (B,), or (1,) for all samples; grid (S + 1,), or (S + 1, B) for a grid of its own
for each sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from util import rng
from util.rng import Stream

Velocity = Callable[[Tensor, Tensor], Tensor]
SOLVERS = ("heun", "euler")


def start_noise(seed: int, index: Sequence[int] | Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Unit noise (B, C, H, W) of the images `index`, drawn on the CPU: a function of (seed, image index) alone."""
    index = torch.as_tensor(index, dtype=torch.int64)
    n = image_shape[0] * image_shape[1] * image_shape[2]
    return rng.normal(seed, Stream.START_NOISE, 0, index, n).view(-1, *image_shape)


def uniform_grid(steps: int) -> Tensor:
    """S + 1 equidistant times from 0 to 1, float32 on the CPU."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: at least 1 is needed")
    return torch.linspace(0.0, 1.0, steps + 1)


def guidance_scale(t: Tensor, cfg: float, lo: float, hi: float) -> Tensor:
    """s(t): `cfg` where t < hi and (lo == 0 or t > lo), else 1. An open interval; shape of `t`."""
    inside = t < hi
    if lo != 0:
        inside = inside & (t > lo)
    return torch.where(inside, cfg, 1.0)


def guided(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_class: int,
    cfg: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Classifier-free guidance v = v_u + s(t) (v_c - v_u) of `velocity(z, t, y)`.

    Both branches are one batch of 2B; where s = 1 for all samples only the conditional one is computed.
    """
    y_both = torch.cat([y, torch.full_like(y, null_class)])

    def v(z: Tensor, t: Tensor) -> Tensor:
        scale = guidance_scale(t, cfg, *interval)
        t = t.to(z.device, non_blocking=True)
        if bool((scale == 1).all()):
            return velocity(z, t, y)
        t_both = t if len(t) == 1 else torch.cat([t, t])
        v_c, v_u = velocity(torch.cat([z, z]), t_both, y_both).chunk(2)
        return v_u + scale.to(z.device, non_blocking=True)[:, None, None, None] * (v_c - v_u)

    return v


def sample(velocity: Velocity, z: Tensor, grid: Tensor, method: str = "heun") -> Tensor:
    """Integrate from z at grid[0] to grid[-1].

    Args:
        velocity: v(z, t) with t float32 on the CPU, (B,), or (1,) where all samples share it.
        z: the start, (B, C, H, W) in float32 or float64, on the device of the computation.
        grid: increasing times on the CPU.
        method: "euler", or "heun": every step but the last is Heun's, the last is Euler's.

    Returns:
        z at grid[-1].
    """
    if method not in SOLVERS:
        raise ValueError(f"the sampling method is {method!r}: it must be one of {', '.join(SOLVERS)}")
    grid = grid.float()
    if grid.dim() == 1:
        grid = grid[:, None]  # (S + 1, 1): what depends on t alone is computed once for all samples
    last = len(grid) - 2
    lengths = (grid[1:] - grid[:-1]).to(z.device, non_blocking=True)[..., None, None, None]  # (S, B or 1, 1, 1, 1)
    for i in range(last + 1):
        t, t_next, h = grid[i], grid[i + 1], lengths[i]
        v = velocity(z, t)
        if method == "heun" and i < last:
            v = 0.5 * (v + velocity(z + h * v, t_next))
        z = z + h * v
    return z
