"""The log of a run: JSON lines, the same in TensorBoard, one Weights & Biases run across restarts, and no secret."""

import contextlib
import glob
import io
import json
import re
import sys
import time

import numpy as np
import pytest
from PIL import Image

import engine_jit
import main_jit
from tests.conftest import CLOCK, ONE, SECRET, arguments, flags, read_log, train
from tests.test_resume import Killed, kill_at
from util import log as log_module
from util.dist.context import DistContext
from util.errors import UserError
from util.log import LOG_NAME, TENSORBOARD_NAME, WANDB_ID_NAME, ImageProgress, RunLog, duration

OFF = {"mode": "disabled"}


def test_lines_are_json_and_are_continued(tmp_path, capsys):
    for step in (0, 1):
        log = RunLog(tmp_path, ONE, OFF)
        log.log("train", step, {"loss": 0.1 + step, "text": 'a "quoted" ü\n'})
        log.image("samples", step, tmp_path / "none.png")  # nothing to do
        log.info("hello")
        log.close()
    lines = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [(line["event"], line["step"], line["loss"]) for line in lines] == [("train", 0, 0.1), ("train", 1, 1.1)]
    assert all(isinstance(line["time"], float) for line in lines)
    assert capsys.readouterr().out == "hello\nhello\n"


def test_a_line_is_in_the_file_at_once(tmp_path):
    log = RunLog(tmp_path, ONE, OFF)
    log.log("train", 0, {"loss": 0.5})
    assert len((tmp_path / LOG_NAME).read_text().splitlines()) == 1
    log.close()


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, DistContext(1, 2), {"mode": "offline"}, tensorboard=True)
    log.log("train", 0, {"loss": 0.5})
    log.info("hello")
    log.image("samples", 0, tmp_path / "none.png")
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.usefixtures("tiny")
def test_log_of_a_run(trained):
    lines = [json.loads(line) for line in (trained / LOG_NAME).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "train", "train", "train", "train", "save"]
    for line in lines[1:-1]:
        assert {"epoch", "step", "loss", "lr", "grad_norm", "images_per_s", "time"} <= set(line)
    config = json.loads((trained / "config.json").read_text())
    assert config["args"]["lr"] == 1e-3 and config["resolved"]["steps_per_epoch"] == 2
    assert config["resolved"]["started_from"] == "fresh weights"
    assert {"date", "command", "commit", "versions", "hardware"} <= set(config)


@pytest.mark.usefixtures("tiny")
def test_loss_is_the_mean_since_the_last_line(tmp_path, trained):
    """A line's loss is the mean of the steps since the last one; the last step of an epoch always has one."""
    folder = train(tmp_path / "a", log_freq=100)
    fine, coarse = read_log(trained), read_log(folder)
    assert [line["step"] for line in coarse] == [1, 3]
    for i, line in enumerate(coarse):
        assert line["loss"] == pytest.approx((fine[2 * i]["loss"] + fine[2 * i + 1]["loss"]) / 2, rel=1e-6)


