"""Plot the training loss of one run or several from their logs.

python -m experiments.plot_log output/a output/b --out loss.png
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from util.log import LOG_NAME, read_log

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
parser.add_argument("--out", type=Path, required=True, help="picture to write")
args = parser.parse_args()
figure = Figure(figsize=(6, 3.2), layout="constrained")
axes = figure.subplots()
for run in args.runs:
    if not (run / LOG_NAME).is_file():
        sys.exit(f"{run / LOG_NAME} does not exist: name the folder of a run.")
    lines = read_log(run)
    train = {line["step"]: line for line in lines if line["event"] == "train" and line["loss"] is not None}
    if not train:
        sys.exit(f"{run / LOG_NAME} has no loss yet: name the folder of a run that has trained.")
    start = lines[0]["time"]
    steps = sorted(train)
    minutes = (train[steps[-1]]["time"] - start) / 60
    axes.plot(steps, [train[s]["loss"] for s in steps], linewidth=1, label=f"{run.name} ({minutes:.0f} min)")
axes.set(xlabel="step", ylabel="v-loss", yscale="log")
axes.grid(alpha=0.3, which="both")
axes.legend(frameon=False)
try:
    figure.savefig(args.out, dpi=120)
except (OSError, ValueError) as error:
    sys.exit(f"{args.out} cannot be written: {error}.")
print(args.out)
