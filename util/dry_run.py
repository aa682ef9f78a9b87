"""What a run will take, from a few of its steps: nothing of it is written.

The steps are the run's own, with its images and loader, and after them the program ends. The first ones are not timed:
they allocate memory, compile, and use up the batches that the loader has read ahead meanwhile.
"""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from types import SimpleNamespace

import torch

from engine_jit import Recipe, Training, train_one_epoch
from util.distributed import World
from util.flops import forward_flop, operator_flop, training_flop
from util.memory import RESERVE, measure
from util.parallel import is_sharded

UNTIMED, TIMED = 3, 7


class _Enough(Exception):
    """The steps are done."""


def expected_memory(args: Namespace, world: World, training: Training) -> float:
    """Bytes on each GPU, or of a process on a CPU; calculated (util/memory.py)."""
    parallel = "fsdp" if is_sharded(training.denoiser) else "ddp"
    needs = measure(args.model, args.img_size, training.denoiser.autocast_dtype)
    fixed, image = needs.for_batch(world.size, parallel, args.activation_checkpointing)
    return fixed + image * args.batch_size - (0 if world.device.type == "cuda" else RESERVE)


def seconds_of_steps(
    training: Training, loader: Iterable, first: int, recipe: Recipe, world: World
) -> tuple[list[float], float]:
    """(seconds of each timed step, those before the first one was done), of at most TIMED steps."""
    moments = [time.perf_counter()]
    ahead = getattr(loader, "num_workers", 0) * (getattr(loader, "prefetch_factor", None) or 0)  # batches
    untimed = UNTIMED + math.ceil(ahead / recipe.accum_iter)
    last = min(first + untimed + TIMED, recipe.epochs * recipe.steps_per_epoch)
    silent = SimpleNamespace(record=lambda *_: None, say=lambda *_: None)

    def after_step(step: int) -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        moments.append(time.perf_counter())
        if step >= last:
            raise _Enough

    epoch = first // recipe.steps_per_epoch
    with suppress(_Enough):
        train_one_epoch(training, loader, epoch, first, recipe, world, silent, after_step)
    each = [after - before for before, after in pairwise(moments)]
    return each[untimed:] or each[-1:], each[0]


def dry_run(args: Namespace, training: Training, loader: Iterable, recipe: Recipe, world: World, step: int) -> str:
    """Time a few steps from `step` on, and say what the rest of the run will take: lines of text."""
    denoiser, images = training.denoiser, args.global_batch
    net, operator = denoiser.net, denoiser.spectral_forcing
    expected = expected_memory(args, world, training)
    seconds, first = seconds_of_steps(training, loader, step, recipe, world)
    median = statistics.median(seconds)
    left = recipe.epochs * recipe.steps_per_epoch - step
    used = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else None
    flop = training_flop(net) + (operator_flop(operator) if operator is not None else 0)
    rows = {
        "model": f"{args.model} at {args.img_size} px, {sum(p.numel() for p in denoiser.parameters()):,} parameters",
        "arithmetic": f"{forward_flop(net) / 1e9:.3g} GFLOP an image forward, {flop * images / 1e12:.3g} TFLOP a step",
        "memory, calculated": f"{expected / 1e9:.3g} GB on each of {world.size}, batch size {args.batch_size}",
        **({"memory, measured": f"{used / 1e9:.3g} GB at most"} if used is not None else {}),
        "first step": f"{first:.3g} s",
        "a step": f"{median:.3g} s ({min(seconds):.3g} to {max(seconds):.3g} in {len(seconds)}), "
        f"{images / median:.4g} images/s, {flop * images / median / 1e12:.3g} TFLOP/s",
        "steps": f"{left} are left: {recipe.epochs} epochs of {recipe.steps_per_epoch}, {step} done",
        "training": f"about {duration(left * median)}, without checkpoints, samples and evaluations",
        "GPU hours": f"about {left * median * world.size / 3600:.4g}" if world.device.type == "cuda" else "none",
    }
    width = max(map(len, rows))
    return "\n".join(["dry run: nothing was written", *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def duration(seconds: float) -> str:
    """As 3 days 4 h, 2 h 5 min, 12 min or 40 s."""
    minutes = math.ceil(seconds / 60)
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"
