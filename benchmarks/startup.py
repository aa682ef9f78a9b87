"""Seconds from the command to the end of the first step of training, with all that comes before: one JSON line.

    python -m benchmarks.startup                                                      in small, on a CPU
    python -m benchmarks.startup -- --model JiT-B/16 --data_path /data/imagenet --batch_size 128

What follows `--` goes to main_jit.py, which a new process runs for each turn until it says that its first step is done.
"imports" is the part of it until torch and the modules of this project are in memory.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import emit, parser
from benchmarks.turns import Turns

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = ["--dataset", "digits", "--model", "JiT-Demo/8", "--batch_size", "64"]


def seconds_until(command: list[str], text: str) -> float:
    """From the start of a command until it has written a line that contains `text`; it is then killed."""
    start, lines = time.perf_counter(), []
    with subprocess.Popen(
        [sys.executable, "-u", *command], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if text in line:
                process.kill()
                return time.perf_counter() - start
    raise SystemExit(f"{' '.join(command)} ended before it wrote {text!r}:\n{''.join(lines[-20:])}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    options = parser(__doc__, repeats=3, clock=False).parse_args(argv[:at])
    options.flags = argv[at + 1 :] or SMALL
    seconds = {"imports": [], "first step": []}
    for _ in range(options.repeats):
        seconds["imports"].append(seconds_until(["-c", "import main_jit; print('there')"], "there"))
        with tempfile.TemporaryDirectory() as folder:
            run = ["main_jit.py", "--device", options.device, "--no-online_eval", "--wandb_mode", "disabled"]
            run += ["--output_dir", folder, *options.flags]
            seconds["first step"].append(seconds_until(run, "first step done"))
    turns = Turns(seconds)
    emit("startup", options, {"results": {name: turns.of(name) for name in seconds}})


if __name__ == "__main__":
    main()
