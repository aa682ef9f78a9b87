"""Plot the training loss of one run or several from their logs.

python experiments/plot_log.py output/a output/b --out loss.png
"""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
parser.add_argument("--out", type=Path, required=True, help="picture to write")
args = parser.parse_args()
figure = Figure(figsize=(6, 3.2), layout="constrained")
axes = figure.subplots()
for run in args.runs:
    lines = []
    if not (run / "log.jsonl").is_file():
        sys.exit(f"{run / 'log.jsonl'} does not exist: name the folder of a run.")
    for text in (run / "log.jsonl").read_bytes().splitlines():
        with suppress(ValueError):  # the last line of a run that was killed may be half
            lines.append(json.loads(text))
    train = {line["step"]: line for line in lines if line["event"] == "train" and line["loss"] is not None}
    if not train:
        sys.exit(f"{run / 'log.jsonl'} has no loss yet: name the folder of a run that has trained.")
    start = lines[0]["time"]
    steps = sorted(train)
    minutes = (train[steps[-1]]["time"] - start) / 60
    axes.plot(steps, [train[s]["loss"] for s in steps], linewidth=1, label=f"{run.name} ({minutes:.0f} min)")
axes.set(xlabel="step", ylabel="v-loss", yscale="log")
axes.grid(alpha=0.3, which="both")
axes.legend(frameon=False)
figure.savefig(args.out, dpi=120)
print(args.out)
