"""Training in shards (fully_shard) on CPUs (gloo) against one copy on each process; recomputed activations.

Two processes do all that two must do (`pair`), and three go on with what they leave; the tests look at it. Between
different numbers of processes the sums of a gradient are rounded differently, and nothing else may differ.
"""

import os

import pytest
import torch

import engine_jit
import main_jit
from engine_jit import parameter_groups
from tests.conftest import (
    TINY,
    TINY_MODEL,
    arguments,
    as_torchrun,
    differences,
    raw,
    read_log,
    register,
    run_on,
    state_differences,
    train,
)
from util import config, merge, training_loop, training_state
from util.build import DenoiserConfig
from util.checkpoint_folder import NAME_SHARDED
from util.distributed import World, find_world, process_group
from util.parallel import build_sharded, initialise, local, local_parameters, own_rows

pytestmark = pytest.mark.usefixtures("tiny")

RUN = {"global_batch": 12, "batch_size": 6, "flip": True, "epochs": 2, "keep_last": 1}  # 3 steps an epoch
LONG = {"epochs": 4}
FSDP = {"parallel": "fsdp"}
SHAPE = {"model": TINY, "dataset": "digits", "img_size": 16}


def _trainer(rank: int, ranks: int, folder, ports: list[int]):
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())
    main_jit.time.sleep = lambda seconds: None

    def call(where: str, code: int = 0, **changes) -> None:
        as_torchrun(rank, ranks, ports.pop())
        assert main_jit.main(arguments(output_dir=folder / where, **{**RUN, **changes})) == code, where

    return call


def _two(rank: int, folder, ports: list[int]) -> None:
    call = _trainer(rank, 2, folder, ports)
    looks = {"val_split": 0.1, "val_images": 3, "wandb_num_vis": 3, "gen_bsz": 1}  # 2 and 1 forward passes
    for mode in ("ddp", "fsdp"):
        call(mode, parallel=mode, **looks, **LONG)
        call(f"{mode} half", parallel=mode)
        call(f"{mode} bf16", parallel=mode, precision="bf16", eval_freq=1, **looks)
    call("recomputed", activation_checkpointing=True, **FSDP, **LONG)
    call("recomputed copies", activation_checkpointing=True, **LONG)
    call("accumulated", batch_size=3, **FSDP, **LONG)
    call("fsdp to fsdp", resume=folder / "fsdp half", **LONG)
    call("ddp to fsdp", resume=folder / "ddp half", **FSDP, **LONG)
    call("fsdp to ddp", resume=folder / "fsdp half", parallel="ddp", **LONG)
    call("1 to 2", resume=folder / "alone half", **LONG)
    as_torchrun(rank, 2, ports.pop())
    torch.save(_initial(rank), folder / f"initial-{rank}.pt")
    _poisoned(rank, folder, call)
    os._exit(0)  # as main_jit.py does after an error within the group: its destructors would wait


def _three(rank: int, folder, ports: list[int]) -> None:
    _trainer(rank, 3, folder, ports)("2 to 3", resume=folder / "fsdp half", batch_size=4, **LONG)
    os._exit(0)


def tiny_denoiser():
    torch.manual_seed(5)
    return DenoiserConfig.from_args(config.resolve(SHAPE, None, training=True)).build()


def _initial(rank: int) -> dict:
    """Fresh parameters and buffers in shards, and the same rows of a network that is not sharded."""
    world = find_world("cpu")
    with process_group(world):
        sharded, whole = build_sharded(tiny_denoiser, world), tiny_denoiser()
        initialise(sharded, tiny_denoiser, world)
        rows = {name: own_rows(p, dict(whole.named_parameters())[name]) for name, p in sharded.named_parameters()}
        found = {
            "parameters": differences(local_parameters(sharded), rows),
            "buffers": differences(dict(sharded.named_buffers()), dict(whole.named_buffers())),
            "numel": sum(p.numel() for p in local_parameters(sharded).values()),
            "groups": differences(parameter_groups(sharded), parameter_groups(whole)),
        }
    return found


