"""Spectrum files and the command that measures them, against numpy image by image: util/spectrum_file.py,
util/measure_spectrum.py."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spectral_schedule import QUANTISATION, TightSchedule, TrainingTimes
from tests.conftest import Payload, smooth_images
from util import measure_spectrum
from util.cifar10 import CLASS_NAMES
from util.data import Images
from util.errors import UserError
from util.measure_spectrum import main, measure
from util.spectrum import fit_power_law, num_rings, rapsd
from util.spectrum_file import default_spectrum_file, image_fits, load_spectrum, save_spectrum

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cifar10_spectrum.json").read_text())
CIFAR10 = Path(__file__).parent.parent / "data" / "cifar10" / "train_images.npy"


class Some(Images):
    """Given images in memory."""

    name, in_memory = "digits", True

    def __init__(self, images: torch.Tensor, labels: list[int], classes: int):
        super().__init__(images.shape[-1], [str(c) for c in range(classes)], np.array(labels))
        self.images = images

    def __getitem__(self, i: int):
        return self.images[i], int(self.labels[i])


def some(count=30, size=16, classes=3):
    return Some(smooth_images(count, 0, 1.0, size), [i % classes for i in range(count)], classes)


def fits_by_numpy(images: np.ndarray) -> np.ndarray:
    """FIT of each image, one at a time; np.polyfit weighs residuals, so its weights are square roots."""
    x = images / 127.5 - 1
    n = x.shape[-1]
    frequency = np.fft.fftfreq(n, 1 / n)
    ring = np.floor(np.hypot(frequency[:, None], frequency[None]) + 1e-9).astype(int)
    mean = x.mean(axis=(0, 2, 3))
    out = []
    for image in x:
        modes = np.abs(np.fft.fft2(image, norm="ortho")) ** 2
        power = np.array([modes[:, ring == k].mean() for k in range(ring.max() + 1)])
        k = np.arange(1, len(power))
        slope, a = np.polyfit(np.log(k), np.log(power[1:]), 1, w=np.sqrt(1 / k))
        centred = np.mean([np.fft.fft2(c - m, norm="ortho")[0, 0].real ** 2 for c, m in zip(image, mean, strict=True)])
        out.append([a, -slope, np.log(max(centred, QUANTISATION)), np.log(max(power[1:].min(), QUANTISATION))])
    return np.array(out)


@pytest.fixture(scope="module")
def measured():
    return measure(some(), np.arange(30), batch_size=7)


@pytest.fixture
def written(measured, tmp_path):
    measured.meta["split"] = "train"
    save_spectrum(measured, tmp_path / "s.npz")
    return tmp_path / "s.npz"


def test_fits_and_spectra_by_numpy(measured):
    dataset = some()
    x = dataset.images.double() / 127.5 - 1
    np.testing.assert_allclose(measured.power, rapsd(x).mean(0), rtol=1e-6)
    np.testing.assert_allclose(measured.centred, rapsd(x - x.mean(0)).mean(0), rtol=1e-6)
    np.testing.assert_allclose(measured.level, x.mean((0, 2, 3)), atol=1e-7)
    np.testing.assert_allclose(measured.fits, fits_by_numpy(dataset.images.numpy()), rtol=1e-4, atol=1e-5)
    assert measured.counts.sum() == 256 and measured.labels.tolist() == dataset.labels.tolist()


def test_statistics_of_each_class(measured):
    for c in range(3):
        rows = measured.fits[measured.labels == c].astype(np.float64)
        np.testing.assert_allclose(measured.mean[c], rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(measured.covariance[c], np.cov(rows.T, bias=True), atol=1e-5)
        np.testing.assert_allclose(measured.low[c], np.quantile(rows, 0.01, axis=0), atol=1e-5)
        np.testing.assert_allclose(measured.high[c], np.quantile(rows, 0.99, axis=0), atol=1e-5)


def test_fits_of_a_mirrored_image_and_of_a_constant_one():
    images = smooth_images(4, 3, 1.0, 16)
    images[3] = 77
    x = images.double() / 127.5 - 1
    level = x.mean((2, 3))
    one, two = (image_fits(rapsd(z), level, level.mean(0), 16) for z in (x, x.flip(-1)))
    torch.testing.assert_close(one[:3], two[:3], atol=1e-9, rtol=0)
    assert one.isfinite().all() and float(one[3, 3]) == pytest.approx(np.log(QUANTISATION))
    grids = TightSchedule.of_fits(one, 16).sampling_grid(20)
    assert (grids.diff(dim=0) > 0).all()


def test_the_file_comes_back_as_it_was(measured, written):
    back = load_spectrum(written, 16, 3)
    for field in dataclasses.fields(back):
        if field.type is np.ndarray:
            np.testing.assert_array_equal(getattr(back, field.name), getattr(measured, field.name))
    assert back.meta == measured.meta and len(back.sha256) == 64 and back.describe()["file"] == str(written)
    grid = back.schedule(variant="frequency", delta=0.2).sampling_grid(9)
    p, c = torch.from_numpy(measured.power), torch.from_numpy(measured.centred)
    assert grid.equal(TightSchedule.of_spectrum(p, c, 16, variant="frequency", delta=0.2).sampling_grid(9))
    y = torch.tensor([0, 1, 2, 0])
    drawn = back.distribution().draw(0, range(4), y)
    t = TrainingTimes(TightSchedule.of_fits(drawn, 16)).draw(0, 0, torch.arange(4))
    assert drawn.shape == (4, 4) and t.shape == (4,)


def rewrite(path: Path, **changes) -> Path:
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    meta = json.loads(str(content["meta"])) | changes.pop("meta", {})
    content |= changes | {"meta": np.array(json.dumps({k: v for k, v in meta.items() if v is not None}))}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"power": np.full(12, np.nan)}, "power in .* not finite"),
        ({"centred": np.full(12, np.inf)}, "centred in .* not finite"),
        ({"power": np.zeros(12)}, "power in .* above 0"),
        ({"power": np.ones(13)}, r"power in .* \(13,\); \(12,\) was expected"),
        ({"power": np.array(["a"] * 12)}, "power in .* was expected"),
        ({"mean": np.full((3, 4), np.nan)}, "mean in .* not finite"),
        ({"labels": np.zeros(2)}, "labels in .* was expected"),
        ({"low": None}, "not a spectrum file"),
        ({"meta": {"img_size": 32}}, "img_size 32 and this run has 16"),
        ({"meta": {"class_num": 10}}, "class_num 10 and this run has 3"),
        ({"meta": {"img_size": None}}, r"incomplete \(img_size\)"),
    ],
)
def test_refused_files(written, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        load_spectrum(rewrite(written, **changes), 16, 3)


def test_files_of_another_kind(written, tmp_path):
    with pytest.raises(UserError, match="does not exist: make it with"):
        load_spectrum(tmp_path / "missing.npz", 16, 3)
    with pytest.raises(UserError, match="cannot be read"):
        load_spectrum(tmp_path, 16, 3)
    for content in (b"", b"text", written.read_bytes()[:500]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match="not a spectrum file"):
            load_spectrum(tmp_path / "bad.npz", 16, 3)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(UserError, match="not a spectrum file"):
        load_spectrum(tmp_path / "other.npz", 16, 3)


def test_pickled_content_is_not_loaded(written, tmp_path):
    hostile = np.array([Payload(tmp_path / "marker")] * 12, dtype=object)
    with pytest.raises(UserError, match="not a spectrum file"):
        load_spectrum(rewrite(written, power=hostile), 16, 3)
    assert not (tmp_path / "marker").exists()


def test_images_that_make_no_spectrum():
    with pytest.raises(UserError, match="class 2 has no image among the 2"):
        measure(some(), np.arange(2))
    same = Some(smooth_images(1, 0, 1.0, 16).expand(4, -1, -1, -1), [0, 0, 0, 0], 1)
    with pytest.raises(UserError, match="do not differ"):
        measure(same, np.arange(4))
    with pytest.raises(UserError, match="cannot be written"):
        save_spectrum(measure(some(), np.arange(30)), Path("/dev/null/no.npz"))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(measure_spectrum, "build_dataset", lambda *args: some())
    monkeypatch.setattr(measure_spectrum, "KNOWN", {"digits": type("Known", (), {"img_size": 16})})


def test_the_command(few, tmp_path, capsys):
    out = tmp_path / "new" / "s.npz"
    assert main(["--dataset", "digits", "--out", str(out), "--num_images", "20"]) == 0
    said = capsys.readouterr().out
    assert str(out) in said and "20 images, alpha" in said
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found = load_spectrum(out, 16, 3)
    assert found.meta["num_images"] == len(found.fits) == 20 and found.meta["split"] == "train"
    assert {"date", "command", "commit", "versions", "hardware", "bounds"} <= found.meta.keys()
    expected = measure(some(), found.index)
    np.testing.assert_array_equal(found.fits, expected.fits)
    assert main(["--dataset", "digits", "--out", str(out)]) == 2
    assert "exists already: give --overwrite" in capsys.readouterr().err
    assert main(["--dataset", "digits", "--out", str(out), "--overwrite"]) == 0
    assert load_spectrum(out, 16, 3).meta["num_images"] == 30


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "s.txt"], "must end in .npz"),
        (["--num_images", "31"], "from 1 to 30"),
        (["--num_images", "2"], "has no image among the 2"),
        (["--batch_size", "0"], "at least 1"),
        (["--num_workers", "-1"], "at least 0"),
    ],
)
def test_requests_that_cannot_be(few, here, capsys, words, sentence):
    assert main(["--dataset", "digits", "--out", "s.npz", *words]) == 2
    assert sentence in capsys.readouterr().err and not (here / "s.npz").exists()


def test_default_place():
    path = default_spectrum_file("cifar10", 32)
    assert path.name == "cifar10_32_spectrum.npz" and path.parent.name == "fid_stats"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="needs data/cifar10 (`make cifar10`)")
def test_cifar10_is_the_published_spectrum(tmp_path):
    """And half a minute is enough for it."""
    assert main(["--dataset", "cifar10", "--out", str(tmp_path / "s.npz")]) == 0
    found = load_spectrum(tmp_path / "s.npz", 32, len(CLASS_NAMES))
    np.testing.assert_allclose(found.power, GOLDEN["P"], rtol=1e-10)
    np.testing.assert_allclose(found.centred, GOLDEN["P_centred"], rtol=1e-9)
    assert found.counts.tolist() == GOLDEN["modes_per_ring"] and len(found.fits) == 50_000
    fit, spread = GOLDEN["power_law_fit"], found.meta["fit_mean_and_std"]
    for name in ("a", "alpha"):
        assert spread[name] == pytest.approx([fit[f"{name}_mean"], fit[f"{name}_std"]], rel=1e-6)
    assert found.meta["corr_a_alpha"] == pytest.approx(fit["corr"], rel=1e-6)
    above = np.exp(spread["a"][0] - spread["alpha"][0] * np.log(22)) / found.power[22]
    assert above > 5  # the power law overestimates the last rings: nu_min is measured
    assert num_rings(32) == 23 and fit_power_law(torch.from_numpy(found.power)).shape == (2,)
