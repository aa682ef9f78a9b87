"""The rank of this process among all, the process group, and the few collectives that the project uses."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError

CPU = torch.device("cpu")
PATIENCE = timedelta(days=1)  # how far apart ranks may be in an evaluation
T = TypeVar("T")

_patient: dist.ProcessGroup | None = None  # gloo, for waits of hours: one rank has more images to make than another


@dataclass(frozen=True)
class DistContext:
    """Rank, number of ranks and device of this process. The default is a single process on the CPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def find_context(device: str | None) -> DistContext:
    """Read rank, number of ranks and device from torchrun's environment; UserError if there is no such device."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {kind} must be cpu or cuda (CUDA_VISIBLE_DEVICES chooses among several).")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here.")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    launched = all(name in os.environ for name in (*names, "MASTER_ADDR"))  # WORLD_SIZE alone: a number of nodes
    rank, world_size, local_rank = (int(os.environ[name]) for name in names) if launched else (0, 1, 0)
    if kind == "cuda" and local_rank >= (visible := torch.cuda.device_count()):
        raise UserError(
            f"Local rank {local_rank} has no GPU: {visible} are visible here. Set NUM_GPUS to at most {visible}."
        )
    return DistContext(rank, world_size, local_rank, torch.device("cuda", local_rank) if kind == "cuda" else CPU)


@contextmanager
def process_group(ctx: DistContext, timeout_minutes: float = 30.0, single_process: bool = False) -> Iterator[None]:
    """Provide the default process group (NCCL on CUDA, gloo on a CPU) inside the block, if there are several ranks.

    A collective that another rank does not join within `timeout_minutes` raises an error (gloo) or ends this process
    (NCCL's watchdog). With `single_process` a single rank has a group, too, as sharding requires. After an error the
    group of several ranks is not destroyed: that would wait for the others.
    """
    global _patient
    if ctx.device.type == "cuda":
        torch.cuda.set_device(ctx.device)
    alone = ctx.world_size == 1
    if alone and not single_process:
        yield
        return
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # the last collectives of each rank, to a file
    store = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    with _explain_unreachable():
        backend = "nccl" if ctx.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **store)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    failed = True
    try:
        yield
        failed = False
    finally:
        if alone or not failed:
            _patient = None
            dist.destroy_process_group()


@contextmanager
def _explain_unreachable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise UserError(
            f"The ranks cannot connect to the addresses of each other's host names ({str(error).splitlines()[0]}). "
            "Set GLOO_SOCKET_IFNAME to the network interface between the nodes, as `ip addr` lists it, also on GPUs."
        ) from error


def gloo_group() -> dist.ProcessGroup:
    """Create a group of all ranks for tensors in host memory; all ranks call it."""
    with _explain_unreachable():
        return dist.new_group(backend="gloo")


def error_on_all_ranks(message: str) -> UserError:
    """Return a UserError that every rank raises alike."""
    error = UserError(message)
    error.on_all_ranks = True
    return error


def all_gather(value: T, ctx: DistContext) -> list[T]:
    """Return a picklable value of each rank, by rank."""
    if ctx.world_size == 1:
        return [value]
    values = [None] * ctx.world_size
    dist.all_gather_object(values, value)
    return values


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """The value of `function`, or the message of its UserError."""
    try:
        return function(), None
    except UserError as error:
        return None, str(error)


def assert_same_across_ranks(what: str, value: object, ctx: DistContext) -> None:
    """Raise a UserError on all ranks if a picklable value differs between them."""
    values = all_gather(value, ctx)
    if different := [f"rank {rank} {other}" for rank, other in enumerate(values) if other != values[0]]:
        raise error_on_all_ranks(f"The ranks do not have the same {what}: rank 0 {values[0]}; {'; '.join(different)}.")


def run_on_rank0(ctx: DistContext, function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and return its value, or raise its UserError, on all ranks. It may take hours."""
    if ctx.world_size == 1:
        return function()
    outcome = [_attempt(function) if ctx.is_main else None]
    dist.broadcast_object_list(outcome, src=0, group=_patient, device=CPU)
    value, message = outcome[0]
    if message is not None:
        raise error_on_all_ranks(message)
    return value


def raise_on_all_ranks(ctx: DistContext, function: Callable[[], T]) -> T:
    """Call `function` on each rank and return its value. A UserError on any rank is raised on all of them."""
    if ctx.world_size == 1:
        return function()
    value, message = _attempt(function)
    if messages := [m for m in all_gather(message, ctx) if m is not None]:
        raise error_on_all_ranks(messages[0])
    return value


def any_rank(ctx: DistContext, flag: bool) -> bool:
    """Return on all ranks whether `flag` is set on any. They may come to it hours apart."""
    if ctx.world_size == 1:
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_patient)
    return bool(flags)


def barrier(ctx: DistContext, timeout_minutes: float | None = None) -> None:
    """Wait for all ranks, for hours if need be. With a timeout, raise a RuntimeError that names the missing ranks."""
    if ctx.world_size > 1 and timeout_minutes is None:
        dist.barrier(group=_patient)
    elif ctx.world_size > 1:
        dist.monitored_barrier(_patient, timedelta(minutes=timeout_minutes), wait_all_ranks=True)


def all_reduce_mean(value: Tensor, ctx: DistContext) -> Tensor:
    """Average a tensor over the ranks in place, without waiting for the device."""
    if ctx.world_size > 1:
        dist.all_reduce(value)
        value /= ctx.world_size
    return value


def local_range(n: int, ctx: DistContext) -> range:
    """Return this rank's contiguous part of 0 .. n - 1; the lengths of two ranks differ by at most one."""
    return range(n * ctx.rank // ctx.world_size, n * (ctx.rank + 1) // ctx.world_size)


def gather(value: T, ctx: DistContext) -> list[T] | None:
    """Return the picklable values of all ranks on rank 0, None elsewhere. They may come to it hours apart."""
    if ctx.world_size == 1:
        return [value]
    values = [None] * ctx.world_size if ctx.is_main else None
    dist.gather_object(value, values, group=_patient)
    return values


def gather_rows(part: Tensor, n: int, ctx: DistContext) -> Tensor | None:
    """Gather the (len(local_range(n, ctx)), ...) rows of all ranks as (n, ...) on rank 0; return None elsewhere."""
    if ctx.world_size == 1:
        return part
    parts = gather(part.cpu().clone(), ctx)  # of a view all its storage would be sent
    return torch.cat(parts).view(n, *part.shape[1:]) if parts else None
