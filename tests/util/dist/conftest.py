"""Two ranks as processes of their own."""

from functools import partial

import torch

from tests.conftest import as_torchrun, run_on
from util.dist.context import find_context


def _as_rank(work, rank: int, folder, ports: list[int]) -> None:
    torch.set_num_threads(1)
    as_torchrun(rank, 2, ports[0])
    work(find_context("cpu"), folder)


def run_pair(work, folder) -> list[dict]:
    """Run `work(ctx, folder)` on two ranks, each of which saves <folder>/<rank>.pt. Return what they saved."""
    run_on(2, partial(_as_rank, work), folder, calls=1)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
