"""Solvers on equations with exact solutions, guidance, and starting noise: sampler.py.

Shapes: z, v (B, C, H, W); t, y (B,); grid (S + 1,) or (S + 1, B).
"""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch

from denoiser import Denoiser
from sampler import guidance_scale, guided, sample, start_noise, uniform_grid
from tests.golden_inputs import small_denoiser

NULL = 10


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_same(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected).double().expand(actual.shape)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


# Solvers. For data N(0, P) and unit noise the flow is dz/dt = a(t) z with the exact solution z(1) = sqrt(P) z(0).


def gaussian_velocity(power):
    def v(z, t):
        t = t.double()[:, None, None, None]
        return (t * power - (1 - t)) / (t**2 * power + (1 - t) ** 2) * z

    return v


def order(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(("method", "expected"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("power", [0.2, 3.0])
def test_order_of_convergence(method, expected, power):
    """Heun's last step is Euler's: its local error h^2 is as large as the global error of the others."""
    steps, z = (16, 32, 64, 128, 256), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ends = [float(sample(gaussian_velocity(power), z, uniform_grid(s), method)) for s in steps]
    errors = [abs(end - math.sqrt(power)) for end in ends]
    assert order(steps, errors) == pytest.approx(expected, abs=0.15)
    assert errors[-1] < (0.01 if method == "euler" else 2e-4)


@pytest.mark.parametrize(("method", "expected"), [("euler", 2), ("heun", 3)])
def test_order_of_one_step(method, expected):
    """From t = 0.5 over h; a last step of no length takes Euler's place at the end."""
    power, z = 3.0, torch.ones(1, 1, 1, 1, dtype=torch.float64)
    lengths, errors = 2.0 ** -np.arange(3, 8), []
    for h in lengths:
        grid = torch.tensor([0.5, 0.5 + h, 0.5 + h])
        exact = math.sqrt(((0.5 + h) ** 2 * power + (0.5 - h) ** 2) / (0.25 * power + 0.25))
        errors.append(abs(float(sample(gaussian_velocity(power), z, grid, method)) - exact))
    assert order(1 / lengths, errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_growth_factor_of_each_step(steps):
    """On dz/dt = k z a step multiplies z by the Taylor series to its order: to the first for Euler, and for Heun to
    the second in all steps but the last."""
    k, h = -1.7, 1 / steps
    z = noise(2, 1, 2, 2).double()
    euler, heun = 1 + k * h, 1 + k * h + (k * h) ** 2 / 2
    assert_same(sample(lambda z, t: k * z, z, uniform_grid(steps), "euler"), z * euler**steps)
    assert_same(sample(lambda z, t: k * z, z, uniform_grid(steps), "heun"), z * heun ** (steps - 1) * euler)


def test_uneven_grid():
    """Heun is the trapezoidal rule where v depends on t alone, and the last step takes the left end."""
    grid = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.0])
    f, z = grid.double() ** 2, torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    h = grid.double().diff()
    velocity = lambda z, t: t.double()[:, None, None, None] ** 2 + 0 * z  # noqa: E731
    assert_same(sample(velocity, z, grid, "euler"), (h * f[:-1]).sum())
    trapezoids = h * (f[:-1] + f[1:]) / 2
    assert_same(sample(velocity, z, grid, "heun"), trapezoids[:-1].sum() + h[-1] * f[-2])


def test_heun_is_the_default_and_the_start_is_left_as_it_is():
    z = noise(2, 1, 2, 2)
    before, v = z.clone(), gaussian_velocity(3.0)
    assert sample(v, z, uniform_grid(4)).equal(sample(v, z, uniform_grid(4), "heun"))
    assert z.equal(before)


def test_variance_of_samples_of_a_gaussian():
    power, z = 0.3, start_noise(0, range(100), (1, 8, 8))
    x = sample(gaussian_velocity(power), z, uniform_grid(50), "heun")
    assert abs(float(x.square().mean()) / power - 1) < 4 * math.sqrt(2 / x.numel())
    assert scipy.stats.kstest(x.flatten().numpy() / math.sqrt(power), "norm").pvalue > 0.01


def test_samples_of_a_gaussian_field_have_its_spectrum():
    """With the optimal denoiser, a gain per frequency, the flow multiplies each DCT coefficient by sqrt(P)."""
    u, v = np.mgrid[:8, :8]
    power = 2 / (1 + u + v) ** 2

    class Wiener(torch.nn.Module):
        def forward(self, z, t, y):
            t = t.double().numpy()[:, None, None, None]
            coefficients = scipy.fft.dctn(z.double().numpy(), axes=(2, 3), norm="ortho")
            gain = t * power / (t**2 * power + (1 - t) ** 2)
            return torch.from_numpy(scipy.fft.idctn(gain * coefficients, axes=(2, 3), norm="ortho"))

    y = torch.zeros(4, dtype=torch.int64)
    z = start_noise(0, range(4), (1, 8, 8))
    velocity = guided(Denoiser(Wiener(), t_eps=1e-3).velocity, y, NULL)
    x = sample(velocity, z, uniform_grid(200), "heun")
    expected = np.sqrt(power) * scipy.fft.dctn(z.double().numpy(), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho"), expected, atol=0.01)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_grid_for_each_sample(method):
    z = noise(3, 1, 2, 2)
    grids = torch.stack([torch.linspace(0, 1, 7) ** p for p in (0.5, 1.0, 2.0)], dim=1)  # (S + 1, B)
    together = sample(gaussian_velocity(3.0), z, grids, method)
    alone = [sample(gaussian_velocity(3.0), z[b : b + 1], grids[:, b], method) for b in range(3)]
    assert_same(together, torch.cat(alone))
    y, cfg = torch.tensor([1, 4, 7]), 2.5
    together = sample(guided(by_label, y, NULL, cfg, (0.2, 0.6)), z, grids, method)
    alone = [
        sample(guided(by_label, y[b : b + 1], NULL, cfg, (0.2, 0.6)), z[b : b + 1], grids[:, b], method)
        for b in range(3)
    ]
    assert_same(together, torch.cat(alone), 1e-5)


def test_uniform_grid():
    grid = uniform_grid(50)
    assert grid.dtype == torch.float32 and grid.device.type == "cpu"
    assert grid.equal(torch.linspace(0, 1, 51))
    assert uniform_grid(1).tolist() == [0, 1]


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps"):
        uniform_grid(steps)


@pytest.mark.parametrize("method", ["dopri5", "Heun", ""])
def test_unknown_method(method):
    with pytest.raises(ValueError, match="heun, euler"):
        sample(gaussian_velocity(1.0), noise(1, 1, 2, 2), uniform_grid(2), method)


# Guidance.


def by_label(z, t, y):
    """A velocity that tells labels apart."""
    return (1 + y.float() * (1 + t))[:, None, None, None] * torch.cos(z)


class Recorder:
    """by_label, with its calls kept."""

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, y):
        self.calls.append((z, t, y))
        return by_label(z, t, y)

    @property
    def sizes(self):
        return [len(z) for z, _, _ in self.calls]


@pytest.mark.parametrize("cfg", [0.0, 0.5, 2.9])
def test_guided_velocity(cfg):
    z, t, y = noise(3, 2, 2, 2), torch.full((3,), 0.5), torch.tensor([0, 4, 9])
    conditional, unconditional = by_label(z, t, y), by_label(z, t, torch.full((3,), NULL))
    out = guided(by_label, y, NULL, cfg, (0.1, 1.0))(z, t)
    assert_same(out, unconditional + cfg * (conditional - unconditional), 1e-5)


def test_both_branches_are_one_batch_and_the_second_has_the_null_class():
    z, t, y, velocity = noise(3, 2, 2, 2), torch.tensor([0.2, 0.5, 0.7]), torch.tensor([0, 4, 9]), Recorder()
    guided(velocity, y, NULL, 3.0)(z, t)
    ((z_both, t_both, y_both),) = velocity.calls
    assert z_both.equal(torch.cat([z, z])) and t_both.equal(torch.cat([t, t]))
    assert y_both.tolist() == [0, 4, 9, NULL, NULL, NULL]


@pytest.mark.parametrize(
    ("cfg", "interval", "time"), [(1.0, (0.0, 1.0), 0.5), (3.0, (0.6, 1.0), 0.5), (3.0, (0.0, 0.5), 0.5)]
)
def test_one_branch_where_there_is_no_guidance(cfg, interval, time):
    z, t, y, velocity = noise(3, 2, 2, 2), torch.full((3,), time), torch.tensor([0, 4, 9]), Recorder()
    out = guided(velocity, y, NULL, cfg, interval)(z, t)
    assert velocity.sizes == [3] and velocity.calls[0][2].equal(y)
    assert out.equal(by_label(z, t, y))


def test_scale_of_each_sample_at_its_own_time():
    z, t, y = noise(4, 2, 2, 2), torch.tensor([0.1, 0.3, 0.5, 0.8]), torch.tensor([0, 4, 9, 2])
    conditional, unconditional = by_label(z, t, y), by_label(z, t, torch.full((4,), NULL))
    out = guided(by_label, y, NULL, 3.0, (0.2, 0.6))(z, t)
    assert_same(out[[0, 3]], conditional[[0, 3]], 1e-5)
    assert_same(out[[1, 2]], (unconditional + 3 * (conditional - unconditional))[[1, 2]], 1e-5)


def test_interval_is_open_in_float32():
    """The edges 0.1 and 0.9 as float32 numbers are outside, and their neighbours are inside."""
    lo, hi = np.float32(0.1), np.float32(0.9)
    zero, one = np.float32(0), np.float32(1)
    times = [
        zero,
        np.nextafter(lo, zero),
        lo,
        np.nextafter(lo, one),
        np.nextafter(hi, zero),
        hi,
        np.nextafter(hi, one),
        one,
    ]
    scale = guidance_scale(torch.tensor(np.array(times)), 2.9, 0.1, 0.9)
    assert scale.dtype == torch.float32
    assert_same(scale, [1, 1, 1, 2.9, 2.9, 1, 1, 1])


def test_interval_from_0_includes_0():
    times = torch.tensor([0.0, 1e-30, 0.5, 1.0])
    assert_same(guidance_scale(times, 2.0, 0.0, 1.0), [2, 2, 2, 1])
    assert_same(guidance_scale(times, 2.0, 1e-35, 1.0), [1, 2, 2, 1])


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize(("first", "last"), [(0.1, 1.0), (0.2, 0.8), (0.3, 0.7), (0.0, 0.6)])
def test_interval_on_the_times_of_the_solver(steps, first, last):
    """At each of Heun's stages, with edges that fall on grid times: decided in float32, by numpy."""
    velocity = Recorder()
    y = torch.tensor([1, 2])
    sample(guided(velocity, y, NULL, 2.0, (first, last)), noise(2, 1, 1, 1), uniform_grid(steps), "heun")
    grid = torch.linspace(0, 1, steps + 1).numpy()
    stages = [t for i in range(steps - 1) for t in (grid[i], grid[i + 1])] + [grid[-2]]
    inside = [t < np.float32(last) and (first == 0 or t > np.float32(first)) for t in stages]
    assert velocity.sizes == [4 if i else 2 for i in inside]
    assert [float(t[0]) for _, t, _ in velocity.calls] == [float(t) for t in stages]


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 6), ("heun", 11)])
@pytest.mark.parametrize(("cfg", "size"), [(1.0, 3), (2.0, 6)])
def test_number_of_evaluations(method, evaluations, cfg, size):
    velocity = Recorder()
    sample(guided(velocity, torch.tensor([1, 2, 3]), NULL, cfg), noise(3, 1, 1, 1), uniform_grid(6), method)
    assert velocity.sizes == [size] * evaluations


