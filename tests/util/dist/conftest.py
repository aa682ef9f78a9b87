"""Two ranks as processes of their own. They are spawned: a fork of a process that has used autograd cannot use it."""

import time

import pytest
import torch
from torch.distributed import TCPStore

from tests.conftest import as_torchrun
from util.dist.context import find_context


def _work(rank: int, work, folder, port: int) -> None:
    torch.set_num_threads(1)
    as_torchrun(rank, 2, port)
    work(find_context("cpu"), folder)


def run_pair(work, folder) -> list[dict]:
    """Run `work(ctx, folder)` on two ranks, each of which saves <folder>/<rank>.pt. Return what they saved."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (work, folder, store.port)
    processes = torch.multiprocessing.spawn(_work, arguments, nprocs=2, join=False)
    end = time.monotonic() + 180
    while not processes.join(1):  # raises what a process has raised
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail("the two ranks did not finish in 180 s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
