"""Two processes on CPUs (gloo) against one: the same run, the same images, the same refusals.

One pair of processes does all the work (`pair`); the tests look at what it has left. Between one process and two the
sums of a gradient are rounded differently, and nothing else may differ.
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
from tests.test_engine import Labelled, Recording, network, settings
from tests.test_nonfinite import state_of
from util import training_loop, training_state
from util.checkpoint import NAME
from util.distributed import (
    World,
    agree,
    all_reduce_mean,
    everywhere_or_nowhere,
    find_world,
    gather_by_index,
    gloo_group,
    in_group,
    launched_by_torchrun,
    process_group,
)
from util.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")

DROPOUT = {"attn_dropout": 0.3, "proj_dropout": 0.3}
LABELS = [i // 3 for i in range(30)]
ROWS = (0, 1, 2, 7, 8)


def _work(rank: int, folder, ports: list[int]) -> None:
    """What each of the two processes does; results that are not a run's own files go to `folder`."""
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())
    main_jit.time.sleep = lambda seconds: None  # ranks other than 0 wait before they report an error
    codes = {}
    alive = _watch_the_end()

    def call(name, argv):
        as_torchrun(rank, 2, ports.pop())
        codes[name] = main_jit.main(argv)

    half = {"batch_size": 8}
    call("plain", arguments(output_dir=folder / "plain", flip=True, **half))
    call("accumulated", arguments(output_dir=folder / "accumulated", flip=True, batch_size=4, global_batch=16))
    call("dropout", arguments(output_dir=folder / "dropout", **half, **DROPOUT))
    generator = torch.get_rng_state()  # where the masks came from
    call("dropout again", arguments(output_dir=folder / "again", **half, **DROPOUT))
    call("sample", flags(resume=folder / "plain", sample=True, labels="0-6", num_per_class=1, device="cpu"))
    call("evaluate", flags(resume=folder / "plain", evaluate_gen=True, num_images=30, gen_bsz=7, device="cpu"))
    call("refused", arguments(output_dir=folder / "refused", batch_size=21))

    as_torchrun(rank, 2, ports.pop())
    world = find_world("cpu")
    results = {"world": (world.rank, world.size, world.main, launched_by_torchrun())}
    with process_group(world):
        agree("number", 7, world)
        with pytest.raises(UserError, match="same number: process 0: 0; process 1: 1"):
            agree("number", rank, world)
        assert everywhere_or_nowhere(world, lambda: rank) == rank
        with pytest.raises(UserError, match="only on process 1") as error:
            everywhere_or_nowhere(world, lambda: _fails(rank))
        assert error.value.everywhere
        results["mean"] = all_reduce_mean(torch.tensor([1.0, 5.0]) * (rank + 1), world)
        for n in ROWS:
            whole = torch.arange(n * 3).view(n, 3).float()
            mine = whole[n * rank // 2 : n * (rank + 1) // 2]
            results[f"rows {n}"] = gather_by_index(mine, n, world)
        for batch_size in (7, 64):
            sampling = settings(batch_size, 4, cfg=2.0)
            results[f"images {batch_size}"] = engine_jit.generate_all(
                network(), sampling, LABELS, (3, 16, 16), 10, world
            )
        for n in (150, 1):
            suite = Recording(3, 4, 4)
            report = engine_jit.evaluate(Labelled(), settings(4), n, (3, 4, 4), 10 if n > 1 else 1, suite, world)
            results[f"evaluation {n}"] = (report is not None, suite.batches, getattr(suite, "features", None))

    _poisoned(rank, folder, call)
    results |= {"codes": codes, "alive": alive, "generator": generator, "group left": in_group()}
    torch.save(results, folder / f"results-{rank}.pt")
    os._exit(0)  # as main_jit.py does after an error within the group: its destructors would wait


def _watch_the_end() -> list[bool]:
    """For each process group of a training run: whether DDP around the network was still there when it was destroyed.

    DDP's reducer then destroys the group's threads while it holds the interpreter's lock, which a thread that drops a
    gathered tensor waits for: the process hangs, now and then. What is still there is kept, so that this one does not.
    """
    found, wrapped, kept = [], [], []
    wrap, destroy = training_state.wrap, torch.distributed.destroy_process_group

    def remember(denoiser, world):
        module = wrap(denoiser, world)
        wrapped.append(weakref.ref(module))
        return module

    def watched():
        if wrapped:
            module = wrapped.pop()()
            found.append(module is not None)
            kept.append(module)
        destroy()

    training_state.wrap, torch.distributed.destroy_process_group = remember, watched
    watched.kept = kept
    return found


def _fails(rank: int) -> None:
    if rank == 1:
        raise UserError("only on process 1")


def _poisoned(rank: int, folder, call) -> None:
    """A run in which the second process alone draws noise that is not finite, at step 2."""
    seen, draw, epoch = {}, engine_jit.draw, training_loop.train_one_epoch

    def watched(training, *args):
        seen["training"] = training
        epoch(training, *args)

    def poisoned(seed, step, *args):
        d = draw(seed, step, *args)
        if step == 2:
            seen["before"] = state_of(seen["training"])
            if rank == 1:
                d.noise[0, 0, 0, 0] = float("nan")
        return d

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit, "draw", poisoned)
        patch.setattr(training_loop, "train_one_epoch", watched)
        call("poisoned", arguments(output_dir=folder / "poisoned", batch_size=8, save_last_freq=1))
    torch.save({"before": seen["before"], "after": state_of(seen["training"])}, folder / f"poisoned-{rank}.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have worked, and their results."""
    folder = tmp_path_factory.mktemp("pair")
    run_on(2, _work, folder, calls=9)
    return folder, [torch.load(folder / f"results-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run by one process."""
    return train(tmp_path_factory.mktemp("alone") / "run", flip=True)


def test_exit_codes(pair):
    for results in pair[1]:
        codes = results["codes"]
        assert {name: code for name, code in codes.items() if code} == {"refused": 2, "poisoned": 2}
        assert len(codes) == 8
        assert results["group left"]  # ending it would wait for processes that do not fail


def test_ddp_is_gone_before_its_process_group(pair):
    """But for the run that fails, whose exception holds on to it."""
    for results in pair[1]:
        assert results["alive"][:4] == [False] * 4


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_two_processes_train_as_one(pair, alone, name):
    folder = pair[0] / name
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
    assert read_log(folder, "start")[0]["processes"] == 2


def test_one_process_goes_on_where_two_stopped(pair, tmp_path):
    three = train(tmp_path / "one", resume=pair[0] / "plain", epochs=3, batch_size=16, flip=True)
    whole = train(tmp_path / "whole", epochs=3, flip=True)
    for a, b in zip(read_log(three), read_log(whole)[4:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


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
    assert report["processes"] == 2 and report["num_images"] == 30


def test_evaluation_by_two_and_by_one(pair, tmp_path):
    argv = flags(resume=pair[0] / "plain", evaluate_gen=True, num_images=30, output_dir=tmp_path, device="cpu")
    assert main_jit.main(argv) == 0
    one = json.loads(next((tmp_path / "eval").iterdir()).read_text())
    two = json.loads(next((pair[0] / "plain" / "eval").iterdir()).read_text())
    assert one["metrics"] == pytest.approx(two["metrics"], abs=1 / 30 + 1e-9)  # one image may be on the edge
    assert one["processes"] == 1


def test_refusal_writes_nothing(pair):
    assert not (pair[0] / "refused").exists()


def test_step_that_is_not_finite_on_one_process_is_suppressed_on_all(pair):
    folder, states = pair[0], []
    for rank in (0, 1):
        state = torch.load(folder / f"poisoned-{rank}.pt")
        assert differences(state["after"], state["before"]) == []
        states.append(state["after"])
    assert differences(states[0], states[1]) == []  # and the processes agree
    assert raw(folder / "poisoned")["epoch"] == 0
    assert [line["step"] for line in read_log(folder / "poisoned")] == [0, 1]


def test_world_and_means(pair):
    for rank, results in enumerate(pair[1]):
        assert results["world"] == (rank, 2, rank == 0, True)
        assert results["mean"].tolist() == [1.5, 7.5]


@pytest.mark.parametrize("n", ROWS)
def test_rows_are_gathered_in_index_order(pair, n):
    """Also where there are fewer rows than processes, or the processes have different numbers of them."""
    first, second = (results[f"rows {n}"] for results in pair[1])
    assert torch.equal(first, torch.arange(n * 3).view(n, 3).float()) and second is None
    rows = torch.rand(n, 3)
    assert torch.equal(gather_by_index(rows, n, World()), rows)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_images_of_two_processes_are_those_of_one(pair, batch_size):
    """A matrix product may round differently for another batch: at most one level, in less than 1 of 1000 values."""
    one = engine_jit.generate_all(network(), settings(64, 4, cfg=2.0), LABELS, (3, 16, 16), 10, World()).int()
    two, nothing = (results[f"images {batch_size}"] for results in pair[1])
    assert nothing is None and two.shape == one.shape
    assert (two.int() - one).abs().max() <= 1 and ((two.int() - one) != 0).float().mean() < 1e-3


def test_evaluation_is_shared_without_surplus(pair):
    """Blocks of 64, 64 and 22 images, in turn; every process knows the result, and one has all the features."""
    level = (torch.arange(10).repeat_interleave(15) / 10 + 1) / 2 * 255
    reported, batches, features = zip(*(results["evaluation 150"] for results in pair[1]), strict=True)
    assert reported == (True, True) and batches == ([4] * 21 + [2], [4] * 16)
    torch.testing.assert_close(features[0], level[:, None].expand(-1, 48), rtol=0, atol=0.501)
    assert features[1] is None
    assert [len(results["evaluation 1"][1]) for results in pair[1]] in ([1, 0], [0, 1])  # more processes than images


def test_world_size_alone_is_not_torchrun(monkeypatch):
    """The launcher's users set WORLD_SIZE to the number of nodes."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not launched_by_torchrun() and find_world("cpu") == World()


@pytest.mark.parametrize(("said", "error"), [("Gloo connectFullMesh failed with [", UserError), ("else", RuntimeError)])
def test_nodes_that_do_not_reach_each_other(monkeypatch, said, error):
    """Also in a run on GPUs, whose default group does not use gloo."""

    def fail(**_):
        raise RuntimeError(said)

    monkeypatch.setattr(torch.distributed, "new_group", fail)
    with pytest.raises(error) as raised:
        gloo_group()
    assert ("GLOO_SOCKET_IFNAME" in str(raised.value)) == (error is UserError)
