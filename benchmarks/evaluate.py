"""An evaluation from noise to metrics, images per second end to end: one JSON line.

    python -m benchmarks.evaluate                                                     in small, on a CPU
    python -m benchmarks.evaluate --model JiT-B/16 --img_size 256 --dataset imagefolder --metrics fid,is \
        --fid_stats FILE --num_images 4096 --batch_size 128 --num_sampling_steps 50 --precision bf16
"""

import torch

from benchmarks.common import DTYPES, add_model, emit, parser, peak_memory, short
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
    found.add_argument("--compile", default="off", choices=("off", "block", "model"))
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
        denoiser = shape.build(DTYPES[name]).to(device).eval()
        compile_network(denoiser, options.compile)
        with torch.no_grad():  # fresh weights make grey images, which no metric is defined for
            for parameter in denoiser.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        reports = [
            evaluate(
                denoiser, Sampling.from_args(args), args.num_images, shape.image_shape, args.class_num, suite, world
            )
            for _ in range(options.repeats + 1)
        ][1:]
        totals = sorted(sum(report["seconds"].values()) for report in reports)
        middle = totals[len(totals) // 2]
        part = next(r for r in reports if sum(r["seconds"].values()) == middle)["seconds"]
        results[name] = {"seconds": short(middle), "seconds_range": [short(totals[0]), short(totals[-1])]}
        results[name] |= {"images_per_s": short(args.num_images / middle), "seconds_of_parts": part}
    emit("evaluate", options, {"results": results, **peak_memory(device)})


if __name__ == "__main__":
    main()
