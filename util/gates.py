"""What the gates of the spectral residual have learned: g_lo and g_hi of every block over time.

python -m util.gates output/ti1-residual --ema ema1

writes <run>/gates.png and an event `gates` into <run>/log.jsonl. Training does so at each look at samples.

Shapes: L blocks, T times, C classes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_jit import JiT
from util import checkpoint, config
from util.build import DenoiserConfig
from util.distributed import World
from util.errors import UserError
from util.logger import RunLog

TIMES = 41
NAME = "gates.png"
LEAST = 0.01  # range of the colours: gates start at zero, and those that have hardly moved are to look like it


@dataclass(frozen=True)
class Gates:
    """Both gates of every block at each time, g_lo first.

    Attributes:
        t: (T,), from 0 to 1.
        value: (2, L, T); with "time_label" the mean over all classes, "no class" left out.
        spread: (2, L, T), the standard deviation over these classes; None where the label has no say.
    """

    t: Tensor
    value: Tensor
    spread: Tensor | None

    def describe(self) -> dict[str, Any]:
        """Ready for JSON: "low" and "high" are L lists of T numbers."""
        tables = dict(zip(("low", "high"), self.value, strict=True))
        if self.spread is not None:
            tables |= dict(zip(("low_spread", "high_spread"), self.spread, strict=True))
        rounded = {name: table.double().numpy().round(6).tolist() for name, table in tables.items()}
        return {"t": self.t.double().numpy().round(6).tolist(), **rounded}


@torch.no_grad()
def evaluate_gates(net: JiT) -> Gates | None:
    """The gates of the network in float32, on the CPU; None where it has no spectral residual."""
    if net.residual_mode == "off":
        return None
    device = net.pos_embed.device
    t = torch.linspace(0, 1, TIMES)
    labels = torch.arange(net.num_classes, device=device)
    columns = []
    for c in net.t_embedder(t.to(device)).split(1):  # (1, D)
        c = c + net.y_embedder(labels) if net.residual_mode == "time_label" else c  # (C, D) or (1, D)
        gates = [torch.stack(block.spectral_residual.gates(c)).view(2, -1) for block in net.blocks]  # (2, C or 1) each
        columns.append(torch.stack(gates, dim=1))  # (2, L, C or 1)
    every = torch.stack(columns, dim=2).cpu()  # (2, L, T, C or 1)
    spread = every.std(dim=3, correction=0) if net.residual_mode == "time_label" else None
    return Gates(t, every.mean(dim=3), spread)


def plot_gates(gates: Gates, path: Path, title: str) -> Path:
    """Write a PNG: a heat map of each gate, block by t, in shared colours; below them the spread over classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(gates.value, "gate", "RdBu_r", -1)]
    if gates.spread is not None:
        rows.append((gates.spread, "standard deviation over classes", "viridis", 0))
    blocks = gates.value.shape[1]
    height = 0.9 + (0.9 + min(4.0, 0.22 * blocks)) * len(rows)
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 2, sharex=True, sharey=True, squeeze=False)
    half = 0.5 / (len(gates.t) - 1)
    extent = (-half, 1 + half, blocks - 0.5, -0.5)  # a cell around each t and each number of a block
    for row, (tables, meaning, colours, lowest) in zip(grid, rows, strict=True):
        limit = max(float(tables.abs().max()), LEAST)
        for axes, table, name in zip(row, tables, ("g_lo: low frequencies", "g_hi: high frequencies"), strict=True):
            image = axes.imshow(
                table.numpy(),
                aspect="auto",
                extent=extent,
                interpolation="nearest",
                cmap=colours,
                vmin=lowest * limit,
                vmax=limit,
            )
            axes.set_title(name, fontsize="medium")
        row[0].set(ylabel="block", yticks=range(0, blocks, -(-blocks // 9)))
        figure.colorbar(image, ax=list(row), label=meaning)
    for axes in grid[-1]:
        axes.set_xlabel("t (0 noise, 1 data)")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path


def record(
    net: JiT, ema: str, epoch: int, step: int, folder: Path, title: str, world: World, log: RunLog
) -> dict[str, Path]:
    """Picture and event of the weights `ema`, which `net` has. Returns {"gates": the picture}, or {} without gates."""
    gates = evaluate_gates(net) if world.main else None
    if gates is None:
        return {}
    path = plot_gates(gates, folder / NAME, f"{title}: {ema} after epoch {epoch + 1}")
    log.record("gates", step, {"ema": ema, **gates.describe()})
    log.image("gates", step, path)
    return {"gates": path}


def run(folder: Path, ema: str, name: str | None) -> str:
    """The gates of a checkpoint in `folder`; a line about them.

    Raises:
        UserError: no checkpoint, or one without a spectral residual.
    """
    saved = checkpoint.load(folder, name)
    args = config.resolve({}, saved.args, training=False)
    shape = DenoiserConfig.from_args(args)
    if shape.spectral_residual == "off":
        raise UserError(f"{saved.path} was trained without a spectral residual (--spectral_residual): it has no gates")
    denoiser = shape.build()
    checkpoint.load_weights(denoiser, saved.weights[checkpoint.CHOICES[ema]], saved.path)
    world = World()
    log = RunLog(folder, world, {"mode": "disabled"})
    step = saved.run.get("step", saved.epoch + 1)
    path = record(denoiser.net, ema, saved.epoch, step, folder, args.model, world, log)["gates"]
    log.close()
    return f"gates: {path}   log: {log.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for an error that a sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m util.gates", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--ema", default="ema1", choices=tuple(checkpoint.CHOICES), help="which weights")
    parser.add_argument("--checkpoint", help="file in the folder (default: the newest)")
    args = parser.parse_args(argv)
    try:
        print(run(args.run, args.ema, args.checkpoint))
    except UserError as error:
        print(f"util.gates: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
