"""Noise schedules against root finding, published gaps and their own densities: spectral_schedule.py.

Shapes: B spectra, K rings, M times; grids (S + 1,) or (S + 1, B).
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from experiments.schedule_gaps import COLUMNS, gaps, predicted_gap
from sampler import sample, uniform_grid
from spectral_schedule import (
    QUANTISATION,
    VARIANTS,
    FitDistribution,
    TightSchedule,
    TrainingTimes,
    latest_time,
    noise_bounds,
    sample_t_eps,
    strictly_increasing,
)
from util import rng
from util.rng import Stream
from util.spectrum import num_rings, rings, spectrum_gap

GOLDEN = json.loads((Path(__file__).parent / "golden" / "cifar10_spectrum.json").read_text())
P, CENTRED = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in ("P", "P_centred"))
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
PUBLISHED = {  # of Euler 10, 20, 32, 50, 100 and Heun 8, 16, 32
    "uniform": (1.309, 0.729, 0.466, 0.295, 0.143, 1.326, 0.698, 0.315),
    "logsnr": (0.549, 0.256, 0.162, 0.109, 0.064, 0.324, 0.048, 0.017),
    "frequency": (0.579, 0.290, 0.191, 0.133, 0.079, 0.285, 0.078, 0.041),
    "mixed": (0.787, 0.433, 0.298, 0.211, 0.128, 0.512, 0.184, 0.060),
    "power": (1.505, 0.971, 0.734, 0.565, 0.374, 1.235, 0.716, 0.411),
}


def cifar10(variant="mixed", **settings):
    return TightSchedule.of_spectrum(P, CENTRED, 32, variant=variant, **settings)


def by_root_finding(u, variant, power=GOLDEN["P"], centred=GOLDEN["P_centred"], delta=0.1):
    """Lambda(u) as defined, one u at a time."""
    power, counts = np.array(power), np.array(GOLDEN["modes_per_ring"])
    low = -math.log(max(centred) / delta)
    high = -math.log(max((2 / 255) ** 2 / 12, delta / (1 - delta) * min(power[1:])))
    if variant == "logsnr":
        return low + u * (high - low)
    if variant == "mixed":
        return sum(by_root_finding(u, v, power, centred, delta) for v in ("frequency", "power")) / 2
    weight = (np.ones(23) if variant == "frequency" else counts * power) * (np.arange(23) > 0)

    def q(lam):
        return (weight / (1 + np.exp(-lam) / power)).sum()

    target = q(low) + u * (q(high) - q(low))
    return scipy.optimize.brentq(lambda lam: q(lam) - target, low - 1e-9, high + 1e-9, xtol=1e-13)


# Lambda.


def test_bounds_of_cifar10():
    nu_min, nu_max = noise_bounds(CENTRED.max(), P[1:].min(), 0.1)
    assert float(nu_min) == pytest.approx(GOLDEN["P"][22] / 9) and float(nu_max) == pytest.approx(761.9087, abs=1e-3)
    grid = cifar10().sampling_grid(50)
    assert float(grid[1]) == pytest.approx(0.0350, abs=5e-5) and float(grid[-2]) == pytest.approx(0.9950, abs=5e-5)


def test_what_the_bounds_neglect():
    """Starting at nu_max ignores ln(1 + d) / 2 nats in the strongest ring, and stopping at nu_min leaves a gain of
    d unfiltered in the weakest: Wiener gains d / (1 + d) and 1 - d."""
    nu_min, nu_max = noise_bounds(CENTRED.max(), P[1:].min(), 0.1)
    assert 0.5 * math.log1p(float(CENTRED.max() / nu_max)) == pytest.approx(math.log(1.1) / 2)
    assert float(P[1:].min() / (P[1:].min() + nu_min)) == pytest.approx(0.9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5])
def test_lambda_by_root_finding(variant, delta):
    u = torch.linspace(0, 1, 41, dtype=torch.float64)
    expected = [by_root_finding(float(x), variant, delta=delta) for x in u]
    np.testing.assert_allclose(cifar10(variant, delta=delta).log_snr(u[None])[0], expected, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EXTREME)
def test_the_inverse_is_exact_and_monotone(variant, name):
    """u -> Lambda -> u and lambda -> u -> lambda, the latter where Q is not flat for float64."""
    schedule = TightSchedule.of_spectrum(*EXTREME[name], 32, variant=variant)
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    lam = schedule.log_snr(u[None])
    assert lam.isfinite().all() and (lam.diff() >= 0).all()
    assert float(lam[0, 0]) == float(schedule.low) and float(lam[0, -1]) == float(schedule.high)
    for part in schedule.parts:
        own = part.inverse(u[None])
        assert (part.fraction(own) - u).abs().max() < 1e-9
    if name != "astronomic":
        inside = schedule.low + (schedule.high - schedule.low) * u
        assert (schedule.log_snr(schedule._fraction(inside)) - inside).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_inverse_of_random_spectra(seed):
    """B spectra at once, over eight orders of magnitude and all noise scales in use."""
    g = torch.Generator().manual_seed(seed)
    power = 10 ** (8 * torch.rand(16, 23, generator=g, dtype=torch.float64) - 5)
    centred = power * torch.rand(16, 23, generator=g, dtype=torch.float64)
    for variant in VARIANTS:
        schedule = TightSchedule.of_spectrum(power, centred, 32, variant=variant, noise_scale=(0.25, 1, 2, 4)[seed])
        lam = schedule.low + (schedule.high - schedule.low) * torch.rand(16, 50, generator=g, dtype=torch.float64)
        assert (schedule.log_snr(schedule._fraction(lam)) - lam).abs().max() < 1e-6


def test_frequency_gives_each_ring_the_same_part_of_u():
    """Over all of lambda each ring's Wiener gain rises by 1. Between rings that open at equal distances in lambda lies
    1 / 22 of u, but near the ends, where there are rings on one side alone."""
    power = torch.full((23,), 1.0, dtype=torch.float64)
    power[1:] = torch.logspace(2, -2, 22)
    schedule = TightSchedule.of_spectrum(power, power, 32, variant="frequency", delta=1e-3)
    crossings = torch.tensor([-math.log(float(p)) for p in power[1:]], dtype=torch.float64)
    u = schedule._fraction(crossings[None])[0]  # where each ring is half open
    np.testing.assert_allclose(u.diff()[7:14], 1 / 22, rtol=0.05)
    assert float(u[:11].mean() + u[11:].mean()) == pytest.approx(1, abs=1e-3)


def test_power_divides_the_steps_by_the_power_that_appears():
    """Ring 3 has 20 modes of power .1 and ring 12 has 80 of .01: half open, they have appeared in these parts."""
    power = torch.full((23,), 1e-5, dtype=torch.float64)
    power[3], power[12] = 0.1, 0.01
    schedule = TightSchedule.of_spectrum(power, power, 32, variant="power", delta=1e-3)
    u = schedule._fraction(torch.tensor([[math.log(10), math.log(100)]], dtype=torch.float64))[0]
    expected = [(2 * 0.5 + 0.8 * 1 / 11) / 2.8, (2 * 10 / 11 + 0.8 * 0.5) / 2.8]
    np.testing.assert_allclose(u, expected, atol=2e-3)


def test_ring_0_has_no_weight():
    other = P.clone()
    other[0] = 3
    for variant in VARIANTS:
        one, two = (TightSchedule(p, CENTRED.max(), P[1:].min(), 32, variant) for p in (P, other))
        assert one.sampling_grid(20).equal(two.sampling_grid(20))


def test_noise_of_scale_s_is_data_of_scale_1_over_s():
    scaled = TightSchedule.of_spectrum(P / 4, CENTRED / 4, 32).sampling_grid(20)
    assert cifar10(noise_scale=2.0).sampling_grid(20).sub(scaled).abs().max() < 1e-7
    assert cifar10(noise_scale=1.0).sampling_grid(20).sub(scaled).abs().max() > 0.01


# Grids.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("delta", [1e-6, 0.1, 0.9, 1 - 1e-9])
def test_grids_of_any_spectrum(variant, name, delta):
    schedule = TightSchedule.of_spectrum(*EXTREME[name], 32, variant=variant, delta=delta)
    for steps in (3, 4, 50, 1000):
        grid = schedule.sampling_grid(steps)
        assert grid.shape == (steps + 1,) and grid.dtype == torch.float32
        assert float(grid[0]) == 0 and float(grid[-1]) == 1
        assert grid.isfinite().all() and (grid.diff() > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_grids_that_float32_cannot_tell_apart(variant):
    """At noise of scale 1e4 the last times are 1 within 2e-7."""
    grid = cifar10(variant, noise_scale=1e4).sampling_grid(1000)
    assert (grid.diff() > 0).all() and float(grid[-1]) == 1 and grid.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_grid_by_the_formula(variant):
    grid = cifar10(variant).sampling_grid(12)
    inner = [1 / (1 + math.exp(-by_root_finding((i - 1) / 10, variant) / 2)) for i in range(1, 12)]
    np.testing.assert_allclose(grid, [0, *inner, 1], atol=1e-7)
    assert cifar10(variant).sampling_grid(3)[1:3].equal(grid[[1, 11]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_sample_has_its_own_grid(variant):
    power, centred = torch.stack([P, 1 + 0 * P, P**0.5]), torch.stack([CENTRED, 1 + 0 * P, P])
    together = TightSchedule.of_spectrum(power, centred, 32, variant=variant).sampling_grid(9)
    alone = [
        TightSchedule.of_spectrum(p, c, 32, variant=variant).sampling_grid(9)
        for p, c in zip(power, centred, strict=True)
    ]
    assert together.shape == (10, 3) and (together.diff(dim=0) > 0).all()
    assert together.equal(torch.stack(alone, 1))


def test_equal_times_are_moved_apart_by_the_least_there_is():
    grid = torch.tensor([[0, 0.5, 0.5, 0.5, 1], [0, 0, 0, 1, 1], [0, 0.2, 0.4, 0.6, 1]]).T
    out = strictly_increasing(grid)
    assert (out.diff(dim=0) > 0).all() and (out - grid).abs().max() < 2e-7
    assert out[:, 2].equal(grid[:, 2]) and out[[0, -1]].equal(grid[[0, -1]])


@pytest.mark.parametrize("steps", [2, 1, 0, -5])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps .* at least 3"):
        cifar10().sampling_grid(steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_delta_outside_0_and_1(delta):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        cifar10(delta=delta)


def test_other_refusals():
    with pytest.raises(ValueError, match="variant is 'loud'"):
        cifar10("loud")
    with pytest.raises(ValueError, match="23 rings"):
        TightSchedule.of_spectrum(P[:9], CENTRED[:9], 32)
    for noise_scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="noise_scale"):
            cifar10(noise_scale=noise_scale)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="negative or not finite"):
            TightSchedule.of_spectrum(P, P * bad, 32)
    for mix in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            TrainingTimes(cifar10(), mix)


# Exact sampling of Gaussian data.


def propagate(power, grid, heun, t_eps=0.0):
    """Amplitude of each mode after the solver, by the recursion, in float64."""
    amplitude = np.ones_like(power)

    def a(t):
        return (t * power / (t**2 * power + (1 - t) ** 2) - 1) / max(1 - t, t_eps)

    for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
        h = t_next - t
        if heun and i < len(grid) - 2:
            amplitude *= 1 + h / 2 * (a(t) + a(t_next) * (1 + h * a(t)))
        else:
            amplitude *= 1 + h * a(t)
    return amplitude


def test_the_published_table():
    """Five grids, eight solvers, within .002 and in fact to the last digit."""
    table = gaps(P, CENTRED, 32, 0.1, 0.0)
    assert table.keys() == PUBLISHED.keys() and len(COLUMNS) == 8
    for name, row in PUBLISHED.items():
        np.testing.assert_allclose(table[name], row, atol=6e-4, err_msg=name)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("t_eps", [0.0, 0.05])
def test_gap_of_the_sampler_is_that_of_the_recursion(method, t_eps):
    for schedule in (cifar10("logsnr"), cifar10("mixed")):
        grid = schedule.sampling_grid(13)
        amplitude = propagate(P.numpy(), grid.double().numpy(), method == "heun", t_eps)
        found = predicted_gap(P, grid, method, t_eps)
        assert found == pytest.approx(spectrum_gap(P, amplitude**2), abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "method", "steps", "t_eps", "expected"),
    [
        ("logsnr", "euler", 50, 0.05, 0.27),
        ("logsnr", "heun", 50, 0.0, 0.015),
        ("logsnr", "heun", 50, 0.05, 0.25),
        ("uniform", "euler", 50, 0.05, 0.16),
        ("uniform", "euler", 250, 0.0, 0.06),
        ("uniform", "euler", 250, 0.05, 0.23),
    ],
)
def test_what_the_clamp_of_training_costs(variant, method, steps, t_eps, expected):
    grid = uniform_grid(steps) if variant == "uniform" else cifar10(variant).sampling_grid(steps)
    assert predicted_gap(P, grid, method, t_eps) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_clamp_of_sampling_costs_nothing(method):
    for variant in VARIANTS:
        grid = cifar10(variant).sampling_grid(32)
        clamp = sample_t_eps(0.05, float(grid[-2]))
        assert 0.004 < clamp < 0.005
        assert predicted_gap(P, grid, method, clamp) == pytest.approx(predicted_gap(P, grid, method), abs=1e-12)
        assert predicted_gap(P, grid, method, 1.1 * clamp) != pytest.approx(predicted_gap(P, grid, method), abs=1e-3)
    assert sample_t_eps(0.001, 0.995) == 0.001


@pytest.mark.parametrize("noise_scale", [0.5, 1.0, 4.0])
def test_no_grid_has_a_later_time(noise_scale):
    latest = latest_time(noise_scale)
    for power, centred in EXTREME.values():
        schedule = TightSchedule.of_spectrum(power, centred, 32, noise_scale=noise_scale)
        for steps in (3, 50, 500):
            assert float(schedule.sampling_grid(steps)[-2]) <= latest
    smallest = TightSchedule.of_spectrum(*EXTREME["constant, bright"], 32, noise_scale=noise_scale)
    assert float(smallest.sampling_grid(3)[-2]) == pytest.approx(latest, abs=1e-6)


def test_stopping_at_nu_min_costs_what_is_said():
    """One Euler step from lambda_1 to t = 1 multiplies the power at hand, P t^2 + (1 - t)^2, by (P t / that)^2."""
    t = float(cifar10().sampling_grid(20)[-2])
    p, nu = P.numpy(), ((1 - t) / t) ** 2
    at_hand = p * t**2 + (1 - t) ** 2
    out = at_hand * (1 + (1 - t) * (t * p - (1 - t)) / at_hand) ** 2
    assert np.abs(np.log(p) - np.log(out)).mean() == pytest.approx(np.log1p(nu / p).mean(), rel=1e-4)


def test_grids_drive_the_sampler():
    grid = TightSchedule.of_spectrum(torch.stack([P, P**0.5]), torch.stack([CENTRED, P]), 32).sampling_grid(6)
    z = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    z = sample(lambda z, t: 0 * z + t.double()[:, None, None, None], z, grid, "euler")
    expected = 1 + (grid.diff(dim=0) * grid[:-1]).sum(0)
    torch.testing.assert_close(z.flatten().float(), expected, atol=1e-6, rtol=0)


# Training times.


def ks(times, density, points=20_001):
    """p-value against the distribution that the trapezoidal rule makes of p(t); and the rule's total."""
    t = torch.linspace(-14, 14, points, dtype=torch.float64).sigmoid()
    p = density(t).numpy()
    steps = np.diff(t.numpy()) * (p[1:] + p[:-1]) / 2
    cdf = np.concatenate([[0], np.cumsum(steps)])
    return scipy.stats.kstest(times.double().numpy(), lambda x: np.interp(x, t.numpy(), cdf)).pvalue, cdf[-1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mix", [0.0, 0.05, 0.5])
def test_training_times_have_their_density(variant, mix):
    density = TrainingTimes(cifar10(variant), mix)
    t = density.draw(3, 7, torch.arange(20_000))
    assert t.dtype == torch.float32 and t.shape == (20_000,) and t.min() > 0 and t.max() < 1
    pvalue, total = ks(t, density.density)
    assert pvalue > 0.01 and total == pytest.approx(1, abs=2e-3)
    other = TrainingTimes(cifar10("power" if variant != "power" else "frequency"), mix)
    assert ks(t, other.density)[0] < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_cdf_is_the_integral_of_the_density(variant):
    density = TrainingTimes(cifar10(variant), 0.1)
    t = torch.linspace(0.05, 0.99, 400_001, dtype=torch.float64)[::40]
    p, cdf = density.density(t), density.cdf(t)
    np.testing.assert_allclose(torch.cumulative_trapezoid(p, t), (cdf - cdf[0])[1:], atol=1e-5)
    assert density.cdf(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)


def test_uniform_times():
    density = TrainingTimes()
    t = density.draw(0, 0, torch.arange(5000))
    assert t.equal(rng.uniform(0, Stream.TIME, 0, torch.arange(5000), 2)[:, 0])
    assert scipy.stats.kstest(t.numpy(), "uniform").pvalue > 0.01
    assert density.density(t).eq(1).all() and density.cdf(t).equal(t.double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_time_at_an_end_has_a_density(variant):
    """Though float32 may have rounded it outwards; what is further out has none."""
    for scale in torch.logspace(-2, 2, 20):
        density = TrainingTimes(TightSchedule.of_spectrum(P * scale, CENTRED * scale, 32, variant=variant), 0.0)
        ends = density.time(torch.tensor([1e-7, 1 - 1e-7]), torch.ones(2))
        assert (density.density(ends) > 0).all()
        outside = torch.tensor([0.99 * float(ends[0]), 1 - 0.99 * (1 - float(ends[1]))])
        assert density.density(outside).tolist() == [0, 0]


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("variant", VARIANTS)
def test_times_are_strictly_inside(name, variant):
    ends = torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24])
    for mix, noise_scale in itertools.product((0.0, 1.0), (1e-3, 1e6)):
        schedule = TightSchedule.of_spectrum(*EXTREME[name], 32, variant=variant, noise_scale=noise_scale)
        t = TrainingTimes(schedule, mix).time(ends, torch.full((3,), 0.5))
        assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1


