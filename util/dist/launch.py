"""Run torchrun in this process: signals become a request to stop, the exit codes of the workers become one.

    python -m util.dist.launch ARGUMENTS-OF-TORCHRUN main_jit.py FLAGS

main_jit.py, the worker, ends through `run_main` and `leave`. util/dist/preemption.py describes how both communicate.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from util.dist import preemption
from util.dist.preemption import BURST, EXIT_CODE, Preempted
from util.errors import UserError

STOP = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT)
STOPPED_AT_ONCE = 130


def info(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)


# ---- the launcher ----------------------------------------------------------------------------------------------------


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun until it ends. Return 75 if the workers were asked to stop, and otherwise why they failed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # first: threads and workers inherit it
    state = Path(tempfile.mkdtemp(prefix="jit-"))
    os.environ.update(JIT_STATE_DIR=str(state), JIT_LAUNCHER_PID=str(os.getpid()))
    threading.Thread(target=_handle_signals, args=(state,), daemon=True).start()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    failed = True
    try:
        run.main(["--signals_to_handle=SIGUSR2", *arguments])
        failed = False
    except SignalException:
        return STOPPED_AT_ONCE
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
    finally:
        recorded = [int(file.read_text()) for file in state.glob("exit-*")]
        shutil.rmtree(state, ignore_errors=True)
    code = exit_code(failed, recorded)
    if code == EXIT_CODE and os.environ.get("REQUEUE") == "1":
        _requeue(os.environ["SLURM_JOB_ID"])
    return code


def _handle_signals(state: Path) -> None:
    """Write the stop file at the first signal; a second Ctrl-C, or Ctrl-\\, ends everything at once."""
    asked_at = None
    while True:
        number = signal.sigwait(STOP)
        now = time.monotonic()
        if number == signal.SIGINT and asked_at is not None and now - asked_at < BURST:
            continue
        if number == signal.SIGQUIT or (number == signal.SIGINT and asked_at is not None):
            info("stopping at once")
            os.kill(os.getpid(), signal.SIGUSR2)  # torchrun ends its workers
            time.sleep(5)
            shutil.rmtree(state, ignore_errors=True)
            os._exit(STOPPED_AT_ONCE)  # torchrun hangs; the workers end with this process
        asked_at = now
        (state / "stop").write_text(f"{number.name}\n")


def exit_code(failed: bool, recorded: Iterable[int]) -> int:
    """Return the exit code of a node from those of its workers. A failure outweighs a 75, a reason torchrun's 1."""
    failures = [code for code in recorded if code != EXIT_CODE]
    failure = max([int(failed), *failures])
    return failure or (EXIT_CODE if EXIT_CODE in recorded else 0)


def _requeue(job: str) -> None:
    """Put a SLURM job back into the queue, unless it was cancelled, timed out or is requeued by SLURM itself."""
    try:
        show = ["scontrol", "show", "job", job, "--oneliner"]
        words = subprocess.run(show, capture_output=True, text=True, timeout=60).stdout.split()
        state = next((word[9:] for word in words if word.startswith("JobState=")), "unknown")
        if state != "RUNNING":
            return info(f"job {job} is not requeued: its state is {state}")
        info(f"job {job} is requeued and resumes from its checkpoint")
        subprocess.run(["scontrol", "requeue", job], timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        info(f"scontrol failed ({error}): submit the job with sbatch --requeue")


# ---- a worker --------------------------------------------------------------------------------------------------------


def run_main(run: Callable[[Sequence[str] | None], str | None], arguments: Sequence[str] | None = None) -> int:
    """Call `run`, print the line that it returns or why it ended, and return the exit code for the parent process.

    0: done; 2: a UserError, said in one sentence; 1: any other error; 75: asked to stop; 130: a second Ctrl-C.
    """
    from torch.distributed import is_initialized

    from util.dist.context import find_context

    ctx = find_context("cpu")
    with preemption.listening():
        try:
            line = run(arguments)
            if ctx.is_main and line:
                print(line, flush=True)
            return preemption.finish(0)
        except Preempted as stop:
            reason, code, recorded = str(stop), preemption.finish(EXIT_CODE, on_all_ranks=True), None
            ...
        except KeyboardInterrupt:
            ...
