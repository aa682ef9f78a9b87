"""Sampling with guidance on an interval: images/s and share of the device's measured ceiling; one JSON line.

    python -m benchmarks.sampler                                                       in small, on a CPU
    python -m benchmarks.sampler --model JiT-B/16 --img_size 256 --batch_size 64 --num_sampling_steps 50

What runs is util.evaluation.generate.generate, from the starting noise on the CPU to 8-bit images. The arithmetic
counts the forward passes that the interval leaves: two for an image within it, one outside.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch

from benchmarks.common import Turns, build_parser, emit, settings, short
from benchmarks.reference import Reference
from sampler import guidance_scale, uniform_grid
from util import rng
from util.build import autocast_dtype, build_denoiser
from util.compile import compile_denoiser
from util.cpu_layers import speed_up_on_cpu
from util.dist.context import DistContext
from util.evaluation.generate import generate
from util.profile import count_flops


def forward_passes(config: Any) -> int:
    """Return how often an image goes through the network."""
    grid = uniform_grid(config.num_sampling_steps)
    times = torch.cat([grid[:-1], grid[1:-1] if config.sampling_method == "heun" else grid[:0]])
    return len(times) + int((guidance_scale(times, config.cfg, config.interval_min, config.interval_max) != 1).sum())


def sampling(config: Any, images: int, device: torch.device) -> Callable[[], None]:
    """Return a function that generates that many images."""
    denoiser = build_denoiser(config, autocast_dtype(config, device)).to(device).eval()
    if device.type == "cpu":
        speed_up_on_cpu(denoiser)
    compile_denoiser(denoiser, config.compile, device)
    labels, ctx = [i % config.class_num for i in range(images)], DistContext(device=device)

    def turn() -> None:
        rng.use_compiler(config.compile != "off")
        for _ in generate(denoiser, config, range(images), labels, ctx):
            pass

    return turn


def sampling_settings(options: Namespace, precision: str, compile: str) -> Any:
    low, high = options.interval
    given = {"precision": precision, "compile": compile, "cfg": options.cfg, "interval_min": low, "interval_max": high}
    return settings(options, **given, num_sampling_steps=options.num_sampling_steps, gen_bsz=options.batch_size)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--num_sampling_steps", type=int, default=5)
    parser.add_argument("--cfg", type=float, default=2.9, help="1 is no guidance")
    parser.add_argument("--interval", type=float, nargs=2, default=[0.1, 1.0])
    parser.add_argument("--batches", type=int, default=1, help="of a turn")
    options = parser.parse_args(argv)
    turns, images = Turns(options), options.batch_size * options.batches
    configs = {
        f"{p} compile {c}": sampling_settings(options, p, c) for p, c in product(options.precision, options.compile)
    }
    for name, config in configs.items():
        turns.add(name, lambda config=config: sampling(config, images, turns.device))
    given = ("num_sampling_steps", "cfg", "interval_min", "interval_max", "sampling_method")
    with ExitStack() as stack:
        for precision in options.precision if options.reference else ():
            flags = {flag: getattr(config, flag) for flag in given}
            other = stack.enter_context(Reference(options, "sample", precision, options.batches, **flags))
            turns.join(f"{precision} reference", other)
        turns.run(options.repeats)
    flops, passes = count_flops(options.model, options.img_size, num_classes=options.class_num), forward_passes(config)
    results = turns.results(images, dict.fromkeys(configs, flops * passes * images))
    emit("sampler", options, gflop_per_pass=short(flops / 1e9), forward_passes=passes, results=results)


if __name__ == "__main__":
    main()
