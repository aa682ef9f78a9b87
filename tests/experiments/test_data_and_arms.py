"""Data with a known best denoiser, arms, and what is measured of a trained network."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch

from denoiser import Denoiser
from experiments import data, photographs, results, run, synthetic, train
from experiments.arms import ARMS, input_operator
from experiments.train import Run
from spectral_forcing import dct_rings

pytestmark = pytest.mark.usefixtures("cifar10_of_noise")
N = synthetic.SIZE


# --- data whose best denoiser is known ----------------------------------------------------------------------------


def covariance(images: synthetic.GaussianImages, c: int) -> np.ndarray:
    basis, variance = images.basis[c].numpy(), images.variance[c].numpy()
    return (basis * variance) @ basis.T


def test_essential_is_low_modes_and_their_product_with_a_carrier():
    """Built image by image with scipy: each low mode, plus its product with the carrier, scaled to 30% of all power."""
    images, c = data.open_data("essential"), 1
    k = np.maximum(np.hypot(*np.mgrid[:N, :N]) / 2, 0.5)
    power = k**-3.0
    power *= 0.7 * synthetic.VARIANCE / power.mean()
    carrier = np.zeros((N, N))
    carrier[synthetic.CARRIERS[c]] = 1
    carrier = scipy.fft.idctn(carrier, norm="ortho")
    low = scipy.fft.idctn(
        np.sqrt(power)[:, :, None, None] * np.eye(N * N).reshape(N, N, N, N), axes=(2, 3), norm="ortho"
    )
    copied = np.zeros_like(low)
    copied[:8, :8] = low[:8, :8] * carrier
    copied *= math.sqrt(0.3 * synthetic.VARIANCE / (copied**2).sum((0, 1)).mean())
    total = (low + copied).reshape(N * N, N * N)
    np.testing.assert_allclose(covariance(images, c), total.T @ total, atol=1e-10)


def test_noise_has_the_power_of_essential_in_each_mode_and_no_correlation():
    noise, essential = data.open_data("noise"), data.open_data("essential")
    for found, expected in zip(noise.mode_power(), essential.mode_power(), strict=True):
        torch.testing.assert_close(found, expected)
    modes = [
        scipy.fft.dctn(covariance(x, 0).reshape(N, N, N, N), axes=(0, 1), norm="ortho") for x in (noise, essential)
    ]
    modes = [scipy.fft.dctn(m, axes=(2, 3), norm="ortho").reshape(N * N, N * N) for m in modes]
    off = [np.abs(m - np.diag(np.diag(m))).max() for m in modes]
    assert off[0] < 1e-10 and off[1] > 1e-3
    high = noise.variance[0].view(N, N)[16:32, 8:24].sum() / noise.variance[0].sum()
    assert 0.3 < high < 0.32  # the copy is there, and a little of the low part


def test_pictures_of_the_two_splits_come_from_other_parts_of_the_photographs(monkeypatch):
    """Of photographs whose left two thirds are black, and whose right third is white."""
    whole = np.zeros((300, 600, 3), np.uint8)
    whole[:, 400:] = 255
    monkeypatch.setattr(photographs, "photographs", lambda: [whole, 255 - whole])
    for split, values in (("train", [0, 255]), ("test", [255, 0])):
        pictures = photographs.cut(split, 40, 64)
        assert pictures.shape == (40, 3, 64, 64)
        assert [np.unique(part).tolist() for part in (pictures[::2], pictures[1::2])] == [[v] for v in values]


def test_pictures_are_those_of_the_seven_photographs_and_the_same_each_time():
    assert [min(p.shape[:2]) for p in photographs.photographs()] == [512, 300, 400, 500, 427, 427, 427]
    assert all(p.shape[1] - 2 * p.shape[1] // 3 >= photographs.LARGEST for p in photographs.photographs())
    first, again = (photographs.cut("train", 14, 64) for _ in range(2))
    assert np.array_equal(first, again) and not np.array_equal(first, photographs.cut("test", 14, 64))
    assert data.open_data("photographs").batch(0, 0, 8)[0].shape == (8, 3, 64, 64)


@pytest.mark.parametrize("kind", ["power2", "floor", "essential"])
def test_posterior_mean_is_gaussian_conditioning(kind):
    images = data.open_data(kind)
    x, y = images.batch(0, 0, 6)
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    z = t.view(-1, 1, 1, 1) * x + (1 - t.view(-1, 1, 1, 1)) * e
    found = images.posterior_mean(z, t, y)
    for i in range(6):
        c, time = covariance(images, y[i]), float(t[i])
        mean = images.mean[y[i]].numpy()
        gain = time * c @ np.linalg.pinv(time**2 * c + (1 - time) ** 2 * np.eye(N * N), hermitian=True)
        expected = mean + gain @ (z[i].double().numpy().ravel() - time * mean)
        np.testing.assert_allclose(found[i].numpy().ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_batches_and_the_least_loss(kind):
    images = data.open_data(kind)
    x, y = images.batch(3, 7, 512)
    again, _ = images.batch(3, 7, 300)
    torch.testing.assert_close(x[:300], again, rtol=0, atol=1e-5)  # several threads sum in another order
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert not torch.equal(x, images.batch(3, 8, 512)[0]) and not torch.equal(x, images.batch(4, 7, 512)[0])
    centred = x.double().flatten(1) - images.mean[y]
    assert centred.square().mean().item() == pytest.approx(images.variance.mean().item(), rel=0.1)  # mostly few modes
    assert x.double().flatten(1).square().mean().item() == pytest.approx(0.35 + 0.01 * (kind == "floor"), rel=0.1)
    t = torch.full((512,), 0.6)
    z = 0.6 * x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    error = (images.posterior_mean(z, t, y) - x).square().mean().item()
    assert error == pytest.approx(images.least_loss(t[:1]).item(), rel=0.05)


def test_names():
    with pytest.raises(ValueError, match="'power4' must be one of power1"):
        synthetic.GaussianImages("power4")
    with pytest.raises(ValueError, match="cifar10"):
        data.open_data("cifar100")


# --- arms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["power3", "cifar10"])
def test_controls_have_the_loudness_that_they_promise(name):
    x, _ = data.open_data(name).batch(1, 0, 500)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for value in (0.1, 0.5, 0.9):
        t = torch.full((500,), value)
        z = value * x + (1 - value) * e
        scale, linear = (input_operator(ARMS[arm], name)(z, t).square().mean().item() for arm in ("scale", "linear"))
        assert scale == pytest.approx(linear, rel=0.06)
        for arm in ("unit", "linear_unit", "snr0.1_unit"):
            seen = input_operator(ARMS[arm], name)(z, t)
            assert seen.square().mean().sqrt().item() == pytest.approx(1, rel=0.03)
    ratio = input_operator(ARMS["scale"], name)(z, t) / z
    assert ratio.amax().item() == pytest.approx(ratio.amin().item(), rel=1e-4)


def test_wiener_gain_is_the_best_linear_prediction():
    """t times the gain of x: with it the best prediction is t z / ... of each mode; 0 at t = 0 and 1 at t = 1."""
    operator, (variance, _) = input_operator(ARMS["wiener"], "power2"), data.open_data("power2").mode_power()
    z = torch.randn(3, 1, N, N, generator=torch.Generator().manual_seed(0))
    seen = operator(z, torch.tensor([0.0, 0.4, 1.0]))
    assert seen[0].abs().max() == 0 and torch.allclose(seen[2], z[2], atol=1e-5)
    power = variance[0].numpy() * (0.4 / 0.6) ** 2
    expected = scipy.fft.idctn(scipy.fft.dctn(z[1, 0].numpy(), norm="ortho") * power / (1 + power), norm="ortho")
    np.testing.assert_allclose(seen[1, 0].numpy(), expected, atol=1e-5)


def test_arms_start_from_the_same_weights():
    plain = train.build_denoiser(Run("cifar10", 8, "plain", 3))
    x = torch.randn(2, 3, N, N)
    for arm in ARMS:
        other = train.build_denoiser(Run("cifar10", 8, arm, 3))
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name))
        if not {"input", "unit", "levels"} & ARMS[arm].keys():  # the correction of blocks is zero at first
            t, y = torch.tensor([0.3, 0.8]), torch.tensor([1, 2])
            assert torch.equal(other.velocity(x, t, y), plain.velocity(x, t, y))
    assert not torch.equal(
        next(plain.parameters()), next(train.build_denoiser(Run("cifar10", 8, "plain", 4)).parameters())
    )
    with pytest.raises(ValueError, match="'blur'"):
        input_operator({"input": "blur"}, "power2")


# --- what is measured ---------------------------------------------------------------------------------------------


def test_rings_add_up_to_the_mean_square():
    residual = torch.randn(4, 3, N, N)
    modes = dct_rings(N)[1]
    rings = train.by_ring(residual)
    assert (rings * modes).sum().item() / N**2 == pytest.approx(residual.square().mean().item(), rel=1e-5)
    wave = torch.zeros(N, N)
    wave[6, 8] = 1  # hypot(6, 8) / 2 = 5
    wave = torch.from_numpy(scipy.fft.idctn(wave.numpy(), norm="ortho"))
    assert (train.by_ring(wave[None, None]) > 1e-9).nonzero().tolist() == [[5]]


class Best(torch.nn.Module):
    """Predicts the posterior mean, plus a constant."""

    def __init__(self, images, offset=0.0):
        super().__init__()
        self.images, self.offset = images, offset

    def forward(self, z, t, y):
        return (self.images.posterior_mean(z, t, y) + self.offset).float()


def test_excess_is_the_distance_to_the_best_prediction():
    settings = Run("essential", 16, "plain", 0, images=8, times=4)
    images = data.open_data("essential")
    best = train.measure(Denoiser(Best(images)), settings)
    assert np.abs(best["excess"]).max() < 1e-9
    off = results.table_of({"run": asdict(settings), **train.measure(Denoiser(Best(images, 0.1)), settings)})  # (T, K)
    times = (np.arange(4) + 0.5) / 4
    np.testing.assert_allclose(off.sum(1), 0.01 / (1 - times) ** 2, rtol=1e-3)
    assert off[:, 0].sum() == pytest.approx(off.sum(), rel=1e-4)  # a constant is of ring 0


def test_loss_is_that_of_training():
    settings = Run("cifar10", 16, "linear", 0, images=12, times=5)
    denoiser = train.build_denoiser(settings).eval()
    found = train.measure(denoiser, settings)
    assert found["least"] is None
    x, y = data.open_data("cifar10").held_out(12)
    t = torch.full((12,), 0.5)
    noise = train.CounterRNG(0, 2, torch.arange(12)).normal("validation", x[0].numel()).view_as(x)
    with torch.no_grad():
        expected = denoiser(x, y, t, noise).item()
    assert results.table_of({"run": asdict(settings), **found}).sum(1)[2] == pytest.approx(expected, rel=1e-4)


def test_training_is_reproducible_and_says_when_it_diverges():
    settings = Run("power2", 16, "linear", 1, steps=6, images=8, times=4)
    assert run.do(settings)["excess"] == run.do(settings)["excess"]
    assert run.do(settings)["excess"] != run.do(replace(settings, seed=2))["excess"]
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        train.train(replace(settings, lr=math.inf, steps=7, batch=2))


def test_density_is_that_of_training_times():
    t = torch.sigmoid(-0.8 + 0.8 * torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    counted = torch.histc(t, 20, 0, 1) / len(t)
    torch.testing.assert_close(train.density(20).float(), counted, atol=3e-3, rtol=0)


def test_latents_are_drawn_from_their_moments():
    latents = data.open_data("cifar10_latents")
    x, _ = latents.batch(3, 5, 64)
    assert x.shape == (64, 4, 8, 8) and torch.equal(x, latents.batch(3, 5, 64)[0])
    assert not torch.equal(x, latents.batch(4, 5, 64)[0])
    held, _ = latents.held_out(5000)
    moments = latents._load("test")[0][torch.from_numpy(data.random_order(5200, seed=0)[:5000].copy()), 0].float()
    noise = (held - moments[:, 0]) / moments[:, 1]
    assert noise.mean().abs() < 0.01 and noise.std() == pytest.approx(1, abs=0.01)
    variance, second = latents.mode_power()
    assert variance.shape == second.shape == (4, 8, 8)
    expected = (1 / np.maximum(np.hypot(*np.mgrid[:8, :8]), 1)) ** 2 + 0.01
    np.testing.assert_allclose(variance.mean(0), expected, rtol=0.15)
