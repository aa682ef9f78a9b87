"""Images from a denoiser: image i is a function of the settings, its label and i alone.

Shapes: B images of a batch; images (B, 3, H, W), y (B,); N images in all, with indices 0 .. N - 1.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from denoiser import Denoiser
from sampler import Velocity, guided, sample, start_noise, uniform_grid
from util.distributed import World, any_of, gather_by_index, requested_of_any, share
from util.flags import DEFAULTS
from util.images import quantise
from util.logger import progress
from util.preemption import Preempted


@dataclass(frozen=True)
class Sampling:
    """How images are made. The batch size decides only how fast."""

    solver: str
    steps: int
    cfg: float
    interval: tuple[float, float]
    seed: int
    batch_size: int

    @classmethod
    def from_args(cls, args: Namespace) -> "Sampling":
        interval = (args.interval_min, args.interval_max)
        return cls(args.sampling_method, args.num_sampling_steps, args.cfg, interval, args.seed, args.gen_bsz)

    def describe(self) -> dict[str, Any]:
        """All that decides the images, ready for JSON."""
        return {
            "solver": self.solver,
            "steps": self.steps,
            "cfg": self.cfg,
            "interval": list(self.interval),
            "seed": self.seed,
        }


def setting_name(epoch: int, ema: str, sampling: Sampling) -> str:
    """Part of a file name that differs wherever images of a run differ, apart from seed and labels."""
    guidance = f"cfg{sampling.cfg:.10g}"
    if sampling.cfg != 1 and sampling.interval != (DEFAULTS["interval_min"], DEFAULTS["interval_max"]):
        guidance += "-t{:.10g}to{:.10g}".format(*sampling.interval)
    return f"epoch{epoch + 1:04d}-{ema}-{sampling.solver}{sampling.steps}-{guidance}"


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout and gradients within the block; the module's mode is then as it was."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():  # in inference mode autocast would not keep what it casts
            yield
    finally:
        module.train(was_training)


def make_images(
    denoiser: Denoiser,
    sampling: Sampling,
    index: Sequence[int],
    labels: Sequence[int],
    image_shape: tuple[int, int, int],
    null_class: int,
    device: torch.device,
) -> Tensor:
    """The images `index` (B,) as uint8 (B, 3, H, W) on the device; `labels` holds those of all images.

    Raises:
        NonFiniteImages: values that are not finite. The message names image, label, seed and the step of the
            solver from which on they are not; for that the batch is computed a second time.
    """
    y = torch.tensor([labels[i] for i in index], device=device)  # (B,)
    z = denoiser.noise_scale * start_noise(sampling.seed, index, image_shape).to(device)
    velocity = guided(denoiser.velocity, y, null_class, sampling.cfg, sampling.interval)
    with denoiser.fixed_weights(device):
        x = sample(velocity, z, uniform_grid(sampling.steps), sampling.solver)
    return quantise(x, index, y, sampling.seed, lambda: first_bad_steps(velocity, z, sampling))


def first_bad_steps(velocity: Velocity, z: Tensor, sampling: Sampling) -> list[str]:
    """Integrate again and say of each image from which step of the solver on it is not finite; "" where it is.

    A velocity belongs to the step that asks for it: Heun's steps ask twice (the last, Euler's, once), Euler's once.
    """
    per_step = 2 if sampling.solver == "heun" else 1
    first = torch.full((len(z),), -1, device=z.device)  # (B,)
    calls = 0

    def look(tensor: Tensor, call: int) -> None:
        nonlocal first
        bad = ~tensor.isfinite().flatten(1).all(1)  # (B,)
        first = torch.where(bad & (first < 0), max(call, 0) // per_step, first)

    def watched(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        look(z, calls - 1)  # what the previous call has led to
        v = velocity(z, t)
        look(v, calls)
        calls += 1
        return v

    grid = uniform_grid(sampling.steps)
    look(sample(watched, z, grid, sampling.solver), per_step * (sampling.steps - 1))
    return [
        f" from step {step + 1} of {sampling.steps} (t = {float(grid[step]):.4g}) on" if step >= 0 else ""
        for step in first.tolist()
    ]


def generate(
    denoiser: Denoiser,
    sampling: Sampling,
    labels: Sequence[int],
    image_shape: tuple[int, int, int],
    null_class: int,
    world: World,
    may_stop: bool = False,
) -> Iterator[Tensor]:
    """This process's share of the images 0 .. len(labels) - 1, in index order, as batches uint8 (B, 3, H, W).

    With `may_stop` it ends between two batches where a process was asked to stop.

    Raises:
        UserError: an image with values that are not finite.
    """
    mine = share(len(labels), world)
    starts = range(mine.start, mine.stop, sampling.batch_size)
    with evaluation_mode(denoiser):
        for start in progress(starts, world, len(starts), "sampling", "batch"):
            if may_stop and requested_of_any(world):
                break
            index = range(start, min(start + sampling.batch_size, mine.stop))
            yield make_images(denoiser, sampling, index, labels, image_shape, null_class, world.device)


def generate_all(
    denoiser: Denoiser,
    sampling: Sampling,
    labels: Sequence[int],
    image_shape: tuple[int, int, int],
    null_class: int,
    world: World,
    may_stop: bool = False,
) -> Tensor | None:
    """All images uint8 (len(labels), 3, H, W) on rank 0's host, None elsewhere.

    Raises:
        Preempted: on all processes, with `may_stop`, where any was asked to stop.
    """
    empty = torch.empty((0, *image_shape), dtype=torch.uint8)
    batches = [b.cpu() for b in generate(denoiser, sampling, labels, image_shape, null_class, world, may_stop)]
    if may_stop and any_of(world, requested_of_any(world) is not None):
        raise Preempted("stopped before all images were there, of which none is kept; the same command makes them")
    return gather_by_index(torch.cat([empty, *batches]), len(labels), world)