def test_a_part_of_the_times_is_uniform():
    u, v = torch.tensor([0.3, 0.3]), torch.tensor([0.05, 0.2])
    t = TrainingTimes(cifar10(), 0.1).time(u, v)
    assert float(t[0]) == pytest.approx(0.3) and float(t[1]) == pytest.approx(float(cifar10().time(u)[1]))
    assert abs(float(t[1]) - 0.3) > 0.05


def test_times_are_a_function_of_the_position():
    density = TrainingTimes(cifar10())
    together, alone = density.draw(1, 2, torch.arange(64)), density.draw(1, 2, torch.arange(32, 64))
    assert together[32:].equal(alone) and not density.draw(1, 3, torch.arange(64)).equal(together)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_schedule_for_each_sample(variant):
    power, centred = torch.stack([P, 1 + 0 * P]), torch.stack([CENTRED, 1 + 0 * P])
    both = TrainingTimes(TightSchedule.of_spectrum(power, centred, 32, variant=variant))
    u, v = torch.tensor([0.3, 0.7]), torch.tensor([0.9, 0.9])
    t = both.time(u, v)
    for i in range(2):
        one = TrainingTimes(TightSchedule.of_spectrum(power[i], centred[i], 32, variant=variant))
        assert float(one.time(u, v)[i]) == float(t[i])
        assert float(one.density(t)[i]) == pytest.approx(float(both.density(t)[i]), rel=1e-9)
        assert float(one.cdf(t)[i]) == pytest.approx(float(both.cdf(t)[i]), abs=1e-9)


