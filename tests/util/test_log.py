"""The log of a run: JSON lines, one Weights & Biases run across restarts, and no secret in any file."""

import json
import re
import time

import pytest

import engine_jit
import main_jit
from tests.conftest import ONE, SECRET, arguments, flags, read_log, train
from util import log as log_module
from util.dist.context import DistContext
from util.errors import UserError
from util.log import LOG_NAME, WANDB_ID_NAME, ImageProgress, RunLog, duration

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
    log = RunLog(tmp_path, DistContext(1, 2), {"mode": "offline"})
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
def test_duration_of_the_first_step_is_logged(tmp_path, monkeypatch, capsys):
    """With its time and the step of the next line; also in the middle of an epoch, here of five steps."""
    sample_step, slow = engine_jit.sample_step, 0

    def delayed(rng, *args):
        if rng.step == 6 and slow == 0:
            raise KeyboardInterrupt
        time.sleep(0.4 if rng.step == slow else 0)
        return sample_step(rng, *args)

    monkeypatch.setattr(engine_jit, "sample_step", delayed)
    settings = {"batch_size": 8, "log_freq": 4, "save_every_steps": 3}
    train(tmp_path, code=130, **settings)
    first = capsys.readouterr().out
    slow = 6
    train(tmp_path, **settings)
    for said, follows, line in ((first, 4, "step 4/10"), (capsys.readouterr().out, 8, "step 8/10")):
        (found,) = re.finditer(r"first step took (\S+) s; next log line at step (\d+)\n", said)
        assert 0.4 <= float(found[1]) < 30 and int(found[2]) == follows and found.end() <= said.index(line)
    lines = map(json.loads, (tmp_path / LOG_NAME).read_text().splitlines())
    assert {line["event"] for line in lines} == {"start", "train", "save"}  # it is for people alone
    train(tmp_path, batch_size=8, epochs=3)
    assert re.search(r"step 11/15 .*\nfirst step took \S+ s\n", capsys.readouterr().out)


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
        ids = []
        for epochs in (1, 2):
            argv = arguments(output_dir=folder, epochs=epochs, wandb_mode="offline", wandb_run_name="a name")
            assert main_jit.main(argv) == 0
            ids.append((folder / WANDB_ID_NAME).read_text().strip())
    return folder, ids


def test_a_resumed_run_keeps_its_id(offline):
    folder, ids = offline
    assert len(set(ids)) == 1
    runs = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(f"-{ids[0]}" in name for name in runs)
    assert [line["step"] for line in read_log(folder)] == [0, 1, 2, 3]


def test_the_key_is_in_no_file(offline):
    folder, _ = offline
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
