"""Spectral Forcing alone, and as a share of a training step: one JSON line.

    python -m benchmarks.sf_operator                                                  in small, on a CPU
    python -m benchmarks.sf_operator --model JiT-B/32 --img_size 256 --batch_size 4
    python -m benchmarks.sf_operator --model JiT-700M --img_size 256 --batch_size 128 --precision bf16 --compile block

"t each" has a time for each image, as in training; "t shared" one for all, as in sampling. The share is the operator's
time over that of a step with it, turn by turn.
"""

import torch

from benchmarks.common import DTYPES, Ceiling, add_model, emit, parser, peak_memory, short, take_turns
from benchmarks.step import Steps, setting
from util.distributed import World
from util.flops import operator_flop


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5)
    add_model(found)
    found.add_argument("--calls", type=int, default=5, help="calls of the operator in a turn")
    found.add_argument("--compile", default="off", choices=("off", "block", "model"))
    options = found.parse_args(argv)
    device = torch.device(options.device)
    args, batches = setting(options, steps=1)
    ours = Steps(args, options.compile, 1, batches, World(device=device))
    operator = ours.operator
    z = torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=device)
    t = torch.rand(options.batch_size, device=device)
    ceiling = Ceiling(device, None)  # the operator is float32 in any precision

    def repeated(times: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(options.calls):
                operator(z, times)

    variants = {"ceiling fp32": ceiling, "t each": lambda: repeated(t), "t shared": lambda: repeated(t[:1])}
    for name in options.precision:
        variants[f"step {name}"] = lambda name=name: ours(True, DTYPES[name])
    turns = take_turns(variants, options.repeats, device, options.clock)
    flop = operator_flop(operator) * options.batch_size * options.calls
    results = {"ceiling fp32": turns.of("ceiling fp32") | ceiling.report(turns.median("ceiling fp32"))}
    for key in ("t each", "t shared"):
        per_image = turns.median(key) / options.calls / options.batch_size
        results[key] = turns.of(key) | {"milliseconds_per_image": short(per_image * 1e3)}
        results[key]["of_ceiling"] = turns.share(key, flop, "ceiling fp32", ceiling.flop)
    for name in options.precision:
        share = turns.ratio("t each", f"step {name}")
        share = {
            "median": short(share["median"] / options.calls),
            "range": [short(v / options.calls) for v in share["range"]],
        }
        results[f"step {name}"] = turns.of(f"step {name}") | {"share_of_operator": share}
    content = {"gflop_operator_per_image": short(operator_flop(operator) / 1e9)}
    emit("operator", options, {**content, "results": results, **peak_memory(device)})


if __name__ == "__main__":
    main()
