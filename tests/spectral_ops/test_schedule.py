"""Noise schedules against root finding, published gaps and their own distributions of times.

Shapes: B spectra, K rings, M times; grids (S + 1,) or (S + 1, B).
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from sampler import sample, uniform_grid
from spectral_ops.schedule import (
    VARIANTS,
    FitDistribution,
    GlobalTimeSampler,
    TightSchedule,
    latest_time,
    noise_bounds,
    strictly_increasing,
)
from spectral_ops.spectrum import QUANTISATION, spectrum_gap
from tests.golden_inputs import CIFAR10_SPECTRUM
from util.rng import CounterRNG

P, CENTRED = (torch.tensor(CIFAR10_SPECTRUM[key], dtype=torch.float64) for key in ("P", "P_centred"))
ONE_HOT = torch.zeros(23, dtype=torch.float64).index_fill(0, torch.tensor([7]), 1024 / 24)
EXTREME = {  # (P_k, P^c_k) of one image each
    "cifar10": (P, CENTRED),
    "constant, the mean image": (torch.zeros(23), torch.zeros(23)),
    "constant, bright": (torch.zeros(23).index_fill(0, torch.tensor([0]), 1024.0),) * 2,
    "white noise": (torch.ones(23),) * 2,
    "one frequency": (ONE_HOT, ONE_HOT),
    "one frequency but for the mean": (ONE_HOT, torch.zeros(23)),
    "rising": (torch.arange(23).double().exp() * 1e-6,) * 2,
    "astronomic": (P * 1e30, CENTRED * 1e30),
}
COLUMNS = [("euler", steps) for steps in (10, 20, 32, 50, 100)] + [("heun", steps) for steps in (8, 16, 32)]
PUBLISHED = {
    "uniform": (1.309, 0.729, 0.466, 0.295, 0.143, 1.326, 0.698, 0.315),
    "logsnr": (0.549, 0.256, 0.162, 0.109, 0.064, 0.324, 0.048, 0.017),
    "frequency": (0.579, 0.290, 0.191, 0.133, 0.079, 0.285, 0.078, 0.041),
    "mixed": (0.787, 0.433, 0.298, 0.211, 0.128, 0.512, 0.184, 0.060),
    "power": (1.505, 0.971, 0.734, 0.565, 0.374, 1.235, 0.716, 0.411),
}


def cifar10(variant="mixed", **settings):
    return TightSchedule.of_spectrum(P, CENTRED, 32, variant=variant, **settings)


def by_root_finding(u, variant, delta=0.1):
    """Lambda(u) of CIFAR-10 as defined, one u at a time."""
    power, counts = np.array(CIFAR10_SPECTRUM["P"]), np.array(CIFAR10_SPECTRUM["modes_per_ring"])
    low = -math.log(max(CIFAR10_SPECTRUM["P_centred"]) / delta)
    high = -math.log(max((2 / 255) ** 2 / 12, delta / (1 - delta) * min(power[1:])))
    if variant == "logsnr":
        return low + u * (high - low)
    if variant == "mixed":
        return sum(by_root_finding(u, v, delta) for v in ("frequency", "power")) / 2
    weight = (np.ones(23) if variant == "frequency" else counts * power) * (np.arange(23) > 0)

    def q(lam):
        return (weight / (1 + np.exp(-lam) / power)).sum()

    target = q(low) + u * (q(high) - q(low))
    return scipy.optimize.brentq(lambda lam: q(lam) - target, low - 1e-9, high + 1e-9, xtol=1e-13)


def given(*columns):
    """Random numbers that are these columns (B,), in a sampler's order."""
    return SimpleNamespace(uniform=lambda stream, n: torch.stack(columns, dim=1))


def time_of(lam):
    return torch.sigmoid(torch.as_tensor(lam, dtype=torch.float64) / 2)


# --- Lambda


