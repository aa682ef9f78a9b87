"""Two ranks on CPUs (gloo) against one, DDP and FSDP: the same run, the same images, the same refusals.

One pair of ranks does all the work (`pair`); the tests look at what it has left. Between one rank and two the sums of a
gradient are rounded differently, and nothing else may differ.
"""

import json
import os
import weakref

import pytest
import torch

import engine_jit
import main_jit
from tests.conftest import (
    STATE,
    arguments,
    as_torchrun,
    differences,
    flags,
    raw,
    read_log,
    register,
    run_on,
    state_differences,
    train,
)
from tests.test_nonfinite import poison, state_of
from util.checkpoint.files import NAME
from util.checkpoint.published import load, whole
from util.dist import launch

pytestmark = pytest.mark.usefixtures("tiny")

DROPOUT = {"attn_dropout": 0.3, "proj_dropout": 0.3}


def _work(rank: int, folder, ports: list[int]) -> None:
    """What each of the two ranks does; results that are not a run's own files go to `folder`."""
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())
    launch.time.sleep = lambda seconds: None  # ranks other than 0 wait before they report an error
    codes = {}
    alive = _watch_the_end()

    def call(name, argv):
        as_torchrun(rank, 2, ports.pop())
        codes[name] = main_jit.main(argv)

    half = {"batch_size": 8}
    call("plain", arguments(output_dir=folder / "plain", flip=True, **half))
    call("accumulated", arguments(output_dir=folder / "accumulated", flip=True, batch_size=4, global_batch=16))
    call("grey", arguments(output_dir=folder / "grey", flip=True, channels=1, **half))
    call("dropout", arguments(output_dir=folder / "dropout", **half, **DROPOUT))
    generator = torch.get_rng_state()  # where the masks came from
    call("dropout again", arguments(output_dir=folder / "again", **half, **DROPOUT))
    call("fsdp", arguments(output_dir=folder / "fsdp", parallel="fsdp", flip=True, save_every_steps=1, **half))
    call("sample", flags(resume=folder / "plain", sample=True, labels="0-6", num_per_class=1, device="cpu"))
    call("evaluate", flags(resume=folder / "plain", evaluate_gen=True, num_images=30, gen_bsz=7, device="cpu"))
    call("refused", arguments(output_dir=folder / "refused", batch_size=21))
    torch.distributed.destroy_process_group()  # it stays after an error, and this process goes on
    _poisoned(rank, folder, call)
    group = torch.distributed.is_initialized()
    torch.save({"codes": codes, "alive": alive, "generator": generator, "group": group}, folder / f"results-{rank}.pt")
    os._exit(0)  # as main_jit.py does after an error within the group: its destructors would wait


def _watch_the_end() -> list[bool]:
    """For each process group of a training run: whether DDP still existed when the group was destroyed.

    DDP's reducer then destroys the group's threads while it holds the interpreter's lock, which a thread that drops a
    gathered tensor waits for: the process hangs, now and then. What is still there is kept, so that this one does not.
    """
    found, wrapped, kept = [], [], []
    wrap, destroy = engine_jit.wrap_ddp, torch.distributed.destroy_process_group

    def remember(denoiser, ctx):
        module = wrap(denoiser, ctx)
        wrapped.append(weakref.ref(module))
        return module

    def watched():
        if wrapped:
            module = wrapped.pop()()
            found.append(module is not None)
            kept.append(module)
        destroy()

    engine_jit.wrap_ddp, torch.distributed.destroy_process_group = remember, watched
    watched.kept = kept
    return found


