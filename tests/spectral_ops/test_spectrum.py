"""Spectra against a naive double loop and closed forms, power laws, the spectrum gap, and the sums over a data set."""

import numpy as np
import pytest
import torch

from spectral_forcing import rings
from spectral_ops.spectrum import (
    QUANTISATION,
    fit_power_law,
    grey_spectrum,
    image_fits,
    rapsd,
    ring_ratio,
    spectrum_gap,
)
from tests.golden_inputs import CIFAR10_SPECTRUM


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


@pytest.mark.parametrize("n", [7, 12])
def test_powers_equal_a_double_loop(n):
    images = random_images(2, n)
    pixels = images.double().numpy()
    grey = (0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2]) / 255
    np.testing.assert_allclose(grey_spectrum(images), [naive_power(x) for x in grey], rtol=1e-10)
    x = pixels / 127.5 - 1
    expected = np.mean([[naive_power(channel) for channel in image] for image in x], axis=1)
    np.testing.assert_allclose(rapsd(torch.from_numpy(x)), expected, rtol=1e-10)
    torch.testing.assert_close(grey_spectrum(images)[1:], grey_spectrum(images[1:]), rtol=1e-12, atol=0)


def test_white_noise_has_power_one_on_every_ring():
    b, c, n = 400, 3, 32
    x = torch.randn(b, c, n, n, generator=torch.Generator().manual_seed(0))
    samples = b * c * rings(n)[1].double() / 2  # of complex modes, each at most once with its mirror image
    deviation = (rapsd(x).mean(dim=0) - 1).abs() * samples.sqrt()
    assert deviation.max() < 4.5  # standard deviations, at least


def test_fit_is_numpys():
    power = np.array(CIFAR10_SPECTRUM["P"])
    slope, a = np.polyfit(np.log(np.arange(1, 23)), np.log(power[1:]), 1, w=np.arange(1, 23) ** -0.5)
    np.testing.assert_allclose(fit_power_law(torch.from_numpy(power)), [a, -slope], rtol=1e-10)
    assert fit_power_law(torch.zeros(4, 23)).isfinite().all()


def test_fits_of_a_mirrored_image_are_the_same_and_those_of_a_constant_one_finite():
    x = random_images(4, 16).double() / 127.5 - 1
    x[3] = 0.2
    level = x.mean((2, 3))
    one, two = (image_fits(rapsd(z), level, level.mean(0), 16) for z in (x, x.flip(-1)))
    torch.testing.assert_close(one[:3], two[:3], atol=1e-9, rtol=0)
    assert one.isfinite().all() and float(one[3, 3]) == pytest.approx(np.log(QUANTISATION))


def test_gap_and_ratio():
    p = np.array(CIFAR10_SPECTRUM["P"])
    assert spectrum_gap(p, p) == 0
    assert spectrum_gap(p.tolist(), torch.from_numpy(2 * p)) == pytest.approx(np.log(2))
    q = p.copy()
    q[5], q[22] = p[5] / np.e, p[22] * np.e**2
    assert spectrum_gap(p, q) == pytest.approx(spectrum_gap(q, p)) == pytest.approx(3 / 23)
    np.testing.assert_allclose(ring_ratio(p, q)[[0, 5, 22]], [1, 1 / np.e, np.e**2])
    assert not np.isfinite(spectrum_gap(p, 0 * p))
    with pytest.raises(ValueError, match="same rings"):
        spectrum_gap(p, p[:5])


def test_refused_images():
    for bad in (torch.zeros(1, 3, 8, 8), random_images(1, 8)[:, :2], random_images(1, 8)[0]):
        with pytest.raises(ValueError, match="needs uint8"):
            grey_spectrum(bad)
    with pytest.raises(ValueError, match="square"):
        rapsd(torch.zeros(1, 3, 8, 9))
