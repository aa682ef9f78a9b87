"""Images from a denoiser: image i is a function of the settings, its label and i alone.

Shapes: B images of a batch; images (B, 3, H, W), y (B,); N images in all, with indices 0 .. N - 1.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from denoiser import Denoiser
from sampler import Velocity, guided, sample, start_noise
from util.acceleration import no_more_graphs
from util.cuda_graph import replayed
from util.distributed import World, any_of, gather_by_index, requested_of_any, share
from util.flags import DEFAULTS
from util.images import quantise
from util.logger import progress
from util.preemption import Preempted
from util.schedules import GeneratedSchedules

T, U = TypeVar("T"), TypeVar("U")


@dataclass(frozen=True)
class Sampling:
    """How images are made. Batch size and CUDA graph decide only how fast.

    t_eps: clamp of 1 - t in sampling; None where it is the denoiser's own.
    """

    solver: str
    steps: int
    cfg: float
    interval: tuple[float, float]
    seed: int
    batch_size: int
    schedules: GeneratedSchedules = field(default_factory=GeneratedSchedules)
    t_eps: float | None = None
    cuda_graph: bool = False

    @classmethod
    def from_args(cls, args: Namespace) -> "Sampling":
        """Raises UserError where there is no spectrum file for what asks for one."""
        interval, schedules = (args.interval_min, args.interval_max), GeneratedSchedules.from_args(args)
        t_eps = schedules.t_eps(args.t_eps) if args.sample_t_eps is None else args.sample_t_eps
        return cls(
            *(args.sampling_method, args.num_sampling_steps, args.cfg, interval, args.seed, args.gen_bsz),
            *(schedules, t_eps if args.pred_param == "x" and t_eps != args.t_eps else None, args.cuda_graph),
        )

    def describe(self) -> dict[str, Any]:
        """All that decides the images, ready for JSON."""
        return {
            "solver": self.solver,
            "steps": self.steps,
            "cfg": self.cfg,
            "interval": list(self.interval),
            "seed": self.seed,
            **self.schedules.describe(),
            **({} if self.t_eps is None else {"sample_t_eps": self.t_eps}),
        }


def setting_name(epoch: int, ema: str, sampling: Sampling) -> str:
    """Part of a file name that differs wherever images of a run differ, apart from seed and labels."""
    guidance = f"cfg{sampling.cfg:.10g}"
    if sampling.cfg != 1 and sampling.interval != (DEFAULTS["interval_min"], DEFAULTS["interval_max"]):
        guidance += "-t{:.10g}to{:.10g}".format(*sampling.interval)
    clamp = "" if sampling.t_eps is None else f"-teps{sampling.t_eps:.10g}"
    return f"epoch{epoch + 1:04d}-{ema}-{sampling.solver}{sampling.steps}-{guidance}{sampling.schedules.name}{clamp}"


@contextmanager
def sampling_mode(denoiser: Denoiser, cuda_graph: bool = False) -> Iterator[None]:
    """No dropout, no gradients, weights as they are used; afterwards the denoiser is as it was."""
    was_training = denoiser.training
    denoiser.eval()
    try:
        with torch.no_grad(), denoiser.fixed_weights(), replayed(denoiser) if cuda_graph else nullcontext():
            yield
    finally:
        denoiser.train(was_training)


def split(index: Sequence[int], size: int) -> list[Sequence[int]]:
    """Batches of `size`; the last may be smaller."""
    return [index[start : start + size] for start in range(0, len(index), size)]


def ahead(make: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
    """make(item) of each item in order, by a thread that is one ahead of who takes them."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(make, item) for item in items[:1]]
        for following in range(1, len(items) + 1):
            made = coming.pop().result()
            coming += [thread.submit(make, item) for item in items[following : following + 1]]
            yield made


def batches_of_noise(
    batches: Sequence[Sequence[int]], sampling: Sampling, image_shape: tuple[int, int, int], device: torch.device
) -> Iterator[Tensor]:
    """The starting noise (B, 3, H, W) of each batch of image indices, drawn on the CPU while a GPU is at work."""
    if device.type == "cpu":
        return (start_noise(sampling.seed, index, image_shape) for index in batches)
    return ahead(lambda index: start_noise(sampling.seed, index, image_shape), batches)


def make_images(
    denoiser: Denoiser,
    sampling: Sampling,
    index: Sequence[int],
    labels: Sequence[int],
    noise: Tensor,
    null_class: int,
    device: torch.device,
) -> Tensor:
    """The images `index` (B,) as uint8 (B, 3, H, W) on the device; `labels` holds those of all images.

    Args:
        noise: their `start_noise` (B, 3, H, W).

    Raises:
        NonFiniteImages: values that are not finite. The message names image, label, seed and the step of the
            solver from which on they are not; for that the batch is computed a second time.
    """
    y = torch.tensor([labels[i] for i in index], device=device)  # (B,)
    z = denoiser.noise_scale * noise.to(device, non_blocking=True)
    grid, bounds = sampling.schedules.times(sampling.steps, sampling.seed, index, y)
    bounds = None if bounds is None else bounds.to(device)
    velocity = guided(_velocity(denoiser, sampling.t_eps, bounds), y, null_class, sampling.cfg, sampling.interval)
    with no_more_graphs(len(index) < sampling.batch_size):
        x = sample(velocity, z, grid, sampling.solver)
    return quantise(x, index, y, sampling.seed, lambda: first_bad_steps(velocity, z, grid, sampling.solver))


def _velocity(
    denoiser: Denoiser, t_eps: float | None, bounds: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """velocity(z, t, y) of a batch, once or, for guidance, twice in a row; the network is told `bounds`, if any."""
    if t_eps is None and bounds is None:
        return denoiser.velocity

    def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told = None if bounds is None else bounds.repeat(len(z) // len(bounds), 1)
        return denoiser.velocity(z, t, y, t_eps, told)

    return velocity


def first_bad_steps(velocity: Velocity, z: Tensor, grid: Tensor, solver: str) -> list[str]:
    """Integrate again and say of each image from which step of the solver on it is not finite; "" where it is.

    A velocity belongs to the step that asks for it: Heun's steps ask twice (the last, Euler's, once), Euler's once.
    """
    per_step, steps = 2 if solver == "heun" else 1, len(grid) - 1
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

    look(sample(watched, z, grid, solver), per_step * (steps - 1))
    times = grid if grid.dim() == 2 else grid[:, None].expand(-1, len(z))  # (S + 1, B)
    return [
        f" from step {step + 1} of {steps} (t = {float(times[step, b]):.4g}) on" if step >= 0 else ""
        for b, step in enumerate(first.tolist())
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

    With `may_stop` it ends between two batches where a process was asked to stop. Until it ends the denoiser is in
    `sampling_mode`: who saves, loads or trains its weights closes this first.

    Raises:
        UserError: an image with values that are not finite.
    """
    mine = share(len(labels), world)
    batches = split(mine, sampling.batch_size)
    noise = batches_of_noise(batches, sampling, image_shape, world.device)
    with sampling_mode(denoiser, sampling.cuda_graph), closing(noise):
        for index in progress(batches, world, len(batches), "sampling", "batch"):
            if may_stop and requested_of_any(world):
                break
            yield make_images(denoiser, sampling, index, labels, next(noise), null_class, world.device)


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
