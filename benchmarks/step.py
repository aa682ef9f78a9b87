"""A step of training: images per second, share of the ceiling, peak memory; one JSON line.

    python -m benchmarks.step                                                          in small, on a CPU
    python -m benchmarks.step --model JiT-B/32 --img_size 256 --batch_size 4 --precision fp32 bf16
    python -m benchmarks.step --model JiT-B/16 --img_size 256 --batch_size 128 --precision bf16 --compile off block
    python -m benchmarks.step --reference DIR                                          beside another checkout

What runs is the loop of training itself (engine_jit.train_one_epoch) on images in memory: random numbers, forward and
backward pass, optimizer, both averages. On a GPU a turn ends with the wait that a log line costs.
"""

from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.common import (
    DTYPES,
    ON,
    Ways,
    add_model,
    add_ways,
    emit,
    of_ceilings,
    parser,
    speed_ups,
    start,
    ways,
)
from benchmarks.reference import Reference
from benchmarks.turns import batch, short
from denoiser import Denoiser
from engine_jit import Training, train_one_epoch
from util import config
from util.build import DenoiserConfig
from util.distributed import World
from util.flops import operator_flop, training_flop
from util.training_run import build_recipe
from util.training_state import build_training

SILENT = SimpleNamespace(record=lambda *_: None, say=lambda *_: None)
LR = 1e-4


class Steps:
    """Our training: an epoch of `steps` steps at each call, of the same weights in whatever way."""

    def __init__(self, args, compiled: Sequence[str], steps: int, batches: list, world: World):
        shape = DenoiserConfig.from_args(args)
        self.training: Training = build_training(args, shape, None, None, world)[0]
        self.operator = self.training.denoiser.spectral_forcing
        self.ways = Ways(self.training.denoiser, compiled)
        self.recipe = build_recipe(args, steps, shape, world)
        self.batches, self.world, self.epoch = batches, world, 0

    def __call__(self, way: tuple[str, bool], spectral_forcing: bool, dtype: torch.dtype | None) -> None:
        self.ways.use(*way)
        self.training.denoiser.spectral_forcing = self.operator if spectral_forcing else None
        self.training.denoiser.autocast_dtype = dtype
        first = self.epoch * self.recipe.steps_per_epoch
        train_one_epoch(
            self.training, self.batches, self.epoch, first, self.recipe, self.world, SILENT, lambda step: None
        )
        self.epoch += 1


def setting(options: Namespace, steps: int) -> tuple[Namespace, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Settings of a run from the flags of add_model, and a batch for each of its steps."""
    given = {"model": options.model, "img_size": options.img_size, "class_num": options.class_num, "lr": LR}
    given |= {"batch_size": options.batch_size, "global_batch": options.batch_size, "accum_iter": 1}
    given |= {"epochs": 10**6, "warmup_epochs": 0.0, "device": options.device}
    given["compile"] = "off"  # Steps compiles, as its variant says
    pinned = options.device == "cuda"  # as the loader of a run has them: the host does not wait for the copy
    batches = [batch(options.batch_size, options.img_size, options.class_num, pinned) for _ in range(steps)]
    return config.resolve(given, None, training=True), batches


def without_memory(args: Namespace) -> Denoiser:
    """The denoiser, for the arithmetic that follows from its shapes."""
    with torch.device("meta"):
        return DenoiserConfig.from_args(args).build()


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5)
    add_model(found)
    found.add_argument("--steps", type=int, default=1, help="steps of a turn")
    add_ways(found)
    found.add_argument("--sf", nargs="+", default=["on", "off"], choices=ON, help="Spectral Forcing")
    found.add_argument("--reference", type=Path, metavar="DIR", help="another checkout of the JiT family")
    options = found.parse_args(argv)
    device = torch.device(options.device)
    args, batches = setting(options, options.steps)
    shapes = without_memory(args)
    variants, ceilings = start(options, options.precision)
    about, uses = {}, {}  # name of a variant -> its precision, and how it uses Steps
    for title, way in ways(options):
        for name in options.precision:
            for sf in options.sf:
                key = f"{name} sf {sf} {title}"
                about[key] = name
                uses[key] = lambda ours, call=(way, ON[sf], DTYPES[name]): ours(*call)
    variants.add(lambda: Steps(args, options.compile, options.steps, batches, World(device=device)), uses)
    with ExitStack() as stack:
        if options.reference:
            theirs = {f"{name} reference": name for name in options.precision}
            decorators = device.type == "cuda"
            other = Reference(options, "step", theirs, decorators, steps=options.steps, lr=LR)
            stack.enter_context(other).join(variants)
            about |= theirs
        turns = variants.take_turns(options.repeats)

    images = options.batch_size * options.steps
    flop = training_flop(shapes.net) * images
    results = of_ceilings(turns, ceilings)
    for key, name in about.items():
        results[key] = turns.of(key)
        if key in turns.failed:
            continue
        results[key]["images_per_s"] = short(images / turns.median(key))
        results[key]["of_ceiling"] = turns.share(key, flop, f"ceiling {name}", ceilings[name].flop)
        if "reference" not in key:
            results[key] |= speed_ups(turns, key, {name: f"{name} reference" for name in options.precision})
    content = {
        "gflop_per_image": short(training_flop(shapes.net) / 1e9),
        "gflop_operator": short(operator_flop(shapes.spectral_forcing) / 1e9),
    }
    emit("step", options, {**content, "results": results})


if __name__ == "__main__":
    main()
