"""Training on one process: a run is a function of its settings, whatever interrupts it.

Two steps per epoch, a global batch of 16. "Bit-identical" compares weights, both EMAs and the optimizer's state.
"""

import json
import shutil
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch

import engine_jit
import main_jit
import util.log
from tests.conftest import (
    STATE,
    arguments,
    config_of,
    differences,
    flags,
    listing,
    raw,
    read_log,
    state_differences,
    train,
)
from util.build import build_denoiser
from util.checkpoint.files import NAME
from util.evaluation import generate
from util.evaluation.evaluate import weights_hash

pytestmark = pytest.mark.usefixtures("tiny")

DROPOUT = {"attn_dropout": 0.3, "proj_dropout": 0.3}


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, DROPOUT], ids=["plain", "dropout"])
def test_same_settings_twice_and_another_seed(tmp_path, extra):
    torch.manual_seed(5)  # what went before must not matter
    a = train(tmp_path / "a", **extra)
    torch.manual_seed(6)
    torch.randn(7)
    b = train(tmp_path / "b", **extra)
    assert state_differences(a, b) == [] and read_log(a) == read_log(b)
    c = train(tmp_path / "c", seed=1, **extra)
    assert state_differences(a, c) and read_log(a) != read_log(c)
    grid = "samples/epoch0002-ema1-heun2-cfg2.9.png"
    assert (a / grid).read_bytes() == (b / grid).read_bytes() != (c / grid).read_bytes()


def test_dropout_changes_what_is_learned(tmp_path, trained):
    assert read_log(train(tmp_path / "a", **DROPOUT)) != read_log(trained)


def test_the_run_is_what_was_asked_for(trained):
    """Losses, rates and steps as the log has them; the averages as their definition gives them."""
    lines = read_log(trained)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [line["lr"] for line in lines] == [0.0, 1e-3, 1e-3, 1e-3]  # the warm-up takes half an epoch, one step
    content = raw(trained)
    assert content["epoch"] == 1 and content["args"].global_batch == 16
    assert {float(slot["step"]) for slot in content["optimizer"]["state"].values()} == {4.0}
    assert not torch.equal(content["model_ema1"]["net.in_context_posemb"], content["model"]["net.in_context_posemb"])
    names = {path.name for path in trained.rglob("*")}
    assert names == {NAME, "config.json", "log.jsonl", "samples", "epoch0002-ema1-heun2-cfg2.9.png"}


def test_ema_follows_its_definition(tmp_path):
    """ema <- decay ema + (1 - decay) p after each step, from a copy of the first weights, computed here anew."""
    weights = []
    update = engine_jit.EMA.update

    def record(self, skip=None):
        weights.append({name: p.detach().double().clone() for name, p in self.module.named_parameters()})
        update(self, skip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit.EMA, "update", record)
        folder = train(tmp_path / "a", save_last_freq=1)
    content = raw(folder)
    torch.manual_seed(0)
    first = build_denoiser(config_of(folder))
    for key, decay in (("model_ema1", 0.9), ("model_ema2", 0.5)):
        average = {name: p.detach().double() for name, p in first.named_parameters()}
        for step in weights[::2]:
            average = {name: decay * average[name] + (1 - decay) * p for name, p in step.items()}
        for name, expected in average.items():
            torch.testing.assert_close(content[key][name].double(), expected, rtol=0, atol=1e-6, msg=name)


def test_accumulation_does_not_change_the_run(tmp_path, trained):
    """Two passes of 8 and one of 16: the same gradients but for the order of sums."""
    folder = train(tmp_path / "a", batch_size=8, global_batch=16)
    for a, b in zip(read_log(folder), read_log(trained), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    two, one = raw(folder), raw(trained)
    for name in STATE[:3]:
        for key, value in two[name].items():
            torch.testing.assert_close(value, one[name][key], rtol=0, atol=2e-5, msg=key)
    assert read_log(folder, "start")[0]["peak_lr"] == 1e-3


def test_learning_rate_scales_with_the_global_batch(tmp_path):
    for i, extra in enumerate(({"batch_size": 16}, {"batch_size": 8, "accum_iter": 2}, {"batch_size": 8})):
        folder = train(tmp_path / str(i), lr=None, blr=0.016, epochs=1, **extra)
        assert read_log(folder, "start")[0]["peak_lr"] == pytest.approx(0.016 * (8 if i == 2 else 16) / 256)


@pytest.mark.parametrize("extra", [{}, {**DROPOUT, "lr_schedule": "cosine"}], ids=["plain", "dropout"])
def test_resumed_run_is_the_uninterrupted_run(tmp_path, extra):
    """Three epochs at once, and the same command ended in its third epoch and started again: bit-identical."""
    whole = train(tmp_path / "whole", epochs=3, **extra)
    sample_step = engine_jit.sample_step

    def interrupt(rng, *args):
        if rng.step == 5:
            raise KeyboardInterrupt
        return sample_step(rng, *args)

    parts = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_jit, "sample_step", interrupt)
        train(parts, code=130, epochs=3, save_last_freq=1, **extra)
    assert raw(parts)["epoch"] == 1
    train(parts, epochs=3, save_last_freq=1, **extra)
    assert state_differences(whole, parts) == []
    assert read_log(whole) == read_log(parts)
    assert (parts / "config-from-step000000004.json").exists()
    grid = "samples/epoch0003-ema1-heun2-cfg2.9.png"
    assert (whole / grid).read_bytes() == (parts / grid).read_bytes()