def test_bounds_of_cifar10_and_what_they_neglect():
    """Starting at nu_max ignores ln(1 + d) / 2 nats in the strongest ring, and stopping at nu_min leaves a gain of
    d unfiltered in the weakest: Wiener gains d / (1 + d) and 1 - d."""
    nu_min, nu_max = noise_bounds(CENTRED.max(), P[1:].min(), 0.1)
    assert float(nu_min) == pytest.approx(CIFAR10_SPECTRUM["P"][22] / 9) and float(nu_max) == pytest.approx(
        761.9087, abs=1e-3
    )
    assert 0.5 * math.log1p(float(CENTRED.max() / nu_max)) == pytest.approx(math.log(1.1) / 2)
    assert float(P[1:].min() / (P[1:].min() + nu_min)) == pytest.approx(0.9)
    grid = cifar10().sampling_grid(50)
    assert float(grid[1]) == pytest.approx(0.0350, abs=5e-5) and float(grid[-2]) == pytest.approx(0.9950, abs=5e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5])
def test_lambda_and_cdf_equal_root_finding(variant, delta):
    u, schedule = torch.linspace(0, 1, 41, dtype=torch.float64), cifar10(variant, delta=delta)
    expected = [by_root_finding(float(x), variant, delta) for x in u]
    np.testing.assert_allclose(schedule.log_snr(u[None])[0], expected, atol=1e-8)
    np.testing.assert_allclose(schedule.cdf(time_of(expected)), u, atol=1e-7)
    assert schedule.cdf(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EXTREME)
def test_lambda_is_monotone_and_the_cdf_its_inverse_for_any_spectrum(variant, name):
    schedule = TightSchedule.of_spectrum(*EXTREME[name], 32, variant=variant)
    u = torch.linspace(0, 1, 501, dtype=torch.float64)
    lam = schedule.log_snr(u[None])
    assert lam.isfinite().all() and (lam.diff() >= 0).all()
    assert float(lam[0, 0]) == float(schedule.low) and float(lam[0, -1]) == float(schedule.high)
    if name != "astronomic":  # there Q is flat for float64
        inside = schedule.low + (schedule.high - schedule.low) * u
        assert (schedule.log_snr(schedule.cdf(time_of(inside[0]))[None]) - inside).abs().max() < 1e-5


# --- grids


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EXTREME)
def test_grids_of_any_spectrum_increase_strictly_and_times_are_inside(variant, name):
    for delta, noise_scale in ((1e-6, 1.0), (1 - 1e-9, 1.0), (0.1, 1e-3), (0.1, 1e6)):
        settings = {"variant": variant, "delta": delta, "noise_scale": noise_scale}
        schedule = TightSchedule.of_spectrum(*EXTREME[name], 32, **settings)
        for steps in (3, 1000):
            grid = schedule.sampling_grid(steps)
            assert grid.shape == (steps + 1,) and grid.dtype == torch.float32
            assert float(grid[0]) == 0 and float(grid[-1]) == 1 and (grid.diff() > 0).all()
        t = schedule.time(torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24]))
        assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_grid_follows_the_formula(variant):
    grid = cifar10(variant).sampling_grid(12)
    inner = [float(time_of(by_root_finding((i - 1) / 10, variant))) for i in range(1, 12)]
    np.testing.assert_allclose(grid, [0, *inner, 1], atol=1e-7)
    assert cifar10(variant).sampling_grid(3)[1:3].equal(grid[[1, 11]])


def test_equal_times_are_moved_apart_by_the_least_possible():
    grid = torch.tensor([[0, 0.5, 0.5, 0.5, 1], [0, 0, 0, 1, 1], [0, 0.2, 0.4, 0.6, 1]]).T
    out = strictly_increasing(grid)
    assert (out.diff(dim=0) > 0).all() and (out - grid).abs().max() < 2e-7
    assert out[:, 2].equal(grid[:, 2]) and out[[0, -1]].equal(grid[[0, -1]])


