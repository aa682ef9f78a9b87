"""Requests to stop, by a signal or from the launcher, and the exit code that the launcher is told.

Code that can stop safely asks `requested` between two steps or batches. Started alone or by torchrun, SIGTERM, SIGINT
and SIGUSR1 are noted. torchrun neither forwards all signals nor returns its workers' exit codes; so util/dist/launch.py,
which runs it, names a folder of this node in JIT_STATE_DIR, and its workers inherit that signals are blocked:

    <JIT_STATE_DIR>/stop          launcher -> workers: stop soon; contains the signal's name
    <JIT_STATE_DIR>/exit-<l>      worker -> launcher: the exit code of the worker with local rank l

torch is imported in functions only: the launcher blocks signals before it starts torch's threads, which inherit that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from util.dist.context import DistContext

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, resumes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BURST = 0.3  # seconds: a SIGINT this soon after another is the same one, sent to a process and to its group
PR_SET_PDEATHSIG = 1  # of Linux's prctl

_reason: str | None = None
_since = 0.0


class Preempted(Exception):
    """The work stopped where the same command resumes it."""


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGNALS inside the block instead of dying of them."""
    global _reason
    _reason = None
    previous = {} if _folder() else {number: signal.signal(number, _note) for number in SIGNALS}
    if _folder():
        _exit_file().unlink(missing_ok=True)  # of the worker that this one replaces (MAX_RESTARTS)
        if (launcher := os.environ.get("JIT_LAUNCHER_PID")) and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive the launcher
            if os.getppid() != int(launcher):
                os._exit(1)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and _reason is not None:
        if time.monotonic() - _since < BURST:
            return
        raise KeyboardInterrupt
    _accept(signal.Signals(number).name)


def _accept(reason: str) -> None:
    global _reason, _since
    _reason, _since = reason, time.monotonic()
    if os.environ.get("RANK", "0") == "0":  # by a system call: a signal handler may have interrupted a print
        text = f"main_jit.py: Received {reason}: finishing this step or batch of images, then saving. "
        os.write(sys.__stderr__.fileno(), f"{text}Ctrl-C again stops at once.\n".encode())


def requested() -> str | None:
    """Return the signal that asked this process to stop, None if there was none."""
    stop = _folder() / "stop" if _reason is None and _folder() else None
    if stop and stop.exists() and (reason := stop.read_text().strip()):  # empty: the launcher is about to write it
        _accept(reason)
    return _reason


def requested_on_any_rank(ctx: DistContext) -> str | None:
    """Return the signal that asked this rank or, as far as is known here, another one; waits for none of them."""
    reason = requested()
    if ctx.world_size > 1:
        from torch.distributed import distributed_c10d

        store = distributed_c10d._get_default_store()  # torch has no public name for it
        if reason:
            store.set("preemption", reason)
        elif store.check(["preemption"]):
            reason = store.get("preemption").decode()
    return reason


class StepVotes:
    """What any rank asks for (K questions), all ranks decide after the same step.

    Votes (K,) are summed over the ranks at each step, in host memory; `lag` steps later, on a GPU, they are read.
    """

    def __init__(self, ctx: DistContext, questions: tuple[str, ...]):
        from util.dist.context import gloo_group

        self.ctx, self.questions = ctx, questions
        on_gpus = ctx.world_size > 1 and ctx.device.type == "cuda"
        self.lag = 2 if on_gpus else 0
        self._group = gloo_group() if on_gpus else None
        self._pending: deque = deque()

    def __call__(self, wishes: dict[str, bool]) -> set[str]:
        """Vote at this step. Return the questions that are decided now, the same on all ranks."""
        if self.ctx.world_size == 1:
            return {name for name in self.questions if wishes[name]}
        import torch

        votes = torch.tensor([float(wishes[name]) for name in self.questions])
        self._pending.append((votes, torch.distributed.all_reduce(votes, group=self._group, async_op=True)))
        if len(self._pending) <= self.lag:
            return set()
        votes, sent = self._pending.popleft()
        sent.wait()
        return {name for name, vote in zip(self.questions, votes.tolist(), strict=True) if vote > 0}


def finish(code: int, on_all_ranks: bool = False) -> int:
    """Tell the launcher the exit code, if there is one. Return the code for the process that started this one.

    torchrun restarts workers that fail (MAX_RESTARTS) and prints where. So under the launcher it sees success where all
    ranks stop alike and have said why.
    """
    if _folder() is None:
        return code
    _exit_file().write_text(f"{code}\n")
    return 0 if on_all_ranks else code


def _folder() -> Path | None:
    folder = os.environ.get("JIT_STATE_DIR")
    return Path(folder) if folder and Path(folder).is_dir() else None


def _exit_file() -> Path:
    """Named by local rank: a restart may number the nodes in another order."""
    return _folder() / f"exit-{os.environ.get('LOCAL_RANK', '0')}"