def test_more_epochs_and_resume_into_another_folder(tmp_path, trained):
    before = listing(trained)
    whole = train(tmp_path / "whole", epochs=3)
    branch = train(tmp_path / "branch", epochs=3, resume=trained)
    assert listing(trained) == before
    assert state_differences(whole, branch) == []
    assert read_log(whole)[4:] == read_log(branch)
    # A checkpoint in the output folder wins over --resume: nothing is left to do.
    after = raw(branch)
    train(branch, epochs=3, resume=trained)
    assert read_log(branch) == read_log(whole)[4:]
    assert not differences({k: after[k] for k in STATE}, {k: raw(branch)[k] for k in STATE})


def test_finished_run_is_left_alone(tmp_path, trained, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = (folder / NAME).read_bytes()
    train(folder)
    assert "has finished 2 of 2 epochs" in capsys.readouterr().out
    assert (folder / NAME).read_bytes() == before


def test_ema_longer_than_the_run_is_warned_about(tmp_path, capsys):
    train(tmp_path / "a", epochs=1, ema_decay1=0.9999, ema_decay2=0.5)
    err = capsys.readouterr().err
    assert err.count("warning:") == 1
    for part in ("--ema_decay1 0.9999", "10000 steps", "the run has 2"):
        assert part in err
    train(tmp_path / "b", epochs=1, ema_decay1=1.0, ema_decay2=0.4)
    assert "infinitely many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("epochs", "given", "kept"),
    [(199, None, []), (200, None, [100, 200]), (600, 0, []), (250, None, [100, 200]), (30, 10, [10, 20, 30])],
)
def test_checkpoints_that_stay(epochs, given, kept):
    """Of long runs those of every 100th epoch, as in the published release."""
    trainer = SimpleNamespace(config=SimpleNamespace(epochs=epochs, keep_every_epochs=given))
    assert [done for done in range(1, epochs + 1) if engine_jit.Trainer._keeps(trainer, done)] == kept


# --- samples and evaluations ----------------------------------------------------------------------------------------