@pytest.mark.parametrize("noise_scale", [0.5, 1.0, 4.0])
def test_no_grid_has_a_later_time(noise_scale):
    latest = latest_time(noise_scale)
    for name, spectrum in EXTREME.items():
        last = float(TightSchedule.of_spectrum(*spectrum, 32, noise_scale=noise_scale).sampling_grid(50)[-2])
        assert last <= latest and (name != "constant, bright" or last == pytest.approx(latest, abs=1e-6))


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        *((lambda steps=steps: cifar10().sampling_grid(steps), f"{steps} sampling steps") for steps in (2, 0, -5)),
        *((lambda d=d: cifar10(delta=d), "above 0 and below 1") for d in (0.0, 1.0, -0.1, math.nan)),
        *((lambda s=s: cifar10(noise_scale=s), "noise_scale") for s in (0.0, -1.0, math.nan)),
        *((lambda b=b: TightSchedule.of_spectrum(P, P * b, 32), "negative") for b in (math.nan, math.inf, -1.0)),
        (lambda: cifar10("loud"), "'loud' must be one of"),
        (lambda: TightSchedule.of_spectrum(P[:9], CENTRED[:9], 32), "23 rings"),
    ],
)
def test_refused_settings(request_, sentence):
    with pytest.raises(ValueError, match=sentence):
        request_()


# --- exact sampling of Gaussian data


