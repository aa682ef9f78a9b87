"""A step whose loss or gradient is not finite changes nothing and is named; a few may be tolerated."""

import json
import shutil

import pytest
import torch

import engine_jit
from denoiser import LogitNormal, sample_step
from tests.conftest import FEW, differences, raw, read_log, state_differences, train
from util.checkpoint.files import NAME
from util.data.loader import GlobalBatchSampler
from util.dist import preemption
from util.rng import CounterRNG

pytestmark = pytest.mark.usefixtures("tiny")


def state_of(trainer):
    parameters = dict(trainer.denoiser.named_parameters())
    return {
        "weights": {name: p.detach().clone() for name, p in parameters.items()},
        "optimizer": {n: {k: v.clone() for k, v in trainer.optimizer.state[p].items()} for n, p in parameters.items()},
    }


def poison(patch, *steps, part=slice(None), value=float("nan")):
    """Put noise that is not finite into these steps."""
    real = engine_jit.sample_step

    def poisoned(rng, *args):
        s = real(rng, *args)
        if rng.step in steps:
            s.noise[part] = value
        return s

    patch.setattr(engine_jit, "sample_step", poisoned)


@pytest.mark.parametrize("kind", ["loss", "gradient", "infinite gradient"])
def test_non_finite_step_changes_nothing(tmp_path, trained, capsys, kind):
    """Step 5 of a resumed run: state in memory as before the step, checkpoint as it was, exit code 2."""
    folder = shutil.copytree(trained, tmp_path / "run")
    checkpoint = (folder / NAME).read_bytes()
    seen, train_step = {}, engine_jit.Trainer.train_step

    def watched(self, batches, step):
        if step == 5:
            seen.update(trainer=self, before=state_of(self))
            weight = self.denoiser.net.blocks[1].mlp.w12.weight
            if kind != "loss":
                weight.register_hook(lambda g: g * float("nan" if kind == "gradient" else "inf"))
        return train_step(self, batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit.Trainer, "train_step", watched)
        if kind == "loss":
            poison(patch, 5, part=(3, 0, 0, 0))
        train(folder, code=2, epochs=4)
    err = capsys.readouterr().err
    assert "is not finite at step 5 (epoch 2), learning rate 0.001" in err and "Traceback" not in err
    assert differences(state_of(seen["trainer"]), seen["before"]) == []
    assert (folder / NAME).read_bytes() == checkpoint
    assert [line["step"] for line in read_log(folder)] == [0, 1, 2, 3, 4]  # and all lines are JSON
    assert train(folder, epochs=4) and raw(folder)["epoch"] == 3  # the run resumes once the cause is gone


def test_learning_rate_that_is_too_high(tmp_path, capsys):
    train(tmp_path / "a", code=2, lr=1e30, warmup_epochs=0)
    err = capsys.readouterr().err
    assert "at step 1" in err and "1e+30" in err
    assert not (tmp_path / "a" / NAME).exists()


def test_between_log_lines_the_first_bad_step_is_named(tmp_path, capsys, monkeypatch):
    """On a GPU the host looks only when it logs: later steps change nothing and the first one is named."""
    stop, calls = engine_jit.Trainer._stop_if_non_finite, []

    def late(self):
        calls.append(1)
        if len(calls) >= 5:  # the last step of the epoch
            stop(self)

    poison(monkeypatch, 1, 2, 3, value=float("inf"))
    monkeypatch.setattr(engine_jit.Trainer, "_stop_if_non_finite", late)
    train(tmp_path / "a", code=2, batch_size=10, log_freq=100)
    assert "at step 1 (epoch 0)" in capsys.readouterr().err


@pytest.mark.parametrize("log_freq", [1, 100])
def test_tolerated_steps_are_skipped_and_counted(tmp_path, monkeypatch, capsys, log_freq):
    """Steps 2 and 3 of 10: the run ends as one whose optimizer did not see them."""
    settings = {"batch_size": 8, "epochs": 2, "log_freq": log_freq, "warmup_epochs": 0}
    with monkeypatch.context() as patch:
        poison(patch, 2, 3)
        skipped = train(tmp_path / "skipped", skip_nonfinite=2, **settings)
    assert "2 non-finite steps skipped" in capsys.readouterr().out if log_freq == 100 else True
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


def test_one_more_consecutive_step_than_tolerated_stops(tmp_path, monkeypatch, capsys):
    settings = {"batch_size": 8, "epochs": 2, "skip_nonfinite": 2}
    poison(monkeypatch, 1, 2, 4, 5, 6)
    train(tmp_path, code=2, **settings)
    error = capsys.readouterr().err
    assert "at step 4 (epoch 0)" in error and "3 consecutive steps" in error
    written = json.loads((tmp_path / "nonfinite-step000000004.json").read_text())
    assert [step["step"] for step in written["steps"]] == [4, 5, 6]


def test_consecutive_steps_are_counted_across_a_restart(tmp_path, monkeypatch, capsys):
    """Two steps in a row, with the end of the process between them."""
    settings = {"batch_size": 8, "epochs": 2, "skip_nonfinite": 1, "save_every_steps": 1}
    with monkeypatch.context() as patch:
        poison(patch, 3, 4)
        patch.setattr(preemption, "requested", lambda: "SIGTERM")
        for _ in range(4):
            train(tmp_path, code=75, **settings)
        assert raw(tmp_path)["run"]["step"] == 4 and raw(tmp_path)["run"]["metrics"]["consecutive"] == 1
        train(tmp_path, code=2, **settings)
    assert "at step 3" in capsys.readouterr().err
    assert raw(tmp_path)["run"]["step"] == 4
    train(tmp_path, **settings)


def test_images_and_times_of_the_step_are_written(tmp_path, monkeypatch, capsys):
    """Which images, at which t, computed from the seed again, are those that the step saw."""
    seen = {}
    real = engine_jit.sample_step

    def remember(rng, y, *args):
        s = real(rng, y, *args)
        if rng.step == 6 and not seen:
            seen.update(t=s.t.tolist(), y=y.tolist(), dropped=s.y.tolist())
            s.noise[0] = float("inf")
        return s

    monkeypatch.setattr(engine_jit, "sample_step", remember)
    train(tmp_path, code=2, batch_size=8, epochs=2, seed=3)
    path = tmp_path / "nonfinite-step000000006.json"
    assert str(path) in capsys.readouterr().err
    (step,) = json.loads(path.read_text())["steps"]
    assert (step["step"], step["epoch"], step["lr"]) == (6, 1, 1e-3)
    assert step["t"] == seen["t"] and step["label"] == seen["y"] and step["label_after_drop"] == seen["dropped"]
    sampler = GlobalBatchSampler(FEW, 8, 0, 1, 1, seed=3)
    sampler.set_epoch(1, 1)
    assert step["index"] == next(iter(sampler))
    rng = CounterRNG(3, 6, torch.arange(8))
    s = sample_step(rng, torch.tensor(step["label"]), (3, 16, 16), LogitNormal(), 0.1, 10)
    assert s.t.tolist() == step["t"] and s.y.tolist() == step["label_after_drop"]
