"""The whole path as users take it: environment, launcher, torchrun, main_jit.py, and the resulting files.

A folder of 24 images of mixed size and format in two classes, the model JiT-Demo/8, 32 pixels. Two more calls of the
launcher run meanwhile: two processes on the digits, and one that must fail.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_jit
import prepare_ref
from tests.conftest import SECRET, flags, listing, raw, read_log
from util.checkpoint.files import NAME

ROOT = Path(main_jit.__file__).parent
QUICK = flags(num_sampling_steps=2, log_freq=1, lr=1e-3, warmup_epochs=0.5, ema_decay1=0.9, ema_decay2=0.5)


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen:
    """The launcher, in the working directory `folder`, with nothing of this process's environment but the basics."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ENABLE_WANDB": "0", "WANDB_API_KEY": SECRET}
    command = ["bash", str(ROOT / "run_jit_multinode.sh"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**env, **variables}, cwd=folder, **pipes)


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[str, str]:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, (process.returncode, out[-2000:], err[-2000:])
    return out, err


def stop(process: subprocess.Popen) -> None:
    """Ended by a signal that torchrun passes on, so that no worker stays behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def run(folder: Path, *words: str, **variables: str) -> tuple[str, str]:
    process = start(folder, *words, **variables)
    try:
        return finish(process)
    finally:
        stop(process)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """data/train/{cat,dog}: 12 files each."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for label, name in enumerate(("cat", "dog")):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(12):
            coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8) // (2 - label)
            size = (int(rng.integers(32, 90)), int(rng.integers(32, 90)))
            image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            if i % 4 == 3:
                image = image.convert("L")
            image.save(folder / "train" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two processes on the digits, with an evaluation at the end; waited for by who asks."""
    folder = tmp_path_factory.mktemp("digits")
    variables = {"DATASET": "digits", "MODEL": "JiT-Demo/8", "IMG_SIZE": "16", "BATCH_SIZE": "128", "EPOCHS": "1"}
    variables |= {"NUM_GPUS": "2", "NUM_IMAGES": "30", "GEN_BSZ": "7", "OUTPUT_DIR": "run", "WANDB_NUM_VIS": "4"}
    process = start(folder, *QUICK, **variables)
    yield folder / "run", process
    stop(process)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    process = start(folder, DATA_PATH="nowhere", ONLINE_EVAL="0", OUTPUT_DIR="run")
    yield folder, process
    stop(process)


@pytest.fixture(scope="module")
def trained(images, digits, failing, tmp_path_factory):
    """The folder of two epochs on the images, and what the launcher said."""
    folder = tmp_path_factory.mktemp("work")
    variables = {"DATA_PATH": str(images), "MODEL": "JiT-Demo/8", "IMG_SIZE": "32", "BATCH_SIZE": "8", "EPOCHS": "2"}
    variables |= {"ONLINE_EVAL": "0", "OUTPUT_DIR": "run", "WANDB_NUM_VIS": "4"}
    out, err = run(folder, "--class_num", "2", "--num_workers", "1", *QUICK, **variables)
    return folder / "run", out, err


@pytest.fixture(scope="module")
def resumed(trained):
    """The same folder after a third epoch; all but the number of epochs comes from the checkpoint."""
    folder = trained[0]
    before = raw(folder), read_log(folder)
    out, _ = run(folder.parent, EPOCHS="3", OUTPUT_DIR="run")
    return folder, before, out


def test_training(trained):
    folder, out, err = trained
    assert "JiT-Demo/8" in out and "epoch 2/2 done" in out and "spectral_forcing: whole image" in out
    assert "tools.launch" in err and SECRET not in out + err
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {NAME, "config.json", "log.jsonl", "samples/epoch0002-ema1-heun2-cfg2.9.png"} <= names
    lines = read_log(folder)
    assert [(line["epoch"], line["step"]) for line in lines][:6] == [(i // 3, i) for i in range(6)]
    assert all(np.isfinite(line["loss"]) for line in lines)
    config = json.loads((folder / "config.json").read_text())
    assert config["resolved"]["peak_lr"] == 1e-3 and config["args"]["class_num"] == 2 and config["args"]["flip"]
    assert not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_resuming(resumed):
    folder, (content, log), out = resumed
    assert "resumed" in out and "epoch 3/3 done" in out
    assert read_log(folder)[:6] == log[:6] and [line["step"] for line in read_log(folder)] == list(range(9))
    after = raw(folder)
    assert (content["epoch"], after["epoch"]) == (1, 2)
    assert not torch.equal(content["model"]["net.in_context_posemb"], after["model"]["net.in_context_posemb"])
    assert (folder / "config-from-step000000006.json").exists()


def test_sampling(resumed):
    folder = resumed[0]
    words = ["--sample", "--labels", "0,1", "--num_per_class", "2", "--seed", "5"]
    out, _ = run(folder.parent, *words, RESUME="run")
    (samples,) = (folder / "samples").glob("epoch0003*seed5-*")
    assert str(samples.relative_to(folder)) in out
    for i in range(4):
        assert Image.open(samples / f"{i:06d}.png").size == (32, 32)
    assert json.loads((samples / "settings.json").read_text())["labels"] == [0, 0, 1, 1]
    assert Image.open(samples / "grid.png").width > 64


def check_report(report: dict) -> None:
    """What every report must say."""
    assert {"ema", "cfg", "interval", "steps", "solver", "seed", "num_images", "measured_with", "metrics"} <= set(
        report
    )
    assert {"matmul", "cudnn"} <= set(report["measured_with"]["tf32"])
    assert {"date", "command", "commit", "versions", "hardware", "weights", "epoch"} <= set(report)


def test_two_processes_on_the_digits(digits, tmp_path):
    """Through the launcher, and alone in this process with twice the batch: the same losses."""
    folder, process = digits
    end = time.monotonic() + 120
    while not list(folder.glob("eval/*.json")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    report = json.loads(next((folder / "eval").iterdir()).read_text())
    check_report(report)
    assert (report["ranks"], report["num_images"]) == (2, 30) and "class_agreement" in report["metrics"]
    alone = {"dataset": "digits", "model": "JiT-Demo/8", "img_size": 16, "batch_size": 256, "epochs": 1}
    alone |= {"output_dir": tmp_path, "wandb_mode": "disabled", "online_eval": False, "device": "cpu"}
    assert main_jit.main([*flags(**alone), "--wandb_num_vis", "1", *QUICK]) == 0
    assert len(read_log(folder)) == 1797 // 256
    for a, b in zip(read_log(folder), read_log(tmp_path), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    two, one = raw(folder)["model_ema2"], raw(tmp_path)["model_ema2"]
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-4, msg=name)


def test_two_processes_end(digits):
    out, _ = finish(digits[1], timeout=30)
    assert "global batch 256 = 128 x 2 ranks x 1 microbatches" in out and "metrics: run/eval/" in out


def test_failure_is_seen_outside(failing):
    folder, process = failing
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    (line,) = [line for line in err.splitlines() if line.startswith("main_jit.py: error:")]
    assert "nowhere does not exist" in line
    assert 'main_jit.py", line' not in err  # torchrun adds a traceback of its own, and there is none of ours
    assert listing(folder) == {}


def test_evaluation_with_inception(resumed, images, inception_file, tmp_path):
    """Reference statistics of the training images, then FID and IS of the model against them."""
    folder, reference = resumed[0], tmp_path / "reference.npz"
    of_images = {"dataset": "imagefolder", "data_path": images, "img_size": 32, "out": reference}
    argv = flags(**of_images, inception_weights=inception_file, num_workers=0, device="cpu")
    assert prepare_ref.main(argv) == 0
    words = ["--metrics", "fid,is", "--fid_stats", str(reference), "--inception_weights", str(inception_file)]
    before = listing(folder)
    out, err = run(folder.parent, *words, EVALUATE_GEN="1", RESUME="run", NUM_IMAGES="12", GEN_BSZ="5", CFG="1.5")
    new = [Path(path) for path in listing(folder) if path not in before]
    (path,) = (path for path in new if path.suffix == ".json")
    assert str(path.relative_to(folder)) in out and "fid" in out
    report = json.loads(path.read_text())
    check_report(report)
    assert (report["ema"], report["cfg"], report["interval"], report["steps"]) == ("ema1", 1.5, [0.1, 1.0], 2)
    assert (report["solver"], report["seed"], report["num_images"], report["epoch"]) == ("heun", 0, 12, 2)
    beside = {"sfid", "precision", "recall", "density", "coverage", "kid_mean", "kid_std", "spectrum_gap"}
    assert set(report["metrics"]) == {"fid", "is_mean", "is_std"} | beside
    assert np.isfinite(list(report["metrics"].values())).all()
    described = report["measured_with"]["references"]["fid"]
    assert str(reference) in map(str, described.values())
    assert described["sha256"] == hashlib.sha256(reference.read_bytes()).hexdigest()
    assert "rank deficient" in err  # 12 images: said, and done


def test_bad_image_on_one_of_two_processes_is_named(tmp_path):
    """The process that reads it says so, and the job ends although the other one waits for it."""
    folder = tmp_path / "images" / "train"
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / label / f"{i}.png")
    bad = folder / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    variables = {"DATA_PATH": str(tmp_path / "images"), "MODEL": "JiT-Demo/8", "IMG_SIZE": "32", "NUM_GPUS": "2"}
    variables |= {"BATCH_SIZE": "4", "EPOCHS": "1", "ONLINE_EVAL": "0", "OUTPUT_DIR": "run"}
    process = start(tmp_path, "--class_num", "2", "--num_workers", "1", **variables)
    try:
        _, err = process.communicate(timeout=200)
    finally:
        stop(process)
    assert process.returncode not in (0, None)
    lines = [line for line in err.splitlines() if line.startswith("main_jit.py: error:")]
    assert len(lines) == 1 and str(bad) in lines[0]
    assert not (tmp_path / "run" / "checkpoint-last.pth").exists()
