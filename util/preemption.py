"""Asked to stop: by a signal, or by the launcher through a file, and what the launcher is told at the end.

Whoever has work that is safe to leave asks `requested` between two pieces of it. Started alone or by torchrun, SIGTERM,
SIGINT and SIGUSR1 leave a note that `requested` finds, and a second SIGINT stops at once. torchrun neither forwards
every signal nor tells its workers' exit codes, so run_jit_multinode.sh names a folder of this node in JIT_STATE_DIR:

    <JIT_STATE_DIR>/stop          launcher -> processes: stop soon; holds the signal's name
    <JIT_STATE_DIR>/exit-<l>      process -> launcher: the exit code of the process with local rank l

There the file alone counts. A scheduler signals every process of a job, the launcher too, which writes the file; but
torchrun sends SIGTERM to the processes that are left when another one has failed, and they have nothing to save.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 5.0  # seconds until the launcher, signalled at the same time, has certainly written the file

AGAIN = 0.3  # seconds: a second SIGINT within is the first, sent to a process and to its group, as `timeout` does
_reason: str | None = None
_since = 0.0
_previous: dict[int, object] = {}


class Preempted(Exception):
    """The work was left where it is safe to leave, and the same command goes on from there."""


def listen() -> None:
    """Take note of SIGNALS from now on instead of dying of them; `stop_listening` ends it."""
    global _reason
    _reason = None
    launched = _folder() is not None
    for number in SIGNALS:
        handler = (_leave_to_the_watch if number == signal.SIGTERM else signal.SIG_IGN) if launched else _note
        before = signal.signal(number, handler)
        _previous.setdefault(number, before)
    if launched:
        _exit_file().unlink(missing_ok=True)  # of the process that this one replaces (MAX_RESTARTS)
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)
        threading.Thread(target=_watch, args=(heard,), daemon=True).start()


def stop_listening() -> None:
    """Signals do again what they did before `listen`."""
    if (tell := signal.set_wakeup_fd(-1)) != -1:
        os.close(tell)
    while _previous:
        signal.signal(*_previous.popitem())


def _note(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and _reason is not None:
        if time.monotonic() - _since < AGAIN:
            return
        raise KeyboardInterrupt
    _take(signal.Signals(number).name)


def _leave_to_the_watch(number: int, frame: FrameType | None) -> None:
    """A handler in Python, so that the watch is told; it runs only once the main thread is back from its call."""


def _watch(heard: int) -> None:
    """End this process after a SIGTERM that the launcher knows nothing of, even in a call that never returns."""
    while told := os.read(heard, 1):
        if told[0] == signal.SIGTERM:
            time.sleep(GRACE)
            if not (folder := _folder()) or not (folder / "stop").exists():
                os._exit(128 + signal.SIGTERM)
    os.close(heard)


def _take(reason: str) -> None:
    global _reason, _since
    _reason, _since = reason, time.monotonic()
    if os.environ.get("RANK", "0") == "0":  # by a system call: a handler may interrupt what print does
        line = f"main_jit.py: {reason}: stops when this step or batch of images is done; Ctrl-C again stops at once\n"
        os.write(sys.__stderr__.fileno(), line.encode())


def requested() -> str | None:
    """The signal that asked this process to stop, None while nobody has."""
    if _reason is None and (folder := _folder()) and (stop := folder / "stop").exists():
        reason = stop.read_text().strip()
        if reason:  # else the launcher is about to write it
            _take(reason)
    return _reason


def end_process(code: int, alike: bool) -> int:
    """Tell the launcher the exit code, where there is one. Returns the code for whoever started this process.

    That is torchrun where there is a launcher, and torchrun restarts what fails (MAX_RESTARTS) and prints where it
    did. An end that all processes come to `alike` and that is explained already is no failure for it.
    """
    if _folder() is None:
        return code
    _exit_file().write_text(f"{code}\n")
    return 0 if alike else code


def _folder() -> Path | None:
    folder = os.environ.get("JIT_STATE_DIR")
    return Path(folder) if folder and Path(folder).is_dir() else None


def _exit_file() -> Path:
    """By local rank: a restart may number the nodes in another order."""
    return _folder() / f"exit-{os.environ.get('LOCAL_RANK', '0')}"
