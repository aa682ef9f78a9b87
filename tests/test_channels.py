"""Images of one and of four channels: read, trained on, sampled, measured and exported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_jit
from tests.conftest import config_of, few_digits, flags, raw, read_log, train
from tools.export import export, load_denoiser
from tools.measure_spectrum import measure
from util.data.datasets import build_dataset
from util.data.images import DataError
from util.evaluation.images import rgb, to_pil
from util.profile import count_flops

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def stickers(tmp_path_factory):
    """A folder of 24 images with alpha in two classes."""
    folder, rng = tmp_path_factory.mktemp("rgba"), np.random.RandomState(0)
    for i in range(24):
        path = folder / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (20, 24, 4), dtype=np.uint8), "RGBA").save(path)
    return folder


def test_grey_is_the_luma_of_the_image():
    images = build_dataset("digits", None, 16, channels=1)
    batch = torch.stack([images[i][0] for i in range(5)])
    batch[:, 1] //= 2  # colour
    x = images.prepare(batch)
    expected = np.einsum("bchw,c->bhw", batch.numpy() / 127.5 - 1, [0.299, 0.587, 0.114])
    assert x.shape == (5, 1, 16, 16) and x.dtype == torch.float32
    np.testing.assert_allclose(x[:, 0], expected, atol=1e-6)


def test_alpha_is_that_of_the_file(stickers):
    images = build_dataset("imagefolder", stickers, 20, channels=4)
    found = images[3][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, np.asarray(Image.open(images.path(3)))[:, 2:22])
    assert build_dataset("imagefolder", stickers, 20)[3][0].shape == (3, 20, 20)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_data_do_not_have(channels, tmp_path, capsys):
    with pytest.raises(DataError, match=f"digits has 3 channels, and --channels is {channels}; possible are 1, 3"):
        build_dataset("digits", None, 16, channels=channels)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_whole_run(channels, stickers, tmp_path, capsys):
    data = {"dataset": "digits"} if channels == 1 else {"dataset": "imagefolder", "data_path": stickers, "class_num": 2}
    run = train(tmp_path / "run", channels=channels, batch_size=8, spectral_residual="time", eval_freq=2, **data)
    assert len(read_log(run)) > 2 and all(np.isfinite(line["loss"]) for line in read_log(run))
    config = config_of(run)
    assert config.image_shape == (channels, 16, 16) and config.channels == channels
    (grid,) = (run / "samples").glob("*.png")
    assert Image.open(grid).mode == "RGB"
    assert main_jit.main(flags(sample=True, resume=run, labels="0,1", num_per_class=2, device="cpu")) == 0
    files = sorted(run.glob("samples/*/0*.png"))
    assert len(files) == 4 and {Image.open(path).mode for path in files} == {"L" if channels == 1 else "RGBA"}
    export(run, tmp_path / "x.safetensors", "model")
    denoiser, _ = load_denoiser(tmp_path / "x.safetensors")
    z, t, y = torch.ones(2, channels, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    assert denoiser.velocity(z, t, y).shape == z.shape
    again = train(tmp_path / "again", channels=channels, batch_size=8, epochs=1, spectral_residual="time", **data)
    train(again, channels=channels, batch_size=8, spectral_residual="time", eval_freq=2, **data)
    first, second = raw(run)["model"], raw(again)["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    capsys.readouterr()
    train(again, code=2, channels=3, batch_size=8, spectral_residual="time", epochs=3, **data)
    assert f"--channels 3 (the checkpoint has {channels})" in capsys.readouterr().err


def test_metrics_of_grey_images(tmp_path):
    run = train(tmp_path / "run", channels=1, epochs=1)
    argv = flags(evaluate_gen=True, resume=run, num_images=20, device="cpu", save_images=tmp_path / "png")
    assert main_jit.main(argv) == 0
    (report,) = (run / "eval").glob("*.json")
    assert 0 <= json.loads(report.read_text())["metrics"]["class_agreement"] <= 1
    assert Image.open(tmp_path / "png" / "000000.png").mode == "L"


def test_pictures_and_what_metrics_see():
    grey, rgba = torch.full((2, 1, 4, 4), 7, dtype=torch.uint8), torch.arange(2 * 4 * 16).view(2, 4, 4, 4).byte()
    assert rgb(grey).shape == (2, 3, 4, 4) and (rgb(grey) == 7).all() and rgb(rgba).equal(rgba[:, :3])
    np.testing.assert_array_equal(np.asarray(to_pil(rgba[1])), rgba[1].permute(1, 2, 0))
    assert to_pil(grey[0]).mode == "L"


def test_spectrum_of_grey_images():
    """Of images without colour: their only axis has the power that the first one of three equal channels shares."""
    grey, colour = measure(few_digits(16, 1), np.arange(40)), measure(few_digits(16), np.arange(40))
    np.testing.assert_allclose(grey.power, colour.power, rtol=1e-5)
    assert grey.level.shape == (1,) and grey.dct_power.shape == (1, colour.dct_power.shape[1])
    np.testing.assert_allclose(3 * grey.dct_power[0], colour.dct_power[0], rtol=1e-4, atol=1e-8)


def test_operations_of_more_channels():
    """Beside those of three: the patch embedding and the final layer."""
    three, sixteen = (count_flops("JiT-S/2", 32, in_channels=c, out_channels=c) for c in (3, 16))
    tokens, patch, width, bottleneck = 256, 4, 384, 96
    assert sixteen - three == 2 * tokens * 13 * patch * (bottleneck + width)
