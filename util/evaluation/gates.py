"""The gates that the spectral residual has learned: g_lo and g_hi of every block over time.

Shapes: L blocks, T times, C classes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_jit import JiT
from util.dist.context import DistContext
from util.evaluation.plots import new_figure
from util.log import RunLog

NAME = "gates.png"
TIMES = 41
MIN_LIMIT = 0.01  # of the colour scale: gates start at zero, and those that have hardly moved should look so


@torch.no_grad()
def compute_gates(net: JiT) -> dict[str, Tensor] | None:
    """Return t (T,), low and high (L, T) on the CPU, at TIMES times; None without a spectral residual.

    With "time_label" they are means over the classes, and low_spread and high_spread (L, T) the standard deviations.
    """
    residuals = [getattr(block, "spectral_residual", None) for block in net.blocks]
    if residuals[0] is None:
        return None
    labelled = residuals[0].mode == "time_label"
    device = net.pos_embed.device
    t = torch.linspace(0, 1, TIMES)
    labels = torch.arange(net.num_classes if labelled else 1, device=device)
    y_emb = net.y_embedder(labels)  # (C, D), or (1, D) if the gates do not depend on the label
    columns = []
    for t_emb in net.t_embedder(t.to(device)).split(1):  # (1, D)
        gates = [torch.stack(r.gates(t_emb.expand_as(y_emb), y_emb)).view(2, -1) for r in residuals]  # (2, C) each
        columns.append(torch.stack(gates, dim=1))  # (2, L, C)
    low, high = torch.stack(columns, dim=2).float().cpu()  # (L, T, C) each
    found = {"t": t, "low": low.mean(2), "high": high.mean(2)}
    if labelled:
        found |= {"low_spread": low.std(2, correction=0), "high_spread": high.std(2, correction=0)}
    return found


def plot_gates(gates: dict[str, Tensor], path: Path, title: str) -> Path:
    """Write a PNG: a heat map of each gate, block by t, in shared colours; below them the spread over classes."""
    rows = [(("low", "high"), "gate", "RdBu_r", -1)]
    if "low_spread" in gates:
        rows.append((("low_spread", "high_spread"), "standard deviation over classes", "viridis", 0))
    blocks = len(gates["low"])
    half = 0.5 / (TIMES - 1)  # of the time between two columns
    figure = new_figure(8, 0.9 + (0.9 + min(4.0, 0.22 * blocks)) * len(rows))
    grid = figure.subplots(len(rows), 2, sharex=True, sharey=True, squeeze=False)
    extent = (-half, 1 + half, blocks - 0.5, -0.5)  # a cell around each t and each block
    for row, (names, meaning, colours, lowest) in zip(grid, rows, strict=True):
        limit = max(*(float(gates[name].abs().max()) for name in names), MIN_LIMIT)
        scale = {"cmap": colours, "vmin": lowest * limit, "vmax": limit}
        for axes, name, heading in zip(row, names, ("g_lo: low frequencies", "g_hi: high frequencies"), strict=True):
            image = axes.imshow(gates[name].numpy(), aspect="auto", extent=extent, interpolation="nearest", **scale)
            axes.set_title(heading, fontsize="medium")
        row[0].set(ylabel="block", yticks=range(0, blocks, -(-blocks // 9)))
        figure.colorbar(image, ax=list(row), label=meaning)
    for axes in grid[-1]:
        axes.set_xlabel("t (0 noise, 1 data)")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path


def record(
    net: JiT, config: Any, epoch: int, step: int, folder: Path, ctx: DistContext, log: RunLog
) -> dict[str, Path]:
    """Write the picture and the log event of the weights in `net`; return {"gates": path}, or {} without gates."""
    gates = compute_gates(net) if ctx.is_main else None
    if gates is None:
        return {}
    path = plot_gates(gates, folder / NAME, f"{config.model}: {config.ema} after epoch {epoch + 1}")
    tables = {name: table.double().numpy().round(6).tolist() for name, table in gates.items()}
    log.log("gates", step, {"ema": config.ema, **tables})
    log.image("gates", step, path)
    return {"gates": path}
