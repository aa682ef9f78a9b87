"""Draw the frequency-time plane: SNR of the data, cutoffs of Spectral Forcing, times of the sampling grids.

    python experiments/frequency_time_plane.py --spectrum fid_stats/cifar10_32_spectrum.npz \
        --out docs/frequency_time_plane.png

The spectrum is a file of tools/measure_spectrum.py. Times are on the scale of the log-SNR, lambda = 2 ln(t / (1 - t)).
Frequencies are in cycles per image. The photograph comes with scikit-learn (no download).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sampler import uniform_grid
from spectral_forcing import SpectralForcing, ring_radii
from spectral_ops.schedule import VARIANTS, TightSchedule
from util.data.crop import center_crop
from util.data.datasets import to_float
from util.rng import CounterRNG

TICKS = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99, 0.997)  # of t
TIMES = (0.1, 0.25, 0.4, 0.6, 0.8, 0.95)  # of the photograph
RANGE = (-10.0, 12.5)  # of lambda


def lam(t: Tensor | np.ndarray | tuple) -> np.ndarray:
    t = np.asarray(t, dtype=np.float64)
    return 2 * np.log(t / (1 - t))


def cutoffs(power: Tensor, a: float, alpha: float, img_size: int) -> dict[str, SpectralForcing]:
    """Spectral Forcing with each schedule. `power` is given the fit A k^-alpha, which its floor 1 / A says."""
    floor = float(f"{np.exp(-a):.2g}")
    return {
        "linear": SpectralForcing(img_size),
        "power": SpectralForcing(img_size, schedule="power", alpha=round(alpha, 1), snr_floor=floor),
        "snr": SpectralForcing(img_size, schedule="snr", power=power.tolist()),
    }


def draw_plane(axes, power: Tensor, img_size: int, operators: dict[str, SpectralForcing]) -> None:
    """The measured ratio in colours, its contour 1, and c(t) of each schedule."""
    k, x = ring_radii(img_size).numpy(), np.linspace(*RANGE, 400)
    ratio = (np.log(power.numpy())[:, None] + x) / np.log(10)  # (K, X)
    image = axes.pcolormesh(x, k, ratio, cmap="RdBu_r", vmin=-4, vmax=4, shading="gouraud", rasterized=True)
    axes.contour(x, k, ratio, levels=[0], colors="black", linewidths=4)
    axes.plot([], [], color="black", linewidth=4, label="SNR 1")
    t = torch.sigmoid(torch.from_numpy(x) / 2).float()
    styles = (("#0b7a3b", "-"), ("#0b7a3b", "--"), ("#ffd400", "-"))
    for (name, operator), (colour, style) in zip(operators.items(), styles, strict=True):
        cycles = operator.cutoff(t) / operator.radius_per_cycle
        about = f", alpha {operator.alpha:g}, floor {operator.snr_floor:g}" if name == "power" else ""
        width = 2 if colour != styles[-1][0] else 1.6
        axes.plot(x, cycles, color=colour, linestyle=style, linewidth=width, label=f"cutoff c(t): {name}{about}")
    axes.set(ylabel="spatial frequency k\n(cycles per image)", ylim=(k[0], k[-1]), xlim=RANGE)
    axes.legend(loc="upper left", fontsize=8.5, framealpha=0.9)
    above = axes.secondary_xaxis("top")
    above.set_xlabel("log-SNR  $\\lambda = 2\\,\\ln(t/(1-t))$", fontsize=9)
    colours = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=18)
    colours.set_label("$\\log_{10}$ of the ratio\n(data in ring k / noise)", fontsize=9)


def draw_steps(axes, grids: dict[str, Tensor]) -> None:
    """A mark for each time of each grid between 0 and 1."""
    for row, (_, grid) in enumerate(grids.items()):
        inner = lam(grid[1:-1].numpy())
        colour = "black" if row == 0 else "#b3421b"
        axes.plot(inner, np.full(len(inner), row), "|", color=colour, markersize=11, markeredgewidth=1.6)
    axes.set(xlim=RANGE, ylim=(len(grids) - 0.4, -0.6), xlabel="time t (0 noise, 1 data), on the scale of $\\lambda$")
    axes.set_yticks(range(len(grids)), list(grids))
    axes.set_ylabel(f"sampling grids,\n{len(grid) - 1} steps")
    axes.grid(axis="x", alpha=0.3)


def draw_photograph(figure, operators: dict[str, SpectralForcing], img_size: int) -> None:
    """For each of TIMES: z, and for the first and the last schedule the mask and what the network sees of z."""
    from sklearn.datasets import load_sample_image

    photograph = center_crop(Image.fromarray(load_sample_image("flower.jpg")), img_size)
    x = to_float(torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None])
    t = torch.tensor(TIMES)
    e = CounterRNG(0, 0, torch.tensor([0])).normal("start_noise", x.numel()).view_as(x)
    z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e
    rows = {"z": z}
    for name in ("linear", "snr"):
        rows |= {f"mask, {name}": operators[name].mask(t), f"SF(z), {name}": operators[name](z, t)}
    axes = figure.subplots(len(rows), len(TIMES))
    for (name, pictures), line in zip(rows.items(), axes, strict=True):
        for time, picture, cell in zip(TIMES, pictures, line, strict=True):
            if picture.ndim == 3:
                cell.imshow((picture.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy(), interpolation="nearest")
            else:
                cell.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            if name == "z":
                cell.set_title(f"t = {time}", fontsize=10)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)


def read(path: Path) -> tuple[Tensor, Tensor, float, float, dict]:
    """P_k, P^c_k, mean fit a and alpha, and the metadata of a spectrum file."""
    with np.load(path, allow_pickle=False) as file:
        power, centred = (torch.from_numpy(file[name]).double() for name in ("power", "centred"))
        meta = json.loads(str(file["meta"]))
    spread = meta["fit_mean_and_std"]
    return power, centred, spread["a"][0], spread["alpha"][0], meta


def main() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spectrum", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/frequency_time_plane.png"))
    parser.add_argument("--steps", type=int, default=20, help="steps of each grid")
    args = parser.parse_args()

    power, centred, a, alpha, meta = read(args.spectrum)
    operators = cutoffs(power, a, alpha, meta["img_size"])
    schedules = {v: TightSchedule.of_spectrum(power, centred, meta["img_size"], variant=v) for v in VARIANTS}
    grids = {"uniform": uniform_grid(args.steps)} | {v: s.sampling_grid(args.steps) for v, s in schedules.items()}

    figure = Figure(figsize=(9, 11.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(6, 5.5))
    plane, steps = above.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.suptitle(f"{meta['dataset']}, {meta['img_size']} px, {meta['num_images']:,} images", fontsize=11)
    draw_plane(plane, power, meta["img_size"], operators)
    draw_steps(steps, grids)
    steps.set_xticks(lam(TICKS), [f"{t:g}" for t in TICKS])
    draw_photograph(below, operators, meta["img_size"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=92, pil_kwargs={"optimize": True})
    print(args.out)


if __name__ == "__main__":
    main()
