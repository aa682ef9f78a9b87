"""Spectral Forcing against scipy's DCT, its derivatives, and the facts that its documentation states.

Shapes: images (B, C, H, W) with H = W, masks (B, n, n); n is the window.
"""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.fft
import torch

import spectral_forcing
from spectral_forcing import (
    SpectralForcing,
    dct_matrix,
    num_rings,
    ring_radii,
    rings,
    separable_transform,
)
from tests.golden_inputs import CIFAR10_SPECTRUM, normals

TIMES = torch.tensor([0.0, 0.31, 0.77, 1.0])
SPECTRUM = CIFAR10_SPECTRUM["P"]
BUMPY = [(1.0 + k % 5) * 2.0 ** -(k % 7) for k in range(23)]


def noise(*shape, seed=0):
    return normals(seed, *shape)


def gain(n, t, c_min=0.05, c_max=1.0, kappa=30.0):
    """M(t) (n, n) in float64, one entry at a time."""
    mask = np.empty((n, n))
    for u, v in np.ndindex(n, n):
        r = math.sqrt(u * u + v * v) / (math.sqrt(2) * (n - 1))
        mask[u, v] = 1 / (1 + math.exp(-kappa * (c_min + (c_max - c_min) * t - r)))
    return mask


def by_scipy(z, t, n, **settings):
    """The operator in float64, window by window."""
    out = np.empty(z.shape)
    for b, c, i, j in np.ndindex(z.shape[0], z.shape[1], z.shape[2] // n, z.shape[3] // n):
        where = (b, c, slice(i * n, (i + 1) * n), slice(j * n, (j + 1) * n))
        coefficients = scipy.fft.dctn(z[where].double().numpy(), norm="ortho")
        out[where] = scipy.fft.idctn(coefficients * gain(n, float(t[b]), **settings), norm="ortho")
    return torch.from_numpy(out)


def assert_same(actual, expected, tolerance=3e-6):
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=0)


# --- rings of frequency


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 32, 64, 256])
def test_every_mode_is_in_a_ring_and_no_ring_is_empty(n):
    ring, count = rings(n)
    frequency = np.fft.fftfreq(n) * n
    radius = np.hypot(frequency[:, None], frequency[None, :])
    expected = np.floor(radius + 1e-9)
    np.testing.assert_array_equal(ring.numpy(), expected)
    means = [radius[expected == k].mean() for k in range(num_rings(n))]
    np.testing.assert_allclose(ring_radii(n), means, rtol=1e-12)
    assert count.sum() == n * n and count.min() >= 1 and num_rings(n) == len(count) == ring.max() + 1
    assert n != 32 or count.tolist() == CIFAR10_SPECTRUM["modes_per_ring"]


# --- the transform and the mask


@pytest.mark.parametrize("n", [2, 7, 12, 16])
def test_transform_is_scipys_orthonormal_dct_along_both_axes(n):
    x, d = noise(3, 2, n, n).double(), dct_matrix(n)
    assert_same(d, torch.from_numpy(scipy.fft.dct(np.eye(n), axis=0, norm="ortho")), 1e-14)
    assert_same(d @ d.T, torch.eye(n), 1e-13)
    assert_same(
        separable_transform(d, x), torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")), 1e-12
    )


# --- the operator


@pytest.mark.parametrize("settings", [{}, {"c_min": 0.3, "c_max": 0.6, "kappa": 8.0}])
@pytest.mark.parametrize(("size", "window"), [(16, None), (15, None), (12, 12), (12, 4), (15, 5), (16, 2), (64, None)])
def test_operator_is_scipys(size, window, settings):
    z = noise(4, 2, size, size)
    out, expected = SpectralForcing(size, window, **settings)(z, TIMES), by_scipy(z, TIMES, window or size, **settings)
    assert out.shape == z.shape and out.dtype == torch.float32
    assert_same(out, expected)
    assert (out - expected).norm() / expected.norm() < 1e-6


def test_defaults_are_the_published_ones():
    operator = SpectralForcing(8)
    assert (operator.c_min, operator.c_max, operator.kappa) == (0.05, 1.0, 30.0)
    assert (operator.window_size, operator.fixed_scale, operator.schedule) == (8, None, "linear")
    z = noise(4, 3, 8, 8)
    assert operator(z, TIMES).equal(SpectralForcing(8, schedule="linear", snr_floor=2.0)(z, TIMES))


# --- derivatives: the operator is linear and symmetric in z, and smooth in t


