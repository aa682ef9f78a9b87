"""A training step: images/s, share of the device's measured ceiling, peak memory of a GPU; one JSON line.

    python -m benchmarks.step                                                          in small, on a CPU
    python -m benchmarks.step --model JiT-B/16 --img_size 256 --batch_size 64 --precision bf16 --compile off block
    python -m benchmarks.step ... --reference DIR                                      beside a release

What runs is Trainer.train_step on random images in pinned memory; a turn ends with the wait that a log line costs.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count, islice, product, repeat

from benchmarks.common import Turns, build_parser, emit, settings, short
from benchmarks.reference import Reference
from engine_jit import Trainer
from util import rng
from util.config import split_global_batch
from util.dist.context import DistContext
from util.profile import count_flops


def build_trainer(options: Namespace, precision: str, compile: str, sf: str) -> Trainer:
    """Return a trainer with fresh weights."""
    given = {"precision": precision, "compile": compile, "disable_dct_patchify": sf == "off"}
    config = settings(options, **given, epochs=10**6, lr=1e-4, warmup_epochs=0.0)
    return Trainer(split_global_batch(config, 1), given, None, None, DistContext(device=options.device))


def training(trainer: Trainer, steps: int) -> Callable[[], float]:
    """Return a function that does `steps` training steps and returns the mean loss."""
    batch = next(iter(trainer.loader))
    numbers = count()

    def turn() -> float:
        rng.use_compiler(trainer.config.compile != "off")  # a setting of the process, which variants share
        for step in islice(numbers, steps):
            trainer.train_step(repeat(batch), step)
        values = trainer.metrics.read()
        trainer.metrics.reset()
        return values["loss"]

    return turn


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--sf", nargs="+", default=["on"], choices=("on", "off"), help="Spectral Forcing")
    options = parser.parse_args(argv)
    turns, images = Turns(options), options.batch_size * options.steps
    flops = 3 * count_flops(options.model, options.img_size, num_classes=options.class_num)  # backward: twice forward
    names = {
        f"{p} compile {c} sf {s}": (p, c, s) for p, c, s in product(options.precision, options.compile, options.sf)
    }
    for name, how in names.items():
        turns.add(name, lambda how=how: training(build_trainer(options, *how), options.steps))
    with ExitStack() as stack:
        for precision in options.precision if options.reference else ():
            other = stack.enter_context(Reference(options, "train", precision, options.steps))
            turns.join(f"{precision} reference", other)
        turns.run(options.repeats)
    results = turns.results(images, dict.fromkeys(names, flops * images))
    emit("step", options, gflop_per_image=short(flops / 1e9), results=results)


if __name__ == "__main__":
    main()
