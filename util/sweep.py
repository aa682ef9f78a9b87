"""Guidance scale x EMA x guidance interval, each on few images, then the best of them on many.

What is published was chosen like this, and a choice made on few images favours what suited their noise: so the
evaluation at full size has a seed that the sweep did not use.

    <output_dir>/sweep/<digest>/<setting>.json        a report for each point; `digest` is of all but the points
                               /table.csv, table.json, metrics.png
"""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from util.checkpoint import CHOICES
from util.distributed import World, from_main
from util.errors import UserError
from util.evaluation import (
    Subject,
    decided_by_of,
    evaluate_and_write,
    fingerprint_of,
    finished_report,
    metric_line,
    report_name,
)
from util.generation import Sampling
from util.metrics import MetricSuite
from util.provenance import write_json
from util.sweep_table import write_tables

FLAGS = ("sweep_cfg", "sweep_ema", "sweep_interval", "sweep_images")
CFG_FORM = "numbers and start:stop:step, as in 1.0:4.0:0.1 or 1.5,2.0,3:4:0.5"
EMA_FORM = "of 1, 2 and 0 (the weights without average, also: model), as in 1,2"
INTERVAL_FORM = "pairs lo:hi with 0 <= lo < hi <= 1, as in 0.1:1.0,0.2:0.8"
MOST_VALUES = 1000
EMAS = {"1": "ema1", "2": "ema2", "0": "model"} | {name: name for name in CHOICES}
CRITERIA = {  # metric -> (its value, whether the lowest is best), in order of preference
    "fid": ("fid", True),
    "fd_effnet": ("fd_effnet_lite0", True),
    "class_agreement": ("class_agreement", False),
    "is": ("is_mean", False),
}

# ---------------------------------------------------------------------------------------------------- what to sweep


@dataclass(frozen=True)
class Point:
    """One setting."""

    ema: str
    cfg: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """The points in the order in which they are evaluated, and on how many images."""

    points: tuple[Point, ...]
    images: int

    @classmethod
    def from_args(cls, args: Namespace) -> "Plan | None":
        """What the flags ask for; None where none of them is given. What has no sweep flag stays as it is.

        Raises:
            UserError: naming the flag, the piece that is wrong and the form that is expected.
        """
        if not any(given := [getattr(args, name) is not None for name in FLAGS]):
            return None
        if not any(given[:3]):
            raise UserError("--sweep_images says how large a sweep is: --sweep_cfg, --sweep_ema, --sweep_interval what")
        cfgs = parse_cfg(args.sweep_cfg) if args.sweep_cfg is not None else [args.cfg]
        emas = parse_ema(args.sweep_ema) if args.sweep_ema is not None else [args.ema]
        own = (args.interval_min, args.interval_max)
        intervals = parse_interval(args.sweep_interval) if args.sweep_interval is not None else [own]
        images = 8000 if args.sweep_images is None else args.sweep_images
        if images < 1 or images % args.class_num:
            raise UserError(
                f"--sweep_images {images} is not a multiple of the {args.class_num} classes: "
                "an evaluation needs equally many images of each class"
            )
        return cls(make_points(emas, cfgs, intervals), images)


