"""torchrun in this process, for tools/launch.py. Signals become a request to stop, and workers' exit codes its own, as
util/dist/preemption.py says. What imports torch is imported in functions, after signals were blocked for all threads.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

STOP = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT}
AT_ONCE = 130  # exit code after a second Ctrl-C
EXIT_CODE = 75  # asked to stop: EX_TEMPFAIL of sysexits.h, the same command, started again, resumes
FIRST_WORD = 10.0  # seconds
BURST = 0.3  # seconds: a SIGINT this soon after another is the same one, sent to a process and to its group


def block_signals() -> None:
    """Keep signals that ask to stop until `_handle_signals` takes them; threads and workers inherit it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun until it ends. Return 75 if the workers were asked to stop, and otherwise why they failed."""
    block_signals()
    from torch.distributed import run

    state = Path(tempfile.mkdtemp(prefix="jit-"))
    os.environ.update(JIT_STATE_DIR=str(state), JIT_LAUNCHER_PID=str(os.getpid()))
    codes = [1]
    try:
        threading.Thread(target=_handle_signals, args=(state,), daemon=True).start()
        threading.Thread(target=_say_what_is_missing, args=(arguments, state), daemon=True).start()
        run.main([f"--log_dir={state}", *arguments])
        codes = [0]
    except Exception as error:  # ChildFailedError is torchrun's summary
        if "EADDRINUSE" in str(error):
            _info("MASTER_PORT is in use on this node, perhaps by another run: choose another one, on all nodes")
            return 2
        if "C10d store has failed" in str(error):
            _info("node 0 cannot be reached at MASTER_ADDR:MASTER_PORT, or the port is in use there: set other ones")
            return 2
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        codes += [int(file.read_text()) for file in state.glob("exit-*")]
        shutil.rmtree(state, ignore_errors=True)
    failures = [code for code in codes if code not in (0, EXIT_CODE)]
    code = max(failures or codes)  # a failure outweighs a 75
    if code == EXIT_CODE and os.environ.get("REQUEUE") == "1":
        _requeue(os.environ["SLURM_JOB_ID"])
    return code


def _workers() -> list[int] | None:
    """Return the processes that torchrun's main thread has started; None on a kernel that does not tell."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return None


def _before_start(state: Path) -> bool:
    """Whether torchrun has not started workers yet, since it waits for other nodes."""
    return _workers() == [] and not any(state.glob("exit-*"))  # with those, the workers have ended


def _handle_signals(state: Path) -> None:
    """Write the stop file at the first signal; end everything at a second Ctrl-C, at a SIGQUIT, or before the start."""
    asked_at = None
    while True:
        number, now = signal.sigwait(STOP), time.monotonic()
        if number == signal.SIGINT and asked_at is not None and now - asked_at < BURST:
            continue
        again = number == signal.SIGQUIT or (number == signal.SIGINT and asked_at is not None)
        if again or _before_start(state):
            _info("stopping at once" if again else f"{number.name} before the start of training")
            for worker in _workers() or []:  # where they are not known, they end with this process
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            shutil.rmtree(state, ignore_errors=True)
            os._exit(AT_ONCE if again else EXIT_CODE)
        if asked_at is None and state.exists():  # else the workers have ended
            (state / "stop").write_text(f"{number.name}\n")
        asked_at = now


def _say_what_is_missing(arguments: Sequence[str], state: Path) -> None:
    """While no worker of this node has started, say after 10 seconds, then each minute, which nodes have not joined."""
    torchrun = itertools.takewhile(lambda word: word.startswith("--"), arguments)
    options = dict(word[2:].split("=", 1) for word in torchrun if "=" in word)
    nodes, wait = int(options.get("nnodes", 1)), FIRST_WORD
    while nodes > 1:
        time.sleep(wait)
        if not state.exists() or not _before_start(state):
            return
        if missing := _missing_nodes(options, nodes):
            _info(f"waiting for {missing}; start the same command there")
        wait = 60.0


def _missing_nodes(options: Mapping[str, str], nodes: int) -> str:
    """Return a phrase on the nodes that torchrun waits for; empty if all have joined."""
    from torch.distributed import TCPStore

    if "rdzv_backend" in options:
        return f"some of {nodes} nodes to join at {options['rdzv_endpoint']}"
    host, port = options["master_addr"], options["master_port"]
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        return f"MASTER_ADDR {host} to be a name that this node knows ({error})"
    try:  # with the static rendezvous each node writes itself into node 0's store
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    except RuntimeError:
        return f"node 0, which does not answer at {host}:{port}"
    others = [node for node in range(nodes) if node != int(options["node_rank"])]
    missing = [str(node) for node in others if not store.check([f"none/torchelastic/role_info/{node}"])]
    return f"node {', '.join(missing)} of {nodes} to join at {host}:{port}" if missing else ""


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
