"""Spectra: the rings and powers against a naive double loop and closed forms, the gap, and the sums over a data set."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch

from util.spectrum import (
    SpectrumSums,
    fit_power_law,
    grey_spectrum,
    num_rings,
    plot_spectra,
    rapsd,
    ring_power,
    ring_radii,
    ring_ratio,
    rings,
    spectrum_gap,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cifar10_spectrum.json").read_text())
CIFAR10 = Path(__file__).parent.parent / "data" / "cifar10" / "train_images.npy"


def naive_power(channel: np.ndarray) -> list[float]:
    """Ring means of one channel (n, n) by the sum that defines the Fourier transform, one mode at a time."""
    n = len(channel)
    total, count = {}, {}
    place = np.arange(n)
    for u in range(-(n // 2), (n + 1) // 2):
        for v in range(-(n // 2), (n + 1) // 2):
            wave = np.exp(-2j * np.pi * (u * place[:, None] + v * place[None, :]) / n)
            ring = int(np.hypot(u, v))
            total[ring] = total.get(ring, 0) + abs((channel * wave).sum() / n) ** 2
            count[ring] = count.get(ring, 0) + 1
    return [total[k] / count[k] for k in range(len(total))]


def random_images(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (b, 3, n, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 32, 64, 256])
def test_every_mode_is_in_a_ring_and_no_ring_is_empty(n):
    ring, count = rings(n)
    frequency = np.fft.fftfreq(n) * n
    expected = np.floor(np.hypot(frequency[:, None], frequency[None, :]) + 1e-9)
    np.testing.assert_array_equal(ring.numpy(), expected)
    assert count.sum() == n * n and count.min() >= 1 and num_rings(n) == ring.max() + 1


def test_rings_at_32_are_those_of_the_published_spectrum():
    assert rings(32)[1].tolist() == GOLDEN["modes_per_ring"] and num_rings(32) == 23


@pytest.mark.parametrize("n", [7, 12])
def test_powers_equal_a_double_loop(n):
    images = random_images(2, n)
    pixels = images.double().numpy()
    grey = (0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2]) / 255
    np.testing.assert_allclose(grey_spectrum(images), [naive_power(x) for x in grey], rtol=1e-10)
    x = pixels / 127.5 - 1
    expected = np.mean([[naive_power(channel) for channel in image] for image in x], axis=1)
    np.testing.assert_allclose(rapsd(torch.from_numpy(x)), expected, rtol=1e-10)


def test_parseval_over_rings():
    x = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = (ring_power(x) * rings(32)[1]).sum(dim=-1)
    torch.testing.assert_close(total, x.square().sum(dim=(-2, -1)), rtol=1e-12, atol=0)


def test_white_noise_has_power_one_on_every_ring():
    b, c, n = 400, 3, 32
    x = torch.randn(b, c, n, n, generator=torch.Generator().manual_seed(0))
    samples = b * c * rings(n)[1].double() / 2  # of complex modes, each at most once with its mirror image
    deviation = (rapsd(x).mean(dim=0) - 1).abs() * samples.sqrt()
    assert deviation.max() < 4.5  # standard deviations, at least


@pytest.mark.parametrize(("u", "v"), [(0, 0), (0, 1), (3, 4), (1, 1), (16, 0), (16, 16), (9, 13), (15, 7)])
def test_an_image_of_one_frequency_is_in_one_ring(u, v):
    place = torch.arange(32, dtype=torch.float64)
    wave = torch.cos(2 * torch.pi * (u * place[:, None] + v * place[None, :]) / 32)[None, None]
    power = rapsd(wave)[0] * rings(32)[1]
    ring = int(np.hypot(u, v))
    assert power[ring] == pytest.approx(float(wave.square().sum()), rel=1e-12)
    power[ring] = 0
    assert power.abs().max() < 1e-20


@pytest.mark.parametrize("n", [2, 7, 32])
def test_mean_radius_of_each_ring(n):
    frequency = np.arange(-(n // 2), (n + 1) // 2)
    radius = np.hypot(frequency[:, None], frequency[None]).ravel()
    expected = [radius[np.floor(radius + 1e-9) == k].mean() for k in range(num_rings(n))]
    np.testing.assert_allclose(ring_radii(n), expected, rtol=1e-12)
    assert ((ring_radii(n) - torch.arange(num_rings(n))) < 1).all()


def test_fit_of_an_exact_power_law():
    k = torch.arange(23).double()
    power = torch.stack([2.5 * k.clamp_min(1) ** -alpha for alpha in (0.0, 1.5, 2.9)])
    power[:, 0] = 1e6  # has no part in it
    fits = fit_power_law(power)
    np.testing.assert_allclose(fits[:, 0], np.log(2.5), atol=1e-12)
    np.testing.assert_allclose(fits[:, 1], [0, 1.5, 2.9], atol=1e-12)


def test_fit_by_numpy():
    power = np.array(GOLDEN["P"])
    slope, a = np.polyfit(np.log(np.arange(1, 23)), np.log(power[1:]), 1, w=np.arange(1, 23) ** -0.5)
    np.testing.assert_allclose(fit_power_law(torch.from_numpy(power)), [a, -slope], rtol=1e-10)
    assert fit_power_law(torch.zeros(4, 23)).isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 2.0, 3.0])
def test_alpha_of_a_power_law_field(alpha):
    """P_k of a Gaussian field over P is chi^2 of d = 3 n_k degrees of freedom, divided by d. The mean of its logarithm
    is psi(d / 2) - ln(d / 2): -.04 in ring 1, which has 8 modes and most weight, and -.37 in the last, which has one
    mode. That shifts the mean of alpha by -.005. What remains is sampling error: the variance of the logarithm is
    psi'(d / 2), so alpha varies by .103 from image to image, and four standard errors of 400 images are .021."""
    n, b = 32, 400
    ring, count = rings(n)
    white = torch.randn(b, 3, n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    amplitude = ring.clamp_min(1).double() ** (-alpha / 2)
    field = torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real
    found = fit_power_law(rapsd(field))[:, 1]
    half = 1.5 * count.double().numpy()
    bias = np.exp(scipy.special.psi(half) - np.log(half))
    expected = float(fit_power_law(torch.arange(23).double().clamp_min(1) ** -alpha * torch.from_numpy(bias))[1])
    assert expected - alpha == pytest.approx(-0.005, abs=1e-3)
    assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / b**0.5)
    slopes = fit_power_law(torch.eye(23, dtype=torch.float64).exp())[:, 1].numpy()  # of alpha, in each ln P_k
    spread = np.sqrt((slopes[1:] ** 2 * scipy.special.polygamma(1, half[1:])).sum())
    assert spread == pytest.approx(0.1025, abs=5e-4) and float(found.std()) == pytest.approx(spread, rel=0.15)


