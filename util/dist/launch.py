"""torchrun in this process, for tools/launch.py: signals become a request to stop, workers' exit codes its own (how, says
util/dist/preemption.py). What imports torch is imported in functions, after signals have been blocked for all threads.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

STOP = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT}
AT_ONCE = 130  # exit code after a second Ctrl-C
EXIT_CODE = 75  # asked to stop: EX_TEMPFAIL of sysexits.h, the same command, started again, resumes
BURST = 0.3  # seconds: a SIGINT this soon after another is the same one, sent to a process and to its group


def block_signals() -> None:
    """Keep signals that ask to stop until `_handle_signals` takes them; threads and workers inherit it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun until it ends. Return 75 if the workers were asked to stop, and otherwise why they failed."""
    block_signals()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException

    state = Path(tempfile.mkdtemp(prefix="jit-"))
    os.environ.update(JIT_STATE_DIR=str(state), JIT_LAUNCHER_PID=str(os.getpid()))
    signal.signal(signal.SIGUSR2, signal.default_int_handler)  # until torchrun handles it
    threading.Thread(target=_handle_signals, args=(state,), daemon=True).start()
    codes = [1]
    try:
        run.main(["--signals_to_handle=SIGUSR2", *arguments])
        codes = [0]
    except (SignalException, KeyboardInterrupt):
        return AT_ONCE
    except Exception as error:  # ChildFailedError is torchrun's summary
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        codes += [int(file.read_text()) for file in state.glob("exit-*")]
        shutil.rmtree(state, ignore_errors=True)
    code = max(code for code in codes if code != EXIT_CODE) or max(codes)  # a failure outweighs a 75
    if code == EXIT_CODE and os.environ.get("REQUEUE") == "1":
        _requeue(os.environ["SLURM_JOB_ID"])
    return code


def _handle_signals(state: Path) -> None:
    """Write the stop file at the first signal; end everything at a second Ctrl-C, or at a SIGQUIT."""
    asked_at = None
    while True:
        number, now = signal.sigwait(STOP), time.monotonic()
        if number == signal.SIGINT and asked_at is not None and now - asked_at < BURST:
            continue
        if number == signal.SIGQUIT or (number == signal.SIGINT and asked_at is not None):
            _info("stopping at once")
            os.kill(os.getpid(), signal.SIGUSR2)  # torchrun's main thread ends its workers and raises SignalException
            time.sleep(5)
            os._exit(AT_ONCE)  # it hangs in a call; the workers end with this process
        if asked_at is None and state.exists():  # else the workers have ended
            (state / "stop").write_text(f"{number.name}\n")
        asked_at = now


def _requeue(job: str) -> None:
    """Put a SLURM job back into the queue, unless it was cancelled, timed out or is requeued by SLURM itself."""
    try:
        shown = subprocess.check_output(["scontrol", "show", "job", job, "--oneliner"], text=True, timeout=60)
        if "JobState=RUNNING" not in shown:
            return _info(f"job {job} is not requeued: it is not in the state RUNNING")
        _info(f"job {job} is requeued and resumes from its checkpoint")
        subprocess.run(["scontrol", "requeue", job], timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        _info(f"scontrol failed ({error}): submit the job with sbatch --requeue")


def _info(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
