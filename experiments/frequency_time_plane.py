"""Draw the frequency-time plane: SNR of the data, cutoffs of Spectral Forcing, times of the sampling grids.

    python -m experiments.frequency_time_plane --spectrum fid_stats/cifar10_32_spectrum.npz

The spectrum is a file of tools/measure_spectrum.py. Times are on the scale of the log-SNR, lambda = 2 ln(t / (1 - t)).
Frequencies are in cycles per image. The photograph comes with scikit-learn.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from sampler import uniform_grid
from spectral_forcing import SpectralForcing, ring_radii
from spectral_ops.schedule import VARIANTS, TightSchedule
from tools.explorer.plane import RANGE, TICKS, rows
from util.data.crop import center_crop
from util.data.images import to_float

TIMES = (0.1, 0.25, 0.4, 0.6, 0.8, 0.95)  # of the photograph
STYLES = {"linear": ("#0b7a3b", "-"), "power": ("#0b7a3b", "--"), "snr": ("#ffd400", "-")}


def draw_plane(axes, power: Tensor, operators: dict[str, SpectralForcing]) -> None:
    """Draw the SNR in colours with its contour 1, and c(t) of each schedule."""
    k, x = ring_radii(operators["snr"].img_size).numpy(), np.linspace(*RANGE, 400)
    snr = (np.log(power.numpy())[:, None] + x) / np.log(10)  # (K, X)
    image = axes.pcolormesh(x, k, snr, cmap="RdBu_r", vmin=-4, vmax=4, shading="gouraud", rasterized=True)
    axes.contour(x, k, snr, levels=[0], colors="black", linewidths=4)
    axes.plot([], [], color="black", linewidth=4, label="SNR 1")
    for name, operator in operators.items():
        cycles = operator.cutoff(torch.sigmoid(torch.from_numpy(x) / 2).float()) / operator.radius_per_cycle
        about = f", alpha {operator.alpha:g}, floor {operator.snr_floor:g}" if name == "power" else ""
        style = {"color": STYLES[name][0], "linestyle": STYLES[name][1], "linewidth": 1.6 if name == "snr" else 2}
        axes.plot(x, cycles, **style, label=f"cutoff c(t): {name}{about}")
    axes.set(ylabel="spatial frequency k\n(cycles per image)", ylim=(k[0], k[-1]), xlim=RANGE)
    axes.legend(loc="upper left", fontsize=8.5, framealpha=0.9)
    axes.secondary_xaxis("top").set_xlabel("log-SNR  $\\lambda = 2\\,\\ln(t/(1-t))$", fontsize=9)
    colours = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=18)
    colours.set_label("$\\log_{10}$ SNR\n(data in ring k / noise)", fontsize=9)


def draw_steps(axes, grids: dict[str, Tensor]) -> None:
    """Draw a mark for each time of each grid between 0 and 1."""
    for row, grid in enumerate(grids.values()):
        inner, colour = 2 * grid[1:-1].double().logit(), "#b3421b" if row else "black"
        axes.plot(inner, np.full(len(inner), row), "|", color=colour, markersize=11, markeredgewidth=1.6)
    axes.set(xlim=RANGE, ylim=(len(grids) - 0.4, -0.6), xlabel="time t (0 noise, 1 data), on the scale of $\\lambda$")
    axes.set_yticks(range(len(grids)), list(grids))
    axes.set_xticks(2 * torch.tensor(TICKS).double().logit(), [f"{t:g}" for t in TICKS])
    axes.set_ylabel(f"sampling grids,\n{len(grid) - 1} steps")
    axes.grid(axis="x", alpha=0.3)


def draw_photograph(figure, operators: dict[str, SpectralForcing]) -> None:
    """Draw z at each of TIMES, and for two schedules the mask and what the network sees of z."""
    photograph = center_crop(Image.fromarray(load_sample_image("flower.jpg")), operators["snr"].img_size)
    x, shown = to_float(torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None]), {}
    for schedule in ("linear", "snr"):
        found = rows(x, operators[schedule], TIMES)
        shown |= {"z": found["z"], f"mask, {schedule}": found["mask"], f"SF(z), {schedule}": found["SF(z)"]}
    for (name, pictures), line in zip(shown.items(), figure.subplots(len(shown), len(TIMES)), strict=True):
        for time, picture, axes in zip(TIMES, pictures, line, strict=True):
            values = (picture.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) if picture.ndim == 3 else picture
            axes.imshow(values.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"t = {time:g}" if name == "z" else "", fontsize=10)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--spectrum", type=Path, required=True)
parser.add_argument("--out", type=Path, default=Path("output/frequency_time_plane.png"))
parser.add_argument("--steps", type=int, default=20, help="steps of each grid")
args = parser.parse_args()
with np.load(args.spectrum, allow_pickle=False) as file:
    power, centred = (torch.from_numpy(file[name]).double() for name in ("power", "centred"))
    meta = json.loads(str(file["meta"]))
size, (a, alpha) = meta["img_size"], (meta["fit_mean_and_std"][name][0] for name in ("a", "alpha"))
floor = float(f"{np.exp(-a):.2g}")  # the spectrum is about exp(a) k^-alpha, so the power schedule's floor is exp(-a)
operators = {
    "linear": SpectralForcing(size),
    "power": SpectralForcing(size, schedule="power", alpha=round(alpha, 1), snr_floor=floor),
    "snr": SpectralForcing(size, schedule="snr", power=power.tolist()),
}
grids = {v: TightSchedule.of_spectrum(power, centred, size, variant=v).sampling_grid(args.steps) for v in VARIANTS}
figure = Figure(figsize=(9, 11.5), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=(6, 5.5))
plane, steps = above.subplots(2, 1, sharex=True, height_ratios=(3, 1))
above.suptitle(f"{meta['dataset']}, {size} px, {meta['num_images']:,} images", fontsize=11)
draw_plane(plane, power, operators)
draw_steps(steps, {"uniform": uniform_grid(args.steps), **grids})
below.suptitle(f"a photograph at {size} px", fontsize=11)
draw_photograph(below, operators)
args.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(args.out, dpi=92, pil_kwargs={"optimize": True})
print(args.out)
