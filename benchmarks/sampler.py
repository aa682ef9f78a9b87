"""Images per second of sampling, with guidance on an interval: one JSON line.

    python -m benchmarks.sampler                                                      in small, on a CPU
    python -m benchmarks.sampler --model JiT-B/16 --img_size 256 --batch_size 64 --num_sampling_steps 50
    python -m benchmarks.sampler --reference DIR                                      beside another checkout

What runs is util.generation.generate, from the starting noise on the CPU to 8-bit images. The arithmetic of a turn
counts the forward passes that the interval leaves: two for each image within it, one outside.
"""

from pathlib import Path

import torch

from benchmarks import reference
from benchmarks.common import DTYPES, Ceiling, add_model, emit, parser, peak_memory, short, take_turns
from benchmarks.step import setting
from sampler import guidance_scale, uniform_grid
from util.acceleration import compile_network
from util.build import DenoiserConfig
from util.distributed import World
from util.flops import forward_flop
from util.generation import Sampling, generate


def forward_passes(sampling: Sampling) -> int:
    """Of one image."""
    grid = uniform_grid(sampling.steps)
    stages = [*grid[:-1], *(grid[1:-1] if sampling.solver == "heun" else [])]
    return sum(1 + int(guidance_scale(t, sampling.cfg, *sampling.interval) != 1) for t in stages)


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5)
    add_model(found)
    found.add_argument("--num_sampling_steps", type=int, default=5)
    found.add_argument("--cfg", type=float, nargs="+", default=[2.9], help="1 is no guidance")
    found.add_argument("--interval", type=float, nargs=2, default=[0.1, 1.0])
    found.add_argument("--compile", nargs="+", default=["off"], choices=("off", "block", "model"))
    found.add_argument("--reference", type=Path, metavar="DIR", help="another checkout of the JiT family")
    options = found.parse_args(argv)
    device = torch.device(options.device)
    args, _ = setting(options, steps=1)
    shape = DenoiserConfig.from_args(args)
    labels = [i % options.class_num for i in range(options.batch_size)]
    variants, about = {}, {}
    for name in options.precision:
        variants[f"ceiling {name}"] = about[f"ceiling {name}"] = Ceiling(device, DTYPES[name])

    def ours(denoiser, sampling: Sampling, dtype: torch.dtype | None) -> None:
        denoiser.autocast_dtype = dtype
        for _ in generate(denoiser, sampling, labels, shape.image_shape, shape.null_class, World(device=device)):
            pass

    def theirs(denoiser, dtype: torch.dtype | None) -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            denoiser.eval().generate(torch.tensor(labels, device=device))

    settings = {
        cfg: Sampling("heun", options.num_sampling_steps, cfg, tuple(options.interval), 0, len(labels))
        for cfg in options.cfg
    }
    for compiled in options.compile:
        denoiser = shape.build().to(device)
        compile_network(denoiser, compiled)
        for name in options.precision:
            for cfg, sampling in settings.items():
                key = f"{name} cfg {cfg:g} compile {compiled}"
                variants[key] = lambda d=denoiser, s=sampling, name=name: ours(d, s, DTYPES[name])
                about[key] = name, cfg
    if options.reference:
        for cfg in options.cfg:
            flags = {"num_sampling_steps": options.num_sampling_steps, "cfg": cfg}
            flags |= {"interval_min": options.interval[0], "interval_max": options.interval[1]}
            other = reference.load(
                options.reference, options.model, options.img_size, options.class_num, device, **flags
            )
            for name in options.precision:
                key = f"{name} cfg {cfg:g} reference"
                variants[key] = lambda d=other, name=name: theirs(d, DTYPES[name])
                about[key] = name, cfg
    turns = take_turns(variants, options.repeats, device, options.clock)
    results = {}
    for key, what in about.items():
        results[key] = turns.of(key)
        if isinstance(what, Ceiling):
            results[key] |= what.report(turns.median(key))
            continue
        name, cfg = what
        results[key]["images_per_s"] = short(len(labels) / turns.median(key))
        if not key.endswith("reference"):
            passes = forward_passes(settings[cfg])
            flop = forward_flop(denoiser.net) * len(labels) * passes
            results[key] |= {"forward_passes": passes}
            results[key]["of_ceiling"] = turns.share(key, flop, f"ceiling {name}", about[f"ceiling {name}"].flop)
            if options.reference:
                for other in options.precision:
                    results[key][f"speed_up over {other}"] = turns.ratio(f"{other} cfg {cfg:g} reference", key)
    content = {"gflop_per_pass": short(forward_flop(denoiser.net) / 1e9)}
    emit("sampler", options, {**content, "results": results, **peak_memory(device)})


if __name__ == "__main__":
    main()
