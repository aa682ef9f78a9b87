"""Evaluations of several runs side by side.

python -m util.report output/b16 output/b16-sf --sort fid --csv table.csv

A run's evaluations are <run>/eval/*.json and <run>/sweep/**/*.json; files may be named as well. What all rows share
stands once, above the table. A column whose name ends in " !" makes rows incomparable, and a warning below says why.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from util.errors import UserError

HIGHER_IS_BETTER = ("is_mean", "precision", "recall", "class_agreement")  # and what begins so
FOLDERS = {"eval": "*.json", "sweep": "**/*.json"}
MARK = " !"
PUBLISHED = "published by torch-fidelity"  # what util.features says of Inception's weights
WHY = {
    "N": "a Fréchet distance falls and an Inception Score rises with the number of images",
    "reference": "distances to different references are different quantities",
    "extractor": "features of other weights are other features",
    "quantisation": "rounding moves every metric",
}


# ------------------------------------------------------------------------------------------------------------- reading


def find(arguments: Sequence[str]) -> Iterator[tuple[str, Path, bool]]:
    """(name of the run, file, whether it was named itself) of every JSON file that may be a report, none of them twice.

    Raises:
        UserError: an argument that does not exist.
    """
    names = [Path(a).resolve().name for a in arguments]
    seen = set()
    for argument, name in zip(arguments, names, strict=True):
        path = Path(argument)
        if not path.exists():
            raise UserError(f"{argument} does not exist: name folders of runs, or JSON files of evaluations")
        if path.is_dir():
            run = str(path) if names.count(name) > 1 else name
            files = [f for folder, pattern in FOLDERS.items() for f in sorted((path / folder).glob(pattern))]
        else:
            above = next((p.parent.name for p in path.resolve().parents if p.name in FOLDERS), path.stem)
            run, files = above, [path]
        for file in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield run, file, file == path


def is_report(content: Any) -> bool:
    """Whether this is what an evaluation writes, and not, for instance, the table of a sweep."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("metrics"), dict)
        and type(content.get("num_images")) is int
    )


def read(arguments: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per report, and warnings about the files that are none.

    Raises:
        UserError: an argument that does not exist, or no report anywhere.
    """
    rows, warnings = [], []
    for run, path, named in find(arguments):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if is_report(content):
                rows.append(row_of(run, content))
            elif named:
                warnings.append(f"{path} is skipped: it is JSON, but not the report of an evaluation")
        except OSError as error:
            warnings.append(f"{path} is skipped: it cannot be read ({error.strerror})")
        except (ValueError, RecursionError) as error:
            warnings.append(f"{path} is skipped: it is no JSON ({error})")
        except (TypeError, AttributeError, LookupError) as error:
            warnings.append(f"{path} is skipped: its entries have unexpected types ({error})")
    if not rows:
        raise UserError(
            "no report of an evaluation in "
            + ", ".join(arguments)
            + ": expected eval/*.json or sweep/**/*.json in it, "
            "which `python main_jit.py --evaluate_gen --resume DIR` writes" + "".join(f"; {w}" for w in warnings)
        )
    return rows, warnings


def row_of(run: str, report: dict[str, Any]) -> dict[str, Any]:
    """The columns of one report: name -> value. Metrics are under their own names in "metrics"."""
    with_ = report.get("measured_with") or {}
    solver, steps, interval, epoch, grid = (report.get(k) for k in ("solver", "steps", "interval", "epoch", "grid"))
    on = ""
    if grid not in (None, "uniform"):
        on = f" {grid} {report.get('spectral_variant')} {report.get('spectral_delta')}"
    row = {
        "run": run,
        "epoch": epoch + 1 if isinstance(epoch, int) else None,  # as in file names: counted from 1
        "ema": report.get("ema"),
        "cfg": report.get("cfg"),
        "interval": None if interval is None else "-".join(f"{end:g}" for end in interval),
        "solver": None if solver is None else f"{solver}{'' if steps is None else steps}{on}",
        "seed": report.get("seed"),
        "N": report["num_images"],
        "metrics": {name: value for name, value in report["metrics"].items() if isinstance(value, int | float)},
    }
    for metric, reference in (with_.get("references") or {}).items():
        row[f"reference {metric}"] = Fingerprint(Path(reference.get("file") or "?").stem, reference.get("sha256"))
    for extractor in with_.get("extractors") or []:
        if sha256 := extractor.get("weights_sha256"):  # None: it has no weights
            published = extractor.get("weights", PUBLISHED) == PUBLISHED
            row[f"extractor {extractor['extractor']}"] = Fingerprint("" if published else "not published", sha256)
    quantisation = report.get("quantisation", with_.get("quantisation"))
    row["quantisation"] = quantisation if quantisation is None else str(quantisation)
    return row


class Fingerprint:
    """A file: shown by name and the first digits of its sha256, compared by sha256 alone."""

    def __init__(self, name: str, sha256: str | None):
        self.name, self.sha256 = name, sha256

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __str__(self) -> str:
        return f"{self.name} {(self.sha256 or 'no sha256')[:9]}".strip()


# ------------------------------------------------------------------------------------------------------------- writing


def metric_names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """Every column but the metrics, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name != "metrics"))