def test_importance_weights_undo_a_density():
    """E over an instance's t of f(t) p_global / p_instance is E over the global t of f."""
    steep = TightSchedule.of_spectrum(P / 100, CENTRED / 100, 32, variant="frequency")
    ours, common = TrainingTimes(steep, 0.1), TrainingTimes(cifar10("frequency"), 0.1)
    t, reference = (d.draw(0, step, torch.arange(40_000)) for step, d in enumerate((ours, common)))
    weight = common.density(t) / ours.density(t)
    assert abs(float(t.mean() - reference.mean())) > 0.1
    assert float((weight * t).mean()) == pytest.approx(float(reference.mean()), abs=0.02)
    assert float(weight.mean()) == pytest.approx(1, abs=0.02) and float(weight.max()) < float(
        common.density(torch.linspace(0.01, 0.999, 999)).max() / 0.1
    )


# Schedules of generated images.


def distribution(classes=3, images=4000, seed=0):
    """Fits of three classes, correlated as CIFAR-10's a and alpha are, and their statistics."""
    generator = np.random.default_rng(seed)
    mean = np.array([[2.4, 2.9, 3.5, -9.8], [1.0, 2.5, 1.0, -8.0], [3.0, 3.1, 5.0, -11.0]])[:classes]
    mix = np.array([[0.8, 0, 0, 0], [0.25, 0.2, 0, 0], [0, 0, 1.0, 0], [0.5, 0.1, 0, 1.0]])
    fits = mean[:, None] + generator.standard_normal((classes, images, 4)) @ mix.T
    low, high = np.quantile(fits, 0.01, axis=1), np.quantile(fits, 0.99, axis=1)
    covariance = np.stack([np.cov(rows.T) for rows in fits])
    return FitDistribution(*(torch.from_numpy(a) for a in (fits.mean(1), covariance, low, high))), fits


