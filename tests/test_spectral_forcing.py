"""Spectral Forcing against scipy's DCT, and the facts that its documentation states: spectral_forcing.py.

Shapes: images (B, C, H, W) with H = W, masks (B, n, n); n is the window.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

from spectral_forcing import SpectralForcing, dct_matrix, radius_grid
from util.spectrum import ring_radii

TIMES = torch.tensor([0.0, 0.31, 0.77, 1.0])


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def gain(n, t, c_min=0.05, c_max=1.0, kappa=30.0):
    """M(t) (n, n) in float64, one entry at a time."""
    mask = np.empty((n, n))
    for u, v in np.ndindex(n, n):
        r = math.sqrt(u * u + v * v) / (math.sqrt(2) * (n - 1))
        mask[u, v] = 1 / (1 + math.exp(-kappa * (c_min + (c_max - c_min) * t - r)))
    return mask


def by_scipy(z, t, n, **kwargs):
    """The operator in float64, window by window."""
    out = np.empty(z.shape)
    for b, c, i, j in np.ndindex(z.shape[0], z.shape[1], z.shape[2] // n, z.shape[3] // n):
        where = (b, c, slice(i * n, (i + 1) * n), slice(j * n, (j + 1) * n))
        coefficients = scipy.fft.dctn(z[where].double().numpy(), norm="ortho")
        out[where] = scipy.fft.idctn(coefficients * gain(n, float(t[b]), **kwargs), norm="ortho")
    return torch.from_numpy(out)


def assert_same(actual, expected, tolerance=3e-6):
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=0)


# The transform and the mask.


@pytest.mark.parametrize("n", [2, 7, 12, 16])
def test_dct_matrix_is_scipys_and_orthogonal(n):
    d = dct_matrix(n)
    assert d.dtype == torch.float64
    assert_same(d, torch.from_numpy(scipy.fft.dct(np.eye(n), axis=0, norm="ortho")), 1e-14)
    assert_same(d @ d.T, torch.eye(n), 1e-13)
    assert_same(d.T @ d, torch.eye(n), 1e-13)
    assert dct_matrix(n, torch.float32).equal(d.float())


def test_parseval():
    x, d = noise(3, 20, 20).double(), dct_matrix(20)
    assert_same((d @ x @ d.T).square().sum((1, 2)), x.square().sum((1, 2)), 1e-10)


@pytest.mark.parametrize("n", [2, 5, 16])
def test_radius_runs_from_0_to_1(n):
    r = radius_grid(n).numpy()
    u, v = np.mgrid[:n, :n]
    np.testing.assert_allclose(r**2 * 2 * (n - 1) ** 2, u**2 + v**2, atol=1e-10)
    assert r[0, 0] == 0 and r[-1, -1] == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("n", [8, 11])
def test_mask_against_a_loop(n):
    settings = {"c_min": 0.2, "c_max": 0.7, "kappa": 11.0}
    mask = SpectralForcing(n, **settings).mask(TIMES)
    assert mask.shape == (4, n, n)
    assert_same(mask, torch.from_numpy(np.stack([gain(n, float(t), **settings) for t in TIMES])), 1e-6)


def test_cutoff_opens_linearly():
    operator = SpectralForcing(8, c_min=0.1, c_max=0.9)
    assert_same(operator.cutoff(torch.tensor([0.0, 0.25, 0.5, 1.0])), torch.tensor([0.1, 0.3, 0.5, 0.9]), 1e-6)


# The operator.


@pytest.mark.parametrize(
    ("size", "window"), [(16, None), (12, None), (15, None), (12, 12), (12, 4), (12, 3), (15, 5), (16, 2)]
)
def test_against_scipy(size, window):
    z = noise(4, 3, size, size)
    out = SpectralForcing(size, window)(z, TIMES)
    assert out.shape == z.shape and out.dtype == torch.float32
    assert_same(out, by_scipy(z, TIMES, window or size))


def test_against_scipy_with_other_settings():
    settings = {"c_min": 0.3, "c_max": 0.6, "kappa": 8.0}
    z = noise(4, 1, 12, 12)
    assert_same(SpectralForcing(12, 6, **settings)(z, TIMES), by_scipy(z, TIMES, 6, **settings))


def test_float32_accuracy_at_a_realistic_size():
    z = noise(2, 1, 64, 64)
    expected = by_scipy(z, TIMES[1:3], 64)
    error = SpectralForcing(64)(z, TIMES[1:3]) - expected
    assert error.norm() / expected.norm() < 1e-6


def test_defaults_are_the_published_ones():
    operator = SpectralForcing(8)
    assert (operator.c_min, operator.c_max, operator.kappa) == (0.05, 1.0, 30.0)
    assert (operator.window_size, operator.fixed_scale) == (8, None)


def test_linear():
    operator, a, b = SpectralForcing(16, 8), noise(4, 2, 16, 16, seed=1), noise(4, 2, 16, 16, seed=2)
    assert_same(operator(3 * a - 0.5 * b, TIMES), 3 * operator(a, TIMES) - 0.5 * operator(b, TIMES), 1e-5)


def test_self_adjoint_and_gradient():
    """An orthonormal transform around a diagonal mask is a symmetric matrix; its gradient is the operator itself."""
    operator, w = SpectralForcing(12, 4), noise(4, 2, 12, 12, seed=1)
    z = noise(4, 2, 12, 12, seed=2).requires_grad_()
    inner = (operator(z, TIMES) * w).sum()
    assert_same(inner, (z * operator(w, TIMES)).sum(), 1e-3)
    (gradient,) = torch.autograd.grad(inner, z)
    assert_same(gradient, operator(w, TIMES))


def test_open_mask_is_the_identity():
    operator = SpectralForcing(16, c_min=2.0, c_max=2.0, kappa=1e4)
    assert operator.mask(TIMES).eq(1).all()
    z = noise(4, 3, 16, 16)
    assert_same(operator(z, TIMES), z)


def test_steep_mask_is_a_projection():
    """kappa -> infinity is the ideal low-pass: gains 0 and 1, and a second pass changes nothing."""
    operator, z, t = SpectralForcing(12, kappa=1e5), noise(3, 1, 12, 12), TIMES[:3]
    r = radius_grid(12)
    passed = torch.stack([r < 0.05 + 0.95 * float(time) for time in t])
    assert operator.mask(t).equal(passed.float())
    once = operator(z, t)
    assert_same(operator(once, t), once)


def test_each_window_is_on_its_own():
    z = noise(2, 3, 12, 12)
    t, alone = TIMES[1:3], SpectralForcing(4)
    whole = SpectralForcing(12, 4)(z, t)
    for i, j in np.ndindex(3, 3):
        where = (..., slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
        assert_same(whole[where], alone(z[where], t))


def test_each_sample_has_its_own_time():
    z, operator = noise(4, 3, 12, 12), SpectralForcing(12, 6)
    together = operator(z, TIMES)
    for b in range(4):
        assert_same(together[b : b + 1], operator(z[b : b + 1], TIMES[b : b + 1]))
    same_image = operator(z[:1].expand(4, -1, -1, -1), TIMES)
    energy = same_image.square().sum((1, 2, 3))
    assert (energy.diff() > 0.01 * energy[3]).all()  # more passes at later times


def test_any_memory_layout():
    z, operator = noise(4, 3, 12, 12), SpectralForcing(12, 4)
    mirrored = z.transpose(2, 3)
    assert_same(operator(mirrored, TIMES), operator(mirrored.contiguous(), TIMES))
    assert_same(operator(z.to(memory_format=torch.channels_last), TIMES), operator(z, TIMES))


# What the documentation states.


def test_close_to_the_identity_at_the_end_and_not_equal_to_it():
    mask = SpectralForcing(11).mask(torch.ones(1))[0]  # r = 0.1 k on the diagonal
    assert float(mask[9, 9]) == pytest.approx(0.95, abs=0.005)
    assert float(mask[10, 10]) == pytest.approx(0.5, abs=1e-4)
    large = SpectralForcing(256).mask(torch.ones(1))[0]
    assert float((large < 0.99).float().mean()) == pytest.approx(0.051, abs=5e-4)


def test_gain_of_a_constant_image_at_the_start():
    out = SpectralForcing(16)(torch.full((1, 3, 16, 16), 0.5), torch.zeros(1))
    assert_same(out, torch.full((1, 3, 16, 16), 0.5 / (1 + math.exp(-1.5))))
    assert float(out[0, 0, 0, 0]) / 0.5 == pytest.approx(0.82, abs=0.005)


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_fixed_scale_does_not_depend_on_time(scale):
    z, fixed = noise(4, 1, 12, 12), SpectralForcing(12, fixed_scale=scale)
    assert_same(fixed(z, TIMES), by_scipy(z, torch.full((4,), scale), 12))
    assert fixed(z, TIMES).equal(fixed(z, TIMES.flip(0)))


def test_fixed_scale_1_is_not_a_no_op():
    z = noise(4, 1, 16, 16)
    out = SpectralForcing(16, fixed_scale=1.0)(z, TIMES)
    assert (out - z).norm() / z.norm() > 0.03


def test_no_parameters_and_no_state():
    operator = SpectralForcing(16, 4)
    assert list(operator.parameters()) == []
    assert operator.state_dict() == {}


# Cutoffs from the spectrum of the data.

SPECTRUM = json.loads((Path(__file__).parent / "golden" / "cifar10_spectrum.json").read_text())["P"]


def test_linear_is_the_default_to_the_bit():
    z = noise(4, 3, 16, 16)
    assert SpectralForcing(16)(z, TIMES).equal(SpectralForcing(16, schedule="linear", snr_floor=2.0)(z, TIMES))


@pytest.mark.parametrize(("u", "v"), [(2, 0), (6, 8), (10, 10), (0, 30), (31, 31)])
def test_a_dct_mode_is_at_half_its_index_in_cycles(u, v):
    """The energy of the DCT's mode (u, v), as the Fourier transform sees it: its mean radius is rho / 2 with
    rho = sqrt(u^2 + v^2) = r sqrt(2) (n - 1), within leakage, and so ring k is at r = 2 k / (sqrt(2) (n - 1))."""
    n = 32
    d = dct_matrix(n)
    wave = torch.outer(d[u], d[v])
    power = torch.fft.fft2(wave, norm="ortho").abs().square()
    f = torch.fft.fftfreq(n, 1 / n).double()
    # Outside of even indices a mode does not close upon itself, and leaks: the root mean square is then larger.
    radius = float((power * torch.hypot(f[:, None], f[None])).sum())
    r = float(radius_grid(n)[u, v])
    assert radius == pytest.approx(r / SpectralForcing(n).radius_per_cycle, rel=0.03)


@pytest.mark.parametrize("window", [None, 16, 8])
@pytest.mark.parametrize("cycles", [2, 4, 6])
def test_a_frequency_of_the_image_is_at_its_radius_in_a_window(window, cycles):
    """A wave of so many cycles per image passes half where the cutoff is that frequency's radius."""
    n = window or 32
    place = torch.arange(32, dtype=torch.float64) + 0.5
    wave = torch.cos(2 * torch.pi * cycles * place / 32).expand(32, 32)[None, None].float()
    operator = SpectralForcing(32, window, kappa=200.0)
    c = operator.radius_per_cycle * cycles
    passed = [SpectralForcing(32, window, c, c, 200.0)(wave, torch.zeros(1)) for c in (0.9 * c, c, 1.1 * c)]
    low, half, high = (float((p * wave).sum() / wave.square().sum()) for p in passed)
    if (2 * cycles * n) % 32 == 0:  # a whole number of half cycles in a window: one coefficient
        assert half == pytest.approx(0.5, abs=1e-3)
    assert low < 0.5 < high


