"""Images per second of sampling, with guidance on an interval: one JSON line.

    python -m benchmarks.sampler                                                      in small, on a CPU
    python -m benchmarks.sampler --model JiT-B/16 --img_size 256 --batch_size 64 --num_sampling_steps 50
    python -m benchmarks.sampler --reference DIR                                      beside another checkout

What runs is util.generation.generate, from the starting noise on the CPU to 8-bit images. The arithmetic of a turn
counts the forward passes that the interval leaves: two for each image within it, one outside.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

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
from benchmarks.step import setting, without_memory
from benchmarks.turns import short
from sampler import guidance_scale, uniform_grid
from util.build import DenoiserConfig
from util.distributed import World
from util.flops import forward_flop
from util.generation import Sampling, generate


def forward_passes(sampling: Sampling) -> int:
    """Of one image."""
    grid = uniform_grid(sampling.steps)
    stages = [*grid[:-1], *(grid[1:-1] if sampling.solver == "heun" else [])]
    return sum(1 + int(guidance_scale(t, sampling.cfg, *sampling.interval) != 1) for t in stages)


class Batch:
    """Our sampling: the images of `labels` at each call, with the same weights in whatever way."""

    def __init__(self, shape: DenoiserConfig, compiled: Sequence[str], labels: list[int], world: World):
        self.denoiser = shape.build().to(world.device)
        self.ways = Ways(self.denoiser, compiled)
        self.shape, self.labels, self.world = shape, labels, world

    def __call__(self, way: tuple[str, bool], sampling: Sampling, dtype: torch.dtype | None) -> None:
        self.ways.use(*way)
        self.denoiser.autocast_dtype = dtype
        shape = self.shape
        for _ in generate(self.denoiser, sampling, self.labels, shape.image_shape, shape.null_class, self.world):
            pass


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5)
    add_model(found)
    found.add_argument("--num_sampling_steps", type=int, default=5)
    found.add_argument("--cfg", type=float, nargs="+", default=[2.9], help="1 is no guidance")
    found.add_argument("--interval", type=float, nargs=2, default=[0.1, 1.0])
    found.add_argument("--batches", type=int, default=1, help="of a turn; a CUDA graph is recorded in the first")
    add_ways(found)
    found.add_argument("--cuda_graph", nargs="+", default=["off"], choices=ON)
    found.add_argument("--reference", type=Path, metavar="DIR", help="another checkout of the JiT family")
    options = found.parse_args(argv)
    device = torch.device(options.device)
    args, _ = setting(options, steps=1)
    shape, shapes = DenoiserConfig.from_args(args), without_memory(args)
    if "on" in options.cuda_graph and device.type != "cuda":
        raise SystemExit("--cuda_graph on: this is no CUDA device")
    labels = [i % options.class_num for i in range(options.batch_size * options.batches)]
    settings = {
        cfg: Sampling("heun", options.num_sampling_steps, cfg, tuple(options.interval), 0, options.batch_size)
        for cfg in options.cfg
    }
    variants, ceilings = start(options, options.precision)
    about, uses = {}, {}  # name of a variant -> its precision and guidance, and how it uses Batch
    for (title, way), graph in product(ways(options), options.cuda_graph):
        for name in options.precision:
            for cfg, sampling in settings.items():
                key = f"{name} cfg {cfg:g} {title}{' graph' if ON[graph] else ''}"
                about[key] = name, cfg
                call = way, replace(sampling, cuda_graph=ON[graph]), DTYPES[name]
                uses[key] = lambda ours, call=call: ours(*call)
    variants.add(lambda: Batch(shape, options.compile, labels, World(device=device)), uses)
    with ExitStack() as stack:
        for cfg in options.cfg if options.reference else []:
            theirs = {f"{name} cfg {cfg:g} reference": name for name in options.precision}
            flags = {"batches": options.batches, "num_sampling_steps": options.num_sampling_steps, "cfg": cfg}
            flags |= {"interval_min": options.interval[0], "interval_max": options.interval[1]}
            other = Reference(options, "sampler", theirs, device.type == "cuda", **flags)
            stack.enter_context(other).join(variants)
            about |= {key: (name, cfg) for key, name in theirs.items()}
        turns = variants.take_turns(options.repeats)

    results = of_ceilings(turns, ceilings)
    for key, (name, cfg) in about.items():
        results[key] = turns.of(key)
        if key in turns.failed:
            continue
        results[key]["images_per_s"] = short(len(labels) / turns.median(key))
        if not key.endswith("reference"):
            passes = forward_passes(settings[cfg])
            flop = forward_flop(shapes.net) * len(labels) * passes
            results[key] |= {"forward_passes": passes}
            results[key]["of_ceiling"] = turns.share(key, flop, f"ceiling {name}", ceilings[name].flop)
            others = {other: f"{other} cfg {cfg:g} reference" for other in options.precision}
            results[key] |= speed_ups(turns, key, others)
    content = {"gflop_per_pass": short(forward_flop(shapes.net) / 1e9)}
    emit("sampler", options, {**content, "results": results})


if __name__ == "__main__":
    main()
