"""Checkpoints beside training: it waits for the copy to host memory, a thread does the rest."""

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util import checkpoint_folder


@dataclass(frozen=True)
class Written:
    """A checkpoint that is on the disk.

    Attributes:
        path, step: of it.
        blocked, seconds: for how long training waited, and how long it took in all.
        num_bytes: its size.
    """

    path: Path
    step: int
    blocked: float
    seconds: float
    num_bytes: int


class HostCopy:
    """Copies of nested dicts, lists and tuples in host memory, where the tensors keep their place from call to call."""

    def __init__(self):
        self._buffers: dict[tuple, Tensor] = {}
        self._from_device = False

    def __call__(self, content: Any) -> Any:
        copied = self._copy(content, ())
        if self._from_device:
            torch.cuda.current_stream().synchronize()  # the copies from it have been started only
        return copied

    def _copy(self, content: Any, place: tuple) -> Any:
        if isinstance(content, Tensor):
            content = content.detach()
            self._from_device |= content.is_cuda
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != content.shape or buffer.dtype != content.dtype:
                buffer = torch.empty_like(content, device="cpu", pin_memory=content.is_cuda)
                self._buffers[place] = buffer
            return buffer.copy_(content, non_blocking=True)
        if isinstance(content, dict):
            return {key: self._copy(value, (*place, key)) for key, value in content.items()}
        if isinstance(content, (list, tuple)):
            return type(content)(self._copy(value, (*place, i)) for i, value in enumerate(content))
        return content


def _same_device() -> Callable[[], None] | None:
    """What a new thread calls to be on the CUDA device of this one. It begins on device 0 otherwise, where torch's
    writer of shards would make every process open a context."""
    if not torch.cuda.is_initialized():
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other. For rank 0 alone.

    Args:
        folder: of the run.
        keep_last: how many of the newest stay, at least 1.
        last_step: the step of the whole checkpoint that is the newest in the folder now; None if none is.
        first_step: the step at which training goes on: what the folder has of later ones is of another course.
    """

    def __init__(self, folder: Path, keep_last: int, last_step: int | None, first_step: int | None = None):
        self.folder, self.keep_last, self.last_step, self.first_step = folder, keep_last, last_step, first_step
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_same_device())
        self._writing: Future[Written] | None = None
        self._done: list[Written] = []

    def save(self, content: dict[str, Any], step: int, keep_as_epoch: int | None = None) -> None:
        """Copy `content` and begin to write it; wait first where the one before is not on the disk yet.

        Args:
            keep_as_epoch: keep it for good, as the one after this epoch (counted from 0).

        Raises:
            UserError: the one before could not be written.
        """
        start = time.perf_counter()
        self.wait()
        copied = self._copy(content)
        blocked = time.perf_counter() - start
        self._writing = self._thread.submit(self._write, copied, step, keep_as_epoch, start, blocked)

    def _write(self, content, step, keep_as_epoch, start, blocked) -> Written:
        path = self._put(content, step, keep_as_epoch)
        return Written(path, step, blocked, time.perf_counter() - start, num_bytes(path))

    def _put(self, content: dict[str, Any], step: int, keep_as_epoch: int | None) -> Path:
        path = checkpoint_folder.save(self.folder, content, self._previous())
        self._arrange(path, step, keep_as_epoch)
        return path

    def _previous(self) -> int | None:
        """The step of the newest checkpoint so far, if it is to be kept."""
        return self.last_step if self.keep_last > 1 else None

    def _arrange(self, path: Path, step: int, keep_as_epoch: int | None) -> None:
        self.last_step = step
        if keep_as_epoch is not None:
            checkpoint_folder.keep(self.folder, keep_as_epoch, path.name)
        try:
            checkpoint_folder.prune(self.folder, self.keep_last, self.first_step)
            self.first_step = None
        except OSError as error:  # the new one is whole all the same
            print(f"warning: an old checkpoint could not be removed: {error}", file=sys.stderr, flush=True)

    def keep(self, epoch: int) -> None:
        """Keep the newest checkpoint for good, as the one after `epoch` (counted from 0), if it is of this run.

        Raises:
            UserError: it cannot be written.
        """
        newest = checkpoint_folder.find(self.folder)
        if self.last_step is not None and newest is not None:
            checkpoint_folder.keep(self.folder, epoch, newest.name)

    def finished(self) -> list[Written]:
        """Those that came to be on the disk since the last call; does not wait.

        Raises:
            UserError: one could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._done.append(writing.result())

    def close(self) -> None:
        """Wait for what is being written, and end the thread. That it could not be written is said, and not raised:
        where nobody has waited for it, another error is on its way.
        """
        self._thread.shutdown()
        if self._writing is not None and (error := self._writing.exception()) is not None:
            print(f"warning: {error}", file=sys.stderr, flush=True)


def num_bytes(path: Path) -> int:
    """Size of a file, or of those in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
