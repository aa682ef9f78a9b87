"""Levels of resolution beside the whole image, against what training costs: a table from the JSON lines alone.

    python -m experiments.resolution
    python -m experiments.resolution --time             first measures the time of a step, all arms in turns, minutes
    python -m experiments.resolution --spectrum FILE    operations that levels save with the spectrum of other images

Runs of different lengths are compared on purpose: the loss of each arm and number of steps beside that of plain JiT
after 600 steps with the same seed. Costs are shares of that run's: the operations of training (the network's matrix
products, two per multiply-add; the transforms to and from a level add 1% to 3%), and the processor time of the steps.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from denoiser import LogitNormal
from experiments.results import Key, cell, differences, load, table
from experiments.run import append, read_lines, results_file
from experiments.train import CPU, Run, train
from model_jit import JiT_models
from spectral_ops.resolution import LevelTimes, ResolutionSchedule
from util.data.spectrum_file import load_spectrum
from util.errors import UserError
from util.io import provenance
from util.profile import count_flops

STUDIES = ("resolution", "resolution_time", "resolution_longer", "resolution_kinds", "resolution_delta")
STUDIES += ("resolution_photographs", "resolution_photographs_longer")
SAMPLES = {  # patch -> studies, sampling steps
    8: (("cifar10_samples", "resolution_samples"), (20,)),
    4: (("resolution_samples_fine", "resolution_samples_fine_levels"), (25, 50)),
}
MODELS = ("JiT-B/16", "JiT-B/32", "JiT-700M")
ARMS = {  # data, patch -> what is compared
    ("cifar10", 4): ("plain", "linear", "levels", "linear_levels"),
    ("cifar10", 8): ("plain", "linear", "levels", "linear_levels"),
    ("photographs", 8): ("plain", "linear", "levels", "two_levels", "linear_two_levels"),
}
TURNS = 7
PLAIN = ("plain", 600)


def step_time(run: Run, short: int = 2, long: int = 8) -> float:
    """Return the processor seconds of a training step: what a longer training takes more, so that set-up cancels."""

    def cost(steps: int) -> float:
        start = time.process_time()
        train(replace(run, steps=steps))
        return time.process_time() - start

    return (cost(long) - cost(short)) / (long - short)


def measure_times() -> None:
    """Append a line for each data and patch: the time of a step of each arm over that of plain JiT, and its range."""
    torch.set_num_threads(1)
    for (data, patch), arms in ARMS.items():
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(TURNS):
            for arm in arms:
                seconds[arm].append(step_time(Run(data, patch, arm, 0)))
        ratios = {
            arm: sorted(a / plain for a, plain in zip(values, seconds["plain"], strict=True))
            for arm, values in seconds.items()
        }
        line = {
            "data": data,
            "patch": patch,
            "plain_s": round(statistics.median(seconds["plain"]), 4),
            "ratio": {arm: round(statistics.median(values), 3) for arm, values in ratios.items()},
            "range": {arm: [round(values[0], 3), round(values[-1], 3)] for arm, values in ratios.items()},
            **provenance(CPU),
            "command": ["python", "-m", "experiments.resolution", "--time"],
        }
        append(results_file("resolution_step"), line)


def step_ratios(data: str, patch: int) -> dict[str, float]:
    """Return the time of a step of each arm over that of plain JiT, as last measured; empty if it was not."""
    lines = read_lines(results_file("resolution_step"))
    lines = [line for line in lines if (line.get("data", "cifar10"), line["patch"]) == (data, patch)]
    return lines[-1]["ratio"] if lines else {}


def savings(file: Path) -> str:
    """Return a table for a spectrum file: operations of the network without levels over those with, in training."""
    try:
        with np.load(file, allow_pickle=False) as content:
            meta = json.loads(str(content["meta"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no spectrum file of tools.measure_spectrum ({error!r}).") from error
    size = meta["img_size"]
    power = load_spectrum(file, size, meta["class_num"]).dct_power
    rows = []
    for count in (1, 2):
        schedule = ResolutionSchedule(size, power, count)
        ratios = [", ".join(f"{t:.2f}" for t in schedule.times)]
        for model in MODELS:
            if size % (JiT_models[model].keywords["patch_size"] << count):
                ratios.append("-")
                continue
            levels = LevelTimes(LogitNormal(), schedule).levels
            with_levels = statistics.mean(count_flops(model, size, level) for level in levels)
            ratios.append(f"{count_flops(model, size) / with_levels:.1f}")
        rows.append([count, *ratios])
    return table([f"{size} px: levels", "t_1, t_2, ...", *MODELS], rows)


def lines_of(data: str, patch: int) -> list[Mapping[str, Any]]:
    """Return the runs of all studies with these data and this patch size. Raises UserError if there are none."""
    lines = []
    for study in STUDIES:
        try:
            lines += [line for line in load(study)[0] if (line["run"]["data"], line["run"]["patch"]) == (data, patch)]
        except UserError:
            continue  # it has not been run
    if not any((line["run"]["arm"], line["run"]["steps"]) == PLAIN for line in lines):
        raise UserError(f"There is no run of plain JiT on {data} at patch {patch}; these studies have it: {STUDIES}.")
    return lines


def by_cost(lines: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Return, for each arm and number of steps, the share of operations, and the losses beside those of PLAIN."""
    cost = {(line["run"]["arm"], line["run"]["steps"]): line["tflop"] for line in lines}  # the same for all seeds
    found = differences(lines, PLAIN)
    return {key: {"operations": cost[key] / cost[PLAIN], **found[key]} for key in found}


