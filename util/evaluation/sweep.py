"""Guidance scale x EMA x guidance interval, each on few images, then the best setting on many.

Published numbers are chosen like this. A choice made on few images favours settings that suit their noise, so the
evaluation at full size uses a seed that the sweep did not use.

    <output_dir>/sweep/<hash>/<setting>.json       a report for each setting; the hash is of what they have in common
                             /table.csv, table.json, metrics.png
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from util import io
from util.config import WEIGHTS
from util.dist.context import DistContext, run_on_rank0
from util.errors import UserError
from util.evaluation.evaluate import evaluate_and_write, find_report, identify, metric_line
from util.evaluation.metrics import METRICS, MetricSuite
from util.evaluation.plots import plot_sweep

EMAS = {"1": "ema1", "2": "ema2", "0": "model"} | {name: name for name in WEIGHTS}


def _cfgs(part: str) -> list[float]:
    """Count in whole steps, so that rounding loses no value and gives 1.3, not 1.3000000000000003."""
    start, *rest = map(float, part.split(":"))
    stop, step = rest or (start, 1.0)
    if not (0 <= start <= stop < math.inf and 1e-6 <= step < math.inf and (stop - start) / step < 1000 - 1e-6):
        raise ValueError
    return [round(start + k * step, 6) for k in range(math.floor((stop - start) / step + 1e-6) + 1)]


def _intervals(part: str) -> list[tuple[float, float]]:
    lo, hi = map(float, part.split(":"))
    if not 0 <= lo < hi <= 1:
        raise ValueError
    return [(lo, hi)]


#: flag -> (function from a part between commas to its values, the form of a part)
AXES: dict[str, tuple[Callable[[str], list], str]] = {
    "sweep_cfg": (_cfgs, "numbers >= 0 and start:stop:step with at most 1000 values, as in 1.5,2.0 or 1.0:4.0:0.1"),
    "sweep_ema": (lambda part: [EMAS[part]], "1, 2 and 0 (the weights without EMA, also: model), as in 1,2"),
    "sweep_interval": (_intervals, "pairs lo:hi with 0 <= lo < hi <= 1, as in 0.1:1.0,0.2:0.8"),
}


def parse_axis(flag: str, text: str) -> list:
    """Return the values of one of AXES, each once, in order. Raises UserError."""
    parse, form = AXES[flag]
    values = []
    for part in map(str.strip, text.split(",")):
        try:
            values += parse(part)
        except (ValueError, KeyError):
            raise UserError(f"--{flag} {text!r}: {part!r} is not understood. Give {form}.") from None
    return list(dict.fromkeys(values))


def plan_sweep(config: Any) -> list:
    """Return a configuration of --sweep_images images for each setting to evaluate; [] without sweep flags.

    What has no sweep flag stays as it is.
    """
    given = {flag: getattr(config, flag) for flag in AXES if getattr(config, flag) is not None}
    if not given:
        if config.sweep_images is not None:
            raise UserError("--sweep_images needs something to sweep: --sweep_cfg, --sweep_ema or --sweep_interval.")
        return []
    images = 8000 if config.sweep_images is None else config.sweep_images
    if images < 1 or images % config.class_num:
        raise UserError(f"--sweep_images {images} must be a positive multiple of the {config.class_num} classes.")
    axes = {
        "sweep_cfg": [config.cfg],
        "sweep_ema": [config.ema],
        "sweep_interval": [(config.interval_min, config.interval_max)],
    }
    axes |= {flag: parse_axis(flag, text) for flag, text in given.items()}
    few = replace(config, num_images=images, save_images=None, keep_features=False)
    return [
        replace(few, ema=ema, cfg=cfg, interval_min=lo, interval_max=hi)
        for ema in axes["sweep_ema"]
        for lo, hi in axes["sweep_interval"]
        for cfg in sorted(axes["sweep_cfg"])
        if cfg != 1 or (lo, hi) == axes["sweep_interval"][0]  # cfg 1 is no guidance, on any interval
    ]


def best(points: Sequence[Any], scores: Sequence[float]) -> int:
    """Return the position of the lowest score. Of equal ones the lowest cfg wins, then the first."""
    return min(range(len(scores)), key=lambda i: (scores[i], points[i].cfg, i))


def run_sweep(
    points: list, config: Any, target_of: Callable, suites: Sequence[MetricSuite], folder: Path, ctx: DistContext
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate all settings, choose, and evaluate the best one with config.num_images on the next seed.

    Finished reports in `folder`, also of a sweep over other settings, are used again. Returns (the report at full size,
    lines on what was written), on all ranks.

    Args:
        points: the settings, from plan_sweep.
        target_of: loads the weights that a configuration names and returns its EvalTarget.
        suites: the metrics of as many images as each of the points has, and of config.num_images images.
    """
    few, full = suites
    images, count = points[0].num_images, len(points)
    name = next(name for name in METRICS if name in few.names)  # METRICS is in order of preference
    value = METRICS[name].values[0]
    order, sign = ("lowest", 1) if METRICS[name].lower_is_better else ("highest", -1)

    def info(text: str) -> None:
        if ctx.is_main:
            print(text, flush=True)

    def find_finished() -> tuple[Path, list[dict | None]]:
        shared = identify(first, few, ctx.device)
        for axis in ("ema", "cfg", "interval"):
            del shared["images"][axis]
        where = folder / "sweep" / io.json_hash(shared)
        targets = [replace(first, config=point) for point in points]
        return where, [find_report(where, target, identify(target, few, ctx.device))[0] for target in targets]

    first = target_of(points[0])
    where, reports = run_on_rank0(ctx, find_finished)
    info(
        f"sweep: {count} settings with {images} images each and seed {config.seed}, "
        f"{count - reports.count(None)} of them done. The {order} {value} is best, and is evaluated with "
        f"{config.num_images} images and seed {config.seed + 1}, which the sweep does not use."
    )
    for i, point in enumerate(points):
        if reports[i] is None:
            reports[i], _ = evaluate_and_write(target_of(point), few, where, ctx)
            info(f"  [{i + 1}/{count}] {describe(point)}: {metric_line(reports[i])}")

    winner = best(points, [sign * report["metrics"][value] for report in reports])
    point = points[winner]
    chosen = {"by": f"{order} {value}", "sweep": str(where), "settings": count, "images": images}
    if ctx.is_main:
        info(write_tables(where, points, reports, winner, {"chosen": chosen}))
    info(f"best: {describe(point)}, by the {order} {value}; now {config.num_images} images")

    axes = {name: getattr(point, name) for name in ("ema", "cfg", "interval_min", "interval_max")}
    final = target_of(replace(config, **axes, seed=(config.seed + 1) % 2**64))
    report, path = run_on_rank0(ctx, lambda: find_report(folder / "eval", final, identify(final, full, ctx.device)))
    if report is None or config.save_images or config.keep_features:
        report, path = evaluate_and_write(final, full, folder / "eval", ctx, extra={"chosen": chosen})
    elif ctx.is_main:
        io.write_json(path, report | {"chosen": chosen})
    if ctx.is_main:
        full_size = {"report": str(path), "metrics": report["metrics"]}
        write_tables(where, points, reports, winner, {"chosen": chosen, "full_size": full_size})
    return report, [f"table: {where / 'table.csv'}", f"report: {path}"]