def test_power_cutoff_by_the_formula():
    alpha, floor = 2.9, 0.5
    operator = SpectralForcing(32, schedule="power", alpha=alpha, snr_floor=floor, c_min=0.0, c_max=9.0)
    for t in (0.1, 0.5, 0.7, 0.9):
        c = float(operator.cutoff(torch.tensor([t])))
        k = c * math.sqrt(2) * 31 / 2
        assert k**-alpha * (t / (1 - t)) ** 2 == pytest.approx(floor, rel=1e-4)
    assert float(operator.cutoff(torch.tensor([0.5]))) == pytest.approx(2 * 2 ** (1 / alpha) / (math.sqrt(2) * 31))


def test_snr_cutoff_is_where_the_ring_falls_to_the_floor():
    """At the time at which a ring's ratio is the floor, the cutoff is the mean radius of its modes."""
    for floor in (0.1, 1.0):
        operator = SpectralForcing(32, schedule="snr", power=SPECTRUM, snr_floor=floor, c_min=0.0, c_max=2.0)
        for k in range(22):  # above the last one, all is open
            t = 1 / (1 + math.sqrt(SPECTRUM[k] / floor))
            expected = 2 * float(ring_radii(32)[k]) / (math.sqrt(2) * 31)
            assert float(operator.cutoff(torch.tensor([t]))) == pytest.approx(expected, abs=2e-4)


