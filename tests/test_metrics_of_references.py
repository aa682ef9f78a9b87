"""What a reference file allows beside the Fréchet distance: precision, recall, KID and the spectrum gap.

A few colour statistics stand in for the networks: which values there are, and why not, does not depend on them.
"""

import json

import numpy as np
import pytest
import torch

from tests.conftest import smooth_images
from util import metrics as metrics_module
from util.metrics import MetricError, MetricSuite
from util.reference import save_reference
from util.spectrum import grey_spectrum

SIZE = 32


class Fake:
    """In the place of both networks: a few colour statistics, so that a suite is made in a moment."""

    sha256 = "abc"

    def __init__(self, *args):
        pass

    def describe(self):
        return {"extractor": self.name}

    def __call__(self, images):
        x = images.float() / 255  # (B, 3, H, W)
        rows = torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1)  # (B, 6)
        return dict.fromkeys(self.streams, rows)


class FakeInception(Fake):
    name, streams = "inception", {"inception_2048": 6}


class FakeEffNet(Fake):
    name, streams = "effnet_lite0", {"effnet_lite0": 6}


@pytest.fixture
def fake_networks(monkeypatch):
    monkeypatch.setattr(metrics_module, "InceptionV3", FakeInception)
    monkeypatch.setattr(metrics_module, "EffNetLite0", FakeEffNet)


REAL = smooth_images(40, 5, 0.5)


def write_reference(path, network, **more):
    """A reference file of REAL with the optional arrays `more`."""
    x = network()(REAL)[next(iter(network.streams))].double().numpy()
    meta = {"dataset": "digits", "split": "train", "img_size": SIZE, "crop": "none", "num_images": len(REAL)}
    meta |= {"extractor": network.name, "extractor_sha256": network.sha256}
    save_reference(path, x.mean(axis=0), np.cov(x, rowvar=False), meta, more)
    return path


def everything(network) -> dict[str, np.ndarray]:
    return {
        "features": network()(REAL)[next(iter(network.streams))].numpy(),
        "grey_spectrum": grey_spectrum(REAL).mean(dim=0).numpy(),
    }


def measure(suite, images):
    return suite.compute(suite.extract(images), torch.zeros(len(images), dtype=torch.int64))


NEIGHBOURS = {"precision", "recall", "kid_mean", "kid_std"}
NEIGHBOURS_EFFNET = {"precision_effnet_lite0", "recall_effnet_lite0"}


def test_the_real_images_themselves_score_perfectly(fake_networks, tmp_path):
    path = write_reference(tmp_path / "r.npz", FakeInception, **everything(FakeInception))
    suite = MetricSuite(("fid",), "digits", SIZE, len(REAL), "cpu", path)
    assert suite.streams == {"inception_2048": 6, "grey_spectrum": 23} and suite.details == {}
    assert suite.plot(tmp_path) is None  # nothing has been computed
    before = suite.describe()
    result = measure(suite, REAL)
    assert result.keys() == {"fid", "spectrum_gap"} | NEIGHBOURS
    assert result["precision"] == result["recall"] == 1
    assert abs(result["fid"]) < 1e-6 and result["spectrum_gap"] < 1e-6
    np.testing.assert_allclose(suite.details["ring_ratio"], 1, rtol=1e-6)
    assert len(json.loads(json.dumps(suite.details))["grey_spectrum"]) == 23
    assert suite.describe() == before and before["not_computed"] == {}
    assert suite.plot(tmp_path / "new") == tmp_path / "new" / "spectra.png"
    assert suite.plot(tmp_path / "own.png") == tmp_path / "own.png" and (tmp_path / "own.png").stat().st_size > 1000


def test_blurred_images_have_a_ratio_below_one_and_less_recall(fake_networks, tmp_path):
    path = write_reference(tmp_path / "r.npz", FakeInception, **everything(FakeInception))
    suite = MetricSuite(("fid",), "digits", SIZE, len(REAL), "cpu", path)
    blurred = torch.nn.functional.avg_pool2d(REAL.float(), 3, 1, 1).round().to(torch.uint8)
    result = measure(suite, blurred)
    ratio = suite.details["ring_ratio"]
    assert max(ratio[8:]) < 0.5 < ratio[0] and result["spectrum_gap"] > 0.5
    assert result["recall"] < 1 and result["kid_mean"] > 1e-6


@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        ({"features"}, NEIGHBOURS),
        ({"grey_spectrum"}, {"spectrum_gap"}),
        ({"features", "grey_spectrum"}, NEIGHBOURS | {"spectrum_gap"}),
    ],
)
def test_what_a_reference_lacks_is_left_out_and_said(fake_networks, tmp_path, missing, absent):
    more = {key: value for key, value in everything(FakeInception).items() if key not in missing}
    suite = MetricSuite(("fid",), "digits", SIZE, 8, "cpu", write_reference(tmp_path / "r.npz", FakeInception, **more))
    result = measure(suite, smooth_images(8, 1, 0.5))
    assert result.keys() == ({"fid", "spectrum_gap"} | NEIGHBOURS) - absent
    said = suite.describe()["not_computed"]
    assert said.keys() == absent and all("prepare_ref.py stores" in why for why in said.values())
    assert ("kid" in suite.describe()) == ("features" not in missing)