def describe(point: Any) -> str:
    interval = "" if point.cfg == 1 else f" on ({point.interval_min:g}, {point.interval_max:g})"
    return f"{point.ema} cfg {point.cfg:g}{interval}"


def write_tables(
    folder: Path, points: Sequence[Any], reports: Sequence[Mapping[str, Any]], winner: int, about: Mapping[str, Any]
) -> str:
    """Write table.csv, table.json and metrics.png. Return the table for the terminal; a star marks the best setting."""
    names = list(dict.fromkeys(name for report in reports for name in report["metrics"]))
    rows = []
    for i, (point, report) in enumerate(zip(points, reports, strict=True)):
        lo, hi = (None, None) if point.cfg == 1 else (point.interval_min, point.interval_max)
        row = {"ema": point.ema, "interval_min": lo, "interval_max": hi, "cfg": point.cfg}
        rows.append(row | {name: report["metrics"].get(name) for name in names} | {"best": i == winner})
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    common = {name: reports[0][name] for name in ("num_images", "seed", "solver", "steps", "checkpoint", "epoch")}
    io.write_json(folder / "table.json", {**common, **about, "points": rows})
    varying = [name for name in names if len({row[name] for row in rows}) > 1]  # not what is known of real images
    plot_sweep(folder / "metrics.png", rows, varying or names)
    lines = [["", "ema", "interval", "cfg", *names]]
    for row in rows:
        interval = "-" if row["interval_min"] is None else f"{row['interval_min']:g}:{row['interval_max']:g}"
        values = ["-" if row[name] is None else f"{row[name]:.5g}" for name in names]
        lines.append(["*" if row["best"] else "", row["ema"], interval, f"{row['cfg']:g}", *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
