"""What a sweep found: a table for the terminal, table.csv, table.json, and a picture of the metrics over cfg.

The points are util.sweep.Point: ema, cfg, interval; a report belongs to each.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.provenance import write_json

LINES = ("-", "--", ":", "-.")


def write_tables(
    folder: Path,
    points: Sequence[Any],
    reports: Sequence[Mapping[str, Any]],
    winner: int,
    chosen: Mapping[str, Any],
    full_size: Mapping[str, Any] | None = None,
) -> str:
    """Write table.csv, table.json and metrics.png into `folder`. Returns the table for the terminal.

    Args:
        winner: position of the best point.
        chosen: how it was chosen, for table.json.
        full_size: report and metrics of the evaluation at full size, when there is one.
    """
    names = list(dict.fromkeys(name for report in reports for name in report["metrics"]))
    rows = [
        {
            "ema": point.ema,
            "interval_min": point.interval[0] if point.cfg != 1 else None,
            "interval_max": point.interval[1] if point.cfg != 1 else None,
            "cfg": point.cfg,
            **{name: report["metrics"].get(name) for name in names},
            "best": i == winner,
        }
        for i, (point, report) in enumerate(zip(points, reports, strict=True))
    ]
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    first = reports[0]
    about = {name: first[name] for name in ("num_images", "seed", "solver", "steps", "checkpoint", "epoch")}
    write_json(folder / "table.json", {**about, "chosen": chosen, "points": rows, "full_size": full_size})
    plot(folder / "metrics.png", points, reports, names, winner)
    return text_table(rows, names)


def text_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Columns of equal width; the best row is marked."""
    head = ["", "ema", "interval", "cfg", *names]
    lines = [head]
    for row in rows:
        interval = "-" if row["interval_min"] is None else f"{row['interval_min']:g}:{row['interval_max']:g}"
        values = ["-" if row[name] is None else f"{row[name]:.5g}" for name in names]
        lines.append(["*" if row["best"] else "", row["ema"], interval, f"{row['cfg']:g}", *values])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def plot(
    path: Path, points: Sequence[Any], reports: Sequence[Mapping[str, Any]], names: Sequence[str], winner: int
) -> None:
    """Each metric over cfg: a colour for each EMA, a line style for each interval, a ring around the best point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    emas = list(dict.fromkeys(point.ema for point in points))
    intervals = list(dict.fromkeys(point.interval for point in points))
    figure, axes = plt.subplots(
        1, len(names), figsize=(max(4.5, 3.6 * len(names)), 3.6), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], names, strict=True):
        for e, ema in enumerate(emas):
            for k, interval in enumerate(intervals):
                line = sorted(  # without guidance there is no interval, so that this point is on every line
                    (point.cfg, report["metrics"][name])
                    for point, report in zip(points, reports, strict=True)
                    if point.ema == ema and (point.interval == interval or point.cfg == 1) and name in report["metrics"]
                )
                if not line:  # a metric that is not defined for any of these images
                    continue
                label = f"{ema}, ({interval[0]:g}, {interval[1]:g})"
                ax.plot(*zip(*line, strict=True), LINES[k % len(LINES)], color=f"C{e % 10}", marker=".", label=label)
        if name in reports[winner]["metrics"]:
            ax.plot(points[winner].cfg, reports[winner]["metrics"][name], "ko", fillstyle="none", markersize=10)
        ax.set(xlabel="cfg", ylabel=name)
        ax.grid(alpha=0.3)
    axes[0][0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
