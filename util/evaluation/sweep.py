"""Guidance scale x EMA x guidance interval, each on few images, then the best setting on many.

Published numbers are chosen like this, and a choice made on few images favours whatever suited their noise. So the
evaluation at full size uses a seed that the sweep did not use.

    <output_dir>/sweep/<hash>/<setting>.json       a report for each setting; the hash is of what they have in common
                             /table.csv, table.json, metrics.png
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Count in whole steps, so that rounding loses no value and 1.3 is the number that a person types."""
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


#: flag -> (values of a part between commas, the form that a part has)
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
            raise UserError(f"--{flag} {text!r}: {part!r} is wrong. Expected are {form}.") from None
    return list(dict.fromkeys(values))


@dataclass(frozen=True)
class SweepPlan:
    """The settings to evaluate, each a configuration with `images` images."""

    points: tuple[Any, ...]
    images: int


def plan_sweep(config: Any) -> SweepPlan | None:
    """Return the sweep that the flags ask for, None without any. A setting without a sweep flag stays as it is."""
    if all(getattr(config, flag) is None for flag in AXES):
        if config.sweep_images is None:
            return None
        raise UserError("--sweep_images needs something to sweep: --sweep_cfg, --sweep_ema or --sweep_interval.")
    images = 8000 if config.sweep_images is None else config.sweep_images
    if images < 1 or images % config.class_num:
        raise UserError(f"--sweep_images {images} is not a multiple of the {config.class_num} classes.")
    usual = {"sweep_cfg": config.cfg, "sweep_ema": config.ema}
    usual["sweep_interval"] = config.interval_min, config.interval_max
    given = {flag: getattr(config, flag) for flag in AXES}
    axes = {flag: [usual[flag]] if text is None else parse_axis(flag, text) for flag, text in given.items()}
    intervals = axes["sweep_interval"]
    few = replace(config, num_images=images, save_images=None, keep_features=False)
    points = tuple(
        replace(few, ema=ema, cfg=cfg, interval_min=lo, interval_max=hi)
        for ema in axes["sweep_ema"]
        for lo, hi in intervals
        for cfg in sorted(axes["sweep_cfg"])
        if cfg != 1 or (lo, hi) == intervals[0]  # cfg 1 is no guidance, on any interval
    )
    return SweepPlan(points, images)


def best(points: Sequence[Any], scores: Sequence[float]) -> int:
    """Return the position of the lowest score. Of equal ones the lowest cfg wins, then the first."""
    scores = [score if math.isfinite(score) else math.inf for score in scores]
    return min(range(len(scores)), key=lambda i: (scores[i], points[i].cfg, i))


def run_sweep(
    plan: SweepPlan, config: Any, target_of: Callable, suites: Sequence[MetricSuite], folder: Path, ctx: DistContext
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate all settings, choose, and evaluate the best one with config.num_images on the next seed.

    Finished reports in `folder`, also of a sweep over other settings, are used again. Returns (the report at full size,
    lines on what was written), on all ranks.

    Args:
        target_of: loads the weights that a configuration names and returns its EvalTarget.
        suites: the metrics of plan.images and of config.num_images images.
    """
    (few, full), info = suites, print if ctx.is_main else lambda *_, **__: None
    metric = METRICS[min(few.names, key=list(METRICS).index)]  # METRICS is in order of preference
    value, order = metric.values[0], "lowest" if metric.lower_is_better else "highest"
    target, count = target_of(plan.points[0]), len(plan.points)

    def find_finished() -> tuple[Path, list[dict | None]]:
        identity = identify(target, few, ctx.device)
        for axis in ("ema", "cfg", "interval"):
            del identity["images"][axis]
        found, targets = folder / "sweep" / io.json_hash(identity), [replace(target, config=p) for p in plan.points]
        return found, [find_report(found, t, identify(t, few, ctx.device))[0] for t in targets]

    where, reports = run_on_rank0(ctx, find_finished)
    info(
        f"sweep: {count} settings with {plan.images} images each and seed {config.seed}, "
        f"{count - reports.count(None)} of them done. The {order} {value} is best, and is evaluated with "
        f"{config.num_images} images and seed {config.seed + 1}, which the sweep does not use.",
        flush=True,
    )
    for i, point in enumerate(plan.points):
        if reports[i] is None:
            target = replace(target, config=point) if point.ema == target.config.ema else target_of(point)
            reports[i], _ = evaluate_and_write(target, few, where, ctx)
            info(f"  [{i + 1}/{count}] {describe(point)}: {metric_line(reports[i])}", flush=True)

    sign = 1 if metric.lower_is_better else -1
    winner = best(plan.points, [sign * report["metrics"][value] for report in reports])
    point = plan.points[winner]
    chosen = {"by": f"{order} {value}", "sweep": str(where), "settings": count, "images": plan.images}
    if ctx.is_main:
        info(write_tables(where, plan, reports, winner, {"chosen": chosen}))
    info(f"best: {describe(point)}, by the {order} {value}; now {config.num_images} images", flush=True)
    axes = {name: getattr(point, name) for name in ("ema", "cfg", "interval_min", "interval_max")}
    final = replace(config, **axes, seed=config.seed + 1)
    target = replace(target, config=final) if point.ema == target.config.ema else target_of(final)
    report, path = run_on_rank0(ctx, lambda: find_report(folder / "eval", target, identify(target, full, ctx.device)))
    if report is None or config.save_images or config.keep_features:
        report, path = evaluate_and_write(target, full, folder / "eval", ctx, extra={"chosen": chosen})
    elif ctx.is_main:
        io.write_json(path, report | {"chosen": chosen})
    if ctx.is_main:
        full_size = {"report": str(path), "metrics": report["metrics"]}
        write_tables(where, plan, reports, winner, {"chosen": chosen, "full_size": full_size})
    return report, [f"table: {where / 'table.csv'}", f"report: {path}"]


def describe(point: Any) -> str:
    interval = "" if point.cfg == 1 else f" on ({point.interval_min:g}, {point.interval_max:g})"
    return f"{point.ema} cfg {point.cfg:g}{interval}"


def write_tables(
    folder: Path, plan: SweepPlan, reports: Sequence[Mapping[str, Any]], winner: int, about: Mapping[str, Any]
) -> str:
    """Write table.csv, table.json and metrics.png. Return the table for the terminal; a star marks the best setting."""
    names = list(dict.fromkeys(name for report in reports for name in report["metrics"]))
    rows = []
    for i, (point, report) in enumerate(zip(plan.points, reports, strict=True)):
        lo, hi = (None, None) if point.cfg == 1 else (point.interval_min, point.interval_max)
        row = {"ema": point.ema, "interval_min": lo, "interval_max": hi, "cfg": point.cfg}
        rows.append(row | {name: report["metrics"].get(name) for name in names} | {"best": i == winner})
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    common = {name: reports[0][name] for name in ("num_images", "seed", "solver", "steps", "checkpoint", "epoch")}
    io.write_json(folder / "table.json", {**common, **about, "points": rows})
    plot_sweep(folder / "metrics.png", rows, names)
    lines = [["", "ema", "interval", "cfg", *names]]
    for row in rows:
        interval = "-" if row["interval_min"] is None else f"{row['interval_min']:g}:{row['interval_max']:g}"
        values = ["-" if row[name] is None else f"{row[name]:.5g}" for name in names]
        lines.append(["*" if row["best"] else "", row["ema"], interval, f"{row['cfg']:g}", *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
