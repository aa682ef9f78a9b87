"""Time sampling with guidance on its interval: images per second. One JSON line.

    python -m benchmarks.sampler                                                            in small, on a CPU
    python -m benchmarks.sampler --model JiT-B/16 --img_size 256 --gen_bsz 64               flags of main_jit.py
    python -m benchmarks.sampler ... --graph                                                in turns with CUDA graphs

What runs is util.evaluation.generate.generate, from the starting noise on the CPU to 8-bit images on the device.
"""

import argparse
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch

from benchmarks.common import emit, in_turns, median_and_range, with_spectrum
from benchmarks.graph import Graphed
from util.build import autocast_dtype, build_denoiser
from util.compile import compile_denoiser, prepare_device
from util.config import parse_args, resolve
from util.cpu_layers import speed_up_on_cpu
from util.dist.context import find_context
from util.evaluation.generate import generate

SMALL = {"model": "JiT-Ti/4", "img_size": 32, "gen_bsz": 4, "num_sampling_steps": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--batches", type=int, default=1, help="batches of a turn")
    parser.add_argument("--graph", action="store_true", help="also with the velocity as a CUDA graph")
    options, words = parser.parse_known_args()
    config = with_spectrum(resolve({**SMALL, **parse_args(words), "dataset": "random"}))
    ctx = find_context(config.device)
    prepare_device(ctx.device)
    denoiser = build_denoiser(config, autocast_dtype(config, ctx.device)).to(ctx.device).eval()
    if ctx.device.type == "cpu":
        speed_up_on_cpu(denoiser)
    compile_denoiser(denoiser, config.compile, ctx.device)
    count = config.gen_bsz * options.batches
    labels = [i % config.class_num for i in range(count)]

    def turn(velocity: Callable[..., torch.Tensor]) -> None:
        with mock.patch.object(denoiser, "velocity", velocity):
            for _ in generate(denoiser, config, range(count), labels, ctx):
                pass

    variants = {"sampling": partial(turn, denoiser.velocity)}
    if options.graph:
        variants["graph"] = partial(turn, Graphed(denoiser.velocity))
    with torch.no_grad(), denoiser.cast_weights():  # here already, since a recording refers to these weights
        seconds = in_turns(variants, options.repeats, ctx.device)
    content: dict = {"flags": words}
    for name, values in seconds.items():
        median, *limits = median_and_range([count / s for s in values], 3)
        content |= {"images_per_s": median, "range": limits} if name == "sampling" else {name: [median, *limits]}
    emit("sampler", ctx.device, content)


if __name__ == "__main__":
    main()