def test_snr_cutoff_of_a_power_law_is_that_of_power():
    """Within half a ring: ring k stands for radii from k to k + 1, and its power here is that at its mean radius."""
    alpha = 2.5
    radii = ring_radii(64).clamp_min(0.5)
    snr = SpectralForcing(64, schedule="snr", power=radii**-alpha)
    power = SpectralForcing(64, schedule="power", alpha=alpha)
    t = torch.linspace(0, 1, 201)
    assert (snr.cutoff(t) - power.cutoff(t)).abs().max() < 0.5 * snr.radius_per_cycle
    closed = SpectralForcing(64, schedule="power", alpha=alpha, snr_floor=4.0)  # a floor of 4 is a spectrum / 4
    assert closed.cutoff(t).equal(SpectralForcing(64, schedule="power", alpha=alpha, snr_floor=4).cutoff(t))
    quarter = SpectralForcing(64, schedule="snr", power=radii**-alpha / 4)
    assert (quarter.cutoff(t) - closed.cutoff(t)).abs().max() < 0.5 * snr.radius_per_cycle


BUMPY = [(1.0 + k % 5) * 2.0 ** -(k % 7) for k in range(23)]


@pytest.mark.parametrize("spectrum", [BUMPY, BUMPY[::-1], SPECTRUM])
def test_a_ring_that_shows_opens_all_below_it(spectrum):
    """The cutoff is between the last ring that reaches the floor and the next one, whatever the rings below do."""
    operator, radii = SpectralForcing(32, schedule="snr", power=spectrum, c_min=0.0, c_max=2.0), ring_radii(32)
    for t in torch.linspace(0.02, 0.98, 49):
        odds = float(t / (1 - t))
        shown = [k for k in range(23) if spectrum[k] * odds**2 >= 1]
        cycles = float(operator.cutoff(t)) / operator.radius_per_cycle
        if not shown:
            assert cycles == 0
        elif shown[-1] < 22:
            assert radii[shown[-1]] - 1e-3 <= cycles <= radii[shown[-1] + 1] + 1e-3
        else:
            assert float(operator.cutoff(t)) == 2