def make_points(
    emas: Sequence[str], cfgs: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[Point, ...]:
    """All combinations; with cfg 1 there is no guidance, so that its interval is the first one only."""
    return tuple(
        Point(ema, cfg, interval)
        for ema in emas
        for interval in intervals
        for cfg in cfgs
        if cfg != 1 or interval == intervals[0]
    )


def _pieces(flag: str, text: str, form: str, parse: Callable[[str], list]) -> list:
    """The values of all pieces between commas, without repetitions, in order."""
    values = []
    for piece in text.split(","):
        try:
            values += parse(piece.strip())
        except (ValueError, KeyError) as error:
            why = f" ({error})" if isinstance(error, _ReasonError) else ""
            raise UserError(f"--{flag} {text!r}: {piece.strip()!r} is wrong{why}; expected are {form}") from None
    return list(dict.fromkeys(values))


class _ReasonError(ValueError):
    """A piece that is wrong for a reason worth saying."""


def parse_cfg(text: str) -> list[float]:
    """Guidance scales, ascending. start:stop:step counts in whole steps, so that rounding loses no value."""

    def parse(piece: str) -> list[float]:
        numbers = [float(part) for part in piece.split(":")]
        if len(numbers) not in (1, 3):
            raise _ReasonError("one number or three")
        if not all(math.isfinite(number) for number in numbers) or numbers[0] < 0:
            raise _ReasonError("a guidance scale is a finite number and not negative")
        if len(numbers) == 1:
            return [round(numbers[0], 6)]
        start, stop, step = numbers
        if stop < start or step < 1e-6:
            raise _ReasonError("start <= stop and step > 0")
        count = math.floor((stop - start) / step + 1e-6) + 1
        if count > MOST_VALUES:
            raise _ReasonError(f"{count} values, and {MOST_VALUES} are the most")
        return [round(start + k * step, 6) for k in range(count)]

    return sorted(_pieces("sweep_cfg", text, CFG_FORM, parse))


def parse_ema(text: str) -> list[str]:
    """Names of weights as --ema has them."""
    return _pieces("sweep_ema", text, EMA_FORM, lambda piece: [EMAS[piece]])


def parse_interval(text: str) -> list[tuple[float, float]]:
    """Guidance intervals (lo, hi)."""

    def parse(piece: str) -> list[tuple[float, float]]:
        lo, hi = (float(part) for part in piece.split(":"))
        if not 0 <= lo < hi <= 1:
            raise _ReasonError("0 <= lo < hi <= 1")
        return [(lo, hi)]

    return _pieces("sweep_interval", text, INTERVAL_FORM, parse)


# ---------------------------------------------------------------------------------------------------- what is best


def criterion(names: Sequence[str]) -> tuple[str, bool]:
    """(value that decides, whether the lowest is best) for the metrics that were asked for.

    Raises:
        UserError: none of them ranks settings.
    """
    for name, choice in CRITERIA.items():
        if name in names:
            return choice
    raise UserError(f"a sweep chooses by {', '.join(CRITERIA)}: --metrics {','.join(names)} has none of them")


def best(points: Sequence[Point], reports: Sequence[Mapping[str, Any]], value: str, lowest: bool) -> int:
    """Position of the best point. Of equal ones the lowest cfg wins, then the one that was asked for first."""
    sign = 1 if lowest else -1
    scores = [sign * report["metrics"][value] for report in reports]
    scores = [score if math.isfinite(score) else math.inf for score in scores]
    return min(range(len(points)), key=lambda i: (scores[i], points[i].cfg, i))


# ---------------------------------------------------------------------------------------------------------- do it


def run_sweep(
    plan: Plan,
    sampling: Sampling,
    subject_of: Callable[[str], Subject],
    suites: tuple[MetricSuite, MetricSuite],
    num_images: int,
    output_dir: Path,
    world: World,
    save_images: Path | None = None,
    keep_features: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate all points, choose, and evaluate the best one at full size on the next seed.

    Reports that are there, of this sweep or of one over other points, are taken over.

    Args:
        sampling: what the points have in common.
        subject_of: the denoiser with the weights of that name.
        suites: the metrics of `plan.images` and those of `num_images` images.
        save_images, keep_features: of the evaluation at full size.

    Returns:
        (report at full size, lines on what was written), on all processes.
    """
    few, full = suites
    value, lowest = criterion(few.names)
    say = print if world.main else lambda *args, **kwargs: None
    settings = {point: replace(sampling, cfg=point.cfg, interval=point.interval) for point in plan.points}
    subject = subject_of(plan.points[0].ema)

    def look() -> tuple[str, dict[Point, dict]]:
        whole = fingerprint_of(subject, sampling, plan.images, few, world.device)
        for part in ("ema", "sampling"):
            del whole["images"][part]
        base = {k: v for k, v in sampling.describe().items() if k not in ("cfg", "interval")}
        name = decided_by_of({**whole, "base": base}, few)
        found = {}
        for point in plan.points:
            about = replace(subject, ema=point.ema)
            mark = decided_by_of(fingerprint_of(about, settings[point], plan.images, few, world.device), few)
            file = report_name(subject.epoch, point.ema, settings[point], plan.images, subject.at)
            if finished := finished_report(output_dir / "sweep" / name, file, mark):
                found[point] = finished[0]
        return name, found

    name, reports = from_main(world, look)
    folder = output_dir / "sweep" / name
    order = "lowest" if lowest else "highest"
    say(
        f"sweep: {len(plan.points)} settings with {plan.images} images each and seed {sampling.seed}, "
        f"{len(reports)} of them done; the {order} {value} is best, and is evaluated with {num_images} images and "
        f"seed {sampling.seed + 1}, which the sweep did not use",
        flush=True,
    )
    for i, point in enumerate(plan.points, start=1):
        if point in reports:
            continue
        subject = subject if point.ema == subject.ema else subject_of(point.ema)
        reports[point], _ = evaluate_and_write(subject, settings[point], plan.images, few, folder, world)
        say(f"  [{i}/{len(plan.points)}] {describe(point)}: {metric_line(reports[point])}", flush=True)

    ordered = [reports[point] for point in plan.points]
    winner = best(plan.points, ordered, value, lowest)
    chosen = {"by": f"{order} {value}", "sweep": str(folder), "settings": len(plan.points), "images": plan.images}
    if world.main:
        say(write_tables(folder, plan.points, ordered, winner, chosen))
    point = plan.points[winner]
    say(f"best: {describe(point)}, by the {order} {value}; now {num_images} images with seed {sampling.seed + 1}")
    subject = subject if point.ema == subject.ema else subject_of(point.ema)
    final = replace(settings[point], seed=sampling.seed + 1)
    where = output_dir / "eval"

    def look_at_full_size() -> tuple[dict[str, Any], Path] | None:
        mark = decided_by_of(fingerprint_of(subject, final, num_images, full, world.device), full)
        finished = finished_report(where, report_name(subject.epoch, subject.ema, final, num_images, subject.at), mark)
        if finished:
            write_json(finished[1], finished[0] | {"chosen": chosen})
        return finished

    finished = from_main(world, look_at_full_size) if not (save_images or keep_features) else None
    report, path = finished or evaluate_and_write(
        subject, final, num_images, full, where, world, save_images, keep_features, {"chosen": chosen}
    )
    if world.main:
        write_tables(folder, plan.points, ordered, winner, chosen, {"report": str(path), "metrics": report["metrics"]})
    return report, [f"table: {folder / 'table.csv'}", f"report: {path}"]


def describe(point: Point) -> str:
    interval = "" if point.cfg == 1 else " on ({:g}, {:g})".format(*point.interval)
    return f"{point.ema} cfg {point.cfg:g}{interval}"
