"""Training in shards (fully_shard) on CPUs (gloo) against one copy on each process, and checkpoints between the two.

Two processes do what two must do, then three go on with it (`pair`, `three`); the tests look at what they have left.
"""

import json
import os
import shutil
import time

import pytest
import torch
from torch.distributed import TCPStore

import main_jit
from tests.conftest import STATE, arguments, flags, raw, read_log, register, state_differences, train
from util import checkpoint, distributed, merge
from util.checkpoint_folder import NAME, NAME_SHARDED
from util.parallel import local_parameters

pytestmark = pytest.mark.usefixtures("tiny")

RUN = {"global_batch": 12, "batch_size": 6, "flip": True, "epochs": 2, "keep_last": 1}  # 3 steps an epoch
LONG = {"epochs": 4}
FSDP = {"parallel": "fsdp"}


def run_on(ranks: int, work, folder, calls: int) -> None:
    """`work(rank, folder, ports)` on that many processes; `calls` is how often it makes a process group."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(calls)]
    processes = torch.multiprocessing.spawn(work, (folder, [s.port for s in stores]), nprocs=ranks, join=False)
    end = time.monotonic() + 180
    while not processes.join(1):  # raises what a process has raised
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"{ranks} processes did not finish in 180 s")


def _start(rank: int, ranks: int, folder, ports: list[int]):
    """A function that trains in one process of several, as torchrun would start it."""
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())

    def call(where: str, **changes) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_PORT=str(ports.pop()))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        assert main_jit.main(arguments(output_dir=folder / where, **{**RUN, **changes})) == 0
        distributed._patient = None

    return call


def _two(rank: int, folder, ports: list[int]) -> None:
    call = _start(rank, 2, folder, ports)
    looks = {"val_split": 0.1, "val_images": 3, "wandb_num_vis": 3, "gen_bsz": 1}  # 2 and 1 forward passes
    for mode in ("ddp", "fsdp"):
        call(f"{mode}", parallel=mode, **looks, **LONG)
        call(f"{mode} half", parallel=mode)
    call("recomputed", activation_checkpointing=True, **FSDP, **LONG)
    call("accumulated", batch_size=3, **FSDP, **LONG)
    call("fsdp again", resume=folder / "fsdp half", **LONG)
    call("ddp to the other", resume=folder / "ddp half", **FSDP, **LONG)
    call("fsdp to the other", resume=folder / "fsdp half", parallel="ddp", **LONG)
    call("1 to 2", resume=folder / "alone half", **LONG)
    os._exit(0)


def _three(rank: int, folder, ports: list[int]) -> None:
    call = _start(rank, 3, folder, ports)
    call("2 to 3", resume=folder / "fsdp half", batch_size=4, **LONG)
    os._exit(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    train(folder / "alone half", **{**RUN, "batch_size": 12}, **FSDP)
    run_on(2, _two, folder, calls=10)
    return folder


@pytest.fixture(scope="module")
def three(pair):
    run_on(3, _three, pair, calls=1)
    return pair


def same_losses(a, b) -> None:
    a, b = read_log(a), read_log(b)
    b = b[-len(a):]
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["recomputed", "accumulated", "fsdp again", "ddp to the other", "fsdp to the other", "1 to 2"])
def test_losses_are_those_of_copies(pair, name):
    shown = {"recomputed", "accumulated"}
    reference = pair / "plain"
    if not reference.exists():
        train(reference, **{**RUN, **LONG, "batch_size": 12})
    print(name, [(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(read_log(pair / name), read_log(reference)[-len(read_log(pair / name)):])])
    same_losses(pair / name, reference)


def test_shards_against_copies(pair):
    print([(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(read_log(pair / "fsdp"), read_log(pair / "ddp"))])
    same_losses(pair / "fsdp", pair / "ddp")
    print([{k: (a[k], b[k]) for k in ("loss_model", "loss_ema1", "loss_ema2")} for a, b in zip(read_log(pair / "fsdp", "val"), read_log(pair / "ddp", "val"))])
    os.system(f"ls -R {pair/'fsdp'} {pair/'fsdp to the other'} {pair/'ddp to the other'}")


def test_three(three):
    same_losses(three / "2 to 3", three / "plain")