def differing(rows: list[dict[str, Any]], name: str) -> bool:
    """Whether the rows differ in a column. Where that would make them incomparable, unknown is not different."""
    values = {row.get(name) for row in rows}
    if name.partition(" ")[0] in WHY:
        values.discard(None)
    return len(values) > 1


def sort(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Best first; rows without the metric, or with a value that is not a number, last. UserError if no row has it."""
    known = metric_names(rows)
    if metric not in known:
        raise UserError(f"--sort {metric}: no report has that metric; there are {', '.join(known) or 'none'}")
    sign = -1 if metric.startswith(HIGHER_IS_BETTER) else 1

    def key(row: dict[str, Any]) -> tuple[bool, float]:
        value = row["metrics"].get(metric, float("nan"))
        return (value != value, 0.0 if value != value else sign * value)

    return sorted(rows, key=key)


def text_of(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def incomparable(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Columns in which rows differ and must not, if their metrics are compared: column -> a sentence."""
    found = {}
    for name in columns(rows):
        kind = name.partition(" ")[0]
        if kind in WHY and differing(rows, name):
            values = ", ".join(dict.fromkeys(text_of(row.get(name)) for row in rows))
            found[name] = f"warning: rows are not comparable across {name} ({values}): {WHY[kind]}"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text: what they share, the table, and warnings where rows are not comparable."""
    bad, metrics = incomparable(rows), metric_names(rows)
    shown = [name for name in columns(rows) if name == "run" or differing(rows, name)]
    shared = {name: next((r[name] for r in rows if r.get(name) is not None), None) for name in columns(rows)}
    above = [f"{name} {text_of(value)}" for name, value in shared.items() if name not in shown and value is not None]
    header = [name + (MARK if name in bad else "") for name in shown] + metrics
    body = [[text_of(r.get(n)) for n in shown] + [text_of(r["metrics"].get(m)) for m in metrics] for r in rows]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [header, *body]]
    rule = "  ".join("-" * width for width in widths)
    top = ["all: " + ", ".join(above)] if above else []
    return "\n".join([*top, lines[0].rstrip(), rule, *lines[1:], *bad.values()])


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """All columns of all rows, numbers in full. Raises UserError if the file cannot be written."""
    names, metrics = columns(rows), metric_names(rows)
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *metrics])
            for row in rows:
                writer.writerow([*(row.get(n) for n in names), *(row["metrics"].get(m) for m in metrics)])
    except OSError as error:
        raise UserError(f"--csv {path} cannot be written ({error.strerror})") from error


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 for an error that a sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m util.report", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="DIR", help="folders of runs, or JSON files of evaluations")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write all columns of all rows there")
    parser.add_argument("--sort", metavar="METRIC", help="best first by this metric")
    args = parser.parse_args(argv)
    try:
        rows, warnings = read(args.paths)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        rows = sort(rows, args.sort) if args.sort else rows
        print(table(rows))
        if args.csv:
            write_csv(rows, args.csv)
    except UserError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
