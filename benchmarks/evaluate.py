"""An evaluation from noise to metrics, images per second end to end: one JSON line.

    python -m benchmarks.evaluate                                                     in small, on a CPU
    python -m benchmarks.evaluate --model JiT-B/16 --img_size 256 --dataset imagefolder --metrics fid,is \
        --fid_stats FILE --num_images 4096 --batch_size 128 --num_sampling_steps 50 --precision bf16
"""

from argparse import Namespace
from typing import Any

import torch

from benchmarks import memory
from benchmarks.common import COMPILE, DTYPES, add_model, emit, parser
from benchmarks.turns import short, spread
from engine_jit import evaluate
from util import config
from util.acceleration import compile_network, prepare_device
from util.build import DenoiserConfig
from util.distributed import World
from util.generation import Sampling
from util.metrics import MetricSuite
from util.preparation import build_suite


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=3, clock=False)
    add_model(found, model="JiT-Demo/8", batch=50)
    found.add_argument("--dataset", default="digits")
    found.add_argument("--metrics", default="class_agreement")
    found.add_argument("--fid_stats")
    found.add_argument("--num_images", type=int, default=100)
    found.add_argument("--num_sampling_steps", type=int, default=5)
    found.add_argument("--cfg", type=float, default=2.9)
    found.add_argument("--compile", default="off", choices=COMPILE)
    found.set_defaults(class_num=10)
    options = found.parse_args(argv)
    device = torch.device(options.device)
    prepare_device(device)
    given = {
        n: getattr(options, n) for n in ("model", "img_size", "class_num", "dataset", "metrics", "num_images", "cfg")
    }
    given |= {"num_sampling_steps": options.num_sampling_steps, "gen_bsz": options.batch_size, "evaluate_gen": True}
    args = config.resolve({**given, "fid_stats": options.fid_stats}, None, training=False)
    world, before = World(device=device), memory.held(device)
    suite = build_suite(args, world, args.num_images)
    results = {name: measure(args, DTYPES[name], options, suite, world, before) for name in options.precision}
    emit("evaluate", options, {"results": results})


def measure(
    args: Namespace, dtype: torch.dtype | None, options: Namespace, suite: MetricSuite, world: World, before: int
) -> dict[str, Any]:
    """Its memory counts from `before`: with the networks of the metrics."""
    shape, sampling = DenoiserConfig.from_args(args), Sampling.from_args(args)
    denoiser = shape.build(dtype).to(world.device).eval()
    compile_network(denoiser, options.compile)
    with torch.no_grad():  # fresh weights make grey images, which no metric is defined for
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def once() -> dict[str, Any]:
        return evaluate(denoiser, sampling, args.num_images, shape.image_shape, args.class_num, suite, world)

    peak = memory.peak(once, world.device) - before
    parts = sorted((once()["seconds"] for _ in range(options.repeats)), key=lambda of: sum(of.values()))
    totals, middle = [sum(of.values()) for of in parts], len(parts) // 2
    return {
        **{"seconds": short(totals[middle]), "seconds_range": spread(totals)},
        **{"images_per_s": short(args.num_images / totals[middle]), "peak_gb": short(peak / 1e9)},
        "seconds_of_parts": parts[middle],
    }


if __name__ == "__main__":
    main()
