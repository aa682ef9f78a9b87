"""Draw the figures of docs/results.md from the JSON lines in experiments/results/ alone: `make figures`.

A figure whose studies have no results yet is left out, which is said.

Shapes: T times, K rings.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import resolution
from experiments.results import compare, groups, load, table_of
from experiments.run import RESULTS, read_lines
from experiments.studies import STUDIES
from util.errors import UserError
from util.io import REPOSITORY

Lines = Sequence[Mapping[str, Any]]
DATA_NAMES = {
    "power2": "$k^{-2}$",
    "floor": "$k^{-3}$ + white floor",
    "noise": "30% above, noise",
    "essential": "30% above, copy",
}


def select(lines: Lines, **settings: Any) -> list[Mapping[str, Any]]:
    return [line for line in lines if all(line["run"][name] == value for name, value in settings.items())]


def mean_table(lines: Lines, arm: str) -> np.ndarray:
    """Return the mean over seeds of what each ring adds, (K, T)."""
    return np.mean([table_of(line) for line in select(lines, arm=arm)], 0).T


def excess_maps(path: Path) -> None:
    """Above: the excess of plain JiT on the (t, ring) plane. Below: the factor by which linear SF changes it."""
    lines = select(load("synthetic")[0], patch=16)
    kinds = list(dict.fromkeys(line["run"]["data"] for line in lines))
    figure = Figure(figsize=(3 * len(kinds), 5.2), layout="constrained")
    axes = figure.subplots(2, len(kinds), sharex=True, sharey=True, squeeze=False)
    for column, kind in enumerate(kinds):
        of_kind = select(lines, data=kind)
        plain, linear = (mean_table(of_kind, arm) for arm in ("plain", "linear"))
        shown = {"origin": "lower", "aspect": "auto", "extent": (0, 1, -0.5, len(plain) - 0.5)}
        above = axes[0, column].imshow(np.log10(plain), cmap="magma", vmin=-6, vmax=0, **shown)
        below = axes[1, column].imshow(np.log2(linear / plain), cmap="RdBu_r", vmin=-2, vmax=2, **shown)
        axes[0, column].set_title(DATA_NAMES.get(kind, kind), fontsize=10)
        axes[1, column].set_xlabel("t")
    for row in axes:
        row[0].set_ylabel("ring (cycles per image)")
    figure.colorbar(above, ax=axes[0], label="$\\log_{10}$ excess, plain")
    figure.colorbar(below, ax=axes[1], label="$\\log_2$ linear SF / plain")
    figure.savefig(path, dpi=110)


def where_it_helps(path: Path) -> None:
    """Change of the excess by linear SF for each data and patch, relative and absolute, with intervals."""
    lines = load("synthetic")[0] + load("synthetic_patch4")[0]
    kinds = list(dict.fromkeys(line["run"]["data"] for line in lines))
    patches = sorted({line["run"]["patch"] for line in lines}, reverse=True)
    percent = np.full((len(kinds), len(patches)), np.nan)
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, kind in enumerate(kinds):
        for j, patch in enumerate(patches):
            if group := select(lines, data=kind, patch=patch):
                found = compare(group, "plain")["linear"]["density"]
                percent[i, j] = found.percent
                texts = str(found), f"{1000 * found.mean:+.2f} ± {1000 * found.half:.2f}"
                for ax, text in zip(axes, texts, strict=True):
                    colour = "white" if abs(found.percent) > 60 else "black"
                    ax.text(j, i, text.replace(" ±", "\n±"), ha="center", va="center", fontsize=9, color=colour)
    for ax, title in zip(axes, ("relative to plain JiT", "absolute, in thousandths"), strict=True):
        ax.imshow(percent, cmap="RdBu_r", vmin=-60, vmax=60, aspect="auto", alpha=0.7)
        ax.set_xticks(range(len(patches)), [f"patch {p}" for p in patches])
        ax.set_yticks(range(len(kinds)), [DATA_NAMES.get(kind, kind) for kind in kinds])
        ax.set_title(f"excess, linear SF: {title}", fontsize=10)
    figure.savefig(path, dpi=110)


def lost_and_hidden(path: Path) -> None:
    """Share of the least possible loss that hiding costs, against the share of noise that is hidden, by cutoff."""
    lines = list(read_lines(RESULTS / "principle.jsonl"))
    if not lines:
        raise UserError("there are no results yet: python -m experiments.principle")
    kinds = list(dict.fromkeys(line["data"] for line in lines))
    styles = {"linear": "k*", "power": "C3D", "snr": "C0s-", "budget": "C1o-"}
    figure = Figure(figsize=(2.3 * len(kinds), 2.9), layout="constrained")
    for ax, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        for family, style in styles.items():
            points = [line for line in lines if line["data"] == kind and line["arm"].startswith(family)]
            points = sorted((p["hidden_noise"], p["lost_percent"]["hard"]) for p in points)
            ax.plot(*zip(*points, strict=True), style, label=family, markersize=9 if family == "linear" else 5)
        ax.set(title=kind, xlabel="share of noise hidden", yscale="log", ylim=(1e-3, 1e2))
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("lost loss, % (hard reading)")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def cutoffs_on_photographs(path: Path) -> None:
    """Change of the held-out loss on CIFAR-10 for each arm and patch, with 95% intervals of three paired seeds."""
    lines = load("cifar10")[0]
    patches = sorted({line["run"]["patch"] for line in lines}, reverse=True)
    arms = [arm for arm in STUDIES["cifar10"].arms if arm != "plain"]
    figure = Figure(figsize=(4.6 * len(patches), 4.4), layout="constrained")
    for ax, patch in zip(figure.subplots(1, len(patches), sharey=True, squeeze=False)[0], patches, strict=True):
        found = compare(select(lines, patch=patch), "plain")
        for row, arm in enumerate(arms):
            if arm not in found:
                continue
            result = found[arm]["density"]
            colour = "C3" if result.mean > 0 else "C0"
            ax.errorbar(result.percent, row, xerr=result.percent_half, fmt="o", color=colour, capsize=3)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set_yticks(range(len(arms)), arms)
        ax.set(title=f"CIFAR-10, patch {patch}, 600 steps", xlabel="held-out loss against plain JiT, %")
        ax.grid(alpha=0.3, axis="x")
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def gain_and_steps(path: Path) -> None:
    """Change of the held-out loss on CIFAR-10, patch 16, after 600, 2400 and 6000 steps; bars are 95% intervals."""
    lines = select([line for s in ("cifar10", "cifar10_long", "cifar10_longest") for line in load(s)[0]], patch=16)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    ax = figure.subplots()
    for shift, arm in ((0.97, "linear"), (1.03, "budget0.03")):
        points = []
        for key, group in groups([line for line in lines if line["run"]["arm"] in ("plain", arm)]).items():
            found = compare(group, "plain")[arm]["density"]
            points.append((dict(key)["steps"] * shift, found.percent, found.percent_half))
        steps, percent, half = zip(*sorted(points), strict=True)
        ax.errorbar(steps, percent, yerr=half, fmt="o-", capsize=3, label=arm)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xscale="log", xlabel="training steps (batch 64)", ylabel="held-out loss against plain, %")
    ax.set_xticks(ticks := sorted({line["run"]["steps"] for line in lines}), [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def loss_and_operations(path: Path) -> None:
    """Held-out loss against the operations of training, with levels of resolution and without."""
    run = {setting: resolution.by_cost(resolution.lines_of(*setting)) for setting in resolution.ARMS}
    figure = Figure(figsize=(4.2 * len(run), 3.6), layout="constrained")
    styles = {"plain": "ko", "linear": "C7o", "levels": "C0s-", "linear_levels": "C3s-"}
    styles |= {"two_levels": "C2^-", "linear_two_levels": "C1^-"}
    axes = figure.subplots(1, len(run), squeeze=False)[0]
    for ax, ((data, patch), found) in zip(axes, run.items(), strict=True):
        for arm, style in styles.items():
            keys = sorted(key for key in found if key[0] == arm)
            if not keys:
                continue
            x, y = ([found[key][name] for key in keys] for name in ("operations", "density"))
            half = [change.percent_half for change in y]
            ax.errorbar(x, [change.percent for change in y], yerr=half, fmt=style, capsize=3, label=arm)
            for key, share, change in zip(keys, x, y, strict=True):
                ax.annotate(f"{key[1]:,}", (share, change.percent), (5, 5), textcoords="offset points", fontsize=8)
        ax.set(title=f"{data}, patch {patch}", xlabel="operations of training (plain, 600 steps: 1)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.axes[0].set_ylabel("held-out loss against plain, %")
    figure.savefig(path, dpi=110)


FIGURES: dict[str, Callable[[Path], None]] = {
    "excess_maps": excess_maps,
    "where_it_helps": where_it_helps,
    "lost_and_hidden": lost_and_hidden,
    "cutoffs_on_photographs": cutoffs_on_photographs,
    "gain_and_steps": gain_and_steps,
    "loss_and_operations": loss_and_operations,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "docs" / "figures", help="folder (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = args.out / f"{name}.png"
        try:
            draw(path)
            print(path)
        except UserError as error:
            print(f"{path.name} is left out: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
