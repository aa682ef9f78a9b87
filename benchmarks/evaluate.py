"""An evaluation from noise to metrics, images per second end to end: one JSON line.

    python -m benchmarks.evaluate                                                     in small, on a CPU
    python -m benchmarks.evaluate --model JiT-B/16 --img_size 256 --dataset imagefolder --metrics fid,is \
        --fid_stats FILE --num_images 4096 --batch_size 128 --num_sampling_steps 50 --precision bf16
"""

import torch

from benchmarks import memory
from benchmarks.common import COMPILE, DTYPES, add_model, emit, parser
from benchmarks.turns import short, spread
from engine_jit import evaluate
from util import config
from util.acceleration import compile_network, use_tf32
from util.build import DenoiserConfig
from util.distributed import World
from util.generation import Sampling
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
    use_tf32(device)
    given = {
        n: getattr(options, n) for n in ("model", "img_size", "class_num", "dataset", "metrics", "num_images", "cfg")
    }
    given |= {"num_sampling_steps": options.num_sampling_steps, "gen_bsz": options.batch_size, "evaluate_gen": True}
    args = config.resolve({**given, "fid_stats": options.fid_stats}, None, training=False)
    shape, world = DenoiserConfig.from_args(args), World(device=device)
    suite, results = build_suite(args, world, args.num_images), {}
    for name in options.precision:
        before = memory.held(device)
        denoiser = shape.build(DTYPES[name]).to(device).eval()
        compile_network(denoiser, options.compile)
        with torch.no_grad():  # fresh weights make grey images, which no metric is defined for
            for parameter in denoiser.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))

        def once(denoiser=denoiser) -> dict:
            how = Sampling.from_args(args)
            return evaluate(denoiser, how, args.num_images, shape.image_shape, args.class_num, suite, world)

        peak = memory.peak(once, device) - before  # with what the metrics keep and the network that they use
        parts = sorted((once()["seconds"] for _ in range(options.repeats)), key=lambda of: sum(of.values()))
        totals, middle = [sum(of.values()) for of in parts], len(parts) // 2
        results[name] = {"seconds": short(totals[middle]), "seconds_range": spread(totals)}
        results[name] |= {"images_per_s": short(args.num_images / totals[middle]), "peak_gb": short(peak / 1e9)}
        results[name] |= {"seconds_of_parts": parts[middle]}
    emit("evaluate", options, {"results": results})


if __name__ == "__main__":
    main()
