"""Requests that cannot be fulfilled are refused: exit code 2, one sentence, and no file is touched."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import engine_jit
import main_jit
from tests.conftest import TINY, Payload, arguments, flags, listing, raw
from util.checkpoint.files import NAME
from util.dist import launch
from util.dist.context import find_context

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def refuses(here, capsys):
    """refuses(argv, *parts): the call ends with 2, its message holds `parts`, and nothing is written."""

    def call(argv, *parts):
        capsys.readouterr()
        before = listing(here)
        assert main_jit.main([str(word) for word in argv]) == 2
        err = capsys.readouterr().err
        assert listing(here) == before
        message = re.findall("^main_jit.py: error: (.*)", err, re.MULTILINE)
        assert len(message) == 1 and "Traceback" not in err, err
        for part in parts:
            assert str(part) in err
        return err

    return call


@pytest.fixture
def run(trained, here):
    """A copy of a finished run."""
    return shutil.copytree(trained, here / "run")


def of_run(run, **settings):
    return flags(resume=run, device="cpu", **settings)


def images(folder, *classes, size=(20, 20), count=1):
    from PIL import Image

    for name in classes:
        (folder / "train" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (i * 40, 9, 99)).save(folder / "train" / name / f"{i}.png")
    return folder


# --- data -----------------------------------------------------------------------------------------------------------


def test_data_that_is_missing(here, refuses):
    data = {"dataset": "imagefolder", "class_num": 2}
    refuses(arguments(output_dir="out", **data), "no data path given", "--data_path", "DATA_PATH")
    refuses(arguments(output_dir="out", **data, data_path=here / "nowhere"), here / "nowhere", "does not exist")
    (here / "empty").mkdir()
    refuses(arguments(output_dir="out", **data, data_path=here / "empty"), here / "empty", "holds no class folders")
    (here / "empty" / "train").mkdir()
    refuses(
        arguments(output_dir="out", **data, data_path=here / "empty"),
        here / "empty" / "train",
        "holds no class folders",
    )
    images(here / "data", "a", "b")
    (here / "data" / "train" / "c").mkdir()
    refuses(arguments(output_dir="out", dataset="imagefolder", class_num=3, data_path="data"), "hold no image: c.")


def test_number_of_classes(here, refuses):
    images(here / "data", "a", "b")
    refuses(arguments(output_dir="out", dataset="imagefolder", data_path="data"), "data has 2 classes", "--class_num")
    refuses(arguments(output_dir="out", class_num=9), "digits has 10 classes and --class_num is 9")


def test_fewer_images_than_a_batch(here, refuses):
    refuses(arguments(output_dir="out", batch_size=41), "40 images", "41 per rank", "BATCH_SIZE")
    refuses(arguments(output_dir="out", global_batch=48), "40 images", "3 accumulated")


def test_unreadable_image_is_named(here, capsys):
    data = images(here / "data", "a", "b", count=4)
    bad = data / "train" / "b" / "2.png"
    bad.write_bytes(b"no image")
    argv = arguments(output_dir="out", dataset="imagefolder", data_path=data, class_num=2, batch_size=8, num_workers=1)
    assert main_jit.main(argv) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and str(bad) in lines[0] and "Traceback" not in err
    assert not (here / "out" / NAME).exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_resume_names_a_file(run, refuses):
    for name in (run / NAME, "missing.pth"):
        refuses(arguments(resume=name, output_dir="out"), name, "folder")
        refuses(arguments(output_dir=name), name, "folder")
        for what in ("evaluate_gen", "sample"):
            refuses(flags(resume=name, **{what: True}), name, "folder")


def test_resume_without_checkpoint(here, refuses):
    (here / "empty").mkdir()
    refuses(arguments(resume="missing", output_dir="out"), "missing", "no such folder")
    refuses(arguments(resume="empty", output_dir="out"), "empty", NAME)
    refuses(arguments(resume="empty"), "empty", NAME)
    refuses(arguments(init_from="empty", output_dir="out"), "empty", NAME)
    assert main_jit.main(arguments(resume="empty", output_dir="./empty/", epochs=1)) == 0  # a run's own folder
    assert raw(here / "empty")["epoch"] == 0


@pytest.mark.parametrize("what", ["evaluate_gen", "sample"])
def test_nothing_to_evaluate_or_sample(here, refuses, what):
    (here / "empty").mkdir()
    refuses(flags(**{what: True}), f"--{what} needs a trained model", "--resume")
    refuses(flags(dataset="digits", **{what: True}), f"--{what} needs a trained model")
    for folder in ("empty", "missing"):
        refuses(flags(resume=folder, **{what: True}), folder)
        refuses(flags(output_dir=folder, **{what: True}), folder)


def test_two_things_at_once(run, refuses):
    refuses(of_run(run, evaluate_gen=True, sample=True), "--evaluate_gen and --sample")
    refuses(arguments(resume=run, init_from=run, output_dir="out"), "--resume", "--init_from")


def test_damaged_and_foreign_checkpoints(here, run, refuses):
    content = (run / NAME).read_bytes()
    marker = here / "executed"
    torch.save(Payload(marker), run / "payload")
    torch.save({"state_dict": {}}, run / "foreign")
    damaged = (content[: len(content) // 2], b"<!DOCTYPE html>", (run / "payload").read_bytes())
    for bad in (*damaged, (run / "foreign").read_bytes()):
        (run / NAME).write_bytes(bad)
        refuses(arguments(output_dir=run, epochs=3), run / NAME)
        refuses(arguments(resume=run, output_dir="out"), run / NAME)
        refuses(arguments(init_from=run, output_dir="out"), run / NAME)
        for what in ("evaluate_gen", "sample"):
            refuses(of_run(run, **{what: True}), run / NAME)
    assert not marker.exists()


def test_checkpoint_without_optimizer(run, refuses):
    content = raw(run)
    del content["optimizer"]
    torch.save(content, run / NAME)
    refuses(arguments(output_dir=run, epochs=3), run / NAME, "no optimizer state", "--init_from")
    assert main_jit.main(arguments(init_from=run, output_dir="out", epochs=1)) == 0


def test_weights_of_another_network(run, refuses):
    content = raw(run)
    content["args"].img_size = 24
    torch.save(content, run / NAME)
    refuses(of_run(run, sample=True), run / NAME, "does not fit the network", "pos_embed")
    refuses(arguments(output_dir=run, img_size=24, epochs=3), "does not fit the network")


def test_contradictions_are_all_named(run, refuses):
    wrong = {"model": "JiT-Demo/8", "img_size": 32, "noise_scale": 2.0, "pred_param": "v", "sf_kappa": 9.0}
    for what in ("evaluate_gen", "sample"):
        argv = [*of_run(run, **wrong, **{what: True}), "--disable_dct_patchify"]
        refuses(argv, *(f"--{name} " for name in wrong), "--disable_dct_patchify True", "the checkpoint has")
    also = {"lr": 0.5, "seed": 7, "weight_decay": 0.1, "ema_decay1": 0.99, "global_batch": 32}
    argv = arguments(output_dir=run, epochs=3, **{**wrong, **also})
    refuses(argv, *(f"--{name} " for name in {**wrong, **also}))
    argv = arguments(resume=run, output_dir="out", epochs=3, **also)
    refuses(argv, *(f"--{name} " for name in also))


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be(refuses):
    for settings, parts in (
        ({"img_size": 20}, ("--img_size 20", "patch size 8")),
        ({"window_size": 3}, ("--window_size 3", "16")),
        ({"model": "JiT-X/2"}, ("--model JiT-X/2", "JiT-B/16", TINY)),
        ({"t_eps": 0.0}, ("t_eps",)),
        ({"noise_scale": 0.0}, ("noise_scale",)),
        ({"sf_kappa": 0.0}, ("kappa",)),
        ({"num_images": 15, "online_eval": True}, ("--num_images 15", "10 classes")),
        ({"global_batch": 24}, ("24", "--batch_size 16", "1 ranks")),
        ({"lr": -1}, ("--lr -1",)),
        ({"epochs": 0}, ("--epochs 0",)),
    ):
        refuses(arguments(**{"output_dir": "out", **settings}), *parts)


def test_seed_that_is_too_large(refuses):
    refuses(arguments(output_dir="out", seed=2**64), "--seed")


def test_texts_and_numbers_without_bounds(here, run, refuses):
    for flag in ("output_dir", "output_root", "resume", "init_from"):
        refuses(arguments(**{"output_dir": "out", flag: "x" * 5000}), f"--{flag} has 5000 characters")
    refuses(of_run(run, sample=True, checkpoint="."), "is no file; --checkpoint names a file")
    refuses(of_run(run, sample=True, labels="0-99999999999"), "names the class 99999999999")
    for name, value in {"cfg": 1e300, "num_workers": 10**20, "dist_timeout": 1e300, "epochs": 10**30}.items():
        refuses(arguments(**{"output_dir": "out", name: value}), f"--{name}", "at most")
    refuses(of_run(run, sample=True, num_per_class=3 * 10**9), "--num_per_class", "at most")


def test_a_file_in_the_place_of_a_folder(here, refuses):
    (here / "out").mkdir()
    (here / "out" / "samples").touch()
    refuses(arguments(output_dir="out"), "samples is a file where the run needs a folder")


def test_something_else_in_the_place_of_a_file(here, refuses):
    """A pipe would be waited for, and a folder replaced."""
    (here / "pipe").mkdir()
    os.mkfifo(here / "pipe" / "log.jsonl")
    refuses(arguments(output_dir="pipe"), "log.jsonl is no file")
    (here / "folder" / "checkpoint-last.pth").mkdir(parents=True)
    refuses(arguments(output_dir="folder"), "checkpoint-last.pth is no file")


def test_labels(run, refuses):
    for labels in ("10", "3,12", "5-3", "x", "-1"):
        refuses([*of_run(run, sample=True), f"--labels={labels}"], labels)


def test_number_of_images(run, refuses):
    refuses(of_run(run, evaluate_gen=True, num_images=15), "--num_images 15", "10 classes")


def test_command_line_errors_end_with_2(refuses):
    for argv in (["--no_such_flag"], ["--epochs", "x"], ["--pred_param", "z"], ["--ema", "ema3"]):
        refuses(argv, argv[0])


def test_output_folder_that_cannot_be_made(here, run, refuses):
    (here / "file").write_text("x")
    refuses(arguments(output_dir="file/out"), "file/out", "cannot be written")
    refuses(arguments(output_dir="/proc/out"), "/proc/out", "cannot be written")
    refuses(of_run(run, sample=True, output_dir="/proc/out"), "/proc/out", "cannot be written")
    refuses(of_run(run, evaluate_gen=True, num_images=10, output_dir="/proc/out"), "/proc/out", "cannot be written")


def test_a_disk_that_is_too_full_for_a_checkpoint(refuses, monkeypatch):
    usage = SimpleNamespace(free=10_000)
    monkeypatch.setattr(engine_jit.shutil, "disk_usage", lambda path: usage)
    refuses(arguments(output_dir="out"), "too full for a checkpoint: 0.00192 GB are needed and 1e-05 GB are free")


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_metrics_that_cannot_be_computed(run, refuses):
    training = arguments(output_dir="out", online_eval=True, num_images=20)
    for metrics, part in (
        ("fid", "nception"),
        ("is", "nception"),
        ("fid,is", "nception"),
        ("fd_effnet", "reference"),
    ):
        err = refuses([*training, "--metrics", metrics], part, "ONLINE_EVAL=0")
        assert "--no-online_eval" in err
        err = refuses(of_run(run, evaluate_gen=True, num_images=20, metrics=metrics), part)
        assert "ONLINE_EVAL" not in err
    refuses([*training, "--metrics", "fid", "--inception_weights", "gone.pth"], "gone.pth", "ONLINE_EVAL=0")
    for metrics, part in (("precision", "precision"), ("none", "names no metric")):
        refuses([*training, "--metrics", metrics], part)
        refuses(of_run(run, evaluate_gen=True, num_images=20, metrics=metrics), part)


@pytest.mark.usefixtures("no_network")
def test_metrics_are_checked_when_a_run_goes_on(run, refuses):
    refuses(arguments(output_dir=run, epochs=3, online_eval=True, num_images=20, metrics="fid"), "ONLINE_EVAL=0")


def test_metrics_of_another_data_set(here, refuses):
    images(here / "data", "a", "b", count=8)
    settings = {"dataset": "imagefolder", "data_path": "data", "class_num": 2, "online_eval": True, "num_images": 4}
    argv = arguments(output_dir="out", **settings, metrics="class_agreement")
    refuses(argv, "class_agreement is defined for the data set digits", "ONLINE_EVAL=0")


# --- devices --------------------------------------------------------------------------------------------------------


def test_cuda_that_is_not_there(run, refuses, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(arguments(output_dir="out", device="cuda"), "--device cuda", "no CUDA device")
    refuses(flags(resume=run, sample=True, device="cuda:0"), "cpu or cuda")
    refuses(arguments(output_dir="out", device="tpu"), "--device tpu", "cpu or cuda")


def test_more_processes_than_devices(refuses, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)  # ranks other than 0 speak later
    names = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    refuses(arguments(output_dir="out", device=None), "NUM_GPUS to at most 2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ctx = find_context(None)
    assert (ctx.rank, ctx.world_size, ctx.local_rank, str(ctx.device)) == (2, 3, 1, "cuda:1")


def test_torchrun_is_told_the_reason(refuses, monkeypatch, tmp_path_factory):
    reason = tmp_path_factory.mktemp("elastic") / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reason))
    refuses(arguments(output_dir="out", epochs=0), "--epochs 0")
    assert "--epochs 0" in json.loads(reason.read_text())["message"]["message"]


@pytest.mark.parametrize("zero", ["img_size", "class_num", "accum_iter", "batch_size", "global_batch"])
def test_zeros_are_no_defaults(refuses, zero):
    refuses(arguments(output_dir="out", **{"global_batch": 16, zero: 0}), f"--{zero} 0", "at least 1")


def test_negative_number_of_workers(refuses):
    refuses(arguments(output_dir="out", num_workers=-1), "--num_workers -1")


def test_a_cuda_device_has_a_number(monkeypatch):
    """torch.cuda.set_device refuses a device without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert find_context(None).device == find_context("cuda").device == torch.device("cuda", 0)