# Starting noise.


def test_starting_noise_depends_on_seed_and_index_alone():
    shape = (3, 4, 4)
    whole = start_noise(7, range(10), shape)
    assert whole.shape == (10, *shape) and whole.dtype == torch.float32 and whole.device.type == "cpu"
    assert torch.cat([start_noise(7, [0, 1, 2], shape), start_noise(7, range(3, 10), shape)]).equal(whole)
    shuffled = [8, 0, 5, 5]
    assert start_noise(7, torch.tensor(shuffled), shape).equal(whole[shuffled])
    torch.manual_seed(123)
    assert start_noise(7, range(10), shape).equal(whole)
    assert not (start_noise(8, range(10), shape) == whole).any()
    assert len(whole.flatten().unique()) == whole.numel()
    assert scipy.stats.kstest(start_noise(1, range(200), shape).flatten().numpy(), "norm").pvalue > 0.01


# What is computed once.


@torch.no_grad()
def test_one_time_for_all_samples_is_the_same_as_one_for_each():
    denoiser, z, y = small_denoiser(), noise(3, 3, 32, 32), torch.tensor([1, 5, 9])
    velocity, seen = guided(denoiser.velocity, y, NULL, 2.9, (0.1, 1.0)), []

    def watched(z, t):
        seen.append(len(t))
        return velocity(z, t)

    shared = sample(watched, z, uniform_grid(4))
    assert set(seen) == {1}
    each = sample(watched, z, uniform_grid(4)[:, None].expand(-1, 3))
    assert set(seen) == {1, 3}
    torch.testing.assert_close(shared, each, rtol=1e-5, atol=1e-5)
