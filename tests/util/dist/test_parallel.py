"""DDP and FSDP (fully_shard) on two CPU ranks against one rank: weights, losses, norms, updates of a tiny denoiser."""

import os

import pytest
import torch
from torch import nn

from denoiser import Denoiser
from tests.conftest import TINY_MODEL, differences
from tests.util.dist.conftest import run_pair
from util.dist.context import DistContext, all_reduce_mean, process_group
from util.dist.parallel import (
    assert_equal_replicas,
    build_sharded,
    grad_norm,
    init_sharded,
    is_sharded,
    local_shard,
    no_sync,
    unsharded,
    wrap_ddp,
)
from util.errors import UserError
from util.optim import EMA, build_optimizer, parameter_groups

B, STEPS, NON_FINITE = 4, 6, 3
ONE = DistContext()


def build() -> Denoiser:
    torch.manual_seed(5)
    return Denoiser(TINY_MODEL(input_size=16, num_classes=10))


def batch(step: int) -> tuple:
    g = torch.Generator().manual_seed(step)
    x, noise = torch.randn(2, B, 3, 16, 16, generator=g)
    return x, torch.randint(10, (B,), generator=g), torch.rand(B, generator=g), noise


def whole(state: dict) -> dict:
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in state.items()}


def trained(denoiser: Denoiser, model: nn.Module, ctx: DistContext, microbatches: int = 1) -> dict:
    """Losses, norms, final weights and EMA of a few steps, of which one is skipped as if it was not finite."""
    optimizer, ema = build_optimizer(denoiser, 0.1, (0.9, 0.95)), EMA(denoiser, 0.9)
    losses, norms, parameters = [], [], list(denoiser.parameters())
    for step in range(STEPS):
        parts = [torch.chunk(part, ctx.world_size * microbatches) for part in batch(step)]
        total = torch.zeros(())
        for micro in range(microbatches):
            mine = [part[micro * ctx.world_size + ctx.rank] for part in parts]
            with no_sync(model) if micro < microbatches - 1 else torch.enable_grad():
                loss = model(*mine) / microbatches
                loss.backward()
            total += loss.detach()
        norm = grad_norm(parameters)
        nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.found_inf = torch.tensor(float(step == NON_FINITE))
        before = whole(dict(denoiser.named_parameters()))
        optimizer.step()
        optimizer.zero_grad()
        if step == NON_FINITE:
            assert differences(before, whole(dict(denoiser.named_parameters()))) == []
        ema.update(optimizer.found_inf)
        losses.append(float(all_reduce_mean(total, ctx)))
        norms.append(float(norm))
    with ema.applied(), unsharded(denoiser):
        for _ in range(1 + ctx.rank):  # ranks may run different numbers of forward passes
            predicted = denoiser(*batch(99)).detach()
    weights = whole(dict(denoiser.named_parameters()))
    return {"losses": losses, "norms": norms, "weights": weights, "ema": whole(ema.shadow), "ema loss": predicted}


def _work(ctx: DistContext, folder) -> None:
    rank, found = ctx.rank, {}
    with process_group(ctx):
        plain = build()
        for name, microbatches in (("ddp", 1), ("ddp accumulated", 2)):
            copy = build()
            model = wrap_ddp(copy, ctx)
            assert all(p.grad is None or not p.grad.any() for p in copy.parameters()) and not is_sharded(copy)
            assert differences(dict(copy.named_parameters()), dict(plain.named_parameters())) == []
            found[name] = trained(copy, model, ctx, microbatches)
        del model
        for name, microbatches in (("fsdp", 1), ("fsdp accumulated", 2)):
            sharded = build_sharded(build, ctx)
            init_sharded(sharded, build, ctx)
            assert is_sharded(sharded) and parameter_groups(sharded) == parameter_groups(plain)
            assert differences(whole(dict(sharded.named_parameters())), dict(plain.named_parameters())) == []
            assert differences(dict(sharded.named_buffers()), dict(plain.named_buffers())) == []
            found["numel"] = sum(local_shard(p).numel() for p in sharded.parameters())
            found[name] = trained(sharded, sharded, ctx, microbatches)
        found["replicas"] = _replicas(rank, ctx)
        torch.save(found, folder / f"{rank}.pt")
        os._exit(0)


def _replicas(rank: int, ctx: DistContext) -> list[str]:
    """What is said of equal replicas, of one flipped bit, of a zero with another sign, and of NaN."""
    said = []
    for spoil in (lambda x: None, lambda x: x.view(torch.int32)[2].__ixor__(1), lambda x: x[0].neg_()):
        tensors = {
            "a": torch.zeros(3),
            "b": torch.full((4, 2), torch.nan),
            "c": torch.arange(3.0),
            "d": torch.tensor(1.0),
        }
        if rank == 1:
            spoil(tensors["c"])
        try:
            assert_equal_replicas(ctx, {"model": {"b": tensors["b"]}, "ema1": tensors})
            said.append("")
        except UserError as error:
            assert error.on_all_ranks
            said.append(str(error).partition(". ")[0])
    return said


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair(_work, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    denoiser = build()
    yield trained(denoiser, wrap_ddp(denoiser, ONE), ONE)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["ddp", "ddp accumulated", "fsdp", "fsdp accumulated"])
def test_two_ranks_train_as_one(pair, alone, name):
    """Sums are rounded differently, and nothing else differs; between fsdp and ddp not even that."""
    for found in pair:
        reference = found[name.replace("fsdp", "ddp")]
        assert found[name]["losses"] == pytest.approx(reference["losses"], rel=1e-7)
        assert found[name]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found[name]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        for key in ("weights", "ema"):
            for parameter, value in alone[key].items():
                torch.testing.assert_close(found[name][key][parameter], value, rtol=0, atol=2e-5, msg=parameter)
        torch.testing.assert_close(found[name]["ema loss"], alone["ema loss"], rtol=1e-5, atol=0)
    assert differences(pair[0][name]["weights"], pair[1][name]["weights"]) == []


def test_each_rank_holds_half_of_a_sharded_model(pair):
    total = sum(p.numel() for p in build().parameters())
    assert sum(found["numel"] for found in pair) == total and pair[1]["numel"] > 0.45 * total


def test_a_flipped_bit_in_a_replica_is_named_on_all_ranks(pair):
    message = "Model replicas diverged: rank 1 differs from rank 0 in ema1.c (1 of 5 tensors)"
    for found in pair:
        assert found["replicas"] == ["", message, message]


def test_a_single_rank_is_sharded_to_the_bit(alone):
    with process_group(ONE, single_process=True):
        sharded = build_sharded(build, ONE)
        init_sharded(sharded, build, ONE)
        found = trained(sharded, sharded, ONE)
    assert differences(found, alone) == []
    assert_equal_replicas(ONE, {"model": {"a": torch.zeros(2)}})
