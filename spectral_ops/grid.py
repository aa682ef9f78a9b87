"""Spectral sampling grids for the flow-matching schedulers of diffusers, and so for existing pipelines.

    grid = SpectralGrid(TightSchedule.of_spectrum(power, centred, img_size))
    with grid.attach(pipeline.scheduler):
        pipeline(prompt, num_inference_steps=28)

Nothing is trained: a grid says where the steps of the solver are (arXiv 2603.19222). sigma = 1 - t, from 1 to 0.
"""

import functools
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

        The grid replaces what `set_timesteps` computes: the shift of the scheduler has no effect, nor have sigmas that
        a pipeline passes, but for their number. Raises ValueError for another scheduler.
        """
        if not any(base.__name__ in SCHEDULERS for base in type(scheduler).__mro__):
            names = " or ".join(SCHEDULERS)
            raise ValueError(f"A spectral grid needs {names} of diffusers, not {type(scheduler).__name__}.")
        if "set_timesteps" in vars(scheduler):
            raise ValueError(f"This {type(scheduler).__name__} follows a grid already.")
        original = scheduler.set_timesteps

        @functools.wraps(original)
        def set_timesteps(num_inference_steps: int | None = None, device: Any = None, **others: Any) -> None:
            given = [values for name in ("sigmas", "timesteps") if (values := others.pop(name, None)) is not None]
            steps = num_inference_steps or len(given[0])
            original(steps, device=device, **others)
            sigmas = torch.tensor([*self.sigmas(steps), 0.0], dtype=torch.float32, device=device)
            if scheduler.order == 2:  # Heun's method comes twice to each level of noise between the ends
                sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
            scheduler.sigmas = sigmas
            scheduler.timesteps = sigmas[:-1] * scheduler.config.num_train_timesteps

        scheduler.set_timesteps = set_timesteps
        return Attachment(lambda: vars(scheduler).pop("set_timesteps"))