@pytest.mark.parametrize("window", [None, 4])
def test_derivatives_in_z_are_the_operator_itself(window):
    operator, w = SpectralForcing(12, window), noise(4, 2, 12, 12, seed=1)
    z = noise(4, 2, 12, 12, seed=2).requires_grad_()
    assert_same(operator(3 * z - 0.5 * w, TIMES), 3 * operator(z, TIMES) - 0.5 * operator(w, TIMES), 1e-5)
    (gradient,) = torch.autograd.grad((operator(z, TIMES) * w).sum(), z)
    assert_same(gradient, operator(w, TIMES))
    (gradient,) = torch.autograd.grad(operator(z, TIMES).square().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad((gradient * w).sum(), z)
    assert_same(second, 2 * operator(operator(w, TIMES), TIMES), 1e-5)


def test_derivatives_in_t_are_differences_of_scipys():
    operator, z, w, h = SpectralForcing(8), noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1), 1e-3
    t = torch.tensor([0.31, 0.77], requires_grad=True)
    below, at, above = ((by_scipy(z, t.detach().double() + d, 8) * w).sum((1, 2, 3)) for d in (-h, 0, h))
    (first,) = torch.autograd.grad((operator(z, t) * w).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    torch.testing.assert_close(first.detach().double(), (above - below) / (2 * h), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(second.double(), (above - 2 * at + below) / h**2, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"schedule": "power", "alpha": 2.5}, {"schedule": "snr", "power": SPECTRUM}])
def test_derivatives_in_t_are_finite_up_to_the_ends(settings):
    operator = SpectralForcing(32, **settings)
    t = torch.tensor([0.0, 1e-6, 0.75, 0.85, 1 - 1e-6, 1.0], requires_grad=True)
    (first,) = torch.autograd.grad(operator.cutoff(t).sum(), t, create_graph=True)
    assert first.isfinite().all() and (first >= 0).all() and first[2:4].min() > 0
    if settings:
        assert first[0] == first[-1] == 0  # clamped to c_min and c_max
        (second,) = torch.autograd.grad(first.sum(), t)
        assert second.isfinite().all()
    h = 1e-4
    difference = (operator.cutoff(t.detach() + h) - operator.cutoff(t.detach() - h)) / (2 * h)
    assert_same(first[2:4].detach(), difference[2:4], 0.02)


