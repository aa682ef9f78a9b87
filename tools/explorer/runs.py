"""What the given folders hold: runs, networks, and from a run's files alone its curves and samples."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tools.hub import CONFIG, WEIGHTS
from util.errors import UserError
from util.evaluation.plots import new_figure
from util.log import LOG_NAME

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito: safe for all
NO_RUNS = ("samples", "eval", "sweep", "wandb")  # folders of a run, which hold no other runs
LOGGED = {"train": ("loss", "lr", "images_per_s"), "val": ("loss_ema1",)}  # event in a log -> what is drawn of it
Curve = tuple[np.ndarray, np.ndarray]  # epochs (N,), values (N,)


def walk(roots: Sequence[Path]) -> list[tuple[Path, list[str], list[str]]]:
    """Return each folder below the roots, and the sorted names of its folders and files."""
    found = []
    for root in roots:
        for folder, below, files in os.walk(root):
            found.append((Path(folder), sorted(below), sorted(files)))
            below[:] = sorted(n for n in below if n not in NO_RUNS and not n.startswith(".") and n[-4:] != ".dcp")
    return found


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """Return the folders of runs: those with a log."""
    return [folder for folder, _, files in walk(roots) if LOG_NAME in files]


def find_networks(roots: Sequence[Path]) -> list[Path]:
    """Return what can sample: a run (its newest checkpoint), one of several checkpoints, or an export."""
    found = []
    for folder, below, files in walk(roots):
        checkpoints = [n for n in (*below, *files) if n.startswith("checkpoint-") and n.endswith((".pth", ".dcp"))]
        found += [folder] if checkpoints else []
        found += [folder / name for name in checkpoints] if len(checkpoints) > 1 else []
        is_hub = CONFIG in files and WEIGHTS in files
        found += [folder] if is_hub else []
        found += [folder / n for n in files if n.endswith(".safetensors") and not (is_hub and n == WEIGHTS)]
    return sorted(found, key=lambda path: path.name.startswith("checkpoint-"))  # earlier checkpoints last


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return what a log says over epochs: `loss`, `lr`, `images_per_s`, and `loss_ema1` of held-out images.

    Epochs are fractions within an epoch, 0 before the first step and 1 after the first epoch.
    """
    per_epoch = next((n for line in lines if isinstance(n := line.get("steps_per_epoch"), int) and n > 0), None)
    points: dict[str, dict[float, float]] = {}
    for line in lines:
        event, step = line.get("event"), line.get("step")
        for name in LOGGED.get(event, ()):
            if per_epoch and isinstance(step, int) and isinstance(line.get(name), int | float):  # null: not finite
                points.setdefault(name, {})[(step + (event == "train")) / per_epoch] = line[name]
    return {name: (np.array(list(of)), np.array(list(of.values()))) for name, of in points.items()}


def draw_curves(of_runs: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Draw loss, learning rate and speed of runs over epochs; dashed: the loss on held-out images."""
    figure = new_figure(13, 4.2)
    loss, lr, speed = figure.subplots(1, 3)
    for i, (name, of_run) in enumerate(of_runs.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.6}
        for axes, key in ((loss, "loss"), (lr, "lr"), (speed, "images_per_s")):
            if key in of_run:
                axes.plot(*of_run[key], **style, label=name)
        if "loss_ema1" in of_run:
            loss.plot(*of_run["loss_ema1"], **style, linestyle="--", label=f"{name}, held out (ema1)")
    loss.set(title="Loss", ylabel="mean squared error of v", yscale="log")
    lr.set(title="Learning rate", ylabel="learning rate")
    speed.set(title="Speed of training", ylabel="images / s")
    for axes in (lr, speed):
        axes.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", scilimits=(-2, 4))
    for axes in (loss, lr, speed):
        axes.set_xlabel("epochs")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def sample_grids(run: Path) -> list[Path]:
    """Return the pictures of samples that a run has drawn, in the order of epochs."""
    return sorted([*run.glob("samples/*.png"), *run.glob("samples/*/grid.png")])


def picture(path: Path) -> Image.Image:
    """Read a picture of a run. UserError if it is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}.") from error