@pytest.mark.usefixtures("tiny")
def test_the_terminal_shows_a_line_an_epoch_with_the_time_left(tmp_path, capsys):
    train(tmp_path, log_freq=100, epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [re.match(r"epoch (./3) done  step (./6)  loss .*  (\d+ s) left$", line).groups() for line in lines] == [
        (f"{epoch}/3", f"{2 * epoch}/6", "0 s") for epoch in (1, 2, 3)
    ]


@pytest.mark.usefixtures("tiny")
def test_slow_steps_are_shown_between_two_lines_of_the_log(tmp_path, monkeypatch, capsys):
    """Five steps of 0.2 s an epoch; the log has what it would have without, to the bit."""
    settings = {"batch_size": 8, "log_freq": 100, "epochs": 2}
    plain = train(tmp_path / "plain", **settings)
    capsys.readouterr()
    sample_step = engine_jit.sample_step

    def delayed(*args):
        time.sleep(0.2)
        return sample_step(*args)

    monkeypatch.setattr(engine_jit, "sample_step", delayed)
    monkeypatch.setattr(engine_jit, "FIRST_LINE", 0.1)
    monkeypatch.setattr(engine_jit, "NEXT_LINE", 0.5)
    slow = train(tmp_path / "slow", **settings)
    out = capsys.readouterr().out
    steps = [int(step) for step in re.findall(r"step (\d+)/10 .* left", out)]
    assert steps[0] == 1 and {5, 10} < set(steps) and 4 <= len(steps) < 10
    assert re.search(r"epoch 1/2  step 1/10  loss [\d.]+ .* [23] s left, 1 s of the epoch\n", out)
    assert read_log(slow) == read_log(plain)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (720, "12 min"), (7500, "2 h 5 min"), (273600, "3 days 4 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_image_progress_counts_only_new_images_as_speed(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now[0])
    progress = ImageProgress("evaluating", 1000, 500, ONE)
    for second, done in ((2, 520), (10, 600), (11, 610), (80, 620)):
        now[0] = float(second)
        progress.update(done)
    progress.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "evaluating: 600/1000 images (60%), 10 images/s, 40 s left"
    assert second.startswith("evaluating: 620/1000 images (62%), 1.5 images/s")


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def points(folder):
    """What TensorBoard's own reader finds: {name: [(step, value)]}, and {name: [(step, PNG)]} of pictures.

    It does not purge anything, as TensorBoard's fast loader does not: the files themselves are right.
    """
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    all_of = {reader.SCALARS: 0, reader.IMAGES: 0}
    found = reader.EventAccumulator(str(folder / TENSORBOARD_NAME), all_of, purge_orphaned_data=False).Reload()
    tags = found.Tags()
    scalars = {name: sorted((p.step, p.value) for p in found.Scalars(name)) for name in tags["scalars"]}
    images = {name: sorted((p.step, p.encoded_image_string) for p in found.Images(name)) for name in tags["images"]}
    return scalars, images


def lines_as_points(folder):
    """The same, made from the JSON lines: "train" counts its step from 0, the others count the finished ones."""
    found = {}
    for line in (json.loads(text) for text in (folder / LOG_NAME).read_text().splitlines()):
        event, step = line.pop("event"), line.pop("step")
        for name, value in line.items():
            if event != "start" and name != "time" and isinstance(value, int | float):
                point = (step + 1 if event == "train" else step, float(np.float32(value)))
                found.setdefault(f"{event}/{name}", []).append(point)
    return found


LOGGED = {"epochs": 3, "batch_size": 8, "val_split": "0.2", "val_images": 8, "save_every_steps": 3, "eval_freq": 2}


@pytest.fixture(scope="module")
def charted(tiny, tmp_path_factory):
    return train(tmp_path_factory.mktemp("charted"), tensorboard=True, **LOGGED)


def test_tensorboard_has_the_numbers_and_the_samples_of_the_log(charted):
    scalars, images = points(charted)
    assert scalars == lines_as_points(charted)
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in scalars["val/loss_ema1"]] == [4, 8, 12] and "save/bytes" in scalars
    grids = sorted((charted / "samples").glob("*.png"))
    assert [step for step, _ in images["samples"]] == [8, 12]
    for (_, shown), grid in zip(images["samples"], grids, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown))), np.asarray(Image.open(grid)))


def test_a_run_that_was_killed_looks_in_tensorboard_as_if_it_was_not(charted, tmp_path):
    """Killed before its first checkpoint, twice after the same one, and in a later epoch."""
    for step in (2, 5, 5, 11):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, step)
            train(tmp_path, tensorboard=True, **LOGGED)
    train(tmp_path, tensorboard=True, **LOGGED)
    (scalars, images), (whole, whole_images) = points(tmp_path), points(charted)
    assert scalars == lines_as_points(tmp_path)
    compared = [name for name in whole if not name.startswith("save/") and not name.endswith((*CLOCK, "seconds"))]
    assert {"train/loss", "train/lr", "val/loss_ema1"} < set(compared) and set(scalars) == set(whole)
    assert {name: scalars[name] for name in compared} == {name: whole[name] for name in compared}
    assert images == whole_images


