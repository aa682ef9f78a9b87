"""Spectral Forcing alone, and as a share of a training step: one JSON line.

    python -m benchmarks.sf_operator                                                  in small, on a CPU
    python -m benchmarks.sf_operator --model JiT-B/32 --img_size 256 --batch_size 4
    python -m benchmarks.sf_operator --model JiT-700M --img_size 256 --batch_size 128 --precision bf16 --compile block

"t each" has a time for each image, as in training; "t shared" one for all, as in sampling. The share is the operator's
time over that of a step with it, turn by turn.
"""

import torch

from benchmarks.common import COMPILE, DTYPES, add_model, emit, of_ceilings, parser, start
from benchmarks.step import Steps, setting, without_memory
from benchmarks.turns import Turns, short
from util.distributed import World
from util.flops import operator_flop


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5)
    add_model(found)
    found.add_argument("--calls", type=int, default=5, help="calls of the operator in a turn")
    found.add_argument("--compile", default="off", choices=COMPILE)
    options = found.parse_args(argv)
    device = torch.device(options.device)
    args, batches = setting(options, steps=1)
    variants, ceilings = start(options, ["fp32"])  # the operator is float32 in any precision
    z = torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=device)
    t = torch.rand(options.batch_size, device=device)

    def repeated(ours: Steps, times: torch.Tensor) -> None:
        ours.ways.use(options.compile, False)
        with torch.no_grad():
            for _ in range(options.calls):
                ours.operator(z, times)

    uses = {"t each": lambda ours: repeated(ours, t), "t shared": lambda ours: repeated(ours, t[:1])}
    for name in options.precision:
        uses[f"step {name}"] = lambda ours, name=name: ours((options.compile, False), True, DTYPES[name])
    variants.add(lambda: Steps(args, [options.compile], 1, batches, World(device=device)), uses)
    turns = variants.take_turns(options.repeats)
    operator = without_memory(args).spectral_forcing
    flop = operator_flop(operator) * options.batch_size * options.calls
    results = of_ceilings(turns, ceilings) | {key: turns.of(key) for key in uses}
    for key in {"t each", "t shared"} - set(turns.failed):
        per_image = turns.median(key) / options.calls / options.batch_size
        results[key] |= {"milliseconds_per_image": short(per_image * 1e3)}
        results[key]["of_ceiling"] = turns.share(key, flop, "ceiling fp32", ceilings["fp32"].flop)
    for name in options.precision:
        if {"t each", f"step {name}"} <= set(turns.seconds):
            results[f"step {name}"]["share_of_operator"] = share(turns, f"step {name}", options.calls)
    content = {"gflop_operator_per_image": short(operator_flop(operator) / 1e9)}
    emit("operator", options, {**content, "results": results})


def share(turns: Turns, step: str, calls: int) -> dict:
    """Of one call of the operator in the time of a step."""
    of_all = turns.ratio("t each", step)
    return {"median": short(of_all["median"] / calls), "range": [short(v / calls) for v in of_all["range"]]}


if __name__ == "__main__":
    main()