def samples(patch: int) -> str:
    """Return the table of samples at a patch size, beside those of plain JiT after 600 steps. Raises UserError."""
    studies, sampling_steps = SAMPLES[patch]
    lines, against = [line for study in studies for line in load(study)[0]], ("half", 600)
    found = {count: differences(lines, against, count) for count in sampling_steps}
    names, rows = ("fd_effnet_lite0", "precision", "recall", "spectrum_gap"), []
    for key, count in product(found[sampling_steps[0]], sampling_steps):
        numbers = found[count][key]
        distance, cells = numbers[names[0]], [cell(name, numbers[name], key == against) for name in names]
        rows.append([*key, count, f"{distance.reference + distance.mean:.0f}", *cells])
    columns = ["arm", "steps", "sampling steps", "FD-EffNet-Lite0", "against half", *names[1:]]
    return f"CIFAR-10, patch {patch}, samples:\n\n{table(columns, rows)}"


def markdown(data: str, patch: int) -> str:
    rows, ratios = [], step_ratios(data, patch)
    for (arm, steps), found in by_cost(lines_of(data, patch)).items():
        seconds = f"{ratios[arm] * steps / PLAIN[1]:.2f}" if arm in ratios else "-"
        loss, operations = found["density"], f"{found['operations']:.2f}"
        rows.append([arm, steps, operations, seconds, loss, found["uniform"], loss.pairs])
    columns = ["arm", "steps", "operations", "time", "loss", "equal weight for all t", "seeds"]
    return f"{data}, patch {patch}; plain JiT after 600 steps is 1 and 0%:\n\n{table(columns, rows)}"


def tables() -> list[str]:
    """Return the tables of all that has been run, and say what has not. Raises UserError if nothing has."""
    made, missing = [], []
    for make, *setting in [*((markdown, *setting) for setting in ARMS), *((samples, patch) for patch in SAMPLES)]:
        try:
            made.append(make(*setting))
        except UserError as error:
            missing.append(error)
    if not made:
        raise missing[0]
    for error in missing:
        print(f"left out: {error}", file=sys.stderr)
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.resolution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--time", action="store_true", help="measure the time of a step")
    parser.add_argument("--spectrum", type=Path, metavar="FILE", help="from tools.measure_spectrum")
    args = parser.parse_args(argv)
    try:
        if args.spectrum:
            print(savings(args.spectrum))
            return 0
        if args.time:
            measure_times()
        print("\n\n".join(tables()))
    except UserError as error:
        print(f"experiments.resolution: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
