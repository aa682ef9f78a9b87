"""Time a training step: images per second, share of the measured ceiling, peak memory. One JSON line.

    python -m benchmarks.step                                                     in small, on a CPU
    python -m benchmarks.step --model JiT-B/16 --img_size 256 --batch_size 64     flags of main_jit.py
    python -m benchmarks.step ... --versus=--disable_dct_patchify                 in turns with other flags
    python -m benchmarks.step ... --inductor combo_kernels=True                   in turns with options of torch.compile
    python -m benchmarks.step ... --graph                                         in turns with CUDA graphs (GPU)
    python -m benchmarks.step ... --reference DIR                                 in turns with a published release
    python -m benchmarks.step ... --kernels                                       also the GPU's kernels by kind

What runs is engine_jit.Trainer.train_step itself, on random images in memory.
"""

import argparse
import ast
import shlex
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor_config

from benchmarks.common import ceiling, emit, in_turns, median_and_range, with_spectrum
from benchmarks.graph import Graphed
from benchmarks.reference import Release
from engine_jit import Trainer
from util import rng
from util.compile import prepare_device, resolve_mode
from util.config import parse_args, resolve, split_global_batch
from util.data.loader import GlobalBatchSampler, open_images
from util.dist.context import DistContext, find_context
from util.profile import mean_flops

SMALL = {"model": "JiT-Ti/4", "img_size": 32, "batch_size": 8}
FIXED = {"dataset": "random", "online_eval": False, "lr": 1e-4, "output_dir": "unused", "epochs": 10_000}
KINDS = {  # kind of a kernel -> parts of its name; the first that fits
    "attention": ("flash", "fmha", "sdpa"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "wgrad", "dgrad", "conv"),
    "optimizer and EMA": ("adam", "multi_tensor", "foreach", "lerp"),
    # Inductor names a kernel after the operations that are fused into it.
    "norm of q and k, rotary": ("_flip_",),
    "SwiGLU": ("triton_poi_fused_cat_mul_silu", "triton_poi_fused_mul_silu"),
    "norms, adaLN, residual": ("rms_norm",),
    "noise and flips": ("triton_poi_fused_bitwise", "bitwise_xor"),
    "other compiled": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")


class Steps:
    """A turn of a variant: some training steps. `peak_gb` is the memory that it takes on a GPU."""

    def __init__(self, flags: dict, steps: int, ctx: DistContext, graph: bool = False):
        on_gpu = ctx.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        config = split_global_batch(resolve({**SMALL, **flags, **FIXED}), ctx.world_size)
        config = replace(with_spectrum(config), num_workers=0)
        images = open_images(config)
        sampler = GlobalBatchSampler(len(images), config.batch_size, 0, 1, config.accum_iter, config.seed)
        self.trainer = Trainer(config, flags, (images, None, sampler), 0, None, None, ctx)
        self.trainer.denoiser.train()
        self.compiled = resolve_mode(config.compile, ctx.device) != "off"
        if graph:
            self.trainer.add_gradient = Graphed(self.trainer.add_gradient, self.trainer.denoiser.parameters())
        self.steps, self.done, self.batch = steps, 0, next(iter(self.trainer.loader))
        self()
        self.peak_gb = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3) if on_gpu else None

    def __call__(self) -> None:
        rng.use_compiler(self.compiled)  # of the process, so the variant built last has set it
        batches = iter([self.batch] * (self.steps * self.trainer.config.accum_iter))
        for _ in range(self.steps):
            self.trainer.train_step(batches, self.done)
            self.done += 1


def kernels(steps: Steps, seconds: float) -> dict:
    """Return milliseconds and launches of a step by kind of kernel, and the share of time in which the GPU is idle.

    Args:
        seconds: of a step without the profiler, which slows the host down: the idle share is of that time.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [e for e in profile.events() if e.device_type == cuda and not e.is_user_annotation]  # which span kernels
    milliseconds, launches, names = Counter(), Counter(), Counter()
    for event in events:
        kind = kind_of(event.name)
        milliseconds[kind] += event.device_time / 1e3 / steps.steps
        launches[kind] += 1 / steps.steps
        names[event.name] += event.device_time / 1e3 / steps.steps
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, end = 0.0, spans[0][0]
    for begin, stop in spans:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return {
        "milliseconds": {kind: round(value, 3) for kind, value in milliseconds.most_common()},
        "launches": {kind: round(value, 1) for kind, value in launches.items()},
        "launches_per_step": round(sum(launches.values()), 1),
        "busy_milliseconds": round(busy / 1e3 / steps.steps, 3),
        "idle_share": round(1 - busy / 1e6 / steps.steps / seconds, 4),
        "longest": {name[:80]: round(value, 3) for name, value in names.most_common(15)},
    }


def inductor_option(text: str) -> tuple[str, Any]:
    """Return the name and the value of NAME=VALUE."""
    name, _, value = text.partition("=")
    if name not in inductor_config.get_config_copy():
        raise argparse.ArgumentTypeError(f"{name!r} is no setting of torch._inductor.config")
    return name, ast.literal_eval(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--versus", help="flags of a second variant, added to those of the first")
    parser.add_argument(
        "--inductor", nargs="+", type=inductor_option, metavar="NAME=VALUE", help="torch._inductor.config of the second"
    )
    parser.add_argument("--graph", action="store_true", help="forward and backward pass of the second as a CUDA graph")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="checkout of a published release")
    parser.add_argument("--kernels", action="store_true", help="profile the kernels of both (GPU)")
    options, words = parser.parse_known_args()
    flags = parse_args(words)
    ctx = find_context(flags.get("device"))
    prepare_device(ctx.device)
    variants = {"first": Steps(flags, options.steps, ctx)}
    first = variants["first"].trainer
    if options.versus is not None or options.inductor or options.graph:
        second = parse_args([*words, *shlex.split(options.versus or "")])
        with inductor_config.patch(dict(options.inductor or ())):  # its first turn compiles
            variants["second"] = Steps(second, options.steps, ctx, options.graph)
    if options.reference:
        bf16 = first.denoiser.autocast_dtype is not None
        variants["reference"] = Release(options.reference, first.config, bf16, options.steps, ctx.device)
    seconds = in_turns(variants, options.repeats, ctx.device)
    asked = ("versus", "inductor", "graph", "steps", "repeats")
    content: dict = {"flags": words, **{name: getattr(options, name) for name in asked}}
    for name, variant in variants.items():
        trainer = first if name == "reference" else variant.trainer
        rate = trainer.config.global_batch * options.steps / statistics.median(seconds[name])
        flops = 3 * mean_flops(trainer) * rate  # a backward pass costs two forward passes
        top = ceiling(ctx.device, trainer.denoiser.autocast_dtype or torch.float32)
        content[name] = {
            "images_per_s": round(rate, 2),
            "tflops": round(flops / 1e12, 4),
            "peak_gb": variant.peak_gb,
            "share_of_ceiling": round(flops / top, 4),
            "ceiling_tflops": round(top / 1e12, 3),
        }
        if options.kernels and ctx.device.type == "cuda" and name != "reference":
            content[name]["kernels"] = kernels(variant, statistics.median(seconds[name]) / options.steps)
        if name != "first":
            ratios = [slow / fast for slow, fast in zip(seconds[name], seconds["first"], strict=True)]
            content[f"first_over_{name}"] = median_and_range(ratios, 4)
    emit("step", ctx.device, content)


if __name__ == "__main__":
    main()