def test_a_tensorboard_that_is_running_forgets_what_is_done_again(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, ONE, OFF, 0, tensorboard=True)
    for step in range(4):
        log.log("train", step, {"loss": float(step)})
    running = reader.EventAccumulator(str(tmp_path / TENSORBOARD_NAME)).Reload()
    assert [p.step for p in running.Scalars("train/loss")] == [1, 2, 3, 4]
    time.sleep(1)  # files are read in the order of their names, which have the second
    resumed = RunLog(tmp_path, ONE, OFF, 2, tensorboard=True)
    resumed.log("train", 2, {"loss": 2.0})
    assert [p.step for p in running.Reload().Scalars("train/loss")] == [1, 2, 3]
    log.close()
    resumed.close()


def test_what_belongs_to_the_last_finished_step_stays(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    for first in (0, 2):
        log = RunLog(tmp_path, ONE, OFF, first, tensorboard=True)
        for step in range(first, first + 2):
            log.log("train", step, {"loss": 0.5 + step, "text": "no number", "none": None})
        log.log("eval", step + 1, {"fid": 3.0})
        log.image("samples", step + 1, tmp_path / "grid.png")
        log.log("train", step + 1, {"loss": -1.0})  # which is done again
        scalars, _ = points(tmp_path)  # before it is closed: nothing is lost if the run is killed
        assert scalars["train/loss"][-1] == (step + 2, -1.0)
        log.close()
    scalars, images = points(tmp_path)
    assert scalars["train/loss"] == [(1, 0.5), (2, 1.5), (3, 2.5), (4, 3.5), (5, -1.0)]
    assert scalars["eval/fid"] == [(2, 3.0), (4, 3.0)] and [step for step, _ in images["samples"]] == [2, 4]
    assert set(scalars) == {"train/loss", "eval/fid"}


@pytest.mark.usefixtures("tiny")
def test_without_its_package_the_run_does_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    folder = train(tmp_path / "run", code=2, tensorboard=True)
    assert "--tensorboard (TENSORBOARD=1) needs the package tensorboard" in capsys.readouterr().err
    assert not list(folder.glob("*.json*"))


def test_an_evaluation_is_added_to_the_curves(charted):
    evaluate = flags(resume=charted, evaluate_gen=True, num_images=10, num_sampling_steps=1, device="cpu")
    before, _ = points(charted)
    assert main_jit.main(evaluate) == 0
    assert points(charted)[0] == before
    assert main_jit.main([*evaluate, "--tensorboard"]) == 0
    after, _ = points(charted)
    ((step, value),) = after["eval/class_agreement"]
    assert step == 12 and 0 <= value <= 1
    assert {name: after[name] for name in before} == before and not (charted / WANDB_ID_NAME).exists()


# --- Weights & Biases -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A run of two epochs in two calls that logs to Weights & Biases offline, with a key in the environment."""
    folder = tmp_path_factory.mktemp("offline") / "run"
    with pytest.MonkeyPatch.context() as patch:
        from tests.conftest import register

        register(patch)
        patch.setenv("WANDB_API_KEY", SECRET)
        for name in ("WANDB_RUN_ID", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME"):
            patch.delenv(name, raising=False)
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(folder.parent / "wandb-own"))
        try:
            import wandb

            probe = wandb.init(mode="offline", dir=str(tmp_path_factory.mktemp("probe")))
            probe.finish()
        except Exception as error:
            pytest.skip(f"Weights & Biases does not start offline here: {error}")
        ids, out = [], io.StringIO()
        for epochs in (1, 2):
            time.sleep(1)  # the folders of its parts are named by the second
            argv = arguments(output_dir=folder, epochs=epochs, wandb_mode="offline", wandb_run_name="a name")
            with contextlib.redirect_stdout(out):
                assert main_jit.main(argv) == 0
            ids.append((folder / WANDB_ID_NAME).read_text().strip())
    return folder, ids, out.getvalue()


def test_a_resumed_run_keeps_its_id_and_all_its_parts_are_uploaded(offline):
    folder, ids, said = offline
    (command,) = set(re.findall("upload to Weights & Biases: wandb sync (.*)", said))
    assert len(glob.glob(command)) == 2
    assert len(set(ids)) == 1
    runs = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(f"-{ids[0]}" in name for name in runs)
    assert [line["step"] for line in read_log(folder)] == [0, 1, 2, 3]


def test_the_key_is_in_no_file(offline):
    folder, *_ = offline
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.json", LOG_NAME, "checkpoint-last.pth"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


class StandIn:
    """In the place of a run of Weights & Biases: keeps what it is told."""

    def __init__(self, seen):
        self.seen = seen

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        self.seen.append(values)

    def finish(self, exit_code):
        self.seen.append(exit_code)


def test_a_folder_keeps_its_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    seen = []

    def init(**kwargs):
        seen.append(kwargs)
        return StandIn(seen)

    monkeypatch.setattr(wandb, "init", init)
    settings = {"mode": "offline", "project": "p", "entity": None, "name": "n", "config": {}}
    log = RunLog(tmp_path, ONE, settings)
    run_id = (tmp_path / WANDB_ID_NAME).read_text().strip()
    assert seen[0]["id"] == run_id and seen[0]["resume"] == "allow" and seen[0]["project"] == "p"
    log.log("train", 3, {"loss": 0.5, "text": "no number"})
    assert seen[1] == {"train/loss": 0.5, "step": 3}
    log.close(2)
    assert seen[2] == 2
    RunLog(tmp_path, ONE, settings)
    assert seen[3]["id"] == run_id
    (tmp_path / "another").mkdir()
    RunLog(tmp_path / "another", ONE, settings)
    assert seen[4]["id"] != run_id


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"a b\n"])
def test_a_damaged_id_is_replaced(tmp_path, monkeypatch, content):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **kwargs: StandIn([]))
    (tmp_path / WANDB_ID_NAME).write_bytes(content)
    RunLog(tmp_path, ONE, {"mode": "online"}).close()
    assert re.fullmatch("[0-9a-f]{8}\n", (tmp_path / WANDB_ID_NAME).read_text())


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    good = json.dumps({"event": "train", "step": 0}) + "\n"
    nested = "[" * 5000 + "]" * 5000 + "\n"
    (tmp_path / LOG_NAME).write_bytes(good.encode() + b'{"event": "\xff"}\n' + nested.encode() + good.encode()[:9])
    RunLog(tmp_path, ONE, OFF, resumed_step=1).close()
    assert (tmp_path / LOG_NAME).read_text() == good


