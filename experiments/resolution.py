"""Levels of resolution beside the whole image, against what training costs: a table from the JSON lines alone.

    python -m experiments.resolution

Runs of different lengths are compared on purpose: the loss of each arm and number of steps beside that of plain JiT
after 600 steps with the same seed, and the operations of training (the network's matrix products, two per multiply-add;
the transforms to and from a level add 1% to 4%) and its seconds as shares of plain JiT's. Seconds are those of one
thread of a busy machine.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.results import Difference, load, numbers, paired
from util.errors import UserError

STUDIES = ("resolution", "resolution_time", "resolution_longer", "resolution_kinds")
PLAIN = ("plain", 600)
Key = tuple[str, int]  # arm, steps


def lines_of(patch: int) -> list[Mapping[str, Any]]:
    """Return the runs of all studies at a patch size. Raises UserError if there are none."""
    lines = []
    for study in STUDIES:
        try:
            lines += [line for line in load(study)[0] if line["run"]["patch"] == patch]
        except UserError:
            continue  # it has not been run
    if not any((line["run"]["arm"], line["run"]["steps"]) == PLAIN for line in lines):
        raise UserError(f"There is no run of plain JiT at patch {patch}: python -m experiments.run resolution")
    return lines


def by_cost(lines: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Return, for each arm and number of steps, the shares of operations and seconds, and the losses beside PLAIN."""
    runs: dict[Key, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        runs.setdefault((line["run"]["arm"], line["run"]["steps"]), {})[line["run"]["seed"]] = line

    def share(key: Key, name: str) -> float:
        return statistics.mean(line[name] for line in runs[key].values()) / statistics.mean(
            line[name] for line in runs[PLAIN].values()
        )

    def difference(key: Key, name: str) -> Difference:
        of, plain = ({seed: numbers(line)[name] for seed, line in runs[k].items()} for k in (key, PLAIN))
        return paired(of, plain)

    return {
        key: {
            "operations": share(key, "tflop"),
            "seconds": share(key, "train_s"),
            "density": difference(key, "density"),
            "uniform": difference(key, "uniform"),
        }
        for key in sorted(runs, key=lambda key: (key[1], list(runs).index(key)))
    }


def markdown(patch: int) -> str:
    out = [f"CIFAR-10, patch {patch}; plain JiT after 600 steps is 1 and 0%:\n"]
    out += ["| arm | steps | operations | seconds | loss | equal weight for all t | seeds |", "|---" * 7 + "|"]
    for (arm, steps), found in by_cost(lines_of(patch)).items():
        costs = f"{found['operations']:.2f} | {found['seconds']:.2f}"
        out.append(
            f"| {arm} | {steps} | {costs} | {found['density']} | {found['uniform']} | {found['density'].pairs} |"
        )
    return "\n".join(out)


def main() -> int:
    try:
        print("\n\n".join(markdown(patch) for patch in (4, 8)))
    except UserError as error:
        print(f"experiments.resolution: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
