"""Print what a sampling grid costs without a network: the spectrum gap of exact sampling of Gaussian data.

    python -m experiments.schedule_gaps --spectrum tests/golden/cifar10_spectrum.json

The spectrum is that of a file of tools/measure_spectrum.py (.npz) or of tests/golden (.json). For Gaussian data with
power P_k in ring k the velocity is known exactly, and the solver itself multiplies each mode by an amplitude. The gap
between P_k and the power that comes out is due to the steps alone. It looks at power, so it does not rank FID.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sampler import sample, uniform_grid
from spectral_forcing import num_rings
from spectral_ops.schedule import VARIANTS, TightSchedule
from spectral_ops.spectrum import spectrum_gap

COLUMNS = [("euler", steps) for steps in (10, 20, 32, 50, 100)] + [("heun", steps) for steps in (8, 16, 32)]


def predicted_gap(power: Tensor, grid: Tensor, solver: str, t_eps: float = 0.0) -> float:
    """Return the gap after exact sampling of power (K,) along grid (S + 1,), with 1 - t clamped at `t_eps`.

    The velocity of z is (E[x | z] - z) / (1 - t) with E[x | z] = t P / (t^2 P + (1 - t)^2) z.
    """

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        t = t.double()[:, None, None, None]
        gain = t * power / (t**2 * power + (1 - t) ** 2)
        return (gain - 1) / (1 - t).clamp_min(t_eps) * z

    amplitude = sample(velocity, torch.ones(1, 1, 1, len(power), dtype=torch.float64), grid, solver)
    return spectrum_gap(power, amplitude.flatten().square())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spectrum", type=Path, required=True)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--t_eps", type=float, default=0.0, help="clamp of 1 - t (default: none)")
    args = parser.parse_args(argv)
    json_file = args.spectrum.suffix == ".json"
    content = json.loads(args.spectrum.read_text()) if json_file else np.load(args.spectrum, allow_pickle=False)
    names = ("P", "P_centred") if json_file else ("power", "centred")
    power, centred = (torch.as_tensor(content[name], dtype=torch.float64) for name in names)  # (K,) each
    img_size = next(n for n in range(2, 2049, 2) if num_rings(n) == len(power))
    schedules = {v: TightSchedule.of_spectrum(power, centred, img_size, variant=v, delta=args.delta) for v in VARIANTS}
    grids = {"uniform": uniform_grid, **{name: schedule.sampling_grid for name, schedule in schedules.items()}}
    print("| grid | " + " | ".join(f"{solver.title()} {steps}" for solver, steps in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, grid in grids.items():
        gaps = [predicted_gap(power, grid(steps), solver, args.t_eps) for solver, steps in COLUMNS]
        print(f"| {name} | " + " | ".join(f"{gap:.3f}" for gap in gaps) + " |")


if __name__ == "__main__":
    main()