def recursion(power, grid, solver, t_eps=0.0):
    """Gap after exact sampling of modes of `power`, by the amplitude's recursion in float64."""
    amplitude = np.ones_like(power)

    def a(t):
        return (t * power / (t**2 * power + (1 - t) ** 2) - 1) / max(1 - t, t_eps)

    for i, (t, t_next) in enumerate(itertools.pairwise(grid.double().tolist())):
        h = t_next - t
        if solver == "heun" and i < len(grid) - 2:
            amplitude *= 1 + h / 2 * (a(t) + a(t_next) * (1 + h * a(t)))
        else:
            amplitude *= 1 + h * a(t)
    return spectrum_gap(power, amplitude**2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_table_of_gaps(name):
    grid_of = uniform_grid if name == "uniform" else cifar10(name).sampling_grid
    found = [recursion(P.numpy(), grid_of(steps), solver) for solver, steps in COLUMNS]
    np.testing.assert_allclose(found, PUBLISHED[name], atol=6e-4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("t_eps", [0.0, 0.05])
def test_the_sampler_along_these_grids_has_the_gap_of_the_recursion(solver, t_eps):
    def velocity(z, t):
        t = t.double()[:, None, None, None]
        return (t * P / (t**2 * P + (1 - t) ** 2) - 1) / (1 - t).clamp_min(t_eps) * z

    grid = TightSchedule.of_spectrum(torch.stack([P, P**0.5]), torch.stack([CENTRED, P]), 32).sampling_grid(13)
    out = sample(velocity, torch.ones(2, 1, 1, 23, dtype=torch.float64), grid, solver)
    for i in range(2):  # each sample along its own
        expected = recursion(P.numpy(), grid[:, i], solver, t_eps)
        assert spectrum_gap(P, out[i].flatten().square()) == pytest.approx(expected, abs=1e-6)


# --- training times


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("mix", [0.0, 0.1])
def test_training_times_have_their_distribution(variant, mix):
    sampler = GlobalTimeSampler(variant and cifar10(variant), mix)
    t = sampler.sample(CounterRNG(0, 0, torch.arange(1500)))
    assert t.dtype == torch.float32 and t.shape == (1500,) and t.min() > 0 and t.max() < 1
    assert sampler.for_images(torch.zeros(1500, 3, 1, 1)) is sampler
    assert scipy.stats.kstest(t.numpy(), lambda x: sampler.cdf(torch.from_numpy(x)).numpy()).pvalue > 0.01
    other = GlobalTimeSampler(cifar10("power" if variant != "power" else "frequency"), mix)
    assert scipy.stats.kstest(t.numpy(), lambda x: other.cdf(torch.from_numpy(x)).numpy()).pvalue < 1e-6


def test_a_part_of_the_times_is_uniform():
    u, v = torch.tensor([0.3, 0.3]), torch.tensor([0.05, 0.2])
    t = GlobalTimeSampler(cifar10(), 0.1).sample(given(u, v))
    assert t.tolist() == pytest.approx([0.3, float(cifar10().time(u)[1])]) and abs(float(t[1]) - 0.3) > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_schedules_of_a_batch_are_those_of_its_samples(variant):
    power, centred = torch.stack([P, 1 + 0 * P]), torch.stack([CENTRED, 1 + 0 * P])
    rng = given(torch.tensor([0.3, 0.7]), torch.tensor([0.9, 0.9]))
    schedule = TightSchedule.of_spectrum(power, centred, 32, variant=variant)
    both, grid = GlobalTimeSampler(schedule), schedule.sampling_grid(9)
    t = both.sample(rng)
    assert grid.shape == (10, 2) and schedule.logsnr_range.shape == (2, 2)
    for i in range(2):
        alone = TightSchedule.of_spectrum(power[i], centred[i], 32, variant=variant)
        one = GlobalTimeSampler(alone)
        assert grid[:, i].equal(alone.sampling_grid(9)) and float(one.sample(rng)[i]) == float(t[i])
        assert float(one.cdf(t)[i]) == pytest.approx(float(both.cdf(t)[i]), abs=1e-9)


# --- schedules of generated images


def test_drawn_fits_have_the_gaussian_of_their_class_and_stay_in_its_range():
    mix = torch.tensor([[0.8, 0, 0, 0], [0.25, 0.2, 0, 0], [0, 0, 1.0, 0], [0.5, 0.1, 0, 1.0]], dtype=torch.float64)
    mean = torch.tensor([[9.0, 9, 9, 9], [2.4, 2.9, 3.5, -9.8]], dtype=torch.float64)
    covariance, wide = (mix @ mix.T).expand(2, 4, 4), torch.full((2, 4), 99.0, dtype=torch.float64)
    y = torch.ones(20_000, dtype=torch.int64)
    drawn = FitDistribution(mean, covariance, -wide, wide).sample(CounterRNG(0, 0, torch.arange(20_000)), y)
    assert (drawn.mean(0) - mean[1]).abs().max() < 0.03 and (drawn.T.cov() - covariance[1]).abs().max() < 0.05
    clamped = FitDistribution(mean, covariance, mean - 1, mean + 1).sample(CounterRNG(0, 0, torch.arange(20_000)), y)
    assert clamped.equal(drawn.clamp(mean[1] - 1, mean[1] + 1))
    one_image = FitDistribution(mean, 0 * covariance, -wide, wide)  # without a Cholesky factor
    assert one_image.sample(CounterRNG(0, 0, torch.arange(3)), y[:3]).equal(mean[[1, 1, 1]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_schedule_of_a_fit_is_that_of_the_spectrum_it_describes(variant):
    a, alpha = 2.4, 2.9
    power = torch.cat([torch.tensor([50.0]), (a - alpha * torch.arange(1, 23).double().log()).exp()])
    fits = torch.tensor([a, alpha, math.log(50), float(power[22].log())], dtype=torch.float64)
    expected = TightSchedule.of_spectrum(power, power, 32, variant=variant).sampling_grid(16)
    assert (TightSchedule.of_fits(fits, 32, variant=variant).sampling_grid(16) - expected).abs().max() < 1e-6
    weaker = TightSchedule.of_fits(fits - torch.tensor([0, 0, 0, 2.0]), 32, variant=variant)  # a measured last ring
    assert float(weaker.sampling_grid(16)[-2]) > float(expected[-2])
    nu_min = max(QUANTISATION, float(power[22]) * math.exp(-2) / 9)
    assert float(weaker.high) == pytest.approx(-math.log(nu_min))