@pytest.mark.parametrize("window", [None, 8, 2])
@pytest.mark.parametrize("spectrum", [SPECTRUM, [1.0] * 23, BUMPY, BUMPY[::-1], [p * 1e-9 for p in SPECTRUM]])
@pytest.mark.parametrize("schedule", ["snr", "power"])
def test_cutoffs_are_monotone_and_bounded(window, spectrum, schedule):
    settings = {"power": spectrum} if schedule == "snr" else {"alpha": 2.0, "snr_floor": spectrum[3]}
    operator = SpectralForcing(32, window, schedule=schedule, **settings)
    t = torch.cat([torch.linspace(0, 1, 1001), 1 - torch.logspace(-7, -3, 50)]).sort().values
    c = operator.cutoff(t)
    assert c.isfinite().all() and (c.diff() >= 0).all()
    assert float(c[0]) == pytest.approx(0.05) and float(c[-1]) == 1.0
    z = noise(2, 1, 32, 32)
    assert operator(z, t[[0, -1]]).isfinite().all()
    ends = SpectralForcing(32, window)(z, t[[0, -1]])
    assert_same(operator(z, t[[0, -1]]), ends, 1e-5)  # the published operator's


def test_the_published_cutoff_passes_more_than_the_data_asks_for_most_of_the_way():
    t = torch.linspace(0.01, 0.99, 99)
    linear, snr = SpectralForcing(32).cutoff(t), SpectralForcing(32, schedule="snr", power=SPECTRUM).cutoff(t)
    assert float((linear > snr).float().mean()) > 0.9


