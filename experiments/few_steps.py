"""How good are samples after few evaluations of the network? Solver x grid x evaluations, on one network.

    python -m experiments.few_steps             trains the networks first, or finds them in output/few_steps/
    python -m experiments.few_steps --quick     networks of a few steps, few images

Networks are those of the studies (experiments/train.py) on CIFAR-10, patch 8, behind linear Spectral Forcing: one is
trained on the default density of t, half of the draws uniform, since that density has next to nothing above 0.9, the
other on the spectral times `mixed`. A setting that has a line in experiments/results/few_steps.jsonl is not done again.

A line holds the quality of the samples (experiments/samples.py) and `own_gap`, the spectrum gap of the solver alone:
Gaussian data of the measured spectrum, with its exact velocity.
"""

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from denoiser import Denoiser
from experiments.data import fft_ring_power
from experiments.run import read_lines, results_file
from experiments.samples import GRIDS, REAL, generate, grid_of, quality
from experiments.train import Run, build_denoiser, train
from sampler import SOLVERS, evaluations, sample
from spectral_ops.spectrum import spectrum_gap
from util.errors import UserError
from util.io import REPOSITORY, make_folder, provenance

NETWORK, ARMS = Run("cifar10", 8, "linear_half", 0, steps=2400), ("linear_half", "linear_mixed")
EVALUATIONS, IMAGES = (8, 16, 32, 50, 100), 500


def steps_for(solver: str, count: int) -> int:
    """Return the most steps that take at most `count` evaluations."""
    return max(steps for steps in range(1, count + 1) if evaluations(solver, steps) <= count)


def network(run: Run) -> Denoiser:
    """Return the trained network of a run, from output/few_steps/ if it is there."""
    path = REPOSITORY / "output" / "few_steps" / f"{run.arm}_{run.steps}.pth"
    if path.exists():
        denoiser = build_denoiser(run)
        denoiser.load_state_dict(torch.load(path, weights_only=True))
        return denoiser.eval()
    denoiser, _, _ = train(run)
    make_folder(path.parent)
    torch.save(denoiser.state_dict(), path)
    return denoiser


def own_gap(solver: str, grid: str, steps: int) -> float | None:
    """Return the spectrum gap of exact sampling of Gaussian data; None for noise, or grids of classes or images."""
    if solver == "sde" or grid in ("class", "instance"):
        return None
    power = fft_ring_power("cifar10")[0]

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        t = t.double()[:, None, None, None]
        return ((t * power / (t**2 * power + (1 - t) ** 2)) - 1) / (1 - t) * z

    times = grid_of(grid, steps, torch.arange(1), torch.arange(1))
    amplitude = sample(velocity, torch.ones(1, 1, 1, len(power), dtype=torch.float64), times, solver)
    return spectrum_gap(power, amplitude.flatten().square())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.few_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path, count = results_file("few_steps", args.quick), 20 if args.quick else IMAGES
    counts = EVALUATIONS[:1] if args.quick else EVALUATIONS
    make_folder(path.parent)
    if args.quick:
        path.unlink(missing_ok=True)
    steps = 20 if args.quick else NETWORK.steps
    runs = {arm: replace(NETWORK, arm=arm, steps=steps) for arm in ARMS}
    settings: list[dict[str, Any]] = [
        {"arm": arm, "solver": solver, "grid": grid, "steps": steps_for(solver, n), "evaluations": n, "images": count}
        for arm in ARMS
        for n in counts
        for grid in GRIDS
        for solver in SOLVERS
    ]
    done = [line["setting"] for line in read_lines(path)]
    left = [setting for setting in settings if setting not in done]
    try:
        networks = {arm: network(runs[arm]) for arm in {setting["arm"] for setting in left}}
        for setting in tqdm(left, unit="setting", disable=None):
            solver, grid, steps = (setting[name] for name in ("solver", "grid", "steps"))
            images = generate(networks[setting["arm"]], count, steps, solver, grid)
            own = own_gap(solver, grid, steps)
            line = {
                "setting": setting,
                **quality(images, 40 if args.quick else REAL),
                "own_gap": None if own is None else round(own, 4),
                "network": runs[setting["arm"]].__dict__,
                **provenance(torch.device("cpu")),
                "command": ["python", "-m", "experiments.few_steps"],
            }
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
    except UserError as error:
        print(f"experiments.few_steps: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(table(path))
    return 0


def table(path: Path) -> str:
    """Return one Markdown table: distance and spectrum gap, a row for each solver and grid."""
    lines = list(read_lines(path))
    counts = sorted({line["setting"]["evaluations"] for line in lines})
    out = ["| network | solver | grid | " + " | ".join(f"{n} evaluations" for n in counts) + " |"]
    out.append("|---" * (3 + len(counts)) + "|")
    for arm, solver, grid in product(ARMS, SOLVERS, GRIDS):
        cells = {}
        for line in lines:
            setting = line["setting"]
            if (setting["arm"], setting["solver"], setting["grid"]) == (arm, solver, grid):
                cells[setting["evaluations"]] = f"{line['fd_effnet_lite0']:.0f} / {line['spectrum_gap']:.2f}"
        if cells:
            out.append(f"| {arm} | {solver} | {grid} | " + " | ".join(cells.get(n, "-") for n in counts) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    sys.exit(main())