def _poisoned(rank: int, folder, call) -> None:
    """A run in which the second rank alone draws noise that is not finite, at step 2."""
    seen, train_step = {}, engine_jit.Trainer.train_step

    def watched(self, batches, step):
        if step == 2:
            seen.update(trainer=self, before=state_of(self))
        return train_step(self, batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit.Trainer, "train_step", watched)
        if rank == 1:
            poison(patch, 2, part=(0, 0, 0, 0))
        call("poisoned", arguments(output_dir=folder / "poisoned", batch_size=8, save_last_freq=1))
    torch.save({"before": seen["before"], "after": state_of(seen["trainer"])}, folder / f"poisoned-{rank}.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have worked, and their results."""
    folder = tmp_path_factory.mktemp("pair")
    run_on(2, _work, folder, calls=10)
    return folder, [torch.load(folder / f"results-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs by one process, of 3 channels and of 1."""
    folder = tmp_path_factory.mktemp("alone")
    return {channels: train(folder / f"run{channels}", flip=True, channels=channels) for channels in (3, 1)}


def test_exit_codes(pair):
    for results in pair[1]:
        codes = results["codes"]
        assert {name: code for name, code in codes.items() if code} == {"refused": 2, "poisoned": 2}
        assert len(codes) == 10
        assert results["group"]  # ending it would wait for ranks that do not fail
    assert not (pair[0] / "refused").exists()


def test_ddp_is_gone_before_its_process_group(pair):
    """But for the run that fails, whose exception holds on to it."""
    for results in pair[1]:
        assert results["alive"][:5] == [False] * 5


@pytest.mark.parametrize("name", ["plain", "accumulated", "grey"])
def test_two_processes_train_as_one(pair, alone, name):
    folder, alone = pair[0] / name, alone[1 if name == "grey" else 3]
    assert len(read_log(folder)) == 4
    for a, b in zip(read_log(folder), read_log(alone), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
    two, one = raw(folder), raw(alone)
    for key in STATE[:3]:
        for parameter, value in two[key].items():
            torch.testing.assert_close(value, one[key][parameter], rtol=0, atol=2e-5, msg=parameter)
    assert two["args"].global_batch == one["args"].global_batch == 16
    assert read_log(folder, "start")[0]["ranks"] == 2


def test_dropout_is_reproducible_and_differs_between_processes(pair):
    folder = pair[0]
    assert state_differences(folder / "dropout", folder / "again") == []
    assert read_log(folder / "dropout") != read_log(folder / "plain")
    first, second = (results["generator"] for results in pair[1])
    assert not torch.equal(first, second)


def test_one_log_and_one_set_of_files(pair):
    folder = pair[0] / "plain"
    names = sorted(p.name for p in folder.iterdir())
    assert names == [NAME, "config.json", "eval", "log.jsonl", "samples"]
    samples = sorted(p.name for p in (folder / "samples").glob("*seed0-*/*"))
    assert samples == [*(f"{i:06d}.png" for i in range(7)), "grid.png", "settings.json"]
    report = json.loads(next((folder / "eval").iterdir()).read_text())
    assert report["ranks"] == 2 and report["num_images"] == 30


def test_evaluation_by_two_and_by_one(pair, tmp_path):
    argv = flags(resume=pair[0] / "plain", evaluate_gen=True, num_images=30, output_dir=tmp_path, device="cpu")
    assert main_jit.main(argv) == 0
    one = json.loads(next((tmp_path / "eval").iterdir()).read_text())
    two = json.loads(next((pair[0] / "plain" / "eval").iterdir()).read_text())
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1 / 30 + 1e-9)  # one image may be on the edge
    assert one["ranks"] == 1


def test_step_that_is_not_finite_on_one_process_is_suppressed_on_all(pair):
    folder, states = pair[0], []
    for rank in (0, 1):
        state = torch.load(folder / f"poisoned-{rank}.pt")
        assert differences(state["after"], state["before"]) == []
        states.append(state["after"])
    assert differences(states[0], states[1]) == []  # and the processes agree
    assert raw(folder / "poisoned")["epoch"] == 0
    assert [line["step"] for line in read_log(folder / "poisoned")] == [0, 1]


def test_fsdp_trains_as_ddp(pair):
    for a, b in zip(read_log(pair[0] / "fsdp"), read_log(pair[0] / "plain"), strict=True):
        assert a["loss"] == b["loss"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    sharded, plain = load(pair[0] / "fsdp"), load(pair[0] / "plain")
    assert sharded.path.suffix == ".dcp" and sharded.epoch == plain.epoch == 1
    for name in plain.weights:
        stored = whole(sharded.weights[name])
        for key, value in plain.weights[name].items():
            torch.testing.assert_close(stored[key], value, rtol=0, atol=1e-7, msg=key)


def test_one_process_goes_on_where_two_stopped_with_shards_and_without(pair, tmp_path):
    settings = {"epochs": 3, "batch_size": 16, "flip": True}
    uninterrupted = read_log(train(tmp_path / "whole", **settings))[4:]
    logs = []
    for before, parallel in (("plain", "ddp"), ("plain", "fsdp"), ("fsdp", "ddp")):
        folder = tmp_path / f"{before} as {parallel}"
        logs.append(read_log(train(folder, resume=pair[0] / before, parallel=parallel, **settings)))
    for log, other, tolerance in ((logs[0], uninterrupted, 1e-5), (logs[1], logs[0], 1e-6), (logs[2], logs[0], 1e-6)):
        assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in other], rel=tolerance)
