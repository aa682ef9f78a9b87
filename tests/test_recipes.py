"""The recipes: the command that each becomes is the published setting, and a start with it is accepted."""

import os
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from model_jit import JiT_models
from tests.conftest import spectrum_of_digits
from tests.launcher_stand_ins import program
from tools import launch
from util.data import cifar10
from util.io import REPOSITORY
from util.profile import count_flops

FOLDER = REPOSITORY / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.sh") if path.stem != "common")
JIT = {"epochs": "600", "global_batch": "1024", "model": "JiT-B/16"}
DIT = """pred_param v  t_sampler uniform  t_eps 0  lr 1e-4  lr_schedule cosine  min_lr 1e-5  warmup_steps 5000
    beta2 0.99  grad_clip 1  sampling_method euler  num_sampling_steps 50  global_batch 256  cfg 1.0
    model JiT-Ti/1""".split()


class Recipe:
    """Runs recipes with an interpreter that only notes how it was started."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.python = program(folder / "python", f"env -0 >'{folder}/env'; printf '%s\\0' \"$@\" >'{folder}/words'")

    def start(self, name, *flags, **variables):
        env = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), **variables}
        return subprocess.run(["bash", FOLDER / f"{name}.sh", *flags], env=env, capture_output=True, text=True)

    def dry_run(self, name, *flags, **variables):
        """Check the start that a recipe becomes, as DRY_RUN=1 does, in this process. Return its flags."""
        done = self.start(name, *flags, **variables)
        assert done.returncode == 0, done.stderr
        env, words = ((self.folder / file).read_bytes().decode().split("\0")[:-1] for file in ("env", "words"))
        assert words[:3] == ["-P", "-m", "tools.launch"]
        with self.monkeypatch.context() as patch:
            patch.setattr(launch, "block_signals", lambda: None)
            patch.setattr(os, "environ", dict(line.split("=", 1) for line in env) | {"DRY_RUN": "1"})
            code = launch.main(words[3:])
        said = self.capsys.readouterr()
        assert code == 0, said.err
        return said.out.split("main_jit.py ")[1].split()


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    return Recipe(tmp_path, monkeypatch, capsys)


def value(words, flag):
    return words[words.index(f"--{flag}") + 1]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """An image folder of 1000 classes with two files each: the same one many times."""
    root = tmp_path_factory.mktemp("imagenet")
    Image.new("RGB", (300, 280)).save(root / "image.png")
    for c in range(1000):
        (root / "train" / f"n{c:04}").mkdir(parents=True)
        for i in range(2):
            (root / "train" / f"n{c:04}" / f"{i}.png").symlink_to(root / "image.png")
    return root


@pytest.fixture
def cifar10_of_zeros(monkeypatch):
    arrays = np.zeros((50_000, 32, 32, 3), np.uint8), np.arange(50_000) % 10
    monkeypatch.setattr(cifar10, "load", lambda folder, split: arrays)


@pytest.mark.parametrize("epochs", [None, "600"])
@pytest.mark.parametrize("method", [None, "plain"])
@pytest.mark.parametrize(
    ("name", "model"), [("sf_130m_16", "JiT-B/16"), ("sf_130m_32", "JiT-B/32"), ("sf_700m_32", "JiT-700M")]
)
def test_spectral_forcing_and_its_baseline(recipe, imagenet, name, model, method, epochs):
    given = {"METHOD": method, "EPOCHS": epochs, "DATA_PATH": str(imagenet), "ONLINE_EVAL": "0"}
    words = recipe.dry_run(name, **{name: text for name, text in given.items() if text})
    expected = {"model": model, "global_batch": "1024", "epochs": epochs or "200"}
    assert {name: value(words, name) for name in expected} == expected
    assert ("--disable_dct_patchify" in words) == (method == "plain")
    assert value(words, "output_dir") == f"output/{name}-{method or 'sf'}-{epochs or 200}"


def test_jit_b16(recipe, imagenet):
    words = recipe.dry_run("jit_b16", DATA_PATH=str(imagenet), ONLINE_EVAL="0")
    assert {name: value(words, name) for name in JIT} == JIT and "--disable_dct_patchify" in words


@pytest.mark.usefixtures("cifar10_of_zeros")
@pytest.mark.parametrize("method", ["residual", "plain"])
def test_spectraldit(recipe, method):
    """The paper's settings, for 400,000 steps."""
    words = recipe.dry_run("spectraldit_cifar10", METHOD=method)
    expected = dict(zip(DIT[::2], DIT[1::2], strict=True))
    assert {name: value(words, name) for name in expected} == expected
    assert "--no-flip" in words and "--disable_dct_patchify" in words
    assert abs(int(value(words, "epochs")) * (50_000 // 256) - 400_000) < 200
    assert ("--spectral_residual" in words) == (method == "residual")


@pytest.mark.usefixtures("cifar10_of_zeros")
@pytest.mark.parametrize("method", ["instance", "global", "plain"])
def test_spectral_schedules(recipe, tmp_path, method):
    spectrum = spectrum_of_digits(tmp_path / "spectrum.npz", 32)
    words = recipe.dry_run("spectral_schedules_cifar10", METHOD=method, SPECTRUM_FILE=str(spectrum))
    named = [word for word in words if word.startswith("spectral_")]
    assert named == ([] if method == "plain" else [f"spectral_{method}"] * 2)


@pytest.mark.usefixtures("cifar10_of_zeros")
@pytest.mark.parametrize("method", ["sf", "plain"])
@pytest.mark.parametrize("name", ["cpu_hour", "gpu_ten_minutes"])
def test_small_runs(recipe, name, method):
    words = recipe.dry_run(name, METHOD=method)
    assert ("--disable_dct_patchify" in words) == (method == "plain")


def test_operations_of_the_ten_minutes_are_those_that_the_recipe_states():
    text = (FOLDER / "gpu_ten_minutes.sh").read_text()
    stated = float(re.search(r"([\d.]+e\d+) operations", text)[1])
    assert 3 * count_flops("JiT-S/4", 32) * 50_000 * 100 == pytest.approx(stated, rel=0.02)


def test_the_predecessor_of_spectral_forcing(recipe, imagenet):
    words = recipe.dry_run("sf_700m_32", METHOD="window", EPOCHS="40", DATA_PATH=str(imagenet), ONLINE_EVAL="0")
    assert value(words, "window_size") == "32" and value(words, "output_dir") == "output/sf_700m_32-window-40"


def test_flags_and_variables_of_ones_own_win(recipe, imagenet):
    given = {"DATA_PATH": str(imagenet), "ONLINE_EVAL": "0", "OUTPUT_DIR": "output/mine", "GLOBAL_BATCH": "256"}
    words = recipe.dry_run("sf_130m_16", "--num_sampling_steps", "25", "--seed", "3", **given)
    assert value(words, "output_dir") == "output/mine" and value(words, "global_batch") == "256"
    assert words[-4:] == ["--num_sampling_steps", "25", "--seed", "3"]


@pytest.mark.usefixtures("cifar10_of_zeros")
def test_another_network_or_learning_rate_is_used_and_has_a_folder_of_its_own(recipe):
    words = recipe.dry_run("spectraldit_cifar10", MODEL="JiT-Ti/2", LR="3e-4")
    assert value(words, "model") == "JiT-Ti/2" and value(words, "lr") == "3e-4" and words.count("--lr") == 1
    assert value(words, "output_dir") == "output/spectraldit_cifar10-JiT-Ti-2-residual-2052"


def test_what_is_wrong_is_said(recipe, tmp_path):
    wrong = recipe.start("sf_130m_16", METHOD="dct")
    assert wrong.returncode == 2 and "METHOD is 'dct'; it must be one of: sf plain" in wrong.stderr
    assert not (tmp_path / "words").exists()


def test_each_recipe_is_listed_and_names_a_model_that_exists():
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    for name in NAMES:
        text = (FOLDER / f"{name}.sh").read_text()
        assert f"`{name}`" in page and f"bash recipes/{name}.sh" in text
        assert re.search(r"MODEL=([\w/-]+)", text)[1] in JiT_models
