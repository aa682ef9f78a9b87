"""Images from a denoiser: image i is a function of weights, sampling settings, seed, its label and i alone.

Shapes: N images in all, with indices 0 .. N - 1; B of a batch; images (B, C, H, W), labels y (B,).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiser import Denoiser
from sampler import Velocity, guided, sample
from util.compile import no_recompile
from util.config import SampleConfig
from util.data.datasets import DATASETS
from util.dist.context import DistContext, any_rank, gather_rows, local_range
from util.dist.parallel import unsharded
from util.dist.preemption import Preempted, requested_on_any_rank
from util.errors import UserError
from util.evaluation.decode import decoder
from util.evaluation.images import labelled_grid, save_png
from util.log import progress
from util.rng import CounterRNG
from util.schedules import SampleSchedules


def own_t_eps(config: Any, schedules: SampleSchedules) -> float | None:
    """Return the lower bound of 1 - t in sampling, or None if it is the denoiser's own."""
    t_eps = schedules.t_eps(config.t_eps) if config.sample_t_eps is None else config.sample_t_eps
    return t_eps if config.pred_param != "v" and t_eps != config.t_eps else None


def sampling_settings(config: Any) -> dict[str, Any]:
    """Return everything that decides the images besides weights and labels, ready for JSON."""
    schedules = SampleSchedules.from_config(config)
    t_eps = own_t_eps(config, schedules)
    return {
        "solver": config.sampling_method,
        "steps": config.num_sampling_steps,
        "cfg": config.cfg,
        "interval": [config.interval_min, config.interval_max],
        "seed": config.seed,
        **schedules.describe(),
        **({} if t_eps is None else {"sample_t_eps": t_eps}),
        **({"vae": config.latents["vae"]["sha256"], "vae_tiled": config.vae_tiled} if config.latents else {}),
    }


def setting_name(config: Any, epoch: int) -> str:
    """Return the part of a file name that tells the images of a run apart, except for their seed and labels."""
    schedules = SampleSchedules.from_config(config)
    guidance = f"cfg{config.cfg:.10g}"
    interval = (config.interval_min, config.interval_max)
    if config.cfg != 1 and interval != (SampleConfig.interval_min, SampleConfig.interval_max):
        guidance += f"-t{config.interval_min:.10g}to{config.interval_max:.10g}"
    t_eps = own_t_eps(config, schedules)
    clamp = "" if t_eps is None else f"-teps{t_eps:.10g}"
    solver = f"{config.sampling_method}{config.num_sampling_steps}"
    return f"epoch{epoch + 1:04d}-{config.ema}-{solver}-{guidance}{schedules.name}{clamp}"


@contextmanager
def sampling_mode(denoiser: Denoiser) -> Iterator[None]:
    """Within the block there are no dropout and no gradients, and weights are whole and cast to their compute type.

    All ranks enter it together if the denoiser is sharded; within it each may compute on its own.
    """
    was_training = denoiser.training
    denoiser.eval()
    try:
        with unsharded(denoiser), torch.no_grad(), denoiser.cast_weights():
            yield
    finally:
        denoiser.train(was_training)


def start_noise(config: Any, index: Sequence[int]) -> Tensor:
    """Draw the unit noise (B, C, H, W) of the images `index`, on the CPU."""
    rng = CounterRNG(config.seed, 0, torch.tensor(index))
    return rng.normal("start_noise", math.prod(config.image_shape)).view(-1, *config.image_shape)


