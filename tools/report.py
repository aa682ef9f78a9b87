"""Compare evaluations of several runs in one table.

    python -m tools.report output/b16 output/b16-sf --sort fid --csv table.csv

A run's evaluations are <run>/eval/*.json and <run>/sweep/**/*.json; files may be named as well. What all rows share is
printed once. A column whose name ends in " !" makes rows incomparable, and a warning below the table says why.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from util.errors import UserError, printable
from util.evaluation.metrics import METRICS
from util.evaluation.weights import NOT_PUBLISHED

WHY = {  # first word of a column -> why rows that differ in it are not comparable
    "N": "a Fréchet distance falls and an Inception Score rises with the number of images",
    "reference": "distances to different references are different quantities",
    "extractor": "features of other weights are other features",
    "quantisation": "rounding moves every metric",
}


def files_of(run: Path) -> list[Path]:
    """Return the files of a run that may be reports of evaluations."""
    return [*sorted(run.glob("eval/*.json")), *sorted(run.glob("sweep/**/*.json"))]


def read(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Return one row per report, the names of their metrics, and warnings. Raises UserError if there is no report."""
    rows, metrics, warnings = [], {}, []
    files = {}  # resolved path -> path: a file that was found twice is one row
    for path in paths:
        files |= {file.resolve(): file for file in (files_of(path) if path.is_dir() else [path])}
    names = [path.resolve().name for path in paths]
    for file in files.values():
        folder = next((p.parent for p in file.absolute().parents if p.name in ("eval", "sweep")), file)
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(report, dict) and "measured_with" in report:
                run = str(folder) if names.count(folder.name) > 1 else folder.name
                rows.append({"run": run, **row_of(report)})
                metrics |= report["metrics"]
            elif file in paths:
                warnings.append(f"{file} is skipped: it is not the report of an evaluation")
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = "there is no such file or folder" if not file.exists() else f"{type(error).__name__}: {error}"
            warnings.append(f"{file} is skipped: {reason}")
    if not rows:
        given = ", ".join(map(str, paths))
        expected = "expected eval/*.json or sweep/**/*.json, which main_jit.py --evaluate_gen --resume DIR writes"
        raise UserError(f"No report of an evaluation in {given}: {expected}. {'; '.join(warnings)}")
    return rows, list(metrics), warnings


def row_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of one report: settings, what decides whether it is comparable, and the metrics."""
    solver = f"{report['solver']}{report['steps']}"
    if report.get("grid", "uniform") != "uniform":
        solver += " {grid} {spectral_variant} {spectral_delta}".format(**report)
    row = {
        "epoch": report["epoch"] + 1,  # counted from 1, as in file names
        "ema": report["ema"],
        "cfg": report["cfg"],
        "interval": "-".join(f"{end:g}" for end in report["interval"]),
        "solver": solver,
        "seed": report["seed"],
        "N": report["num_images"],
    }
    for metric, file in report["measured_with"]["references"].items():
        row[f"reference {metric}"] = f"{Path(file['file']).stem} {file['sha256'][:9]}"
    for extractor in report["measured_with"]["extractors"]:
        if sha256 := extractor["weights_sha256"]:  # None: it has no weights
            name = "not published " if extractor.get("weights") == NOT_PUBLISHED else ""
            row[f"extractor {extractor['extractor']}"] = name + sha256[:9]
    if protocol := report["measured_with"].get("protocol"):
        row["protocol"] = protocol
    return row | {"quantisation": report["quantisation"]} | report["metrics"]


def sort(rows: list[dict[str, Any]], metrics: list[str], metric: str) -> list[dict[str, Any]]:
    """Return the rows best first; rows without the metric come last."""
    if metric not in metrics:
        raise UserError(f"--sort {metric}: no report has that metric; there are {', '.join(metrics) or 'none'}.")
    higher_is_better = any(metric in m.values and not m.lower_is_better for m in METRICS.values())
    with_metric = sorted((row for row in rows if metric in row), key=lambda row: row[metric], reverse=higher_is_better)
    return with_metric + [row for row in rows if metric not in row]


def differs(rows: list[dict[str, Any]], name: str) -> bool:
    """Whether rows differ in a column. Files differ if their sha256, the last word, does; no file is no difference."""
    values = {row.get(name) for row in rows}
    if name.startswith(("reference ", "extractor ")):
        values = {value.split()[-1] for value in values if value is not None}
    return len(values) > 1


def text(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]], metrics: list[str]) -> str:
    """Return what the rows share, the aligned table, and warnings where rows are not comparable."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in metrics]
    shown = [name for name in names if name == "run" or differs(rows, name)]
    bad = [name for name in shown if name.split()[0] in WHY]
    out = []
    if len(shown) < len(names):
        first = {name: next(row[name] for row in rows if name in row) for name in names}
        out.append("all: " + ", ".join(f"{name} {text(first[name])}" for name in names if name not in shown))
    lines = [[f"{name} !" if name in bad else name for name in shown] + metrics]
    lines += [[text(row.get(name)) for name in shown + metrics] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for run, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        out.append("  ".join([run.ljust(widths[0]), *aligned]).rstrip())
    for name in bad:
        values = ", ".join(dict.fromkeys(text(row.get(name)) for row in rows))
        out.append(f"warning: rows are not comparable across {name} ({values}): {WHY[name.split()[0]]}")
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after an error that one sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="DIR", help="folders of runs, or JSON files of evaluations"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write all columns of all rows there")
    parser.add_argument("--sort", metavar="METRIC", help="best first by this metric")
    args = parser.parse_args(argv)
    try:
        rows, metrics, warnings = read(args.paths)
        rows = sort(rows, metrics, args.sort) if args.sort else rows
        for warning in warnings:
            print(f"warning: {printable(warning)}", file=sys.stderr)
        print(table(rows, metrics))
        if args.csv:
            with open(args.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
                writer.writeheader()
                writer.writerows(rows)
    except (UserError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