def test_a_spectrum_depends_on_its_image_alone():
    images = random_images(5, 16)
    assert torch.equal(grey_spectrum(images)[3:4], grey_spectrum(images[3:4]))


def test_gap_and_ratio():
    p = np.array(GOLDEN["P"])
    assert spectrum_gap(p, p) == 0
    assert spectrum_gap(p, torch.from_numpy(2 * p)) == pytest.approx(np.log(2))
    q = p.copy()
    q[5], q[22] = p[5] / np.e, p[22] * np.e**2
    assert spectrum_gap(p, q) == spectrum_gap(q, p) == pytest.approx(3 / 23)
    np.testing.assert_allclose(ring_ratio(p, q)[[0, 5, 22]], [1, 1 / np.e, np.e**2])
    assert not np.isfinite(spectrum_gap(p, 0 * p))
    with pytest.raises(ValueError, match="same rings"):
        spectrum_gap(p, p[:5])


def test_uniform_euler_steps_reproduce_the_published_gap():
    """The gap of a perfect denoiser of Gaussian data with CIFAR-10's spectrum: .295 at 50 Euler steps, .143 at 100."""
    p = np.array(GOLDEN["P"])
    for steps, expected in ((50, 0.295), (100, 0.143)):
        amplitude = np.ones_like(p)
        for t in np.arange(steps) / steps:
            amplitude *= 1 + (t * p - (1 - t)) / (t**2 * p + (1 - t) ** 2) / steps
        assert spectrum_gap(p, amplitude**2) == pytest.approx(expected, abs=5e-4)


def test_sums_equal_the_means_over_all_images_for_any_batches_and_merges():
    images = random_images(11, 16) // 2 + torch.arange(16, dtype=torch.uint8) * 5  # with a mean image
    parts = [SpectrumSums(16) for _ in range(3)]
    for part, rows in zip(parts, (images[:0], images[:7], images[7:]), strict=True):
        for i in range(0, len(rows), 3):
            part.update(rows[i : i + 3])
    total = SpectrumSums(16)
    for part in parts:
        total.merge(total.unpack(part.pack()))
    found = total.finish()
    x = images.double() / 127.5 - 1
    expected = {
        "grey_spectrum": grey_spectrum(images).mean(dim=0),
        "rapsd": rapsd(x).mean(dim=0),
        "rapsd_centred": rapsd(x - x.mean(dim=0)).mean(dim=0),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)
    assert found["rapsd"][0] > 2 * found["rapsd_centred"][0]


def test_refusals():
    for bad in (torch.zeros(1, 3, 8, 8), random_images(1, 8)[:, :2], random_images(1, 8)[0]):
        with pytest.raises(ValueError, match="takes uint8"):
            grey_spectrum(bad)
    with pytest.raises(ValueError, match="square"):
        rapsd(torch.zeros(1, 3, 8, 9))


def test_plot_is_a_picture_that_depends_on_both_spectra(tmp_path):
    p = np.array(GOLDEN["P"])
    paths = [plot_spectra(p, q, tmp_path / "new" / name, "title") for q, name in ((p, "a.png"), (p**0.9, "b.png"))]
    contents = [path.read_bytes() for path in paths]
    assert all(content.startswith(b"\x89PNG") for content in contents) and contents[0] != contents[1]


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.exists(), reason="needs data/cifar10 (`make cifar10`)")
def test_cifar10_spectrum_is_the_published_one():
    images = np.load(CIFAR10, mmap_mode="r")  # (50000, 32, 32, 3)
    sums = SpectrumSums(32)
    for i in range(0, len(images), 1000):
        sums.update(torch.from_numpy(np.array(images[i : i + 1000])).permute(0, 3, 1, 2))
    found = sums.finish()
    assert sums.count == 50_000
    np.testing.assert_allclose(found["rapsd"], GOLDEN["P"], rtol=1e-5)
    np.testing.assert_allclose(found["rapsd_centred"], GOLDEN["P_centred"], rtol=1e-5)
