"""The frequency-time plane of Spectral Forcing, and what it leaves of a picture.

Shapes: n pixels along a side, x (1, 3, n, n) in [-1, 1], T times, K rings of frequency.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from spectral_forcing import SCHEDULES, SpectralForcing
from spectral_ops.spectrum import QUANTISATION, DCTSums, fit_power_law, rapsd
from util.data.crop import center_crop, decode_crop
from util.data.images import BadImage, to_float
from util.errors import UserError
from util.evaluation.plots import new_figure
from util.io import check_zip
from util.rng import CounterRNG

TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
TICKS = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99, 0.997)  # of t
RANGE = (-10.0, 12.5)  # of lambda = 2 ln(t / (1 - t))
DASHES = dict(zip(SCHEDULES, ("-", "--", ":", "-."), strict=True))


@cache
def photograph(size: int) -> Tensor:
    """Return the picture that is there without an upload, x (1, 3, n, n): scikit-learn's pagoda."""
    from sklearn.datasets import load_sample_image

    return _as_x(center_crop(Image.fromarray(load_sample_image("china.jpg")), size))


def upload(content: bytes, size: int) -> Tensor:
    """Return the centre crop x (1, 3, n, n) of an image file's content. UserError if it is no image."""
    try:
        return _as_x(decode_crop(content, "the file", size))
    except BadImage as error:
        raise UserError(f"The file cannot be used: {error.reason}. Choose a PNG or JPEG.") from error


def _as_x(crop: np.ndarray) -> Tensor:
    return to_float(torch.from_numpy(crop.copy()).permute(2, 0, 1)[None])


def powers_of_image(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return P_k (K,) of one image and the mean square of its DCT modes along its colour axes (3, K')."""
    sums = DCTSums(x.shape[-1])
    sums.update(torch.cat([x, -x]))  # whose mean is 0, so that variances are mean squares
    return rapsd(x)[0].clamp_min(QUANTISATION), sums.finish()


def powers_of_file(path: Path) -> tuple[Tensor, Tensor]:
    """Return P_k (K,) and the variance of DCT modes (C, K') in a spectrum file. UserError for other files."""
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["power"]), torch.from_numpy(file["dct_power"])
    except Exception as error:  # damaged bytes raise many types
        raise UserError(
            f"{path} holds no spectrum ({error!r}): measure it again with tools.measure_spectrum."
        ) from error


def build(schedule: str, size: int, power: Tensor, dct_power: Tensor, **settings: Any) -> SpectralForcing:
    """Return Spectral Forcing with a schedule. UserError for settings that do not fit together.

    Args:
        settings: of SpectralForcing: window_size, c_min, c_max, kappa, fixed_scale, alpha, snr_floor, budget.
    """
    spectrum = {"snr": power, "budget": dct_power}.get(schedule)
    if schedule != "linear":
        settings.pop("fixed_scale", None)
    try:
        return SpectralForcing(size, schedule=schedule, power=spectrum, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def power_law(power: Tensor) -> tuple[float, float]:
    """Return (A, alpha) of the power law A k^-alpha that is nearest to P_k (K,)."""
    a, alpha = fit_power_law(power).tolist()
    return float(np.exp(a)), alpha


def draw_plane(power: Tensor, operators: Mapping[str, SpectralForcing], chosen: str, title: str) -> Figure:
    """Draw the SNR of P_k (K,) in colours with its contour 1, and c(t) of each schedule; the chosen one is thick."""
    figure = new_figure(9, 4.9)
    axes, lam = figure.subplots(), np.linspace(*RANGE, 400)
    snr = (np.log(power.numpy())[:, None] + lam) / np.log(10)  # (K, X)
    where = {"origin": "lower", "extent": (*RANGE, 0, len(power))}  # ring k holds the frequencies from k to k + 1
    image = axes.imshow(snr, cmap="RdBu_r", vmin=-4, vmax=4, alpha=0.8, aspect="auto", **where)
    for colour, width in (("black", 5), ("#ffd400", 3)):
        axes.contour(snr, levels=[0], colors=colour, linewidths=width, **where)
    axes.plot([], [], color="#ffd400", linewidth=3, label="SNR 1")
    for name in sorted(operators, key=lambda name: name == chosen):
        operator = operators[name]
        cycles = operator.cutoff(torch.sigmoid(torch.from_numpy(lam) / 2)) / operator.radius_per_cycle
        style = {"color": "black", "linewidth": 3.2} if name == chosen else {"color": "#444444", "linewidth": 1.3}
        axes.plot(lam, cycles, linestyle=DASHES[name], **style, label=f"cutoff c(t): {name}")
    axes.set_xticks([2 * np.log(t / (1 - t)) for t in TICKS], [f"{t:g}" for t in TICKS])
    axes.set(title=title, xlabel="time t (0 noise, 1 data), on the scale of the log-SNR", xlim=RANGE)
    axes.set_ylabel("spatial frequency k (cycles per image)")
    axes.legend(loc="upper left", fontsize=9, facecolor="#cfd8dc", framealpha=1)
    figure.colorbar(image, ax=axes, pad=0.01, label="$\\log_{10}$ SNR (data in ring k / noise)")
    return figure


def rows(x: Tensor, operator: SpectralForcing, times: tuple[float, ...] = TIMES) -> dict[str, Tensor]:
    """Return what becomes of x (1, 3, n, n) at each time: z, its mask (T, h, w), and what passes of z and of x alone.

    The noise is the start of image 0 in sampling with seed 0.
    """
    t = torch.tensor(times)
    e = CounterRNG(0, 0, torch.tensor([0])).normal("start_noise", x.numel()).view_as(x)
    z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e
    passed = operator(x.expand_as(z).contiguous(), t)
    return {"z": z, "mask": operator.mask(t), "SF(z)": operator(z, t), "SF(x)": passed}


ABOUT = {
    "z": "z = t x + (1 − t) e\n(noisy image)",
    "mask": "mask M(t)\n(DCT, from 0 to 1)",
    "SF(z)": "SF(z)\n(the network sees)",
    "SF(x)": "SF(x)\n(left of the image)",
}


def draw_rows(found: Mapping[str, Tensor], times: tuple[float, ...] = TIMES) -> Figure:
    """Draw the rows of `rows`: a column for each time."""
    figure = Figure(figsize=(1.45 * len(times) + 1.5, 1.45 * len(found) + 0.3))
    figure.subplots_adjust(0.16, 0.01, 0.995, 0.95, 0.05, 0.05)
    for (name, pictures), line in zip(found.items(), figure.subplots(len(found), len(times)), strict=True):
        for time, values, axes in zip(times, pictures, line, strict=True):
            shown = (values.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) if values.ndim == 3 else values
            axes.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=f"t = {time:g}" if name == "z" else "")
        line[0].set_ylabel(ABOUT[name], rotation=0, ha="right", va="center", labelpad=8)
    return figure
