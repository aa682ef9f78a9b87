"""Measure what a GPU is for, most important first, within a time limit: make gpu-report MINUTES=9

    python -m benchmarks.gpu_report --minutes 9 [--out FILE] [--reference DIR]

Each measurement is a process of its own, whose JSON line is appended to benchmarks/results/<device>.jsonl as it ends;
one that fails or takes too long leaves a line that says so. Inductor's cache is shared, so later ones compile less.
With --reference, a checkout of a published release has its turns in the first one (benchmarks/reference.py). The tests
marked gpu come last and get the time that is left; pytest's last lines are their result.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from util.io import REPOSITORY, commit

STEP = "-m benchmarks.step --steps 10 --repeats 5 --img_size 256"
PLAN = (  # (limit in seconds, arguments of python)
    (180, f"{STEP} --model JiT-B/16 --batch_size 64 --graph --kernels"),
    (150, f"{STEP} --model JiT-B/16 --batch_size 64 --inductor triton.cudagraphs=True"),
    (150, f"{STEP} --model JiT-B/16 --batch_size 64 --inductor combo_kernels=True"),
    (180, f"{STEP} --model JiT-B/16 --batch_size 64 --inductor cpp_wrapper=True"),
    (120, f"{STEP} --model JiT-B/32 --batch_size 64"),
    (120, "-m benchmarks.sampler --model JiT-B/16 --img_size 256 --gen_bsz 64 --num_sampling_steps 50 --graph"),
    (150, f"{STEP} --model JiT-700M --batch_size 64 --graph --kernels"),
    (150, f"{STEP} --model JiT-B/16 --batch_size 256"),
    (150, "-m benchmarks.sampler --model JiT-700M --img_size 256 --gen_bsz 64 --num_sampling_steps 50"),
    (150, f"{STEP} --model JiT-700M --batch_size 256"),
    (150, f"{STEP} --model JiT-B/16 --batch_size 64 --versus='--resolution_schedule spectrum'"),
    (120, "-m benchmarks.checkpoint --model JiT-B/16"),
    (150, f"{STEP} --model JiT-B/16 --batch_size 64 --versus=--disable_dct_patchify"),
    (240, f"{STEP} --model JiT-B/16 --batch_size 64 --versus='--compile model'"),
    (3600, "-m pytest -m gpu -v -n 6 -p no:cacheprovider"),
)


def measure(arguments: str, limit: float) -> dict:
    """Run a command for `limit` seconds at most. Return a benchmark's JSON line, or the end of any other output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as file:
        command = [sys.executable, *shlex.split(arguments)]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            failed = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            failed = f"did not end within {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # with the processes that it has started
                os.killpg(process.pid, signal.SIGKILL)
        file.seek(0)
        output = file.read()
    line = {"measurement": arguments, "seconds": round(time.monotonic() - start, 1), "commit": commit()}
    results = [text for text in output.splitlines() if text.startswith('{"benchmark"')]
    if results:
        line |= json.loads(results[-1])
    if failed or not results:
        line["output"] = output.splitlines()[-15:]
    if failed:
        line["failed"] = failed
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--reference", help="a checkout of the published release")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_report: torch finds no CUDA device here", file=sys.stderr)
        return 2
    device = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    out = args.out or REPOSITORY / "benchmarks" / "results" / f"{device}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    plan = list(PLAN)
    if args.reference:
        plan[0] = (2 * PLAN[0][0], f"{PLAN[0][1]} --reference {shlex.quote(args.reference)}")
    deadline, failed = time.monotonic() + 60 * args.minutes, False
    for limit, arguments in plan:
        left = deadline - time.monotonic()
        if left < 20:
            break
        line = measure(arguments, min(limit, left))
        failed |= "failed" in line
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
