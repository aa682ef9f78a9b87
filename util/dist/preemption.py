"""Requests to stop, by a signal or from the launcher, and the exit code that the launcher is told.

Code that can stop safely asks `requested` between two steps or batches. Started alone or by torchrun, SIGTERM, SIGINT
and SIGUSR1 are noted. torchrun does not return its workers' exit codes; so the launcher, which runs it, names a folder
of this node in JIT_STATE_DIR, and its workers inherit that signals are blocked:

    <JIT_STATE_DIR>/stop          launcher -> workers: stop soon; contains the signal's name
    <JIT_STATE_DIR>/exit-<l>      worker -> launcher: the exit code of the worker with local rank l
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from util.dist.context import DistContext, gloo_group
from util.dist.launch import BURST, EXIT_CODE  # noqa: F401 (other modules take it from here)

PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_reason: str | None = None
_since = 0.0


class Preempted(Exception):
    """The work stopped where the same command resumes it."""


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGNALS inside the block instead of dying of them."""
    global _reason
    _reason = None
    recorded = _exit_file()
    previous = {number: signal.signal(number, _note) for number in (() if recorded else SIGNALS)}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    if recorded:
        recorded.unlink(missing_ok=True)  # by the worker that this one replaces (MAX_RESTARTS)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, however it ends (prctl(2), Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent() -> None:
    """End with torchrun, which started this process."""
    die_with_parent()
    launcher = os.environ.get("JIT_LAUNCHER_PID")
    if launcher:
        threading.Thread(target=_obey_torchrun, args=(int(launcher),), daemon=True).start()
    if launcher and os.getppid() != int(launcher):
        os.write(2, b"main_jit.py: the launcher has ended, and so does this process\n")
        os._exit(1)


def _obey_torchrun(launcher: int) -> None:
    """End at torchrun's SIGTERM: another rank has ended. A scheduler's, to all processes, reaches the launcher too."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != launcher:
        pass
    os._exit(1)


def _note(number: int, frame: object) -> None:
    if number == signal.SIGINT and _reason is not None:
        if time.monotonic() - _since < BURST:
            return
        raise KeyboardInterrupt
    _accept(signal.Signals(number).name)


def _accept(reason: str) -> None:
    global _reason, _since
    _reason, _since = reason, time.monotonic()
    text = f"main_jit.py: Received {reason}: finishing this step or batch, then saving. A second Ctrl-C stops at once."
    if os.environ.get("RANK", "0") == "0":  # by a system call: a signal handler may have interrupted a print
        os.write(sys.__stderr__.fileno(), f"{text}\n".encode())


def requested() -> str | None:
    """Return the signal that asked this process to stop, None if there was none."""
    if _reason is None and (recorded := _exit_file()):
        stop = recorded.with_name("stop")
        if stop.exists() and (reason := stop.read_text().strip()):  # empty: the launcher is about to write it
            _accept(reason)
    return _reason


def requested_on_any_rank(ctx: DistContext) -> str | None:
    """Return the signal that asked this rank or, as far as is known here, another one; waits for none of them."""
    reason = requested()
    if ctx.world_size > 1:
        store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
        if reason:
            store.set("preemption", reason)
        return reason or (store.get("preemption").decode() if store.check(["preemption"]) else None)
    return reason


class StepVotes:
    """What any rank asks for, all ranks decide after the same step; on GPUs `lag` steps after it was asked for.

    The wishes, a tensor of K questions, are summed over the ranks in host memory, beside the work of the GPU.
    """

    def __init__(self, ctx: DistContext, questions: tuple[str, ...]):
        self.ctx, self.questions = ctx, questions
        self.lag = 2 if ctx.world_size > 1 and ctx.device.type == "cuda" else 0
        self._group = gloo_group() if self.lag else None
        self._pending = []  # (votes, their reduction)

    def __call__(self, wishes: dict[str, bool]) -> set[str]:
        """Vote at this step. Return the questions that are decided now, the same on all ranks."""
        if self.ctx.world_size == 1:
            return {name for name in self.questions if wishes[name]}
        votes = torch.tensor([float(wishes[name]) for name in self.questions])
        self._pending.append((votes, dist.all_reduce(votes, group=self._group, async_op=True)))
        if len(self._pending) <= self.lag:
            return set()
        votes, sent = self._pending.pop(0)
        sent.wait()
        return {name for name, vote in zip(self.questions, votes.tolist(), strict=True) if vote > 0}


def finish(code: int, on_all_ranks: bool = False) -> int:
    """Tell the launcher, if there is one, the exit code. Return the code for the process that started this one.

    Under the launcher it is 0 if all ranks stop alike and have said why: torchrun restarts and reports what fails.
    """
    recorded = _exit_file()
    if recorded:
        recorded.write_text(f"{code}\n")
    return 0 if recorded and on_all_ranks else code


def _exit_file() -> Path | None:
    """The file for this worker's exit code, by local rank: a restart may renumber nodes. None without the launcher."""
    folder = os.environ.get("JIT_STATE_DIR")
    return Path(folder, f"exit-{os.environ.get('LOCAL_RANK', '0')}") if folder and os.path.isdir(folder) else None