def state_of(training) -> dict:
    mine = local_parameters(training.denoiser)
    return {
        "weights": {name: p.detach().clone() for name, p in mine.items()},
        "averages": [{name: a.clone() for name, a in ema.averages.items()} for ema in training.emas],
        "optimizer": [{k: v.clone() for k, v in training.optimizer.state[p].items()} for p in mine.values()],
    }


def _poisoned(rank: int, folder, call) -> None:
    """A run in which the second process alone draws noise that is not finite, at step 2."""
    seen, real = {}, engine_jit.draw
    epoch, norm = training_loop.train_one_epoch, engine_jit.total_norm

    def watched(training, *args):
        seen["training"] = training
        epoch(training, *args)

    def weighed(module):
        value = norm(module)
        gradients = {name: local(p).grad for name, p in module.named_parameters()}
        seen["bytes"] = num_bytes([state_of(seen["training"]), gradients]) if seen.get("started") else 0
        seen["started"] = True
        return value

    def poisoned(seed, step, *args):
        d = real(seed, step, *args)
        if step == 2:
            seen["before"] = state_of(seen["training"])
            if rank == 1:
                d.noise[0, 0, 0, 0] = float("nan")
        return d

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit, "draw", poisoned)
        patch.setattr(engine_jit, "total_norm", weighed)
        patch.setattr(training_loop, "train_one_epoch", watched)
        call("poisoned", code=2, **FSDP)
    result = {"before": seen["before"], "after": state_of(seen["training"]), "bytes": seen["bytes"]}
    torch.save(result, folder / f"poisoned-{rank}.pt")


def num_bytes(content) -> int:
    """Of all tensors in nested dicts and lists, but for AdamW's counters of steps."""
    if isinstance(content, torch.Tensor):
        return content.nbytes if content.dim() else 0
    return sum(num_bytes(part) for part in (content.values() if isinstance(content, dict) else content))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    train(folder / "alone half", **{**RUN, "batch_size": 12}, **FSDP)
    run_on(2, _two, folder, calls=15)
    return folder


@pytest.fixture(scope="module")
def three(pair):
    run_on(3, _three, pair, calls=1)
    return pair


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process that is not sharded."""
    return train(tmp_path_factory.mktemp("alone") / "run", **{**RUN, **LONG, "batch_size": 12})


def same_losses(run, reference) -> None:
    """The run, which may have begun later, has the losses of the reference."""
    ours, theirs = read_log(run), read_log(reference)
    theirs = theirs[-len(ours) :]
    assert len(ours) >= 6
    for a, b in zip(ours, theirs, strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_shards_against_copies(pair):
    same_losses(pair / "fsdp", pair / "ddp")
    assert read_log(pair / "fsdp", "start")[0]["parameters"] == read_log(pair / "ddp", "start")[0]["parameters"]


@pytest.mark.parametrize(
    "name", ["recomputed", "recomputed copies", "accumulated", "fsdp to fsdp", "ddp to fsdp", "fsdp to ddp", "1 to 2"]
)
def test_losses_are_those_of_one_process(pair, alone, name):
    same_losses(pair / name, alone)


def test_three_processes_go_on_where_two_stopped(three, alone):
    same_losses(three / "2 to 3", alone)


def test_one_process_goes_on_where_two_stopped(pair, alone, tmp_path):
    run = train(tmp_path / "run", resume=pair / "fsdp half", **{**RUN, **LONG, "batch_size": 12})
    assert (run / NAME_SHARDED).is_dir()
    same_losses(run, alone)


def test_one_process_in_shards_is_one_that_is_not(alone, tmp_path):
    """To the bit, the optimizer's state included."""
    run = train(tmp_path / "run", **{**RUN, **LONG, "batch_size": 12}, **FSDP)
    assert read_log(run) == read_log(alone)
    merge.run([str(run)])
    assert state_differences(run / "merged", alone) == []


def test_going_on_and_recomputing_change_no_bit(pair, tmp_path):
    """A run of two processes that is interrupted against one that is not, and has recomputed its activations."""
    for name in ("fsdp to fsdp", "recomputed"):
        merge.run([str(pair / name), "--out", str(tmp_path / name)])
    assert state_differences(tmp_path / "fsdp to fsdp", tmp_path / "recomputed") == []
    assert raw(tmp_path / "recomputed")["run"]["step"] == 12


