"""Do the runs of a study, and append one JSON line for each to experiments/results/<study>.jsonl.

    python -m experiments.run cifar10 --processes 2     runs that have a line already are not done again
    python -m experiments.run cifar10 --dry_run         list them
    python -m experiments.run cifar10 --quick           a few steps of each, in output/: does everything work?

A process uses one thread, or shares the GPU, which networks so small leave idle most of the time. A run that fails or
diverges leaves a line that says so, and is not tried again unless that line is removed. After Ctrl-C or a kill the same
command goes on with the runs that have no line.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.samples import sweep
from experiments.studies import STUDIES
from experiments.train import CPU, Run, measure, operations, train
from util.data.images import DataError
from util.dist.preemption import die_with_parent
from util.errors import UserError
from util.io import REPOSITORY, provenance

RESULTS = REPOSITORY / "experiments" / "results"


def results_file(study: str, quick: bool = False) -> Path:
    return (REPOSITORY / "output" / "quick" if quick else RESULTS) / f"{study}.jsonl"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a results file; none if it does not exist. A last line that was cut off does not count."""
    if path.exists():
        *lines, _ = path.read_text().split("\n")
        yield from map(json.loads, lines)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a results file. A last line that was cut off goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")


def start_process(parent: int) -> None:
    """Use one thread, leave Ctrl-C to the parent, and end with it."""
    die_with_parent()
    if os.getppid() != parent:  # it has ended already
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def do(run: Run, device: torch.device = CPU) -> dict[str, Any]:
    """Train and measure: what a line of the results holds beside its provenance."""
    start = time.perf_counter()
    denoiser, ema, train_loss = train(run, device)
    trained = time.perf_counter()
    measured = {"samples": list(sweep(denoiser, ema, run))} if run.samples else measure(denoiser, run, device)
    return {
        "run": asdict(run),
        "train_loss": round(train_loss, 6),
        "tflop": operations(run) / 1e12,
        **measured,
        "train_s": round(trained - start, 1),
        "measure_s": round(time.perf_counter() - trained, 1),
    }


def line_of(run: Run, device: torch.device) -> dict[str, Any]:
    """Do a run; an error becomes part of its line. A data set that is missing is not the run's failure."""
    about = provenance(device)
    try:
        return {**do(run, device), **about}
    except DataError:
        raise
    except Exception as error:
        return {"run": asdict(run), "failed": f"{type(error).__name__}: {error}", **about}


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if a run failed, 2 for wrong input, 130 after Ctrl-C."""
    questions = "\n".join(f"  {name:18}{study.question}" for name, study in STUDIES.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description=f"{__doc__}\nstudies:\n{questions}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES, metavar="STUDY")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the study's")
    parser.add_argument("--quick", action="store_true", help="a few steps of each run")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and do none")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}; at least 1 is needed")
    path, command = results_file(args.study, args.quick), ["python", "-m", "experiments.run", args.study]
    command += ["--device", args.device] if args.device else []
    runs = STUDIES[args.study].runs(args.quick)
    if args.quick and not args.dry_run:
        path.unlink(missing_ok=True)
    done = {Run(**line["run"]) for line in read_lines(path)}  # a setting that a line lacks had its default
    missing = [run for run in runs if run not in done]
    if args.dry_run:
        for run in runs:
            print("to do" if run in missing else "done ", *(f"{k} {v}" for k, v in asdict(run).items()))
        return 0
    device = torch.device(args.device or STUDIES[args.study].device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"{args.study} runs on a GPU, and torch finds no CUDA device here; --device cpu is slower")
    failed = 0
    spawn = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    pool = ProcessPoolExecutor(args.processes, spawn, start_process, (os.getpid(),))
    try:
        tasks = [pool.submit(line_of, run, device) for run in missing]
        for task in tqdm(as_completed(tasks), args.study, len(tasks), unit="run"):
            line = task.result()
            append(path, line | {"command": command})
            if "failed" in line:
                failed += 1
                tqdm.write(f"{line['run']}: {line['failed']}", file=sys.stderr)
    except (UserError, OSError, BrokenProcessPool) as error:  # of the data, of the disk, of a process that was killed
        pool.shutdown(wait=False, cancel_futures=True)
        print(f"experiments.run: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    pool.shutdown()
    print(f"{path}: {len(runs)} runs, {len(missing)} of them done now, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
