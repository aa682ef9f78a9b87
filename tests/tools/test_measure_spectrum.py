"""The command that measures a data set's spectrum, against numpy image by image."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.fft

from spectral_ops.spectrum import QUANTISATION
from tests.conftest import few_digits
from tools import measure_spectrum
from tools.measure_spectrum import main, measure
from util.data.spectrum_file import load_spectrum
from util.errors import UserError

TESTS = Path(__file__).parent.parent
GOLDEN = json.loads((TESTS / "golden" / "cifar10_spectrum.json").read_text())


def test_spectra_fits_and_statistics_are_numpys():
    found, n = measure(few_digits(16), np.arange(40), batch_size=7), 16
    x = np.stack([few_digits(n)[i][0].numpy() for i in range(40)]) / 127.5 - 1
    frequency = np.fft.fftfreq(n, 1 / n)
    ring = np.floor(np.hypot(frequency[:, None], frequency[None]) + 1e-9).astype(int)
    k, level, fits = np.arange(1, ring.max() + 1), x.mean(axis=(0, 2, 3)), []

    def power_of(image):
        modes = np.abs(np.fft.fft2(image, norm="ortho")) ** 2
        return np.array([modes[:, ring == j].mean() for j in range(ring.max() + 1)])

    for image in x:
        power = power_of(image)
        slope, a = np.polyfit(np.log(k), np.log(power[1:].clip(1e-12)), 1, w=np.sqrt(1 / k))
        centred = np.mean((n * (image.mean((1, 2)) - level)) ** 2)
        fits.append([a, -slope, np.log(max(centred, QUANTISATION)), np.log(max(power[1:].min(), QUANTISATION))])
    np.testing.assert_allclose(found.power, np.mean([power_of(image) for image in x], 0), rtol=1e-6)
    np.testing.assert_allclose(found.centred, np.mean([power_of(image) for image in x - x.mean(0)], 0), rtol=1e-6)
    np.testing.assert_allclose(found.level, level, atol=1e-7)
    np.testing.assert_allclose(found.fits, fits, rtol=1e-4, atol=1e-5)
    modes = np.array([scipy.fft.dctn(image, axes=(1, 2), norm="ortho") for image in x - x.mean(0)])  # (40, 3, n, n)
    _, axes = np.linalg.eigh(np.einsum("icuv,iduv->cd", modes, modes))
    dct_ring = (np.hypot(*np.mgrid[:n, :n]) / 2).astype(int)
    along = np.mean(np.einsum("ca,icuv->iauv", axes[:, ::-1], modes) ** 2, 0)
    expected = [[along[a][dct_ring == j].mean() for j in range(dct_ring.max() + 1)] for a in range(3)]
    np.testing.assert_allclose(found.dct_power, expected, rtol=2e-6, atol=1e-9)
    rows = np.array(fits)[found.labels == 3]
    np.testing.assert_allclose(found.mean[3], rows.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.covariance[3], np.cov(rows.T, bias=True), atol=1e-4)
    np.testing.assert_allclose(found.low[3], np.quantile(rows, 0.01, axis=0), atol=1e-4)
    np.testing.assert_allclose(found.high[3], np.quantile(rows, 0.99, axis=0), atol=1e-4)


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure_spectrum, "build_dataset", lambda *args: few_digits(16))
    words = ["--dataset", "digits", "--img_size", "16", "--out", str(tmp_path / "new" / "s.npz")]
    assert main([*words, "--num_images", "35"]) == 0
    assert "s.npz: 35 images, alpha" in capsys.readouterr().out
    found = load_spectrum(words[-1], 16, 10)
    assert found.meta["num_images"] == len(set(found.index)) == 35 and found.meta["split"] == "train"
    assert {"date", "command", "commit", "versions", "hardware", "bounds"} <= found.meta.keys()
    assert np.array_equal(found.fits, measure(few_digits(16), found.index).fits)
    assert main(words) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and load_spectrum(words[-1], 16, 10).meta["num_images"] == 40
    assert main([*words, "--overwrite", "--num_images", "41"]) == 2 and "from 1 to 40" in capsys.readouterr().err


def test_images_that_make_no_spectrum_are_refused(monkeypatch):
    with pytest.raises(UserError, match="Class 2 has no image among the 2"):
        measure(few_digits(16), np.arange(2))
    monkeypatch.setattr(few_digits(16), "num_classes", 1)
    with pytest.raises(UserError, match="do not differ in every ring"):
        measure(few_digits(16), np.zeros(4, dtype=int))


@pytest.mark.slow
@pytest.mark.skipif(not (TESTS.parent / "data" / "cifar10").exists(), reason="needs data/cifar10 (`make cifar10`)")
def test_cifar10_is_the_published_spectrum(tmp_path):
    assert main(["--dataset", "cifar10", "--out", str(tmp_path / "s.npz")]) == 0
    found = load_spectrum(tmp_path / "s.npz", 32, 10)
    np.testing.assert_allclose(found.power, GOLDEN["P"], rtol=1e-10)
    np.testing.assert_allclose(found.centred, GOLDEN["P_centred"], rtol=1e-9)
    assert found.counts.tolist() == GOLDEN["modes_per_ring"] and len(found.fits) == 50_000
    fit, spread = GOLDEN["power_law_fit"], found.meta["fit_mean_and_std"]
    for name in ("a", "alpha"):
        assert spread[name] == pytest.approx([fit[f"{name}_mean"], fit[f"{name}_std"]], rel=1e-6)
    assert found.meta["corr_a_alpha"] == pytest.approx(fit["corr"], rel=1e-6)
    above = np.exp(spread["a"][0] - spread["alpha"][0] * np.log(22)) / found.power[22]
    assert above > 5  # the power law overestimates the last rings: nu_min is measured


def test_ctrl_c_is_a_sentence(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_spectrum, "measure", interrupted)
    assert measure_spectrum.main(["--dataset", "digits", "--out", str(tmp_path / "s.npz")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())
