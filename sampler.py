"""From noise to images: solvers of dz/dt = v(z, t) from t = 0 to t = 1, and classifier-free guidance.

A velocity is any function v(z, t). Guidance takes one that also depends on the label and returns one that does not.
Times live on the host, so that the cost of a step is known without waiting for the device.

Shapes: z, v (B, C, H, W); y (B,); t (B,), or (1,) for all samples; grid (S + 1,), or (S + 1, B) if each sample has
its own grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def uniform_grid(steps: int) -> Tensor:
    """Return S + 1 equidistant times from 0 to 1, float32 on the CPU."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps are too few: at least 1 is needed.")
    return torch.linspace(0.0, 1.0, steps + 1)


def guidance_scale(t: Tensor, cfg: float, lo: float, hi: float) -> Tensor:
    """Return s(t): `cfg` where t < hi and (lo == 0 or t > lo), else 1 (arXiv 2404.07724); shape of `t`."""
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
    """Return the guided velocity v = v_u + s(t) (v_c - v_u) of `velocity(z, t, y)` for labels y (arXiv 2207.12598).

    Both branches are one batch of 2B. If s = 1 for all samples, the conditional branch alone is computed.
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


@dataclass
class Trajectory:
    """What a solver may look at beside the current step, and keep for the next one."""

    noise: Callable[[], Tensor]  # draws (B, C, H, W) of the path's noise, anew for each step
    previous: tuple[Tensor, Tensor] | None = None  # v and h of the step before


def euler_step(velocity: Velocity, z: Tensor, t: Tensor, t_next: Tensor, h: Tensor, trajectory: Trajectory) -> Tensor:
    return z + h * velocity(z, t)


def heun_step(velocity: Velocity, z: Tensor, t: Tensor, t_next: Tensor, h: Tensor, trajectory: Trajectory) -> Tensor:
    v = velocity(z, t)
    return z + h * (0.5 * (v + velocity(z + h * v, t_next)))


def ab2_step(velocity: Velocity, z: Tensor, t: Tensor, t_next: Tensor, h: Tensor, trajectory: Trajectory) -> Tensor:
    """Adams-Bashforth of order 2 for steps of any length, with one evaluation a step; the first step is Euler's.

    z + h ((1 + w) v - w v_previous), w = h / (2 h_previous)
    """
    v = velocity(z, t)
    slope = v
    if trajectory.previous is not None:
        v_previous, h_previous = trajectory.previous
        slope = v + h / (2 * h_previous) * (v - v_previous)
    trajectory.previous = v, h
    return z + h * slope


def sde_step(velocity: Velocity, z: Tensor, t: Tensor, t_next: Tensor, h: Tensor, trajectory: Trajectory) -> Tensor:
    """Euler-Maruyama step of the stochastic equation with the marginals of the path (arXiv 2401.08740, w_t = 1 - t):

    dz = (v - (z - t v)) dt + sqrt(2 (1 - t)) dW, where z - t v is the expected noise
    """
    v = velocity(z, t)
    t = t.to(z)[:, None, None, None]
    return z + h * (v - (z - t * v)) + (2 * (1 - t) * h).sqrt() * trajectory.noise()


@dataclass(frozen=True)
class Solver:
    """An entry of SOLVERS. A step is (velocity, z, t, t_next, h, trajectory) -> z at t_next; t on the CPU, h beside z.

    Attributes:
        step: all steps but the last.
        last: the step to t = 1, where there is no velocity to ask for, with one evaluation.
        evaluations: of the velocity in `step`.
    """

    step: Callable[..., Tensor]
    last: Callable[..., Tensor] = euler_step
    evaluations: int = 1

    def nfe(self, steps: int) -> int:
        """Return the number of function evaluations in so many steps."""
        return self.evaluations * (steps - 1) + 1


SOLVERS: dict[str, Solver] = {
    "heun": Solver(heun_step, evaluations=2),
    "euler": Solver(euler_step),
    "ab2": Solver(ab2_step, last=ab2_step),
    "sde": Solver(sde_step),
}


def sample(
    velocity: Velocity,
    z: Tensor,
    grid: Tensor,
    method: str = "heun",
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Integrate from z at grid[0] to grid[-1] and return z there.

    Args:
        velocity: v(z, t) with t float32 on the CPU, (B,), or (1,) if all samples share it.
        z: the start, (B, C, H, W) in float32 or float64, on the device of the computation.
        grid: increasing times on the CPU.
        method: a key of SOLVERS.
        noise: step i -> (B, C, H, W) of the path's noise, for a stochastic solver (default: of torch's generator).
    """
    if method not in SOLVERS:
        raise ValueError(f"The sampling method is {method!r}; it must be one of {', '.join(SOLVERS)}.")
    solver, grid = SOLVERS[method], grid.float()
    if grid.dim() == 1:
        grid = grid[:, None]  # (S + 1, 1): operations on t alone are done once for all samples
    lengths = (grid[1:] - grid[:-1]).to(z.device, non_blocking=True)[..., None, None, None]  # (S, B or 1, 1, 1, 1)
    trajectory = Trajectory(lambda: torch.randn_like(z) if noise is None else noise(i))
    for i in range(len(lengths)):
        step = solver.step if i < len(lengths) - 1 else solver.last
        z = step(velocity, z, grid[i], grid[i + 1], lengths[i], trajectory)
    return z