@pytest.mark.slow  # torch takes 20 s to load its rules
@pytest.mark.parametrize("settings", [{}, {"window_size": 8}, {"schedule": "snr", "power": SPECTRUM}])
def test_forward_mode_and_vmap(settings):
    operator = SpectralForcing(32, **settings)
    z, t, w = noise(3, 2, 1, 32, 32), torch.rand(3, 2), noise(2, 1, 32, 32, seed=1)
    _, tangent = torch.func.jvp(lambda z: operator(z, t[0]), (z[0],), (w,))
    assert_same(tangent, operator(w, t[0]))
    _, tangent = torch.func.jvp(lambda t: operator(z[0], t), (t[0],), (torch.ones(2),))
    with torch.enable_grad():
        times = t[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad((operator(z[0], times) * w).sum(), times)
    torch.testing.assert_close((tangent * w).sum((1, 2, 3)), gradient, rtol=1e-3, atol=1e-4)
    expected = torch.stack([operator(*pair) for pair in zip(z, t, strict=True)])
    assert_same(torch.func.vmap(operator)(z, t), expected)
    assert_same(torch.func.vmap(operator, (0, None))(z, t[0])[1], operator(z[1], t[0]))


@pytest.mark.parametrize("settings", [{}, {"schedule": "power", "alpha": 2.5}, {"schedule": "snr", "power": BUMPY}])
def test_gradcheck_in_float64(settings):
    operator = SpectralForcing(32, 8, **settings)
    z = noise(2, 1, 32, 32).double()[:, :, :8, :8].repeat(1, 1, 4, 4).requires_grad_()
    t = torch.tensor([0.31, 0.77], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z, t: operator(z, t).square().sum((1, 2, 3)), (z, t), fast_mode=True)
    torch.autograd.gradgradcheck(lambda t: operator(z.detach(), t).mean((1, 2, 3)), (t,))


@pytest.mark.slow  # torch takes 20 s to load its rules
@pytest.mark.parametrize("size", [32, 128])
def test_a_linear_operator_is_its_own_derivative_in_z(size):
    """jvp(m, (z, t), (z, 0)) = m(z, t)."""
    operator, z, t = SpectralForcing(size), noise(2, 1, size, size), torch.tensor([0.3, 0.8])
    out, tangent = torch.func.jvp(operator, (z, t), (z, torch.zeros(2)))
    assert_same(tangent, out)
    _, in_t = torch.func.jvp(operator, (z, t), (torch.zeros_like(z), torch.ones(2)))
    h = 1e-3
    assert_same(in_t, (operator(z.double(), t + h) - operator(z.double(), t - h)) / (2 * h), 2e-3)


# --- times


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
def test_times_may_have_any_shape_of_b_elements(shape):
    operator, z = SpectralForcing(12), noise(4, 2, 12, 12)
    assert operator(z, TIMES.reshape(shape)).equal(operator(z, TIMES))
    assert operator(z, TIMES[1]).equal(operator(z, TIMES[1].expand(4)))  # one for all
    with pytest.raises(ValueError, match=r"t has the shape \(3,\); one time or one for each of 4 images"):
        operator(z, TIMES[:3])


def test_fixed_scales_outside_of_0_to_1_count_as_the_ends():
    """As in the published code."""
    z = noise(4, 1, 12, 12)
    for scale, counts_as in ((-2.0, 0.0), (1.5, 1.0)):
        out = SpectralForcing(12, fixed_scale=scale)(z, TIMES)
        assert out.equal(SpectralForcing(12, fixed_scale=counts_as)(z, TIMES))


@pytest.mark.parametrize("settings", [{}, {"schedule": "power", "alpha": 2.0}])
def test_rounded_times_count_as_the_ends(settings):
    operator, z, rounding = SpectralForcing(12, **settings), noise(4, 1, 12, 12), torch.tensor([-1e-6, 0, 0, 1e-6])
    assert operator(z, TIMES + rounding).equal(operator(z, torch.cat([TIMES[:3], torch.ones(1)])))


# --- what the documentation states


def test_gains_at_both_ends():
    """At t = 1 the operator is close to the identity and not equal to it."""
    assert float(SpectralForcing(16).mask(torch.zeros(1))[0, 0, 0]) == pytest.approx(0.82, abs=0.005)
    mask = SpectralForcing(11).mask(torch.ones(1))[0]  # r = 0.1 k on the diagonal
    assert float(mask[9, 9]) == pytest.approx(0.95, abs=0.005)
    assert float(mask[10, 10]) == pytest.approx(0.5, abs=1e-4)
    large = SpectralForcing(256).mask(torch.ones(1))[0]
    assert float((large < 0.99).float().mean()) == pytest.approx(0.051, abs=5e-4)


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_fixed_scale_does_not_depend_on_time_and_is_never_a_no_op(scale):
    z, fixed = noise(4, 1, 12, 12), SpectralForcing(12, fixed_scale=scale)
    assert_same(fixed(z, TIMES), by_scipy(z, torch.full((4,), scale), 12))
    assert fixed(z, TIMES).equal(fixed(z, TIMES.flip(0)))
    assert (fixed(z, TIMES) - z).norm() / z.norm() > 0.03


def test_the_file_works_alone(tmp_path):
    shutil.copy(spectral_forcing.__file__, tmp_path / "spectral_forcing.py")
    program = (
        "import sys, torch\nfrom spectral_forcing import SpectralForcing\n"
        "print(SpectralForcing(16)(torch.zeros(1, 3, 16, 16), torch.zeros(1)).shape, 'util' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 3, 16, 16]) False", done.stderr


# --- cutoffs from the spectrum of the data


@pytest.mark.parametrize("window", [None, 16, 8])
@pytest.mark.parametrize("cycles", [2, 4, 6])
def test_a_frequency_of_the_image_is_at_its_radius_in_a_window(window, cycles):
    """A wave of so many cycles per image passes half where the cutoff is that frequency's radius."""
    n = window or 32
    place = torch.arange(32, dtype=torch.float64) + 0.5
    wave = torch.cos(2 * torch.pi * cycles * place / 32).expand(32, 32)[None, None].float()
    c = SpectralForcing(32, window).radius_per_cycle * cycles
    passed = [SpectralForcing(32, window, c, c, 200.0)(wave, torch.zeros(1)) for c in (0.9 * c, c, 1.1 * c)]
    low, half, high = (float((p * wave).sum() / wave.square().sum()) for p in passed)
    if (2 * cycles * n) % 32 == 0:  # a whole number of half cycles in a window: one coefficient
        assert half == pytest.approx(0.5, abs=1e-3)
    assert low < 0.5 < high


def test_power_cutoff_follows_the_formula():
    alpha, floor = 2.9, 0.5
    operator = SpectralForcing(32, schedule="power", alpha=alpha, snr_floor=floor, c_min=0.0, c_max=9.0)
    for t in (0.1, 0.5, 0.7, 0.9):
        k = float(operator.cutoff(torch.tensor([t]))) * math.sqrt(2) * 31 / 2
        assert k**-alpha * (t / (1 - t)) ** 2 == pytest.approx(floor, rel=1e-4)


@pytest.mark.parametrize("floor", [0.1, 1.0])
def test_snr_cutoff_is_a_rings_radius_when_its_snr_is_the_floor(floor):
    operator = SpectralForcing(32, schedule="snr", power=SPECTRUM, snr_floor=floor, c_min=0.0, c_max=2.0)
    for k in range(22):  # above the last one, all is open
        t = 1 / (1 + math.sqrt(SPECTRUM[k] / floor))
        expected = 2 * float(ring_radii(32)[k]) / (math.sqrt(2) * 31)
        assert float(operator.cutoff(torch.tensor([t]))) == pytest.approx(expected, abs=2e-4)


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
@pytest.mark.parametrize("spectrum", [SPECTRUM, [1.0] * 23, BUMPY[::-1], [p * 1e-9 for p in SPECTRUM]])
@pytest.mark.parametrize("schedule", ["snr", "power", "budget"])
def test_cutoffs_are_monotone_and_bounded(window, spectrum, schedule):
    settings = {"power": spectrum} if schedule == "snr" else {"alpha": 2.0, "snr_floor": spectrum[3]}
    settings = {"power": spectrum[:22]} if schedule == "budget" else settings
    operator = SpectralForcing(32, window, schedule=schedule, **settings)
    t = torch.cat([torch.linspace(0, 1, 1001), 1 - torch.logspace(-7, -3, 50)]).sort().values
    c = operator.cutoff(t)
    assert c.isfinite().all() and (c.diff() >= 0).all()
    assert float(c[0]) == pytest.approx(0.05) and float(c[-1]) == 1.0
    z = noise(2, 1, 32, 32)
    assert_same(operator(z, t[[0, -1]]), SpectralForcing(32, window)(z, t[[0, -1]]), 1e-5)  # the published one's


def hiding_costs(power: np.ndarray, cycles: float, t: float, n: int) -> float:
    """By a loop over the modes: the cost of not seeing those from `cycles` on, relative to the least possible loss."""
    hidden = least = 0.0
    for u in range(n):
        for v in range(n):
            frequency = math.hypot(u, v) / 2
            for p in power[:, int(frequency)]:
                seen = p * (1 - t) ** 2 / (t**2 * p + (1 - t) ** 2)  # the posterior variance of the mode
                least += seen
                hidden += p - seen if frequency >= cycles else 0.0
    return hidden / least


@pytest.mark.parametrize("budget", [0.001, 0.03])
def test_budget_is_what_hiding_costs(budget):
    """Rings above the cutoff, less the width of the edge, cost at most the budget; with one ring more, too much."""
    n, k = 16, np.arange(11) + 0.5
    power = np.stack([3 * k**-2.5, 0.2 * k**-1.5])
    operator = SpectralForcing(n, schedule="budget", power=power, budget=budget, c_min=0.0, c_max=9.0)
    for t in np.linspace(0.05, 0.95, 19):
        cutoff = operator.cutoff(torch.tensor([t], dtype=torch.float64)).item()
        cycles = (cutoff - 3 / 30) / operator.radius_per_cycle
        assert hiding_costs(power, math.ceil(cycles - 1e-9), t, n) <= budget * 1.0001
        if 2 <= cycles <= 11:  # the cutoff is interpolated, upwards by at most a ring
            assert hiding_costs(power, math.floor(cycles + 1e-9) - 1, t, n) > budget


def test_budget_and_colour_axes():
    """Equal axes are one axis; one that is weaker is hidden longer; one without power changes nothing."""
    k, t = np.arange(22) + 0.5, torch.linspace(0.02, 0.98, 25)
    power = 5 * k**-2.9

    def cutoff(*axes):
        return SpectralForcing(32, schedule="budget", power=np.stack(axes)).cutoff(t)

    alone = SpectralForcing(32, schedule="budget", power=power).cutoff(t)
    for axes in ((power, power, power), (power, 0 * power)):
        assert_same(cutoff(*axes), alone, 1e-6)
    assert (cutoff(power, power / 50) <= alone + 1e-6).all() and not cutoff(power, power / 50).equal(alone)
    at_30 = SpectralForcing(32, schedule="budget", power=power, budget=0.3).cutoff(t)
    assert (at_30 < alone).any() and (at_30 <= alone + 1e-6).all()


# --- state and precision


@pytest.mark.parametrize("settings", [{}, {"schedule": "power", "alpha": 2.0}, {"schedule": "snr", "power": SPECTRUM}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_state_and_float32_tables_after_the_module_was_cast(settings, dtype):
    operator, z = SpectralForcing(32, 8, **settings), noise(4, 1, 32, 32)
    assert list(operator.parameters()) == [] and operator.state_dict() == {}
    expected = operator(z, TIMES)
    cast = torch.nn.ModuleList([operator]).to(dtype)[0]
    assert all(table.dtype == torch.float32 for table in cast.buffers())
    assert cast(z, TIMES).equal(expected)
    if settings:
        assert not SpectralForcing(32, 8)(z, TIMES).allclose(expected, atol=0.1)


@pytest.mark.parametrize("schedule", ["snr", "budget"])
def test_tables_are_right_after_a_move_from_the_meta_device(schedule):
    settings = {"schedule": schedule, "power": SPECTRUM[: 23 if schedule == "snr" else 22]}
    with torch.device("meta"):
        operator = SpectralForcing(32, **settings)
    z, expected = noise(4, 1, 32, 32), SpectralForcing(32, **settings)
    assert operator.to_empty(device="cpu")(z, TIMES).equal(expected(z, TIMES))


def test_float32_under_autocast_and_for_bfloat16_input():
    operator, z = SpectralForcing(16), noise(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operator(z, TIMES)
    assert out.dtype == torch.float32 and out.equal(operator(z, TIMES))
    for dtype, error in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):  # rounded once, when all is computed
        out, expected = operator(z.to(dtype), TIMES.to(dtype)), by_scipy(z.to(dtype), TIMES.to(dtype), 16)
        assert out.dtype == dtype
        assert ((out.double() - expected).abs() <= error * expected.abs() + 3e-6).all()


def test_float64_is_computed_in_float64():
    z, t = noise(4, 2, 12, 12).double(), TIMES.double()
    for window in (12, 4):
        out = SpectralForcing(12, window)(z, t)
        assert out.dtype == torch.float64
        assert_same(out, by_scipy(z, t, window), 1e-13)
    snr = {"schedule": "snr", "power": SPECTRUM}
    assert_same(
        SpectralForcing(32, **snr)(noise(4, 1, 32, 32).double(), t),
        SpectralForcing(32, **snr)(noise(4, 1, 32, 32), TIMES),
    )


# --- errors


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        *(({"window_size": n}, "divide the image size 32") for n in (5, 1, 0, -4, 64)),
        *(({"kappa": k}, "kappa .* positive") for k in (0.0, -30.0, math.nan, math.inf)),
        *(({name: math.inf}, f"{name} inf must be a finite") for name in ("c_min", "c_max", "fixed_scale")),
        ({"schedule": "cosine"}, "'cosine' must be one of linear, power, snr, budget"),
        ({"schedule": "power"}, "'power' needs alpha"),
        ({"schedule": "power", "alpha": math.nan}, "alpha nan"),
        ({"schedule": "power", "alpha": 2.0, "snr_floor": 0.0}, "snr_floor 0.0"),
        ({"schedule": "power", "alpha": 2.0, "fixed_scale": 0.5}, "fixed_scale 0.5 needs the schedule 'linear'"),
        ({"schedule": "power", "alpha": 2.0, "c_min": 0.9, "c_max": 0.1}, "must not exceed c_max"),
        ({"schedule": "snr", "power": SPECTRUM[:9]}, r"23 rings, not \(9,\)"),
        ({"schedule": "snr", "power": [SPECTRUM, SPECTRUM]}, r"23 rings, not \(2, 23\)"),
        ({"schedule": "snr"}, r"23 rings, not \(0,\)"),
        ({"schedule": "budget", "power": SPECTRUM}, r"22 rings, not \(23,\)"),
        ({"schedule": "budget", "power": [-1.0] * 22}, "above 0 and finite"),
        ({"schedule": "budget", "power": [1.0] * 22, "budget": 0.0}, "budget 0.0 must be a positive"),
        *(({"schedule": "snr", "power": [p, *SPECTRUM[1:]]}, "above 0 and finite") for p in (0.0, math.nan, math.inf)),
    ],
)
def test_settings_that_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpectralForcing(32, **settings)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 3, 32, 32), (1, 3, 16, 8), (1, 3, 8, 32)])
def test_an_image_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match="16x16"):
        SpectralForcing(16, 8)(torch.zeros(shape), torch.zeros(1))
