"""How good are samples after few evaluations of the network? Solver x grid x evaluations, on one network.

    python -m experiments.few_steps             trains the networks first, or finds them in output/few_steps/
    python -m experiments.few_steps --quick     networks of a few steps, few images

Networks are those of the studies (experiments/train.py) on CIFAR-10, patch 8, behind linear Spectral Forcing: one is
trained on the default density of t, half of the draws uniform, since that density has next to nothing above 0.9, the
other on the spectral times `mixed`. A setting that has a line in experiments/results/few_steps.jsonl is not done again.

    fd_effnet_lite0   Fréchet distance to test images, by EfficientNet-Lite0: of so few images, for this table alone
    spectrum_gap      to the grey spectrum of training images
    own_gap           the gap of the solver alone: Gaussian data of the measured spectrum, with its exact velocity

Shapes: B images; grid (S + 1,) or (S + 1, B).
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
from experiments.data import fft_ring_power, open_data
from experiments.run import read_lines, results_file
from experiments.train import Run, build_denoiser, train
from sampler import SOLVERS, evaluations, sample, uniform_grid
from spectral_ops.schedule import TightSchedule, latest_time
from spectral_ops.spectrum import grey_spectrum, image_fits, rapsd, spectrum_gap
from util.errors import UserError
from util.evaluation.features import EffNetLite0
from util.evaluation.images import quantise
from util.evaluation.metrics import frechet_distance
from util.io import REPOSITORY, make_folder, provenance
from util.rng import CounterRNG

NETWORK, ARMS = Run("cifar10", 8, "linear_half", 0, steps=2400), ("linear_half", "linear_mixed")
GRIDS = ("uniform", "logsnr", "mixed", "instance")  # instance: mixed, by the spectrum of a training image of the class
EVALUATIONS = (8, 16, 32, 64)
IMAGES, REAL, BATCH = 500, 2000, 100


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
    denoiser, _ = train(run)
    make_folder(path.parent)
    torch.save(denoiser.state_dict(), path)
    return denoiser


def grid_of(name: str, steps: int, index: Tensor, y: Tensor) -> Tensor:
    """Return the times of a grid; for `instance` those of the images `index` with classes y."""
    if name == "uniform":
        return uniform_grid(steps)
    power, centred = fft_ring_power("cifar10")
    if name != "instance":
        return TightSchedule.of_spectrum(power, centred, 32, variant=name).sampling_grid(steps)
    data = open_data("cifar10")
    x, labels = data.batch(1, 0, 5000)  # images, of which each generated one takes the spectrum of one of its class
    chosen = torch.stack([x[labels == int(c)][int(i)] for i, c in zip(index // data.classes, y, strict=True)])
    level = chosen.mean((2, 3))
    fits = image_fits(rapsd(chosen), level, x.mean((0, 2, 3)), 32)
    return TightSchedule.of_fits(fits, 32, variant="mixed").sampling_grid(steps)


@torch.no_grad()
def generate(denoiser: Denoiser, solver: str, grid: str, steps: int, count: int) -> Tensor:
    """Return images uint8 (count, 3, 32, 32); classes in turn, start noise by (0, index)."""
    images, classes = [], open_data("cifar10").classes
    t_eps = None if grid == "uniform" else min(denoiser.loss.t_eps, 1 - latest_time())
    for index in torch.arange(count).split(BATCH):
        y = index % classes
        noise = CounterRNG(0, 0, index).normal("start_noise", 3 * 32 * 32).view(-1, 3, 32, 32)

        def of_step(i: int, index: Tensor = index, noise: Tensor = noise) -> Tensor:
            return CounterRNG(0, i, index).normal("solver", noise[0].numel()).view_as(noise)

        def velocity(z: Tensor, t: Tensor, y: Tensor = y) -> Tensor:
            return denoiser.velocity(z, t, y, t_eps)

        images.append(quantise(sample(velocity, noise, grid_of(grid, steps, index, y), solver, of_step)))
    return torch.cat(images)


def own_gap(solver: str, grid: str, steps: int) -> float | None:
    """Return the spectrum gap of exact sampling of Gaussian data; None for noise or a grid for each image."""
    if solver == "sde" or grid == "instance":
        return None
    power = fft_ring_power("cifar10")[0]

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        t = t.double()[:, None, None, None]
        return ((t * power / (t**2 * power + (1 - t) ** 2)) - 1) / (1 - t) * z

    times = grid_of(grid, steps, torch.zeros(0), torch.zeros(0))
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
    path, count, real_count = results_file("few_steps", args.quick), *((20, 40) if args.quick else (IMAGES, REAL))
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
    try:
        extractor = EffNetLite0()
        real = quantise(open_data("cifar10").held_out(real_count)[0])
        features = torch.cat([extractor(part)["effnet_lite0"] for part in real.split(BATCH)])
        mu, sigma = features.double().mean(0), torch.cov(features.double().T)
        spectrum = grey_spectrum(quantise(open_data("cifar10").batch(1, 0, 5000)[0])).mean(0)
        networks = {arm: network(run) for arm, run in runs.items()}
        for setting in tqdm([s for s in settings if s not in done], unit="setting", disable=None):
            solver, grid, steps = (setting[name] for name in ("solver", "grid", "steps"))
            images = generate(networks[setting["arm"]], solver, grid, steps, count)
            found = torch.cat([extractor(part)["effnet_lite0"] for part in images.split(BATCH)])
            own = own_gap(solver, grid, steps)
            line = {
                "setting": setting,
                "fd_effnet_lite0": round(frechet_distance(found, mu, sigma), 2),
                "spectrum_gap": round(spectrum_gap(spectrum, grey_spectrum(images).mean(0)), 4),
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
