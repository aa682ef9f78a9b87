"""Training on latents, from images to images: encode, measure, train, resume, sample, evaluate, export.

The VAE is tiny and random, so that pictures mean nothing, and every number must still be the same twice.
"""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_jit
import prepare_ref
from model_jit import JiT_models
from spectral_forcing import num_rings
from tests.conftest import TINY_MODEL, config_of, flags, raw, read_log, train
from tests.test_recipes import Recipe
from tests.util.data.image_files import make_folder
from tests.util.evaluation.colours import Colours
from tools import measure_spectrum, prepare_data
from tools.export import export_folder
from tools.hub import SpectralJiT
from util.config import resolve
from util.data import datasets
from util.data.datasets import build_dataset, part_name
from util.data.spectrum_file import load_spectrum
from util.data.vae import load_vae
from util.errors import UserError
from util.evaluation import reference
from util.evaluation.formulas import frechet_distance
from util.schedules import open_spectrum

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("tiny")
MODEL = "JiT-Test/2"
LATENT = {"dataset": "latents", "model": MODEL, "img_size": None, "batch_size": 8}


def save_vae(folder, seed=0):
    """A VAE of factor 2 with 4 channels."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**blocks, block_out_channels=(4, 8), norm_num_groups=2, scaling_factor=0.7)
    vae.save_pretrained(folder)
    return folder


class FewDigits(datasets.Digits):
    def __init__(self, img_size, split="train"):
        super().__init__(img_size, split)
        self._images, self.labels = self._images[:40], self.labels[:40]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """The folder of the latents of 40 digits of 16 pixels: 4 channels, 8 x 8."""
    folder = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        info = datasets.DatasetInfo(lambda path, size, split: FewDigits(size, split), 16, 10, in_memory=True)
        patch.setitem(datasets.DATASETS, "digits", info)
        words = ["latents", "--vae", str(save_vae(folder / "vae")), "--dataset", "digits", "--out", str(folder / "out")]
        assert prepare_data.main(words) == 0
    return folder / "out"


@pytest.fixture(autouse=True)
def small_patches(monkeypatch):
    monkeypatch.setitem(JiT_models, MODEL, partial(TINY_MODEL, **{"patch_size": 2}))


@pytest.fixture(scope="module")
def run(latents, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(JiT_models, MODEL, partial(TINY_MODEL, **{"patch_size": 2}))
        return train(tmp_path_factory.mktemp("run") / "run", data_path=latents, **LATENT)


def test_the_spectrum_comes_with_the_latents(latents):
    found = load_spectrum(latents / "spectrum.npz", 8, 10)
    assert found.level.shape == (4,) and found.dct_power.shape[0] == 4
    before = (latents / "spectrum.npz").read_bytes()
    words = ["--dataset", "latents", "--data_path", str(latents)]
    assert measure_spectrum.main(words) == 2  # it exists
    assert measure_spectrum.main([*words, "--out", str(latents.parent / "again.npz")]) == 0
    again = load_spectrum(latents.parent / "again.npz", 8, 10)
    np.testing.assert_array_equal(found.power, again.power)
    assert (latents / "spectrum.npz").read_bytes() == before


def test_a_run_knows_its_latents(run, latents):
    config = config_of(run)
    assert config.image_shape == (4, 8, 8) and config.pixels == 16 and config.class_num == 10 and config.flip
    assert config.latents["dataset"] == "digits" and config.latents["vae"]["factor"] == 2
    assert all(np.isfinite(line["loss"]) for line in read_log(run))
    (grid,) = (run / "samples").glob("*.png")
    assert Image.open(grid).width > 64


@pytest.mark.parametrize(
    "settings",
    [
        {"spectral_residual": "time", "disable_dct_patchify": True, "pred_param": "v"},
        {"sf_schedule": "budget", "resolution_schedule": "spectrum", "resolution_delta": 1.0},
        {"sf_schedule": "snr", "t_sampler": "spectral_instance", "sampling_grid": "spectral_instance"},
    ],
    ids=["residual", "budget and levels", "instance"],
)
def test_spectral_methods_and_resuming(latents, tmp_path, settings):
    """With the measured spectrum of the latents; an interrupted run ends in the same weights."""
    settings = {**LATENT, "data_path": latents, "num_sampling_steps": 4, "val_split": 0.2, **settings}
    whole = train(tmp_path / "whole", **settings)
    parts = train(tmp_path / "parts", epochs=1, **settings)
    train(parts, **settings)
    first, second = raw(whole)["model"], raw(parts)["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    (*_, last), (*_, again) = read_log(whole, "val"), read_log(parts, "val")
    assert last | {"seconds": 0} == again | {"seconds": 0} and np.isfinite(last["loss_ema1"])
    config = config_of(whole)
    lengths = {"linear": None, "budget": config.channels, "snr": num_rings(8)}
    assert (config.sf_power and len(config.sf_power)) == lengths[config.sf_schedule]


def test_samples_are_decoded_by_the_vae(run, latents, tmp_path, capsys):
    sample = {"sample": True, "resume": run, "labels": "0,1", "num_per_class": 1, "device": "cpu"}
    assert main_jit.main(flags(**sample, output_dir=tmp_path)) == 0
    files = sorted(tmp_path.rglob("0*.png"))
    assert [Image.open(path).size for path in files] == [(16, 16)] * 2
    export_folder(run, tmp_path / "hub")
    model = SpectralJiT.from_pretrained(tmp_path / "hub")
    own, found = config_of(run).latents, model.config.latents
    assert found["vae"] == own["vae"] | {"name": "vae"} and "/tmp" not in (tmp_path / "hub" / "config.json").read_text()
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "model of latents" in card and own["vae"]["sha256"][:12] in card and "pixel-space" not in card
    with pytest.raises(UserError, match="--vae names the one that decodes the latents"):
        model.sample([0, 1])
    images = model.sample([0, 1], vae=str(latents.parent / "vae"))
    assert np.abs(np.asarray(Image.open(files[0])).astype(int) - images[0].permute(1, 2, 0).numpy()).max() <= 1
    other = save_vae(tmp_path / "other", seed=1)
    assert main_jit.main(flags(**sample, output_dir=tmp_path / "x", vae=other)) == 2
    assert "is not the one that the network's latents were made with" in capsys.readouterr().err
    copied = shutil.copytree(latents.parent / "vae", tmp_path / "copy")
    assert main_jit.main(flags(**sample, output_dir=tmp_path / "y", vae=copied)) == 0


def test_metrics_are_those_of_decoded_images(run):
    argv = flags(evaluate_gen=True, resume=run, num_images=20, device="cpu", metrics="class_agreement")
    assert main_jit.main(argv) == 0
    (report,) = (run / "eval").glob("*.json")
    assert json.loads(report.read_text())["vae"] == config_of(run).latents["vae"]["sha256"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data_path": None}, "holds no latents"),
        ({"img_size": 32}, "are 8 wide, and --img_size is 32"),
        ({"channels": 16}, "has 4. Leave the flag out"),
        ({"labels_file": "some.txt"}, "--labels_file goes to `prepare_data latents`"),
    ],
)
def test_latents_that_do_not_fit(latents, tmp_path, change, sentence, capsys):
    train(tmp_path / "run", code=2, **{**LATENT, "data_path": latents, **change})
    assert sentence in capsys.readouterr().err and not (tmp_path / "run" / "checkpoint-last.pth").exists()


def test_a_run_goes_on_with_its_own_latents_alone(run, latents, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(latents, other)
    index = json.loads((other / "train" / "latents.json").read_text())
    index["vae"] |= {"sha256": "0" * 64, "name": "another"}
    (other / "train" / "latents.json").write_text(json.dumps(index))
    train(copied, code=2, epochs=3, **{**LATENT, "data_path": other})
    assert "were made with the VAE another" in capsys.readouterr().err
    train(copied, epochs=3, **{**LATENT, "data_path": latents})
    assert main_jit.main(flags(dry_run=True, resume=copied, data_path=latents, epochs=9, device="cpu")) == 0
    assert f"{MODEL} at 8 px" in capsys.readouterr().out


def test_statistics_of_reconstructions(latents, tmp_path, monkeypatch, capsys):
    """Their distance to the real images is the floor of what samples can reach."""
    metric = replace(prepare_ref.EXTRACTORS["inception"], extractor=Colours)
    monkeypatch.setitem(prepare_ref.EXTRACTORS, "inception", metric)
    monkeypatch.setattr(reference, "FID_STATS", tmp_path)
    words = ["--dataset", "digits", "--img_size", "16", "--num_images", "60", "--num_features", "60", "--device", "cpu"]
    vae = ["--vae", str(latents.parent / "vae")]
    assert prepare_ref.main([*words, *vae]) == 2 and "--vae needs --out" in capsys.readouterr().err
    assert prepare_ref.main(words) == 0
    assert prepare_ref.main([*words, *vae, "--out", str(tmp_path / "floor.npz")]) == 0
    said = capsys.readouterr().out
    real, floor = (np.load(tmp_path / name) for name in ("digits_16_inception.npz", "floor.npz"))
    digits, model = build_dataset("digits", None, 16), load_vae(latents.parent / "vae", torch.device("cpu"))
    images = torch.stack([digits[i][0] for i in prepare_ref.choose_indices(1797, 60)])
    expected = Colours()(model.decode(model.encode(images)[0]))["inception_2048"]
    np.testing.assert_allclose(floor["features"], expected, rtol=1e-4, atol=1e-4)
    distance = frechet_distance(torch.from_numpy(floor["features"]), real["mu"], real["sigma"])
    assert float(said.rpartition(": ")[2].partition(",")[0]) == pytest.approx(distance, rel=1e-3) and distance > 0.1
    assert json.loads(str(floor["meta"]))["reconstructed_by"]["sha256"] == model.sha256


@pytest.mark.parametrize("method", ["residual", "plain", "sf"])
def test_the_recipe_of_imagenet100(latents, tmp_path, monkeypatch, capsys, method):
    given = {"DATA_PATH": str(latents), "METHOD": method, "ONLINE_EVAL": "0", "GLOBAL_BATCH": "8", "BATCH_SIZE": "8"}
    words = Recipe(tmp_path, monkeypatch, capsys).dry_run("imagenet100_latents", **given)
    expected = {"dataset": "latents", "model": "JiT-S/2", "epochs": "810", "cfg": "2.0", "pred_param": "v"}
    assert {name: words[words.index(f"--{name}") + 1] for name in expected} == expected
    assert ("--disable_dct_patchify" in words) == (method != "sf")
    assert ("--spectral_residual" in words) == (method == "residual")


def test_latents_of_some_classes_are_compared_with_these(tmp_path, latents, capsys):
    """And another folder of images is not taken for the same."""
    for folder in ("a", "b"):
        make_folder(tmp_path / folder / "train", {"one": 6, "two": 5, "three": 4}, size=(16, 16))
    (tmp_path / "some.txt").write_text("one\nthree\n")
    words = ["latents", "--vae", str(latents.parent / "vae"), "--img_size", "16", "--out", str(tmp_path / "out")]
    words += ["--labels_file", str(tmp_path / "some.txt")]
    assert prepare_data.main([*words, "--data_path", str(tmp_path / "a")]) == 0
    assert prepare_data.main([*words, "--data_path", str(tmp_path / "b")]) == 2
    assert "was made from other images or settings" in capsys.readouterr().err
    config = resolve({"dataset": "latents", "data_path": str(tmp_path / "out")})
    assert config.class_num == 2
    assert config.real_images == f"imagefolder-{part_name(tmp_path / 'some.txt', ['one', 'three'])}"
    images = build_dataset("latents", tmp_path / "out", 8)
    assert Path(images.path(0)).parent == tmp_path / "a" / "train" / "one"
    before = (tmp_path / "out" / "spectrum.npz").read_bytes()
    assert prepare_data.main([*words, "--data_path", str(tmp_path / "a")]) == 0  # nothing is left to do
    assert (tmp_path / "out" / "spectrum.npz").read_bytes() == before
    at_train = resolve({"dataset": "latents", "data_path": str(tmp_path / "out" / "train"), "sf_schedule": "snr"})
    assert open_spectrum(at_train).path == tmp_path / "out" / "spectrum.npz"
    with pytest.raises(UserError, match="is of 4 channels, and this network has 3"):
        open_spectrum(replace(at_train, channels=3))
