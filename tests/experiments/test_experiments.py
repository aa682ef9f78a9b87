"""The scripts in experiments/ run as their documentation says, and print what it shows."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.spectral_ops.test_schedule import PUBLISHED
from util.io import REPOSITORY

SPECTRUM = REPOSITORY / "tests" / "golden" / "cifar10_spectrum.json"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *words) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(REPOSITORY / "experiments" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_published_table_of_gaps_is_printed(run):
    rows = [row.split("|")[1:-1] for row in run("schedule_gaps.py", "--spectrum", SPECTRUM).splitlines()[2:]]
    assert {name.strip() for name, *_ in rows} == set(PUBLISHED)
    for name, *gaps in rows:
        assert [float(gap) for gap in gaps] == pytest.approx(PUBLISHED[name.strip()], abs=2e-3)


@pytest.mark.usefixtures("tiny")
def test_pictures_are_drawn(run, tmp_path, trained):
    content = json.loads(SPECTRUM.read_text())
    fit = {name: (content["power_law_fit"][f"{name}_mean"], 0.0) for name in ("a", "alpha")}
    meta = {"dataset": "cifar10", "img_size": 32, "num_images": 50000, "fit_mean_and_std": fit}
    np.savez(tmp_path / "s.npz", power=content["P"], centred=content["P_centred"], meta=json.dumps(meta))
    run("what_the_network_sees.py", "--out", tmp_path / "a.png", "--size", 32)
    run("plot_log.py", trained, "--out", tmp_path / "b.png")
    run("frequency_time_plane.py", "--spectrum", tmp_path / "s.npz", "--out", tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 2000 for name in "abc")


def test_a_log_that_was_cut_off_or_has_no_loss_yet(run, tmp_path):
    lines = [{"time": 1, "event": "start", "step": 0}, {"time": 2, "event": "train", "step": 0, "loss": None}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="does not exist"):
        run("plot_log.py", tmp_path / "missing", "--out", tmp_path / "a.png")
    with pytest.raises(SystemExit, match="has no loss yet"):
        run("plot_log.py", tmp_path, "--out", tmp_path / "a.png")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"time": 3, "event": "train", "step": 1, "loss": 1.0}\n{"time": 4, "event": "tr')
    run("plot_log.py", tmp_path, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


# --- ImageNet -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """An image folder of two classes with 512 files each: the same one many times."""
    root = tmp_path_factory.mktemp("imagenet")
    for name in ("n01", "n02"):
        (root / "train" / name).mkdir(parents=True)
        image = root / "train" / name / "0.png"
        Image.new("RGB", (300, 280)).save(image)
        for i in range(1, 512):
            image.with_name(f"{i}.png").symlink_to(image)
    return root


@pytest.mark.parametrize(("method", "epochs"), [("sf", "200"), ("plain", "600")])
@pytest.mark.parametrize(
    ("script", "model"), [("130m_16", "JiT-B/16"), ("130m_32", "JiT-B/32"), ("700m_32", "JiT-700M")]
)
def test_imagenet_scripts_pass_a_dry_run(two_classes, script, model, method, epochs):
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable}
    env |= {"DRY_RUN": "1", "DATA_PATH": str(two_classes), "METHOD": method, "EPOCHS": epochs, "ONLINE_EVAL": "0"}
    path = REPOSITORY / "experiments" / "imagenet" / f"{script}.sh"
    done = subprocess.run(["bash", path, "--class_num", "2"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    for flag, value in {"model": model, "epochs": epochs, "global_batch": "1024", "eval_freq": "40"}.items():
        assert words[words.index(f"--{flag}") + 1] == value
    assert ("--disable_dct_patchify" in words) == (method == "plain")
    assert words[words.index("--output_dir") + 1].endswith(f"-{method}-{epochs}")


def test_imagenet_scripts_say_what_is_wrong(tmp_path):
    path = REPOSITORY / "experiments" / "imagenet" / "130m_16.sh"
    env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "DRY_RUN": "1", "ONLINE_EVAL": "0"}
    wrong = subprocess.run(["bash", path], env=env | {"METHOD": "dct"}, capture_output=True, text=True)
    assert wrong.returncode == 2 and "must be sf or plain" in wrong.stderr
    env |= {"DATA_PATH": str(tmp_path / "missing")}
    missing = subprocess.run(["bash", path], env=env, capture_output=True, text=True)
    assert missing.returncode == 2 and "missing" in missing.stderr