def test_drawn_fits_are_distributed_as_those_of_their_class():
    gaussian, fits = distribution()
    for c in range(3):
        drawn = gaussian.draw(5, range(20_000), torch.full((20_000,), c)).numpy()
        clamped = np.clip(fits[c], gaussian.low[c].numpy(), gaussian.high[c].numpy())
        spread = fits[c].std(0)
        np.testing.assert_allclose(drawn.mean(0) / spread, clamped.mean(0) / spread, atol=0.05)
        np.testing.assert_allclose(
            np.cov(drawn.T) / np.outer(spread, spread), np.cov(clamped.T) / np.outer(spread, spread), atol=0.05
        )
        assert (drawn >= gaussian.low[c].numpy()).all() and (drawn <= gaussian.high[c].numpy()).all()
        assert 0.005 < (drawn == gaussian.high[c].numpy()).mean() < 0.02


def test_a_drawn_schedule_is_a_function_of_seed_and_image():
    gaussian, _ = distribution()
    y = torch.arange(12) % 3
    grids = TightSchedule.of_fits(gaussian.draw(0, range(12), y), 32).sampling_grid(10)
    assert grids.shape == (11, 12) and (grids.diff(dim=0) > 0).all()
    for i in (0, 7):
        alone = TightSchedule.of_fits(gaussian.draw(0, [i], y[i : i + 1]), 32).sampling_grid(10)
        assert (alone[:, 0] - grids[:, i]).abs().max() < 1e-6
    assert not gaussian.draw(1, range(12), y).equal(gaussian.draw(0, range(12), y))
    assert (grids[5].unique().numel()) == 12