def generate(
    denoiser: Denoiser, config: Any, index: Sequence[int], labels: Sequence[int], ctx: DistContext
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield (indices, images uint8 (B, C, H, W) on the device) of the images `index`, in batches of --gen_bsz.

    Image i has labels[i]. It ends early, between two batches, once a rank was asked to stop. The denoiser is in
    `sampling_mode` until the end: exhaust or close the generator before the weights change.

    Raises:
        UserError: an image with non-finite values.
    """
    schedules, decode = SampleSchedules.from_config(config), decoder(config, ctx.device)
    batches = [index[i : i + config.gen_bsz] for i in range(0, len(index), config.gen_bsz)]
    with sampling_mode(denoiser), ThreadPoolExecutor(1) as thread:  # draws the next noise while a GPU is busy
        pending = [thread.submit(start_noise, config, batch) for batch in batches[:1]]
        for i, batch in enumerate(batches):
            if requested_on_any_rank(ctx):
                return
            noise = pending.pop().result()
            pending += [thread.submit(start_noise, config, following) for following in batches[i + 1 : i + 2]]
            y = torch.tensor([labels[k] for k in batch], device=ctx.device)
            with no_recompile(len(batch) < config.gen_bsz):
                images = sample_batch(denoiser, config, batch, schedules, y, noise.to(ctx.device))  # x
            yield batch, decode(images)


def sample_batch(
    denoiser: Denoiser,
    config: Any,
    index: Sequence[int],
    schedules: SampleSchedules,
    y: Tensor,
    noise: Tensor,
    watch: Callable[[Velocity], Velocity] = lambda velocity: velocity,
) -> Tensor:
    """Return the images `index` (B,) with labels y (B,) from unit noise (B, C, H, W): x (B, C, H, W).

    The solver integrates what `watch` makes of the velocity, guidance included. Raises UserError for non-finite images.
    """
    grid, logsnr_range = schedules.times(config.num_sampling_steps, CounterRNG(config.seed, 0, torch.tensor(index)), y)
    if logsnr_range is not None:
        logsnr_range = logsnr_range.to(y.device)
    t_eps = own_t_eps(config, schedules)

    def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        both = None if logsnr_range is None else logsnr_range.repeat(len(z) // len(index), 1)  # guided: the batch twice
        return denoiser.velocity(z, t, y, t_eps, both)

    def noise_of_step(i: int) -> Tensor:
        rng = CounterRNG(config.seed, i, torch.tensor(index, device=noise.device))
        return denoiser.noise_scale * rng.normal("solver", noise[0].numel()).view_as(noise)

    v = guided(velocity, y, config.null_class, config.cfg, (config.interval_min, config.interval_max))
    x = sample(watch(v), denoiser.noise_scale * noise, grid, config.sampling_method, noise_of_step)
    if bad := (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        which = ", ".join(f"image {index[b]} (label {int(y[b])})" for b in bad[:5])
        raise UserError(
            f"Sampling with seed {config.seed} gave non-finite values: {which}, {len(bad)} in this batch. Use another "
            "checkpoint, or --precision fp32."
        )
    return x


def generate_all(denoiser: Denoiser, config: Any, labels: Sequence[int], ctx: DistContext) -> Tensor | None:
    """Return all images uint8 (len(labels), C, H, W) on rank 0's host, None elsewhere.

    Raises:
        Preempted: on all ranks, once one was asked to stop.
    """
    index = local_range(len(labels), ctx)
    batches = generate(denoiser, config, index, labels, ctx)
    shown = progress(batches, ctx, math.ceil(len(index) / config.gen_bsz), "sampling", "batch")
    channels = 3 if config.latents else config.channels
    none = torch.empty((0, channels, config.pixels, config.pixels), dtype=torch.uint8)
    images = [none, *(images.cpu() for _, images in shown)]
    if any_rank(ctx, requested_on_any_rank(ctx) is not None):
        raise Preempted("Stopped before all images existed; none was kept. The same command generates them.")
    return gather_rows(torch.cat(images), len(labels), ctx)


def sample_grid(
    denoiser: Denoiser, config: Any, labels: Sequence[int], ctx: DistContext, path: Path, title: str
) -> Tensor | None:
    """Generate images with `labels` and write them as a labelled grid; return them as `generate_all` does.

    A row is a class if there are equally many images of each, more than one; otherwise the grid is about square.
    """
    images = generate_all(denoiser, config, labels, ctx)
    if ctx.is_main:
        counts = {labels.count(label) for label in labels}
        columns = counts.pop() if len(counts) == 1 and counts != {1} else max(1, round(len(labels) ** 0.5))
        known = None if config.labels_file else DATASETS[config.dataset].class_names
        names = known or [str(i) for i in range(config.class_num)]
        save_png(labelled_grid(images, [names[label] for label in labels], columns, title), path)
    return images