def test_it_does_not_start(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**kwargs):
        raise RuntimeError("no login")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"no login.*ENABLE_WANDB=0"):
        RunLog(tmp_path, ONE, {"mode": "online"})


def test_an_evaluation_is_logged_with_its_run(tmp_path, monkeypatch, tiny):
    """A run that Weights & Biases knows gets its evaluations too; one that it does not know stays unknown."""
    wandb = pytest.importorskip("wandb")
    folder, seen = tmp_path / "run", []
    assert main_jit.main(arguments(output_dir=folder, epochs=1)) == 0
    evaluate = flags(resume=folder, evaluate_gen=True, num_images=10, num_sampling_steps=1, device="cpu")
    monkeypatch.setattr(wandb, "init", lambda **kwargs: pytest.fail("a run that is not tracked"))
    assert main_jit.main(evaluate) == 0
    (folder / WANDB_ID_NAME).write_text("abc\n")

    monkeypatch.setattr(wandb, "init", lambda **kwargs: seen.append(kwargs["id"]) or StandIn(seen))
    assert main_jit.main(evaluate) == 0
    assert seen[0] == "abc" and seen[1]["step"] == 2 and 0 <= seen[1]["eval/class_agreement"] <= 1
    line = json.loads((folder / LOG_NAME).read_text().splitlines()[-1])
    assert line["event"] == "eval" and line["num_images"] == 10
