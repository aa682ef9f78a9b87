"""Tables of a study from its JSON lines alone.

    python -m experiments.results cifar10 [--against plain]

Arms are compared with one arm, seed by seed: the same initial weights, data, times and noise. An interval is that of
the mean of the paired differences, 95%, by Student's t. Three numbers for each run, in this order of importance:

    density   excess or loss weighted by the default density of training times: the number that decides
    low       the same in the rings 0 to 5 alone
    uniform   with equal weight for all t

Where samples are measured, the lowest Fréchet distance over guidance scales and weights decides, which are swept alike
for each run; the other numbers are those of the same samples.

Shapes: T times, K rings.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from experiments.run import read_lines, results_file
from experiments.studies import STUDIES
from experiments.train import Run, density
from spectral_forcing import dct_rings
from util.errors import UserError

SIZES, LOW_RINGS = {len(dct_rings(n)[1]): n for n in (8, 32, 64)}, 6  # rings -> pixels
COLUMNS = {  # number -> its column
    "density": "against {}",
    "low": "rings 0 to 5",
    "uniform": "equal weight for all t",
    "fd_effnet_lite0": "against {}",
    "precision": "precision",
    "recall": "recall",
    "spectrum_gap": "spectrum gap",
}
VARIES = ("arm", "seed")  # within a group of runs that are compared
Key = tuple[str, int]  # arm, steps


def table_of(line: Mapping[str, Any]) -> np.ndarray:
    """Return what each ring adds to the excess or loss per pixel, (T, K)."""
    table = np.array(line.get("excess") or line["loss"])
    size = SIZES[table.shape[1]]
    return table * dct_rings(size)[1].numpy() / size**2


def numbers(line: Mapping[str, Any], sampling_steps: int | None = None) -> dict[str, float]:
    """Return the numbers of a run, the one that decides first; of samples with so many steps, by default the fewest."""
    if "samples" in line:
        sampling_steps = sampling_steps or min(line["run"]["sampling_steps"])
        found = [found for found in line["samples"] if found.get("steps", sampling_steps) == sampling_steps]
        best = min(found, key=lambda found: found["fd_effnet_lite0"])
        return {name: best[name] for name in COLUMNS if name in best}
    table, weight = table_of(line), density(line["run"]["times"]).numpy()
    by_time = table.sum(1)
    return {
        "density": float(weight @ by_time),
        "low": float(weight @ table[:, :LOW_RINGS].sum(1)),
        "uniform": float(by_time.mean()),
    }


def load(study: str, quick: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of a study's finished runs, and what is to be said of the others. Raises UserError for no line.

    A line of a run that the study does not list is refused: it was made with other settings.
    """
    lines, notes = list(read_lines(results_file(study, quick))), []
    for line in lines:
        line["run"] = asdict(Run(**line["run"]))  # a setting that a line lacks had its default
    if not lines:
        raise UserError(f"The study {study} has no results yet: python -m experiments.run {study}")
    expected = [asdict(run) for run in STUDIES[study].runs(quick)]
    other = [line["run"] for line in lines if line["run"] not in expected]
    if other:
        raise UserError(f"{results_file(study, quick)} has {len(other)} runs of other settings, such as {other[0]}.")
    done = [line["run"] for line in lines]
    notes += [f"failed: {short(line['run'])}: {line['failed']}" for line in lines if "failed" in line]
    if missing := [run for run in expected if run not in done]:
        notes.append(f"{len(missing)} of {len(expected)} runs are missing, such as {short(missing[0])}")
    finished = [line for line in lines if "failed" not in line]
    return sorted(finished, key=lambda line: expected.index(line["run"])), notes


def short(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {run[name]}" for name in ("data", "patch", "arm", "seed", "steps", "lr"))


def groups(lines: Iterable[Mapping[str, Any]]) -> dict[tuple, list[Mapping[str, Any]]]:
    """Return the lines by all settings but arm and seed: within a group they can be compared."""
    found: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in lines:
        key = tuple((name, value) for name, value in line["run"].items() if name not in VARIES)
        found.setdefault(key, []).append(line)
    return found


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and half of its 95% interval; relative to the mean of what is compared with."""

    mean: float
    half: float  # infinite for a single pair
    reference: float
    pairs: int

    @property
    def percent(self) -> float:
        return 100 * self.mean / self.reference

    @property
    def percent_half(self) -> float:
        """Half of the interval in percent, for error bars: 0 where it is not known."""
        return 0 if self.pairs == 1 else 100 * self.half / self.reference

    def __str__(self) -> str:
        return f"{self.percent:+.1f}%" + (f" ± {self.percent_half:.1f}" if self.pairs > 1 else "")


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference:
    """Compare {seed: value} with {seed: value} of another arm, over the seeds of both."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        raise UserError("Arms without a common seed cannot be compared.")
    differences = [values[seed] - reference[seed] for seed in seeds]
    half = math.inf
    if len(seeds) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(seeds))
        half = float(student.ppf(0.975, len(seeds) - 1)) * error
    return Difference(statistics.mean(differences), half, statistics.mean(reference[s] for s in seeds), len(seeds))


