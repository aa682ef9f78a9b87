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
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from denoiser import Denoiser
from experiments.data import fft_ring_power
from experiments.results import table
from experiments.run import append, read_lines, results_file
from experiments.samples import GRIDS, REAL, generate, grid_of, quality
from experiments.schedule_gaps import predicted_gap
from experiments.train import Run, build_denoiser, train
from sampler import SOLVERS
from util.errors import UserError
from util.io import REPOSITORY, make_folder, provenance

NETWORK, ARMS = Run("cifar10", 8, "linear_half", 0, steps=2400), ("linear_half", "linear_mixed")
EVALUATIONS, IMAGES = (8, 16, 32, 50, 100), 500


def steps_for(solver: str, count: int) -> int:
    """Return the most steps that take at most `count` evaluations."""
    return max(steps for steps in range(1, count + 1) if SOLVERS[solver].nfe(steps) <= count)


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
    times = grid_of(grid, steps, torch.arange(1), torch.arange(1))
    return predicted_gap(fft_ring_power("cifar10")[0], times, solver)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.few_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = results_file("few_steps", args.quick)
    counts, count, real, steps = EVALUATIONS, IMAGES, REAL, NETWORK.steps
    if args.quick:
        path.unlink(missing_ok=True)
        counts, count, real, steps = EVALUATIONS[:1], 20, 40, 20
    done = [line["setting"] for line in read_lines(path)]
    try:
        for arm in ARMS:
            run = replace(NETWORK, arm=arm, steps=steps)
            settings = [
                {"arm": arm, "solver": s, "grid": g, "steps": steps_for(s, n), "evaluations": n, "images": count}
                for n, g, s in product(counts, GRIDS, SOLVERS)
            ]
            left = [setting for setting in settings if setting not in done]
            denoiser = network(run) if left else None
            for setting in tqdm(left, arm, unit="setting", disable=None):
                solver, grid, sampling_steps = setting["solver"], setting["grid"], setting["steps"]
                images = generate(denoiser, count, sampling_steps, solver, grid)
                own = own_gap(solver, grid, sampling_steps)
                line = {
                    "setting": setting,
                    **quality(images, real),
                    "own_gap": None if own is None else round(own, 4),
                    "network": asdict(run),
                    **provenance(torch.device("cpu")),
                    "command": ["python", "-m", "experiments.few_steps"],
                }
                append(path, line)
    except UserError as error:
        print(f"experiments.few_steps: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(summary(path))
    return 0


def summary(path: Path) -> str:
    """Return one Markdown table: distance and spectrum gap, a row for each solver and grid."""
    cells: dict[tuple[str, str, str], dict[int, str]] = {}  # of each row, by evaluations
    for line in read_lines(path):
        setting = line["setting"]
        row = cells.setdefault((setting["arm"], setting["solver"], setting["grid"]), {})
        row[setting["evaluations"]] = f"{line['fd_effnet_lite0']:.0f} / {line['spectrum_gap']:.2f}"
    counts = sorted({count for row in cells.values() for count in row})
    keys = [key for key in product(ARMS, SOLVERS, GRIDS) if key in cells]
    rows = [[*key, *(cells[key].get(count, "-") for count in counts)] for key in keys]
    return table(["network", "solver", "grid", *(f"{count} evaluations" for count in counts)], rows)


if __name__ == "__main__":
    sys.exit(main())
