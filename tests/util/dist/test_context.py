"""Two ranks on the CPU (gloo): what each collective returns, and on which ranks an error is raised."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.util.dist.conftest import run_pair
from util.dist import context
from util.dist.context import (
    DistContext,
    all_reduce_mean,
    any_rank,
    assert_same_across_ranks,
    barrier,
    find_context,
    gather_rows,
    gloo_group,
    local_range,
    process_group,
    raise_on_all_ranks,
    run_on_rank0,
)
from util.dist.preemption import StepVotes, requested_on_any_rank
from util.errors import UserError

ROWS = (0, 1, 2, 7, 8)


def fail_on(rank: int, failing: int) -> int:
    if rank == failing:
        raise UserError(f"only on rank {failing}")
    return rank


def error_of(function) -> tuple[str, bool]:
    with pytest.raises(UserError) as error:
        function()
    return str(error.value), error.value.on_all_ranks


def _work(ctx: DistContext, folder) -> None:
    rank, found = ctx.rank, {"context": ctx}
    with process_group(ctx):
        assert_same_across_ranks("number", 7, ctx)
        found["different"] = error_of(lambda: assert_same_across_ranks("number", rank, ctx))
        found["all"] = raise_on_all_ranks(ctx, lambda: fail_on(rank, 5))
        found["one fails"] = error_of(lambda: raise_on_all_ranks(ctx, lambda: fail_on(rank, 1)))
        found["rank 0"] = run_on_rank0(ctx, lambda: fail_on(rank, 1))
        found["rank 0 fails"] = error_of(lambda: run_on_rank0(ctx, lambda: fail_on(rank, 0)))
        found["any"] = any_rank(ctx, rank == 1), any_rank(ctx, False)
        found["mean"] = all_reduce_mean(torch.tensor([1.0, 5.0]) * (rank + 1), ctx).tolist()
        for n in ROWS:
            part = torch.arange(n * 3).view(n, 3)[local_range(n, ctx).start : local_range(n, ctx).stop]
            found[f"rows {n}"] = gather_rows(part, n, ctx)
        votes = StepVotes(ctx, ("stop", "save"))
        found["votes"] = [votes({"stop": rank == 1 and step == 1, "save": step == 2}) for step in range(3)]
        votes.lag = 2  # as on GPUs
        found["late votes"] = [votes({"stop": rank == 0 and step == 1, "save": False}) for step in range(4)]
        assert requested_on_any_rank(ctx) is None
        barrier(ctx, timeout_minutes=1)
        if rank == 1:
            context.dist.distributed_c10d._get_default_store().set("preemption", "SIGUSR1")
        barrier(ctx)
        found["asked"] = requested_on_any_rank(ctx)
        if rank == 0:
            with pytest.raises(RuntimeError, match="Ranks 1 failed to pass monitoredBarrier in 300 ms") as error:
                barrier(ctx, timeout_minutes=0.005)
            found["missing"] = str(error.value)
        else:
            time.sleep(1)
        torch.save(found, folder / f"{rank}.pt")
        os._exit(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair(_work, tmp_path_factory.mktemp("pair"))


def test_values_and_errors_are_the_same_on_all_ranks(pair):
    for rank, found in enumerate(pair):
        assert found["context"] == DistContext(rank, 2, rank) and found["context"].is_main == (rank == 0)
        assert found["different"] == ("The ranks do not have the same number: rank 0 0; rank 1 1.", True)
        assert found["all"] == rank and found["rank 0"] == 0
        assert found["one fails"] == ("only on rank 1", True) and found["rank 0 fails"] == ("only on rank 0", True)
        assert found["any"] == (True, False) and found["mean"] == [1.5, 7.5]


@pytest.mark.parametrize("n", ROWS)
def test_rows_are_gathered_in_index_order(pair, n):
    """Also if there are fewer rows than ranks, or the ranks have different numbers of them."""
    first, second = (found[f"rows {n}"] for found in pair)
    assert torch.equal(first, torch.arange(n * 3).view(n, 3)) and second is None
    rows = torch.rand(n, 3)
    assert torch.equal(gather_rows(rows, n, DistContext()), rows)


def test_votes_requests_and_a_barrier_that_names_the_missing_rank(pair):
    for found in pair:
        assert found["votes"] == [set(), {"stop"}, {"save"}]
        assert found["late votes"] == [set(), set(), set(), {"stop"}]
        assert found["asked"] == "SIGUSR1"
    assert "Ranks 1 failed" in pair[0]["missing"]


def test_world_size_alone_is_not_torchrun(monkeypatch):
    """The launcher's users set WORLD_SIZE to the number of nodes."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_context("cpu") == DistContext()


def test_devices_that_do_not_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("tpu", "cuda"):
        with pytest.raises(UserError, match=f"--device {device}"):
            find_context(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="Set NUM_GPUS to at most 2"):
        find_context("cuda")


@pytest.mark.parametrize(("said", "error"), [("Gloo connectFullMesh failed with [", UserError), ("else", RuntimeError)])
def test_nodes_that_do_not_reach_each_other(monkeypatch, said, error):
    """Also in a run on GPUs, whose default group does not use gloo."""

    def fail(**_):
        raise RuntimeError(said)

    monkeypatch.setattr(torch.distributed, "new_group", fail)
    with pytest.raises(error) as raised:
        gloo_group()
    assert ("GLOO_SOCKET_IFNAME" in str(raised.value)) == (error is UserError)


def test_a_single_rank_has_a_group_only_if_asked(monkeypatch):
    with process_group(DistContext()):
        assert not dist.is_initialized()
    with pytest.raises(ValueError), process_group(DistContext(), single_process=True):
        assert dist.get_world_size() == 1
        raise ValueError
    assert not dist.is_initialized()
