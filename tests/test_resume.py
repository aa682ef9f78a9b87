"""A run that is interrupted anywhere and resumed equals, to the bit, one that was never interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import engine_jit
import main_jit
from tests.conftest import FEW, arguments, flags, raw, read_log, register, state_differences, train
from util.checkpoint import files
from util.checkpoint.files import NAME
from util.dist import preemption
from util.evaluation import generate
from util.evaluation.images import save_png
from util.log import LOG_NAME, _truncate
from util.train_metrics import TrainMetrics

pytestmark = pytest.mark.usefixtures("tiny")

STEPS = FEW // 8  # an epoch of 5 steps
RUN = {"epochs": 3, "batch_size": 8, "log_freq": 3, "val_split": "0.2", "val_images": 8, "eval_freq": 2}
EPOCH = 4  # steps of an epoch of RUN, which holds out a fifth


class Killed(BaseException):
    """Nobody handles it: it stands for the end of the process."""


def kill_at(monkeypatch, step):
    real = engine_jit.sample_step

    def sample_step(rng, *args):
        if rng.step == step:
            raise Killed
        return real(rng, *args)

    monkeypatch.setattr(engine_jit, "sample_step", sample_step)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), **RUN)


def checkpoints(folder):
    """All of them, and what is left of unfinished ones: name -> step."""
    return {path.name: torch.load(path, weights_only=False)["run"]["step"] for path in folder.glob("*checkpoint-*")}


def numbers(folder):
    """The log, without clocks."""
    return [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder, event)]
        for event in ("train", "val")
    ]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_in_the_middle_of_epochs_again_and_again(whole, tmp_path, every, workers):
    settings = {**RUN, "save_every_steps": every, "num_workers": workers}
    for step in (2, 5, 6, 10):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, step)
            train(tmp_path, **settings)
        assert raw(tmp_path)["run"]["step"] == step - step % every if step >= every else not (tmp_path / NAME).exists()
    train(tmp_path, **settings)
    assert state_differences(whole, tmp_path) == []
    assert numbers(whole) == numbers(tmp_path)
    for grid in (whole / "samples").iterdir():
        assert grid.read_bytes() == (tmp_path / "samples" / grid.name).read_bytes()


def test_a_requested_stop_saves_and_says_where(whole, tmp_path, capsys, monkeypatch):
    """At each step once: in the middle of an epoch, at its end, before and after looks."""
    starts = 0
    while not (tmp_path / NAME).exists() or raw(tmp_path)["run"]["step"] < RUN["epochs"] * EPOCH:
        with monkeypatch.context() as patch:
            patch.setattr(preemption, "requested", lambda: "SIGUSR1")
            patch.setattr(generate, "requested_on_any_rank", lambda ctx: None)  # the next test is about samples
            train(tmp_path, code=preemption.EXIT_CODE, **RUN)
        starts += 1
        assert raw(tmp_path)["run"]["step"] == starts
        said = capsys.readouterr()
        assert f"Stopped by SIGUSR1 after step {starts} of 12" in said.out + said.err
        assert len(read_log(tmp_path, "val")) == (starts - 1) // EPOCH  # a stop does not wait for the validation loss
    train(tmp_path, **RUN)
    assert starts == 12
    assert state_differences(whole, tmp_path) == []
    assert numbers(whole) == numbers(tmp_path)
    assert sorted(p.name for p in (whole / "samples").iterdir()) == sorted(
        p.name for p in (tmp_path / "samples").iterdir()
    )


@pytest.mark.parametrize(("before", "kills"), [("keep", 1), ("prune", 3)])
def test_kept_checkpoints_survive_kills_and_restarts_at_the_end_of_epochs(tmp_path, monkeypatch, before, kills):
    """Killed between a save, the second name of what is kept, and the removal of an older one."""
    settings, whole, killed = {**RUN, "keep_every_epochs": 1}, tmp_path / "whole", tmp_path / "killed"
    train(whole, **settings)
    for epoch in range(kills):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(files, before, Mock(side_effect=Killed))
            train(killed, **settings)
        assert raw(killed)["epoch"] == epoch
    train(killed, **settings)
    assert state_differences(whole, killed) == []
    (killed / "checkpoint-step000000004.pth").unlink(missing_ok=True)  # after the last kill nothing was left to do
    assert checkpoints(killed) == checkpoints(whole)
    assert sorted(checkpoints(whole).values()) == [4, 8, 8, 12, 12]


@pytest.mark.parametrize("how", ["stopped while they are generated", "killed before"])
def test_missing_samples_are_generated_when_the_run_resumes(whole, tmp_path, monkeypatch, how):
    """Between the checkpoint after epoch 2 and its grid of samples."""
    grid = "samples/epoch0002-ema1-heun2-cfg2.9.png"
    with monkeypatch.context() as patch:
        if how == "killed before":
            patch.setattr(engine_jit.Trainer, "sample_and_evaluate", Mock(side_effect=Killed))
            with pytest.raises(Killed):
                train(tmp_path, **RUN)
        else:
            patch.setattr(generate, "requested_on_any_rank", lambda ctx: "SIGUSR1")
            train(tmp_path, code=preemption.EXIT_CODE, **RUN)
    assert raw(tmp_path)["epoch"] == 1 and not (tmp_path / grid).exists()
    train(tmp_path, **RUN)
    assert (tmp_path / grid).read_bytes() == (whole / grid).read_bytes()
    assert state_differences(whole, tmp_path) == [] and numbers(whole) == numbers(tmp_path)


def test_save_every_minutes(tmp_path):
    train(tmp_path, **{**RUN, "save_every_minutes": 0})
    assert [line["step"] for line in read_log(tmp_path, "save")] == list(range(1, 13))
    for line in read_log(tmp_path, "save"):
        assert 0 <= line["blocked_s"] <= line["seconds"] and line["bytes"] > 1000


def test_a_vote_that_is_read_late_saves_once(tmp_path, monkeypatch):
    """As on GPUs, where a process reads two steps later what all have asked for: one save, not three."""

    class Late(engine_jit.StepVotes):
        def __init__(self, *args):
            super().__init__(*args)
            self.lag, self.asked = 2, [set(), set()]

        def __call__(self, asked):
            self.asked.append(super().__call__(asked))
            return self.asked.pop(0)

    monkeypatch.setattr(engine_jit, "StepVotes", Late)
    train(tmp_path, **{**RUN, "save_every_minutes": 0, "save_last_freq": 100, "eval_freq": 100})
    assert [line["step"] for line in read_log(tmp_path, "save")] == [3, 6, 9, 12]


def test_start_epoch_has_no_effect_on_a_resumed_run(tmp_path, capsys):
    """The same command goes on, also one with --start_epoch."""
    train(tmp_path, **{**RUN, "epochs": 3, "start_epoch": 1})
    train(tmp_path, **{**RUN, "epochs": 4, "start_epoch": 1})
    assert "--start_epoch has no effect" in capsys.readouterr().err and raw(tmp_path)["epoch"] == 3


def test_samples_from_the_middle_of_an_epoch_are_named_so(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6)
        train(tmp_path, **RUN, save_every_steps=1)
    capsys.readouterr()
    argv = flags(resume=tmp_path, sample=True, labels="0", num_per_class=1, device="cpu")
    assert main_jit.main(argv) == 0
    assert "step 6, in epoch 2" in capsys.readouterr().out
    (folder,) = (path for path in (tmp_path / "samples").iterdir() if path.is_dir())
    assert "epoch0001-" in folder.name and "-step000000006-" in folder.name


def test_a_data_set_of_another_size_is_refused(tmp_path, capsys):
    train(tmp_path, **{**RUN, "epochs": 1})
    content = raw(tmp_path)
    content["run"] |= {"step": 3 * EPOCH + 1, "steps_per_epoch": 3 * EPOCH}
    torch.save(content, tmp_path / NAME)
    train(tmp_path, code=2, **RUN)
    assert "step 13 after 1 epochs, but an epoch now has 4 steps" in capsys.readouterr().err


def images_of(folder, count):
    """Image folders of two classes with `count` images each."""
    for name in "ab":
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            save_png(Image.new("RGB", (16, 16), (i * 9 % 256, 40, 90)), folder / "train" / name / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("val_split", ["0.2", None])
def test_other_images_are_refused_or_named(tmp_path, capsys, val_split):
    """One file less, and an epoch as long as before: it moves images from training to the held-out ones."""
    settings = {**RUN, "dataset": "imagefolder", "data_path": images_of(tmp_path / "data", 21), "class_num": 2}
    settings |= {"val_split": val_split, "num_workers": 0}
    train(tmp_path / "run", **{**settings, "epochs": 1})
    (tmp_path / "data" / "train" / "a" / "005.png").unlink()
    train(tmp_path / "run", code=2 if val_split else 0, **settings)
    said = capsys.readouterr().err
    assert "This run was trained on" in said and "images with labels" in said
    assert ("both trained on and held out" in said) == (val_split is not None)


# --- the log --------------------------------------------------------------------------------------------------------


def test_log_lines_about_repeated_steps_are_removed(tmp_path):
    path = tmp_path / LOG_NAME
    lines = [
        {"event": "start", "step": 0},
        {"event": "train", "step": 3},
        {"event": "val", "step": 4},
        {"event": "train", "step": 4},
        {"event": "eval", "step": 5},
        {"event": "start", "step": 9},
    ]
    text = [json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(text) + '{"event": "train", "st')
    _truncate(path, 4)
    assert path.read_text() == "".join(text[i] for i in (0, 1, 2, 5))
    path.write_text("".join(text[:2])[:-1])  # whole as JSON, and yet not written to its end
    _truncate(path, 4)
    assert path.read_text() == text[0]


def test_metrics_resume_between_two_log_lines():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(7, generator=generator)
    one, two = TrainMetrics(2), TrainMetrics(2)
    for step, loss in enumerate(losses):
        bad = torch.tensor(float(step in (3, 4)))
        one.add(step, loss if not bad else torch.tensor(float("nan")), bad, 1)
        if step == 3:
            state = json.loads(json.dumps(one.state_dict()))
    two.load_state_dict(state)
    for step in range(4, 7):
        two.add(step, losses[step], torch.tensor(float(step == 4)), 1)
    a, b = one.read(), two.read()
    assert a["loss"] == b["loss"] and a["skipped"] == b["skipped"] == 2
    assert one.non_finite_steps() is None and two.non_finite_steps() is None


# --- kill -9 --------------------------------------------------------------------------------------------------------


def spawn(folder: Path, **changes) -> subprocess.Popen:
    """A run of its own process, in which saving is slow enough that kills also fall into it."""
    settings = arguments(output_dir=folder, **{**RUN, "save_every_steps": 1, **changes})
    return subprocess.Popen(
        [sys.executable, "-m", "tests.test_resume", *settings],
        cwd=Path(main_jit.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(folder.glob(".checkpoint-next.pth.*.tmp"))


def inject(folder: Path, kills: int, seed: int, **changes) -> list[str]:
    """Kill a run `kills` times at random moments of its life, and let it end. Returns what each kill fell into."""
    chance, what = random.Random(seed), []
    for i in range(kills):
        process = spawn(folder, **changes)
        begun = (folder / "begun").stat().st_mtime_ns if (folder / "begun").exists() else 0
        while not (folder / "begun").exists() or (folder / "begun").stat().st_mtime_ns == begun:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.25))
        if i % 4 == 3:  # every fourth one inside a save
            deadline = time.monotonic() + 20
            while not saving(folder) and time.monotonic() < deadline:
                if process.poll() is not None:
                    break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        inside = saving(folder)
        what.append("done" if process.returncode == 0 else "save" if inside else "elsewhere")
    process = spawn(folder, **changes)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    return what


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """The promise of docs/reliability.md: killed (-9) at 20 random moments, some inside a save: 0 differences."""
    settings = {"epochs": 40}
    whole = spawn(tmp_path / "whole", **settings)
    assert whole.communicate(timeout=300) and whole.returncode == 0
    folder = tmp_path / "killed"
    folder.mkdir()
    what = inject(folder, 20, seed=0, **settings)
    print(what)
    assert what.count("done") == 0 and what.count("save") >= 3, what
    assert state_differences(tmp_path / "whole", folder) == []
    assert numbers(tmp_path / "whole") == numbers(folder)


def test_kill_9(whole, tmp_path):
    what = inject(tmp_path, 2, seed=1)
    assert len(what) == 2
    assert state_differences(whole, tmp_path) == [] and numbers(whole) == numbers(tmp_path)


if __name__ == "__main__":

    def slow_save(content, file, save=torch.save):
        save(content, file)
        file.flush()
        time.sleep(0.02)  # so that a kill can fall between the parts of a save

    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        patch.setattr(files.torch, "save", slow_save)
        real = engine_jit.Trainer.train_one_epoch

        def begin(self, epoch):
            (self.folder / "begun").touch()
            return real(self, epoch)

        patch.setattr(engine_jit.Trainer, "train_one_epoch", begin)
        sys.exit(main_jit.main(sys.argv[1:]))