def test_a_class_without_spread():
    """One image, or four that are equal: the covariance has no Cholesky factor, and the draw is the mean."""
    fit = torch.tensor([[2.4, 2.9, 3.5, -9.8]], dtype=torch.float64)
    gaussian = FitDistribution(fit, torch.zeros(1, 4, 4, dtype=torch.float64), fit, fit)
    assert gaussian.draw(0, range(3), torch.zeros(3, dtype=torch.int64)).equal(fit.expand(3, 4))


def test_of_fits_by_the_spectrum_that_they_describe():
    a, alpha = 2.4, 2.9
    power = torch.cat([torch.tensor([50.0]), (a - alpha * torch.arange(1, 23).double().log()).exp()])
    fits = torch.tensor([a, alpha, math.log(50), float(power[22].log())], dtype=torch.float64)
    for variant in VARIANTS:
        expected = TightSchedule.of_spectrum(power, power, 32, variant=variant)
        found = TightSchedule.of_fits(fits, 32, variant=variant)
        assert found.single and (found.sampling_grid(16) - expected.sampling_grid(16)).abs().max() < 1e-6
    measured_end = fits - torch.tensor([0, 0, 0, 2.0])
    later = TightSchedule.of_fits(measured_end, 32).sampling_grid(16)[-2]
    assert float(later) > float(expected.sampling_grid(16)[-2])
    assert float(TightSchedule.of_fits(measured_end[None], 32).high) == pytest.approx(
        -math.log(max(QUANTISATION, float(power[22]) * math.exp(-2) / 9))
    )


@pytest.mark.parametrize("img_size", [8, 31, 64, 256])
def test_other_image_sizes(img_size):
    power = torch.arange(1, num_rings(img_size) + 1).double() ** -2.5
    grid = TightSchedule.of_spectrum(power, power, img_size).sampling_grid(20)
    assert grid.shape == (21,) and (grid.diff() > 0).all()
    assert len(rings(img_size)[1]) == len(power)