def compare(lines: Sequence[Mapping[str, Any]], against: str) -> dict[str, dict[str, Difference]]:
    """Return {arm: {number: difference from `against`}} of comparable runs.

    Raises:
        UserError: runs that differ in more than arm and seed, or none of the arm `against`.
    """
    if len(kinds := groups(lines)) != 1:
        settings = [dict(key) for key in kinds]
        names = [name for name in settings[0] if len({s[name] for s in settings}) > 1]
        raise UserError(f"Runs of different {', '.join(names)} are not to be compared in one table.")
    arms = list(dict.fromkeys(line["run"]["arm"] for line in lines))
    if against not in arms:
        raise UserError(f"There is no run of the arm {against}, only of {', '.join(arms)}.")
    steps = lines[0]["run"]["steps"]
    return {arm: found for (arm, _), found in differences(lines, (against, steps)).items()}


def differences(
    lines: Iterable[Mapping[str, Any]], against: Key, sampling_steps: int | None = None
) -> dict[Key, dict[str, Difference]]:
    """Return {(arm, steps): {number: difference from the runs `against`}}, the shortest runs first."""
    runs: dict[Key, dict[int, dict[str, float]]] = {}  # of each seed
    for line in sorted(lines, key=lambda line: line["run"]["steps"]):
        run = line["run"]
        runs.setdefault((run["arm"], run["steps"]), {})[run["seed"]] = numbers(line, sampling_steps)

    def column(key: Key, name: str) -> dict[int, float]:
        return {seed: found[name] for seed, found in runs[key].items()}

    names = next(iter(runs[against].values()))
    return {key: {name: paired(column(key, name), column(against, name)) for name in names} for key in runs}


def markdown(lines: Sequence[Mapping[str, Any]], against: str) -> str:
    """Return a table for each group of comparable runs."""
    out = []
    for key, group in groups(lines).items():
        run, what = dict(key), next(name for name in ("excess", "loss", "samples") if name in group[0])
        names, rows = list(numbers(group[0])), []
        for arm, found in compare(group, against).items():
            decides = found[names[0]]
            cells = [cell(name, found[name], arm == against) for name in names]
            rows.append([arm, f"{decides.reference + decides.mean:.4g}", *cells, decides.pairs])
        columns = [COLUMNS[name].format(against) for name in names]
        out.append(f"{run['data']}, patch {run['patch']}, {run['steps']} steps, learning rate {run['lr']:g}:\n")
        out.append(table(["arm", "FD-EffNet-Lite0" if what == "samples" else what, *columns, "seeds"], rows) + "\n")
    return "\n".join(out)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    head, *body = (f"| {' | '.join(map(str, line))} |" for line in [columns, *rows])
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def cell(name: str, found: Difference, is_reference: bool) -> str:
    """Return a difference in percent; of shares and gaps, which may be near 0, the value and the difference itself."""
    if name not in ("precision", "recall", "spectrum_gap"):
        return "" if is_reference else str(found)
    value = f"{found.reference + found.mean:.3f}"
    return value if is_reference else f"{value} ({found.mean:+.3f} ± {found.half:.3f})"


def provenance_line(lines: Sequence[Mapping[str, Any]], study: str) -> str:
    """Return command, commits, hardware and the time that the runs took."""
    commits = sorted({str(line["commit"])[:9] for line in lines})
    hardware = sorted({line["hardware"] for line in lines})
    hours = sum(line["train_s"] + line["measure_s"] for line in lines) / 3600
    return f"python -m experiments.run {study}; commit {', '.join(commits)}; {', '.join(hardware)}; {hours:.2f} hours"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.results", description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES, metavar="STUDY")
    parser.add_argument("--against", default="plain", metavar="ARM")
    parser.add_argument("--quick", action="store_true", help="the results of --quick")
    args = parser.parse_args(argv)
    try:
        lines, notes = load(args.study, args.quick)
        print(markdown(lines, args.against))
        print(provenance_line(lines, args.study))
    except UserError as error:
        print(f"experiments.results: error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