@pytest.mark.parametrize("settings", [{"schedule": "power", "alpha": 2.0}, {"schedule": "snr", "power": SPECTRUM}])
def test_schedules_keep_no_state_and_stay_in_float32(settings):
    operator, z = SpectralForcing(32, 8, **settings), noise(4, 1, 32, 32)
    assert list(operator.parameters()) == [] and operator.state_dict() == {}
    expected = operator(z, TIMES)
    cast = torch.nn.ModuleList([SpectralForcing(32, 8, **settings)]).to(torch.bfloat16)[0]
    assert cast(z, TIMES).equal(expected)
    assert not SpectralForcing(32, 8)(z, TIMES).allclose(expected, atol=0.1)
    assert_same(expected, torch.cat([operator(z[b : b + 1], TIMES[b : b + 1]) for b in range(4)]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"schedule": "cosine"}, "'cosine': it must be one of linear, power, snr"),
        ({"schedule": "power"}, "alpha is None"),
        ({"schedule": "power", "alpha": -1.0}, "alpha is -1.0"),
        ({"schedule": "power", "alpha": math.nan}, "alpha is nan"),
        ({"schedule": "power", "alpha": 2.0, "snr_floor": 0.0}, "snr_floor is 0.0"),
        ({"schedule": "power", "alpha": 2.0, "snr_floor": math.inf}, "snr_floor is inf"),
        ({"schedule": "power", "alpha": 2.0, "fixed_scale": 0.5}, "does not depend on time"),
        ({"schedule": "power", "alpha": 2.0, "c_min": 0.9, "c_max": 0.1}, "opens from c_min to c_max"),
        ({"schedule": "snr"}, "23 rings .* given none"),
        ({"schedule": "snr", "power": SPECTRUM[:9]}, "23 rings .* one of 9"),
        ({"schedule": "snr", "power": [0.0, *SPECTRUM[1:]]}, "not a positive number"),
        ({"schedule": "snr", "power": [math.nan, *SPECTRUM[1:]]}, "not a positive number"),
    ],
)
def test_schedules_without_what_they_need(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpectralForcing(32, **settings)


# Precision.


def test_float32_under_autocast():
    operator, z = SpectralForcing(16, 8), noise(4, 3, 16, 16)
    expected = operator(z, TIMES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operator(z, TIMES)
        assert (z[0, 0] @ z[0, 0]).dtype == torch.bfloat16  # autocast is on around it
    assert out.dtype == torch.float32 and out.equal(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_after_the_module_was_cast(dtype):
    operator, z = SpectralForcing(16, 8), noise(4, 3, 16, 16)
    expected = operator(z, TIMES)
    cast = torch.nn.ModuleList([operator]).to(dtype)[0]
    assert cast.dct.dtype == cast.radius.dtype == torch.float32
    assert cast(z, TIMES).equal(expected)


def test_float32_output_for_bfloat16_input():
    z = noise(4, 3, 16, 16).bfloat16()
    times = TIMES.bfloat16()
    out = SpectralForcing(16)(z, times)
    assert out.dtype == torch.float32
    assert_same(out, by_scipy(z, times, 16))


# Errors.


@pytest.mark.parametrize(("size", "window"), [(16, 5), (16, 1), (16, 0), (16, -4), (16, 32), (1, None)])
def test_window_that_does_not_fit(size, window):
    with pytest.raises(ValueError, match="divide the image size"):
        SpectralForcing(size, window)


@pytest.mark.parametrize("kappa", [0.0, -30.0, math.nan, math.inf])
def test_steepness_must_be_positive(kappa):
    with pytest.raises(ValueError, match="kappa"):
        SpectralForcing(16, kappa=kappa)


@pytest.mark.parametrize("name", ["c_min", "c_max", "fixed_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_settings_must_be_finite(name, value):
    with pytest.raises(ValueError, match=name):
        SpectralForcing(16, **{name: value})


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 32, 32), (1, 3, 16, 8), (1, 3, 8, 32)])
@pytest.mark.parametrize("window", [None, 8])
def test_image_of_another_size(shape, window):
    with pytest.raises(ValueError, match="16x16"):
        SpectralForcing(16, window)(torch.zeros(shape), torch.zeros(1))
