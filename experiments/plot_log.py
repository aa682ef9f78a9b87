"""Plot the training loss of one run or several from their logs.

python experiments/plot_log.py output/a output/b --out loss.png
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(folder: Path) -> tuple[list[int], list[float], list[float]]:
    """Return step, loss and seconds since the start of each training line of the log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    start = lines[0]["time"]
    by_step = {line["step"]: line for line in lines if line["event"] == "train"}
    steps = sorted(by_step)
    # The last line of an epoch may be a mean over a few steps: too noisy beside the others.
    usual = max((b - a for a, b in pairwise(steps)), default=1)
    steps = [s for i, s in enumerate(steps) if i == 0 or s - steps[i - 1] > usual / 2]
    return steps, [by_step[s]["loss"] for s in steps], [by_step[s]["time"] - start for s in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for run in args.runs:
        steps, loss, seconds = read(run)
        axes.plot(steps, loss, linewidth=1, label=f"{run.name} ({seconds[-1] / 60:.0f} min)")
    axes.set(xlabel="step", ylabel="v-loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