def test_held_out_loss_and_samples_are_those_of_copies(pair):
    """One process has more forward passes to do than the other."""
    shards, copies = (read_log(pair / name, "val") for name in ("fsdp", "ddp"))
    assert len(shards) == len(copies) == 4
    for a, b in zip(shards, copies, strict=True):
        for name in ("loss_model", "loss_ema1", "loss_ema2"):
            assert a[name] == pytest.approx(b[name], rel=1e-6)
        assert len({a["loss_model"], a["loss_ema1"], a["loss_ema2"]}) == 3
    grids = [next((pair / name / "samples").glob("*.png")).read_bytes() for name in ("fsdp", "ddp")]
    assert grids[0] == grids[1]


def test_samples_between_epochs_in_bf16_are_those_of_copies_and_training_goes_on(pair):
    """Sampling puts weights that are cast in the place of gathered ones, and takes them away again."""
    losses = [[line["loss"] for line in read_log(pair / f"{mode} bf16")] for mode in ("fsdp", "ddp")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    grids = [
        [path.read_bytes() for path in sorted((pair / f"{mode} bf16" / "samples").glob("*.png"))]
        for mode in ("fsdp", "ddp")
    ]
    assert len(grids[0]) == 2 and grids[0] == grids[1]


def test_initial_weights_are_those_of_a_network_that_is_not_sharded(pair):
    found = [torch.load(pair / f"initial-{rank}.pt") for rank in (0, 1)]
    for each in found:
        assert each["parameters"] == each["buffers"] == each["groups"] == []
    whole = sum(p.numel() for p in tiny_denoiser().parameters())
    assert found[0]["numel"] + found[1]["numel"] == whole and found[1]["numel"] > 0.45 * whole


def test_step_that_is_not_finite_on_one_process_is_suppressed_on_all(pair):
    for rank in (0, 1):
        state = torch.load(pair / f"poisoned-{rank}.pt")
        assert differences(state["after"], state["before"]) == []
    assert [line["step"] for line in read_log(pair / "poisoned")] == [0, 1]


def test_calculated_state_is_what_a_process_holds(pair):
    """Weights, gradients, moments and averages of the process that holds most of them, to the byte."""
    from util.memory import Kept, Memory

    nothing = Kept(0, 0, 0)
    shapes = tuple(tuple(p.shape) for p in tiny_denoiser().parameters())
    held = [torch.load(pair / f"poisoned-{rank}.pt")["bytes"] for rank in (0, 1)]
    assert max(held) == Memory(shapes, 0, 0, nothing, nothing).state(2)
    assert sum(held) == Memory(shapes, 0, 0, nothing, nothing).state(1)


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_bits(drop):
    """Loss and gradients, with the same masks where there is dropout."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        args = config.resolve({**SHAPE, "attn_dropout": drop, "proj_dropout": drop}, None, training=True)
        args.activation_checkpointing = recompute
        shape = DenoiserConfig.from_args(args)
        training, *_ = training_state.build_training(args, shape, None, None, World())
        x, y, t = torch.rand(3, 3, 16, 16), torch.arange(3), torch.tensor([0.1, 0.5, 0.9])
        torch.manual_seed(1)
        loss = training.forward(x, y, t, torch.randn(3, 3, 16, 16))
        loss.backward()
        assert all(block.recomputed == recompute for block in training.denoiser.net.blocks)
        results.append([loss.detach(), {n: p.grad for n, p in training.denoiser.named_parameters()}])
    assert differences(*results) == []


def test_blocks_are_computed_twice_for_less_memory(monkeypatch):
    from model_jit import JiTBlock

    calls, real = [], JiTBlock._forward
    monkeypatch.setattr(JiTBlock, "_forward", lambda self, *args: calls.append(1) or real(self, *args))
    net = TINY_MODEL(input_size=16, num_classes=10)
    for block in net.blocks:
        block.recomputed = True
    out = net(torch.rand(2, 3, 16, 16), torch.rand(2), torch.arange(2))
    assert len(calls) == 4
    out.sum().backward()
    assert len(calls) == 8
    with torch.no_grad():  # sampling keeps nothing anyway
        net(torch.rand(2, 3, 16, 16), torch.rand(2), torch.arange(2))
    assert len(calls) == 12
