"""One process or many: what torchrun's environment says, and the few collectives that are used."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from util import preemption, watch
from util.errors import UserError

CPU = torch.device("cpu")
PATIENCE = timedelta(days=7)  # how long a process may be ahead of another in an evaluation
T = TypeVar("T")

_patient: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @property
    def main(self) -> bool:
        return self.rank == 0


def rank_from_environment() -> int:
    return int(os.environ["RANK"]) if launched_by_torchrun() else 0


def launched_by_torchrun() -> bool:
    """WORLD_SIZE alone says nothing: the launcher's users set it to the number of nodes."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))


def tell_torchrun(reason: str) -> None:
    """Let torchrun end with the reason instead of a hint how to find one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}))


def find_world(device: str | None) -> World:
    """Rank, number of processes and device of this process; nothing is started.

    Raises:
        UserError: a device that is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {kind}: it must be cpu or cuda (CUDA_VISIBLE_DEVICES chooses among several)")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    if not launched_by_torchrun():
        return World(device=torch.device("cuda", 0) if kind == "cuda" else CPU)
    local_rank = int(os.environ["LOCAL_RANK"])
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no CUDA device: {torch.cuda.device_count()} are visible; "
            "set NUM_GPUS to at most that"
        )
    where = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, where)


def _end_the_job(reason: str, text: str) -> NoReturn:
    """End this process, whatever its main thread hangs in, so that torchrun ends the others."""
    last_resort = threading.Timer(5, os._exit, [1])  # who reads the output may hang as well
    last_resort.start()
    tell_torchrun(reason)
    preemption.end_process(1, alike=False)
    sys.stdout.flush()
    print(text, end="", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def process_group(world: World, timeout_minutes: float = 30.0, also_alone: bool = False) -> Iterator[None]:
    """The default process group (nccl on CUDA, gloo on a CPU), where there is more than one process, and its watch.

    With `also_alone` one process has a group too, without a watch. After `timeout_minutes` in which a process waits for
    another one, the watch (util/watch.py) names that one and ends the job; a collective's own timeout comes later.

    An error within leaves a group of several as it is: ending it is a collective, and the others do not take part.
    """
    global _patient
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1 and not also_alone:
        yield
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
        return
    timeout = 60 * timeout_minutes
    with _network_interface():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout + watch.margin(timeout)))
    watch.start(world.rank, world.size, timeout, _end_the_job)
    yield  # not in try: see above
    watch.stop()
    _patient = None
    dist.destroy_process_group()


def in_group() -> bool:
    """Whether the group is there: after an error, that others may be waiting for this process."""
    return dist.is_available() and dist.is_initialized()


def agree(what: str, value: object, world: World) -> None:
    """Compare a picklable value over the processes.

    Raises:
        UserError: on all of them, with the values, where they differ.
    """
    if world.size == 1:
        return
    values: list[object] = [None] * world.size
    dist.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        listed = "; ".join(f"process {rank}: {other}" for rank, other in enumerate(values) if other != values[0])
        error = UserError(f"the processes do not see the same {what}: process 0: {values[0]}; {listed}")
        error.everywhere = True
        raise error


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def _patient_group() -> dist.ProcessGroup:
    """A gloo group on the host with a timeout of its own, made when it is first needed, by all processes alike.

    In the default group whoever waits longer than its timeout is ended, and metrics of many images, or a process
    that has more of them to make than another, take longer.
    """
    global _patient
    if _patient is None:
        _patient = gloo_group(PATIENCE)
    return _patient


def gloo_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A group of all processes for what is in host memory, also in runs on GPUs. Making it is a collective.

    Raises:
        UserError: the processes do not reach each other.
    """
    with _network_interface():
        return dist.new_group(backend="gloo", timeout=timeout)


@contextmanager
def _network_interface() -> Iterator[None]:
    """Where gloo cannot connect, what to do. A node's own name often stands for 127.0.1.1, which no other reaches."""
    try:
        yield
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise UserError(
            "the processes do not reach each other by the address that their nodes' own names stand for "
            f"({str(error).splitlines()[0]}). Set GLOO_SOCKET_IFNAME to the network interface between the nodes, as "
            "`ip addr` lists it, for runs on GPUs as well"
        ) from error


def wait_for_all(world: World) -> None:
    """A barrier for processes that may be hours apart."""
    if world.size > 1:
        dist.barrier(group=_patient_group())


def requested_of_any(world: World) -> str | None:
    """The signal that asked this process to stop or, as far as it is known here, another one; waits for none of them.

    A process that was asked tells the others in the store of the process group.
    """
    reason = preemption.requested()
    if world.size > 1:
        store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
        if reason:
            store.set("preemption", reason)
        elif store.check(["preemption"]):
            reason = store.get("preemption").decode()
    return reason


def any_of(world: World, flag: bool) -> bool:
    """Whether `flag` is set on any process, the same answer on all; they may come to it hours apart."""
    if world.size == 1:
        return flag
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_patient_group())
    return bool(flags)


def from_main(world: World, function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on all processes; it is called there alone, and may take hours.

    Raises:
        UserError: on all processes, where it is raised on rank 0.
    """
    if world.size == 1:
        return function()
    outcome: list = [None]
    if world.main:
        try:
            outcome = [(function(), None)]
        except UserError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0, group=_patient_group(), device=CPU)
    value, error = outcome[0]
    if error is not None:
        error.everywhere = True
        raise error
    return value


def everywhere_or_nowhere(world: World, function: Callable[[], T]) -> T:
    """What `function`, which each process calls, returns here.

    Raises:
        UserError: on all processes, where it is raised on any.
    """
    if world.size == 1:
        return function()
    value, problem = None, None
    try:
        value = function()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    if found := next((p for p in problems if p is not None), None):
        error = UserError(found)
        error.everywhere = True
        raise error
    return value


def all_reduce_mean(value: Tensor, world: World) -> Tensor:
    """Mean over the processes, the same on each of them; does not wait for the device."""
    if world.size > 1:
        dist.all_reduce(value)
        value /= world.size
    return value


def share(n: int, world: World) -> range:
    """The contiguous part of 0 .. n - 1 that belongs to this process; parts differ in length by at most one."""
    return range(n * world.rank // world.size, n * (world.rank + 1) // world.size)


def gather_by_index(part: Tensor, n: int, world: World) -> Tensor | None:
    """Rows of all processes in index order on rank 0, None elsewhere.

    Args:
        part: (len(share(n, world)), ...) rows of this process, on the CPU.
        n: number of rows in all.
    """
    if world.size == 1:
        return part
    longest = -(-n // world.size)
    padded = part.new_zeros((longest, *part.shape[1:]))
    padded[: len(part)] = part
    padded = padded.to(world.device)
    received = [torch.empty_like(padded) for _ in range(world.size)] if world.main else None
    dist.gather(padded, received)
    if received is None:
        return None
    lengths = [len(share(n, World(rank, world.size))) for rank in range(world.size)]
    return torch.cat([rows[:length].cpu() for rows, length in zip(received, lengths, strict=True)])
