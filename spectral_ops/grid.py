"""Spectral sampling grids for the flow-matching schedulers of diffusers, and so for existing pipelines.

    grid = SpectralGrid(TightSchedule.of_spectrum(power, centred, img_size))
    with grid.attach(pipeline.scheduler):
        pipeline(prompt, num_inference_steps=28)

Nothing is trained: a grid says where the steps of the solver are (arXiv 2603.19222). sigma = 1 - t, from 1 to 0.
"""

from collections.abc import Sequence
from typing import Any

import torch

from spectral_ops.attach import Attachment
from spectral_ops.schedule import TightSchedule

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


class SpectralGrid:
    """The grid of one spectrum for all images. Raises ValueError for a schedule of several."""

    def __init__(self, schedule: TightSchedule):
        if not schedule.single:
            raise ValueError("A scheduler has one grid for all images: it needs the schedule of one spectrum.")
        self.schedule = schedule

    def sigmas(self, steps: int) -> list[float]:
        """Return the noise levels at which the steps begin: decreasing from 1, without the last one, 0.

        Raises ValueError for fewer than 3 steps.
        """
        return (1 - self.schedule.sampling_grid(steps)[:-1].double()).tolist()

    def attach(self, scheduler: Any) -> Attachment:
        """Let one of SCHEDULERS step along this grid, until `detach()` of what is returned, or as a `with` block.

        The grid replaces what `set_timesteps` computes: shifts of the scheduler have no effect, nor have sigmas or
        timesteps that a pipeline passes, but for their number. A copy of the scheduler follows the grid as well.

        Raises:
            ValueError: another scheduler, one whose sigmas are inverted, or one that follows a grid already.
        """
        if not any(base.__name__ in SCHEDULERS for base in type(scheduler).__mro__):
            names = " or ".join(SCHEDULERS)
            raise ValueError(f"A spectral grid needs {names} of diffusers, not {type(scheduler).__name__}.")
        if scheduler.config.get("invert_sigmas"):
            raise ValueError("A spectral grid has sigmas from 1 to 0, and this scheduler inverts them.")
        if "set_timesteps" in vars(scheduler):
            raise ValueError(f"This {type(scheduler).__name__} follows a grid already.")
        ours = scheduler.set_timesteps = _SetTimesteps(self, scheduler)

        def detach() -> None:
            if vars(scheduler).get("set_timesteps") is ours:
                del scheduler.set_timesteps

        return Attachment(detach)


class _SetTimesteps:
    """The method of a scheduler; an object, so that a copy of the scheduler has one that belongs to the copy."""

    def __init__(self, grid: SpectralGrid, scheduler: Any):
        self.grid, self.scheduler = grid, scheduler

    def __call__(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        given = {name: value for name, value in given.items() if value is not None}
        counts = [len(given[name]) for name in ("sigmas", "timesteps") if name in given]
        if not num_inference_steps and not counts:
            raise ValueError("set_timesteps needs num_inference_steps.")
        ours, scheduler = self.grid.sigmas(num_inference_steps or counts[0]), self.scheduler
        type(scheduler).set_timesteps(scheduler, num_inference_steps or counts[0], device=device, **given)
        levels = torch.tensor([*ours, 0.0], dtype=torch.float32, device=device)
        if scheduler.order == 2:  # Heun's method comes twice to each level of noise between the ends
            levels = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
        scheduler.sigmas = levels
        scheduler.timesteps = levels[:-1] * scheduler.config.num_train_timesteps
