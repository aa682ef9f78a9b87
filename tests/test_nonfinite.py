"""Steps whose loss or gradient is not finite: they touch nothing, they are named, and a few may be tolerated."""

import json
import shutil

import pytest
import torch

import engine_jit
from denoiser import LogitNormal, draw
from tests.conftest import FEW, differences, raw, read_log, state_differences, train
from util import training_loop
from util.checkpoint import NAME
from util.loader import GlobalBatchSampler

pytestmark = pytest.mark.usefixtures("tiny")


def state_of(training):
    return {
        "weights": {n: p.detach().clone() for n, p in training.denoiser.named_parameters()},
        "averages": [{n: a.clone() for n, a in ema.averages.items()} for ema in training.emas],
        "optimizer": [
            {k: v.clone() for k, v in training.optimizer.state[p].items()} for p in training.denoiser.parameters()
        ],
    }


@pytest.mark.parametrize("kind", ["loss", "gradient", "infinite gradient"])
def test_step_that_is_not_finite_touches_nothing(tmp_path, trained, capsys, kind):
    """Step 5 of a resumed run: state in memory as before the step, checkpoint as it was, exit code 2."""
    folder = shutil.copytree(trained, tmp_path / "run")
    checkpoint = (folder / NAME).read_bytes()
    seen = {}
    draw, epoch = engine_jit.draw, engine_jit.train_one_epoch

    def watched(training, *args):
        seen["training"] = training
        weight = training.denoiser.net.blocks[1].mlp.w12.weight
        factor = float("inf") if kind == "infinite gradient" else float("nan")
        weight.register_hook(lambda g: g * factor if "before" in seen and kind != "loss" else g)
        epoch(training, *args)

    def poisoned(seed, step, *args):
        d = draw(seed, step, *args)
        if step == 5:
            seen["before"] = state_of(seen["training"])
            if kind == "loss":
                d.noise[3, 0, 0, 0] = float("nan")
        return d

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit, "draw", poisoned)
        patch.setattr(training_loop, "train_one_epoch", watched)
        train(folder, code=2, epochs=4)
    err = capsys.readouterr().err
    assert "stopped being finite at step 5 (epoch 2), learning rate 0.001" in err and "Traceback" not in err
    assert differences(state_of(seen["training"]), seen["before"]) == []
    assert (folder / NAME).read_bytes() == checkpoint
    assert [line["step"] for line in read_log(folder)] == [0, 1, 2, 3, 4]  # and all lines are JSON
    assert train(folder, epochs=4) and raw(folder)["epoch"] == 3  # the run goes on where the cause is gone


def test_learning_rate_that_is_too_high(tmp_path, capsys):
    train(tmp_path / "a", code=2, lr=1e30, warmup_epochs=0)
    err = capsys.readouterr().err
    assert "at step 1" in err and "1e+30" in err
    assert not (tmp_path / "a" / NAME).exists()


def test_between_log_lines_the_first_bad_step_is_named(tmp_path, capsys):
    """As on a GPU, where the host looks only when it logs: later steps change nothing and the first one is named."""
    draw, stop = engine_jit.draw, engine_jit.stop_if_non_finite
    calls = []

    def poisoned(seed, step, *args):
        d = draw(seed, step, *args)
        if step >= 1:
            d.noise[:] = float("inf")
        return d

    def late(window, recipe):
        calls.append(1)
        if len(calls) == 4:  # the last step of the epoch
            stop(window, recipe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit, "draw", poisoned)
        patch.setattr(engine_jit, "stop_if_non_finite", late)
        train(tmp_path / "a", code=2, batch_size=10, log_freq=100)
    assert "at step 1 (epoch 0)" in capsys.readouterr().err


def poison(patch, *steps, part=slice(None)):
    """Noise that is not finite at these steps."""
    real = engine_jit.draw

    def poisoned(seed, step, *args):
        d = real(seed, step, *args)
        if step in steps:
            d.noise[part] = float("nan")
        return d

    patch.setattr(engine_jit, "draw", poisoned)