def test_two_references(fake_networks, monkeypatch, tmp_path):
    """Each metric has its own features; the spectrum comes from the first file that holds one."""
    own = write_reference(tmp_path / "inception.npz", FakeInception)
    other = write_reference(tmp_path / "effnet.npz", FakeEffNet, **everything(FakeEffNet))
    monkeypatch.setattr(metrics_module, "default_reference", lambda *args: other)
    suite = MetricSuite(("fid", "fd_effnet"), "digits", SIZE, len(REAL), "cpu", own)
    result = measure(suite, REAL)
    assert result.keys() == {"fid", "fd_effnet_lite0", "spectrum_gap"} | NEIGHBOURS_EFFNET
    assert result["precision_effnet_lite0"] == result["recall_effnet_lite0"] == 1
    assert suite.describe()["not_computed"].keys() == NEIGHBOURS
    assert suite.describe()["precision_effnet_lite0"] == {"neighbours": 3, "real_images": 40}
    write_reference(own, FakeInception, grey_spectrum=2 * everything(FakeInception)["grey_spectrum"])
    suite = MetricSuite(("fid", "fd_effnet"), "digits", SIZE, len(REAL), "cpu", own)
    assert measure(suite, REAL)["spectrum_gap"] == pytest.approx(np.log(2), rel=1e-5)


def test_too_few_images_for_neighbours(fake_networks, tmp_path):
    path = write_reference(tmp_path / "r.npz", FakeInception, **everything(FakeInception))
    suite = MetricSuite(("fid",), "digits", SIZE, 3, "cpu", path)
    assert measure(suite, REAL[:3]).keys() == {"fid", "spectrum_gap"}
    assert "more than 3 images" in suite.not_computed["recall"]
    suite = MetricSuite(("fid",), "digits", SIZE, 4, "cpu", path)
    assert measure(suite, REAL[:4]).keys() >= NEIGHBOURS


def test_images_of_one_colour_have_no_gap_but_their_other_metrics(fake_networks, tmp_path):
    path = write_reference(tmp_path / "r.npz", FakeInception, **everything(FakeInception))
    suite = MetricSuite(("fid",), "digits", SIZE, 8, "cpu", path)
    result = measure(suite, torch.zeros(8, 3, SIZE, SIZE, dtype=torch.uint8))
    assert result.keys() == {"fid"} | NEIGHBOURS
    assert "no power" in suite.details["spectrum_gap"] and suite.plot(tmp_path) is None
    assert "spectrum_gap" in measure(suite, REAL[:8]) and "spectrum_gap" not in suite.details


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((9, 5), np.float32)}, r"features \(9, 5\), but rows of 6"),
        ({"grey_spectrum": np.ones(12)}, "images of 32 x 32 pixels have 23 rings"),
    ],
)
def test_a_reference_with_wrong_arrays_is_refused_before_the_first_image(fake_networks, tmp_path, change, message):
    path = write_reference(tmp_path / "r.npz", FakeInception, **(everything(FakeInception) | change))
    with pytest.raises(MetricError, match=message):
        MetricSuite(("fid",), "digits", SIZE, 8, "cpu", path)


@pytest.mark.parametrize("named", [True, False])
def test_the_spectrum_gap_needs_no_network(tmp_path, monkeypatch, named):
    """Class agreement alone: the file that was named, or one in its usual place, gives the spectrum."""
    monkeypatch.setattr(metrics_module, "default_reference", lambda dataset, size, name: tmp_path / f"{name}.npz")
    path = tmp_path / "effnet_lite0.npz"
    spectrum = grey_spectrum(REAL).mean(0).numpy()
    write_reference(path, FakeEffNet, grey_spectrum=2 * spectrum)
    suite = MetricSuite(("class_agreement",), "digits", SIZE, len(REAL), "cpu", path if named else None)
    assert suite.warnings == [] and suite.streams["grey_spectrum"] == len(spectrum)
    values = suite.compute(suite.extract(REAL), torch.zeros(len(REAL)))
    assert values["spectrum_gap"] == pytest.approx(np.log(2), rel=1e-6)
    assert suite.describe()["references"]["spectrum_gap"]["file"] == str(path)


def test_without_a_reference_there_is_no_spectrum_gap(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module, "default_reference", lambda dataset, size, name: tmp_path / f"{name}.npz")
    suite = MetricSuite(("class_agreement",), "digits", SIZE, 10, "cpu")
    assert list(suite.streams) == ["digit_8x8"] and suite.describe()["references"] == {}
    write_reference(tmp_path / "plain.npz", FakeEffNet)
    suite = MetricSuite(("class_agreement",), "digits", SIZE, 10, "cpu", tmp_path / "plain.npz")
    assert list(suite.streams) == ["digit_8x8"] and "not used" in suite.warnings[0]
    with pytest.raises(MetricError, match="do not exist"):
        MetricSuite(("class_agreement",), "digits", SIZE, 10, "cpu", tmp_path / "nowhere.npz")
    write_reference(tmp_path / "small.npz", FakeEffNet, grey_spectrum=np.ones(3))
    with pytest.raises(MetricError, match="rings"):
        MetricSuite(("class_agreement",), "digits", SIZE, 10, "cpu", tmp_path / "small.npz")
