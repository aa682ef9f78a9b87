"""Asked to stop: by a signal, or by the launcher through a file, and what the launcher is told at the end.

SIGTERM, SIGINT and SIGUSR1 only leave a note here. Whoever has work that is safe to leave asks `requested` between two
pieces of it; a second SIGINT stops at once. torchrun neither forwards every signal nor tells its workers' exit codes,
so run_jit_multinode.sh names a folder of this node in JIT_STATE_DIR:

    <JIT_STATE_DIR>/stop          launcher -> processes: stop soon; holds the signal's name
    <JIT_STATE_DIR>/exit-<rank>   process -> launcher: its exit code
"""

import os
import signal
from pathlib import Path
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_reason: str | None = None


class Preempted(Exception):
    """The work was left where it is safe to leave, and the same command goes on from there."""


def listen() -> None:
    """Take note of SIGNALS from now on instead of dying of them."""
    global _reason
    _reason = None
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _reason
    if number == signal.SIGINT and _reason is not None:
        raise KeyboardInterrupt
    _reason = signal.Signals(number).name


def requested() -> str | None:
    """The signal that asked this process to stop, None while nobody has."""
    global _reason
    folder = os.environ.get("JIT_STATE_DIR")
    if _reason is None and folder and (stop := Path(folder) / "stop").exists():
        _reason = stop.read_text().strip() or "stop file"
    return _reason


def record_exit(code: int, rank: int) -> None:
    """Tell the launcher the exit code, where there is one."""
    folder = os.environ.get("JIT_STATE_DIR")
    if folder and Path(folder).is_dir():
        (Path(folder) / f"exit-{rank}").write_text(f"{code}\n")