@pytest.mark.parametrize("log_freq", [1, 100])
def test_tolerated_steps_are_skipped_counted_and_touch_nothing(tmp_path, monkeypatch, capsys, log_freq):
    """Steps 2 and 3 of 10: the run ends as one whose optimizer did not see them."""
    settings = {"batch_size": 8, "epochs": 2, "log_freq": log_freq, "warmup_epochs": 0}
    with monkeypatch.context() as patch:
        poison(patch, 2, 3)
        skipped = train(tmp_path / "skipped", skip_nonfinite=2, **settings)
    assert "2 steps not finite, skipped" in capsys.readouterr().out if log_freq == 100 else True
    lines = read_log(skipped)
    if log_freq == 1:
        assert [line.get("skipped") for line in lines] == [None, None, 1, 1, *[None] * 6]
        assert [line["loss"] is None for line in lines] == [False, False, True, True, *[False] * 6]
        assert lines[2]["grad_norm"] is None
    else:
        assert [line.get("skipped") for line in lines] == [2, None]

    number = iter(range(100))
    step, update = torch.optim.AdamW.step, engine_jit.EMA.update
    with monkeypatch.context() as patch:
        now = {}

        def some(self, *args):
            now["step"] = next(number)
            if now["step"] not in (2, 3):
                step(self, *args)

        patch.setattr(torch.optim.AdamW, "step", some)
        patch.setattr(engine_jit.EMA, "update", lambda *a: None if now["step"] in (2, 3) else update(*a))
        expected = train(tmp_path / "expected", **settings)
    assert state_differences(expected, skipped) == []


def test_one_more_in_a_row_than_tolerated_stops(tmp_path, monkeypatch, capsys):
    settings = {"batch_size": 8, "epochs": 2, "skip_nonfinite": 2}
    poison(monkeypatch, 1, 2, 4, 5, 6)
    train(tmp_path, code=2, **settings)
    error = capsys.readouterr().err
    assert "at step 4 (epoch 0)" in error and "3 steps in a row" in error
    written = json.loads((tmp_path / "nonfinite-step000000004.json").read_text())
    assert [step["step"] for step in written["steps"]] == [4, 5, 6]


def test_a_row_is_counted_over_a_restart(tmp_path, monkeypatch, capsys):
    """Two steps in a row, with the end of the process between them."""
    settings = {"batch_size": 8, "epochs": 2, "skip_nonfinite": 1, "save_every_steps": 1}
    with monkeypatch.context() as patch:
        poison(patch, 3, 4)
        patch.setattr(training_loop.preemption, "requested", lambda: "SIGTERM")
        for _ in range(4):
            train(tmp_path, code=75, **settings)
        assert raw(tmp_path)["run"]["step"] == 4 and raw(tmp_path)["run"]["window"]["in_a_row"] == 1
        train(tmp_path, code=2, **settings)
    assert "at step 3" in capsys.readouterr().err
    assert raw(tmp_path)["run"]["step"] == 4
    train(tmp_path, **settings)


def test_the_batch_is_written_for_study(tmp_path, monkeypatch, capsys):
    """Which images, at which t, computed from the seed again, are those that the step saw."""
    seen = {}
    real = engine_jit.draw

    def remember(seed, step, position, y, *args):
        d = real(seed, step, position, y, *args)
        if step == 6:
            seen.update(t=d.t.tolist(), y=y.tolist(), dropped=d.y.tolist())
            d.noise[0] = float("inf")
        return d

    monkeypatch.setattr(engine_jit, "draw", remember)
    train(tmp_path, code=2, batch_size=8, epochs=2, seed=3)
    path = tmp_path / "nonfinite-step000000006.json"
    assert str(path) in capsys.readouterr().err
    (step,) = json.loads(path.read_text())["steps"]
    assert (step["step"], step["epoch"], step["lr"]) == (6, 1, 1e-3)
    assert step["t"] == seen["t"] and step["label"] == seen["y"] and step["label_after_drop"] == seen["dropped"]
    sampler = GlobalBatchSampler(FEW, 8, 0, 1, 1, seed=3)
    sampler.set_epoch(1, 1)
    assert step["index"] == next(iter(sampler))
    d = draw(3, 6, torch.arange(8), torch.tensor(step["label"]), (3, 16, 16), LogitNormal(), 0.1, 10)
    assert d.t.tolist() == step["t"] and d.y.tolist() == step["label_after_drop"]
