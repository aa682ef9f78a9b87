"""Pictures of evaluations: spectra of real and generated images, and the metrics of a sweep.

Shapes: spectra (K,), K rings of spatial frequency.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectral_ops.spectrum import ring_ratio, spectrum_gap

LINES = ("-", "--", ":", "-.")


def new_figure(width: float, height: float):
    """Return an empty figure that needs no display and is not kept by pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_spectra(real: Sequence[float], generated: Sequence[float], path: Path) -> None:
    """Draw both spectra over the rings, and below them the ratio generated / real, into a PNG."""
    figure = new_figure(6, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(real, label="real", linewidth=1.5)
    above.plot(generated, label="generated", linewidth=1.5, linestyle="--")
    above.set(yscale="log", ylabel="power", title=f"spectrum gap {spectrum_gap(real, generated):.3f}")
    above.legend(frameon=False)
    below.plot(ring_ratio(real, generated), color="black", linewidth=1.5)
    below.axhline(1, color="grey", linewidth=0.8)
    below.set(yscale="log", ylabel="generated / real", xlabel="ring (cycles per image)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_sweep(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draw each metric over cfg: a colour for each EMA, a line style for each interval, a ring around the best.

    A row has ema, cfg, interval_min and interval_max (None without guidance, cfg 1), best, and the metrics `names`,
    None where a metric is not defined.
    """
    figure = new_figure(max(4.5, 3.6 * len(names)), 3.6)
    emas = list(dict.fromkeys(row["ema"] for row in rows))
    intervals = list(dict.fromkeys((row["interval_min"], row["interval_max"]) for row in rows))
    intervals = [interval for interval in intervals if interval[0] is not None] or intervals
    lines = [(ema, interval) for ema in emas for interval in intervals]
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for ema, interval in lines:
            points = sorted(  # without guidance there is no interval: that point is on every line
                (row["cfg"], row[name])
                for row in rows
                if row["ema"] == ema
                and (row["interval_min"], row["interval_max"]) in (interval, (None, None))
                and row[name] is not None
            )
            label = ema if interval[0] is None else f"{ema}, ({interval[0]:g}, {interval[1]:g})"
            style = LINES[intervals.index(interval) % len(LINES)]
            if points:
                ax.plot(*zip(*points, strict=True), style, color=f"C{emas.index(ema) % 10}", marker=".", label=label)
        best = next(row for row in rows if row["best"])
        if best[name] is not None:
            ax.plot(best["cfg"], best[name], "ko", fillstyle="none", markersize=10)
        ax.set(xlabel="cfg", ylabel=name)
        ax.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