def test_sampling_that_is_not_finite_is_refused(tmp_path, trained, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    content = raw(folder)
    content["model_ema1"]["net.final_layer.linear.bias"][0] = 3e38  # finite, and divided by 1 - t no longer
    torch.save(content, folder / NAME)
    before = listing(folder)
    argv = flags(resume=folder, sample=True, labels="4,5", num_per_class=1, device="cpu")
    assert main_jit.main([*argv, "--seed", "8"]) == 2
    err = capsys.readouterr().err
    assert "seed 8" in err and "image 0 (label 4)" in err and listing(folder) == before
    assert main_jit.main([*argv, "--ema", "ema2"]) == 0


def test_online_evaluation_and_evaluation_agree(tmp_path):
    """The same weights, noise and labels: the report of the training run and the one made from its checkpoint."""
    folder = train(tmp_path / "a", epochs=1, online_eval=True, num_images=20)
    online = next((folder / "eval").iterdir())
    reports = [json.loads(online.read_text())]
    assert read_log(folder, "eval")[0]["class_agreement"] == reports[0]["metrics"]["class_agreement"]
    again = tmp_path / "again"
    argv = flags(resume=folder, evaluate_gen=True, output_dir=again, gen_bsz=7, device="cpu")
    assert main_jit.main(argv) == 0
    reports.append(json.loads((again / "eval" / online.name).read_text()))
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["num_images"] == reports[1]["num_images"] == 20
    assert all(report["ema"] == "ema1" and report["epoch"] == 0 for report in reports)


def test_evaluation_uses_the_weights_that_ema_names(tmp_path, trained, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    used = []

    def record(denoiser, config, labels, *args, **kwargs):
        used.append({name: p.detach().clone() for name, p in denoiser.named_parameters()})
        return torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(generate, "generate_all", record)
    for choice, key in (("ema1", "model_ema1"), ("ema2", "model_ema2"), ("model", "model")):
        argv = flags(resume=folder, sample=True, labels="4", num_per_class=1, ema=choice, device="cpu")
        assert main_jit.main(argv) == 0
        assert not differences(used.pop(), {k: v for k, v in raw(folder)[key].items() if k[4:] != "pos_embed"})
        # In training too, and afterwards training goes on with the weights themselves.
        train(tmp_path / choice, ema=choice, epochs=2, eval_freq=1)
        first, last = used
        saved = {k: v for k, v in raw(tmp_path / choice)[key].items() if k[4:] != "pos_embed"}
        assert not differences(last, saved) and differences(first, last)
        assert state_differences(tmp_path / choice, trained) == []
        used.clear()


# --- files of samples and reports -----------------------------------------------------------------------------------


def sampled(folder, **settings):
    assert main_jit.main(flags(resume=folder, sample=True, num_sampling_steps=1, device="cpu", **settings)) == 0
    return sorted(path.name for path in (folder / "samples").glob("*seed*/*"))


def test_samples_are_written_with_their_settings(tmp_path, trained):
    folder = shutil.copytree(trained, tmp_path / "run")
    names = sampled(folder, labels="0,4-5", num_per_class=2)
    assert names == [*(f"{i:06d}.png" for i in range(6)), "grid.png", "settings.json"]
    content = json.loads(next((folder / "samples").glob("*seed0-*/settings.json")).read_text())
    assert content["labels"] == [0, 0, 4, 4, 5, 5] and content["ema"] == "ema1" and content["seed"] == 0


def test_samples_of_other_labels_have_a_folder_of_their_own(tmp_path, trained):
    folder = shutil.copytree(trained, tmp_path / "run")
    sampled(folder, labels="0-2", num_per_class=2)
    sampled(folder, labels="7", num_per_class=1)
    sampled(folder, labels="7", num_per_class=2)
    sampled(folder, labels=",".join("12" * 65), num_per_class=1)  # a name of a file has 255 letters at most
    assert sorted(len(list(f.iterdir())) for f in (folder / "samples").glob("*-labels*")) == [3, 4, 8, 132]


def test_a_checkpoint_is_verified_once_per_start(tmp_path, trained, monkeypatch):
    folder, read = shutil.copytree(trained, tmp_path / "run"), []
    real = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: read.append(self.filename) or real(self))
    assert main_jit.main(arguments(output_dir=folder, dry_run=True, epochs=3)) == 0
    assert len(read) == 1


def test_the_speed_is_that_of_training_alone(tmp_path, monkeypatch):
    """What lies between two epochs does not count: by this clock a thousand seconds."""
    late, real = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + late[0])
    monkeypatch.setattr(engine_jit.Trainer, "_end_epoch", lambda self, epoch: late.append(late.pop() + 1000))
    train(tmp_path)
    rates = [line["images_per_s"] for line in util.log.read_log(tmp_path) if line["event"] == "train"]
    assert len(rates) == 4 and min(rates) > 16 / 500


def test_a_report_has_the_hash_of_the_weights_that_were_read(tmp_path, trained, monkeypatch):
    """Training may replace the file while they are evaluated."""
    folder = shutil.copytree(trained, tmp_path / "run")
    read, real = weights_hash(folder / NAME), main_jit.evaluate_and_write

    def replaced(*args, **kwargs):
        torch.save({**raw(folder), "epoch": 7}, folder / "new")
        (folder / "new").replace(folder / NAME)
        return real(*args, **kwargs)

    monkeypatch.setattr(main_jit, "evaluate_and_write", replaced)
    argv = flags(resume=folder, evaluate_gen=True, num_images=10, num_sampling_steps=1, device="cpu")
    assert main_jit.main(argv) == 0
    (report,) = (folder / "eval").glob("*.json")
    assert json.loads(report.read_text())["weights"] == read != weights_hash(folder / NAME)


def test_reports_of_different_intervals_are_kept(tmp_path, trained):
    folder = shutil.copytree(trained, tmp_path / "run")
    for extra in ({}, {"interval_min": 0.5}):
        argv = flags(resume=folder, evaluate_gen=True, num_images=10, num_sampling_steps=1, device="cpu", **extra)
        assert main_jit.main(argv) == 0
    assert len(list((folder / "eval").iterdir())) == 2
