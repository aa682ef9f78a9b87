"""Checkpoints written beside training, which waits for the copy to host memory only: a thread does the rest."""

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from util.checkpoint import files
from util.checkpoint import sharded as sharded_checkpoint
from util.dist.context import DistContext, gloo_group


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk: for how many seconds training waited for it, and how many it took in all."""

    path: Path
    step: int
    blocked: float
    seconds: float
    num_bytes: int


class HostCopy:
    """Copies nested dicts of tensors to host memory, which it keeps. DTensors are put on `mesh`, a mesh of CPUs."""

    def __init__(self, device: torch.device, mesh: DeviceMesh | None = None):
        self.device, self.mesh, self._buffers = device, mesh, {}

    def __call__(self, content: dict[str, Any]) -> dict[str, Any]:
        copied = self._copy(content, ())
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copies have only been started
        return copied

    def _copy(self, value: Any, key: tuple) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(part, (*key, name)) for name, part in value.items()}
        if isinstance(value, DTensor):
            like = {"placements": value.placements, "shape": value.shape, "stride": value.stride()}
            return DTensor.from_local(self._copy(value.to_local(), key), self.mesh, run_check=False, **like)
        if not isinstance(value, Tensor):
            return value
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(value.detach(), device="cpu", pin_memory=value.is_cuda)
        return self._buffers[key].copy_(value.detach(), non_blocking=True)


class CheckpointWriter:
    """Writes the checkpoints of a run into `folder`, one at a time. The `keep_last` newest stay.

    Args:
        last_step: step of the newest checkpoint in the folder if it is intact, else None.
        first_step: step at which training resumes; earlier checkpoints of later steps are removed.
        sharded: all ranks write together, and call all methods together. Otherwise rank 0 writes alone.
    """

    def __init__(
        self, folder: Path, keep_last: int, last_step: int | None, first_step: int, ctx: DistContext, sharded=False
    ):
        self.folder, self.keep_last, self.last_step, self.first_step = folder, keep_last, last_step, first_step
        self.ctx, self.group = ctx, gloo_group() if sharded else None  # the group is for the thread alone
        self._copy = HostCopy(ctx.device, DeviceMesh.from_group(self.group, "cpu") if sharded else None)
        # A thread starts on device 0, where DCP would open a context on each rank.
        on_device = partial(torch.cuda.set_device, ctx.device) if ctx.device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=on_device)
        self._writing: Future[Written] | None = None
        self._done: list[Written] = []

    def save(self, content: dict[str, Any], step: int, keep_as_epoch: int | None = None) -> None:
        """Copy `content` (train_state.py) and start to write it; UserError if the one before could not be written.

        With `keep_as_epoch` it is kept for good, as the one after this epoch (counted from 0).
        """
        if self.group is None and not self.ctx.is_main:
            return
        start = time.perf_counter()
        self.wait()
        content = self._copy(content)
        self._writing = self._thread.submit(self._write, content, step, keep_as_epoch, start, time.perf_counter())

    def _write(self, content: dict, step: int, keep_as_epoch: int | None, start: float, copied: float) -> Written:
        if self.group is None:
            path = files.save(self.folder, content, self.last_step)
            self._keep_and_prune(path, keep_as_epoch)
        else:
            path, written = self.folder / files.NAME_SHARDED, self.folder / files.NEXT_SHARDED
            sharded_checkpoint.write(written, content, self.group)

            def put_in_place() -> None:
                if self.ctx.is_main:
                    self._keep_and_prune(files.put_in_place(written, self.last_step), keep_as_epoch)

            sharded_checkpoint.on_all_ranks(path, self.group, put_in_place)
        self.last_step = step
        size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
        return Written(path, step, copied - start, time.perf_counter() - start, size)

    def _keep_and_prune(self, path: Path, keep_as_epoch: int | None) -> None:
        if keep_as_epoch is not None:
            files.keep(path, keep_as_epoch)
        try:
            files.prune(self.folder, self.keep_last, self.first_step)
            self.first_step = None
        except OSError as error:  # the new one is intact all the same
            print(f"warning: an old checkpoint could not be removed: {error}", file=sys.stderr, flush=True)

    def keep(self, epoch: int) -> None:
        """Keep the newest checkpoint for good, as the one after `epoch` (counted from 0), if it is intact."""
        if self.ctx.is_main and self.last_step is not None and (newest := files.find(self.folder)):
            files.keep(newest, epoch)

    def finished(self) -> list[Written]:
        """Return what came to be on disk since the last call, without waiting; UserError if a write failed."""
        if self._writing is not None and self._writing.done():
            self.wait()
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        """Wait until everything is on disk; UserError if that fails."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._done.append(writing.result())

    def close(self) -> None:
        """Wait, and end the thread. A failure is printed, not raised: another error may be on its way."""
        self._thread.shutdown()
        if self._writing is not None and (error := self._writing.exception()) is not None:
            print(f"warning: {error}", file=sys.stderr, flush=True)
