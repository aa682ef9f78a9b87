"""A step of training: images per second, share of the ceiling, peak memory; one JSON line for each model.

    python -m benchmarks.step                                                          in small, on a CPU
    python -m benchmarks.step --model JiT-B/32 --img_size 256 --batch_size 4 --precision fp32 bf16
    python -m benchmarks.step --model JiT-B/16 --img_size 256 --batch_size 128 --precision bf16 --compile off block
    python -m benchmarks.step --reference DIR                                          beside another checkout

What runs is the loop of training itself (engine_jit.train_one_epoch) on images in memory: random numbers, forward and
backward pass, optimizer, both averages. On a GPU a turn ends with the wait that a log line costs.
"""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import reference
from benchmarks.common import DTYPES, Ceiling, add_model, emit, parser, peak_memory, short, take_turns
from engine_jit import Training, train_one_epoch
from util import config
from util.acceleration import compile_network
from util.build import DenoiserConfig
from util.distributed import World
from util.flops import operator_flop, training_flop
from util.training_run import build_recipe
from util.training_state import build_training

SILENT = SimpleNamespace(record=lambda *_: None, say=lambda *_: None)
LR = 1e-4


class Steps:
    """Our training: an epoch of `steps` steps at each call."""

    def __init__(self, args, compiled: str, steps: int, batches: list, world: World):
        shape = DenoiserConfig.from_args(args)
        self.training: Training = build_training(args, shape, None, None, world)[0]
        self.operator = self.training.denoiser.spectral_forcing
        compile_network(self.training.denoiser, compiled)
        self.recipe = build_recipe(args, steps, shape, world)
        self.batches, self.world, self.epoch = batches, world, 0

    def __call__(self, spectral_forcing: bool, dtype: torch.dtype | None) -> None:
        self.training.denoiser.spectral_forcing = self.operator if spectral_forcing else None
        self.training.denoiser.autocast_dtype = dtype
        first = self.epoch * self.recipe.steps_per_epoch
        train_one_epoch(
            self.training, self.batches, self.epoch, first, self.recipe, self.world, SILENT, lambda step: None
        )
        self.epoch += 1


def setting(options: Namespace, steps: int) -> tuple[Namespace, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Settings of a run from the flags of add_model, and a batch for each of its steps."""
    given = {"model": options.model, "img_size": options.img_size, "class_num": options.class_num, "lr": LR}
    given |= {"batch_size": options.batch_size, "global_batch": options.batch_size, "accum_iter": 1}
    given |= {"epochs": 10**6, "warmup_epochs": 0.0, "device": options.device}
    given["compile"] = "off"  # Steps compiles, as its variant says
    size = (options.batch_size, 3, options.img_size, options.img_size)
    batches = [
        (torch.randint(256, size, dtype=torch.uint8), torch.randint(options.class_num, size[:1])) for _ in range(steps)
    ]
    return config.resolve(given, None, training=True), batches


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5)
    add_model(found)
    found.add_argument("--steps", type=int, default=1, help="steps of a turn")
    found.add_argument("--compile", nargs="+", default=["off"], choices=("off", "block", "model"))
    found.add_argument("--sf", nargs="+", default=["on", "off"], choices=("on", "off"), help="Spectral Forcing")
    found.add_argument("--reference", type=Path, metavar="DIR", help="another checkout of the JiT family")
    options = found.parse_args(argv)
    device = torch.device(options.device)
    args, batches = setting(options, options.steps)
    variants, about = {}, {}
    for name in options.precision:
        ceiling = Ceiling(device, DTYPES[name])
        variants[f"ceiling {name}"], about[f"ceiling {name}"] = ceiling, ceiling
    for compiled in options.compile:
        ours = Steps(args, compiled, options.steps, batches, World(device=device))
        for name in options.precision:
            for sf in options.sf:
                key = f"{name} sf {sf} compile {compiled}"
                variants[key] = lambda ours=ours, sf=sf, name=name: ours(sf == "on", DTYPES[name])
                about[key] = name
    if options.reference:
        for name in options.precision:
            other = reference.load(options.reference, options.model, options.img_size, options.class_num, device)
            steps = reference.Steps(other, device, DTYPES[name], LR)
            key = f"{name} reference"
            variants[key], about[key] = lambda steps=steps: [steps(*batch) for batch in batches], name
    turns = take_turns(variants, options.repeats, device, options.clock)

    net, images = ours.training.denoiser.net, options.batch_size * options.steps
    flop = training_flop(net) * images
    results = {}
    for key, name in about.items():
        results[key] = turns.of(key)
        if isinstance(name, Ceiling):
            results[key] |= name.report(turns.median(key))
            continue
        results[key]["images_per_s"] = short(images / turns.median(key))
        results[key]["of_ceiling"] = turns.share(key, flop, f"ceiling {name}", about[f"ceiling {name}"].flop)
        if options.reference and "reference" not in key:
            for other in options.precision:
                results[key][f"speed_up over {other}"] = turns.ratio(f"{other} reference", key)
    content = {
        "gflop_per_image": short(training_flop(net) / 1e9),
        "gflop_operator": short(operator_flop(ours.operator) / 1e9),
    }
    emit("step", options, {**content, "results": results, **peak_memory(device)})


if __name__ == "__main__":
    main()
