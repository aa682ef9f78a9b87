"""The measurements that need a GPU, one after another: make bench-gpu, or

    python -m benchmarks.on_gpu                  all of them
    python -m benchmarks.on_gpu --minutes 9      those that end within 9 minutes; the same command goes on with the rest
    python -m benchmarks.on_gpu --list           which there are, and which are done

Each is a process of its own, whose line is appended to benchmarks/results/<the device>.jsonl as soon as it is there.
What is there for the same sources is not measured again; what failed is, after all others. A measurement starts only
if its limit fits into the time that is left. The exit code is 1 if any failed in this call, 2 without a GPU.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

from util import provenance

REPOSITORY = provenance.REPOSITORY
RESULTS = REPOSITORY / "benchmarks" / "results"
NEVER, FAILED, DONE = range(3)  # states of a measurement
SAID = 30  # lines of a failed one that are kept


@dataclass(frozen=True)
class Measurement:
    """`python -m benchmarks.<argv>`, which is stopped after `minutes`; NAME=value may come before, as in a shell."""

    name: str
    minutes: float
    argv: str

    def command(self) -> list[str]:
        words = self.argv.split()
        variables = list(takewhile(lambda word: re.match("[A-Z][A-Z0-9_]*=", word), words))
        module, *flags = words[len(variables) :]
        return [*(["env", *variables] if variables else []), sys.executable, "-m", f"benchmarks.{module}", *flags]


IN_FP32 = "--img_size 256 --batch_size 128"
IN_BF16 = f"{IN_FP32} --precision bf16"
TRAIN = f"{IN_BF16} --sf on"
SMALL = "--batch_size 64 --precision bf16 --num_sampling_steps 50 --repeats 3"
SAMPLE = f"--img_size 256 --batches 4 {SMALL} --cfg 2.9 --interval 0.1 1.0"
PAD = "--pad_swiglu off on"
BESIDE = "--compile block --reference tests/reference_checkout"
FLASH = "TORCH_CUDNN_SDPA_DEPRIORITIZED=1"  # instead of cuDNN's attention, which torch 2.11 prefers on an H200
PLAN = (  # the most important first
    Measurement("train B/16", 4, f"step --model JiT-B/16 {TRAIN} --steps 10 --compile off block"),
    Measurement("train 700M", 6, f"step --model JiT-700M {TRAIN} --steps 5 --repeats 3 --compile block {PAD}"),
    Measurement("operator 700M", 3, f"sf_operator --model JiT-700M {IN_BF16} --calls 20 --compile block"),
    Measurement("sample B/16", 6, f"sampler --model JiT-B/16 {SAMPLE} --compile block --cuda_graph off on"),
    Measurement("train B/16 beside the stand-in", 6, f"step --model JiT-B/16 {TRAIN} --steps 10 {BESIDE}"),
    Measurement("operator B/16", 3, f"sf_operator --model JiT-B/16 {IN_BF16} --calls 20 --compile block"),
    Measurement("parts B/16", 3, f"step_parts --model JiT-B/16 {IN_BF16} --steps 10 --compile block"),
    Measurement("sample 700M", 7, f"sampler --model JiT-700M {SAMPLE} --batches 2 --compile block {PAD}"),
    Measurement("checkpoint B/16", 3, "checkpoint --model JiT-B/16"),
    Measurement("train B/32", 4, f"step --model JiT-B/32 {TRAIN} --steps 10 --compile off block"),
    Measurement("operator B/32", 3, f"sf_operator --model JiT-B/32 {IN_BF16} --calls 20 --compile block"),
    Measurement("parts 700M", 4, f"step_parts --model JiT-700M {IN_BF16} --steps 5 --compile block"),
    Measurement("evaluate", 3, "evaluate --precision bf16 --num_images 500 --batch_size 250"),
    Measurement("startup", 4, "startup"),
    Measurement("checkpoint 700M", 4, "checkpoint --model JiT-700M --saves 2"),
    Measurement("train B/16, sf off", 4, f"step --model JiT-B/16 {IN_BF16} --steps 10 --sf on off --compile block"),
    Measurement("train B/16, float32", 5, f"step --model JiT-B/16 {IN_FP32} --steps 5 --sf on --compile block"),
    Measurement("train B/16, flash attention", 4, f"{FLASH} step --model JiT-B/16 {TRAIN} --steps 10 --compile block"),
    Measurement("train 700M, plain", 6, f"step --model JiT-700M {TRAIN} --steps 5 --repeats 3 {PAD}"),
    Measurement("sample Ti/4", 4, f"sampler --model JiT-Ti/4 --batches 16 {SMALL} --compile block --cuda_graph off on"),
    Measurement("sample B/16, not compiled", 6, f"sampler --model JiT-B/16 {SAMPLE} --cuda_graph off on"),
    Measurement("train B/16, one graph", 8, f"step --model JiT-B/16 {TRAIN} --steps 10 --compile block model"),
)


def gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def results_file(device: str) -> Path:
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"


def sources() -> str:
    """A digest of what is measured, torch included, which a commit of results or of a text leaves as it is."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in ("", "util", "benchmarks", "tests/reference_checkout"):
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            if path != Path(__file__).resolve():
                digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def states(file: Path, code: str, plan: Sequence[Measurement]) -> dict[str, int]:
    """What the file has on the measurements, for the same sources and command."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = {m.name: NEVER for m in plan}
    commands = {m.name: m.argv for m in plan}
    for line in lines:
        name = line.get("measurement")
        if line.get("sources") == code and line.get("argv") == commands.get(name, ""):
            found[name] = max(found[name], FAILED if "failed" in line else DONE)
    return found


def in_order(plan: Sequence[Measurement], there: dict[str, int]) -> Iterator[Measurement]:
    """As in the plan, those that have failed before at the end."""
    for state in (NEVER, FAILED):
        yield from (m for m in plan if there[m.name] == state)


def run(measurement: Measurement, folder: str) -> dict:
    """The line that it prints; or why there is none. Its temporary files are in `folder`."""
    process = subprocess.Popen(
        measurement.command(),
        **{"cwd": REPOSITORY, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
        env=os.environ | {"TMPDIR": folder},
        process_group=0,
    )
    why = None
    try:
        out, said = process.communicate(timeout=60 * measurement.minutes)
    except subprocess.TimeoutExpired:
        why = f"not done after {measurement.minutes:g} minutes"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            out, said = process.communicate()
    if process.returncode == 0:
        try:
            return json.loads((out.splitlines() or [""])[-1])
        except json.JSONDecodeError:
            why = "its last line is no JSON"
    print(said, file=sys.stderr)
    said = said.splitlines()[-SAID:]
    return {"failed": why or (said or ["it said nothing"])[-1], "exit_code": process.returncode, "said": said}


def main(argv: list[str] | None = None, plan: Sequence[Measurement] = PLAN) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no measurement goes on for longer")
    parser.add_argument("--list", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where lines are read and appended")
    parser.add_argument("--commit", help="for the lines, where this is no checkout of git")
    options = parser.parse_args(argv)
    end, device = time.monotonic() + 60 * options.minutes, gpu()
    if device is None and not options.list:
        print("torch sees no GPU here; `make bench` measures on a CPU", file=sys.stderr)
        return 2
    file, code = options.results or results_file(device or "no GPU"), sources()
    there = states(file, code, plan)
    if options.list:
        for m in plan:
            print(f"{('to do', 'failed', 'done')[there[m.name]]:8}{m.name:40}at most {m.minutes:g} minutes")
        return 0
    counts = {"measured": 0, "failed": 0, "left": 0}
    for measurement in in_order(plan, there):
        if time.monotonic() + 60 * measurement.minutes > end:
            counts["left"] += 1
            continue
        print(f"{measurement.name} ...", end=" ", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            line = run(measurement, folder)
        seconds = round(time.monotonic() - start, 1)
        about = {"measurement": measurement.name, "argv": measurement.argv, "sources": code, "seconds_in_all": seconds}
        if "failed" in line:
            line |= {**provenance.provenance(torch.device("cpu")), "hardware": device}
        line |= {"commit": options.commit} if options.commit else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps({**about, **line}) + "\n")
        counts["failed" if "failed" in line else "measured"] += 1
        print(f"{line.get('failed', 'done')} ({seconds} s)", flush=True)
    already = sum(state == DONE for state in there.values())
    print(
        f"{counts['measured']} measured, {counts['failed']} failed, {already} were there before, {counts['left']} are "
        f"left (of up to {max(m.minutes for m in plan):g} minutes); the lines are in {file}"
    )
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of run(), which ends its process
    sys.exit(main())
