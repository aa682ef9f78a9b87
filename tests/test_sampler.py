"""Solvers on equations with exact solutions, and guidance: sampler.py.

Shapes: z, v (B, C, H, W); t, y (B,); grid (S + 1,) or (S + 1, B).
"""

import math

import numpy as np
import pytest
import scipy.fft
import torch

from denoiser import Denoiser
from sampler import (
    SOLVERS,
    Solver,
    Trajectory,
    euler_step,
    guidance_scale,
    guided,
    sample,
    sde_step,
    uniform_grid,
)
from tests.golden_inputs import normals

NULL = 10


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


@pytest.mark.parametrize(("method", "expected"), [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("power", [0.2, 3.0])
def test_order_of_convergence(method, expected, power):
    """Heun's last step is Euler's: its local error h^2 is as large as the global error of the others."""
    steps, z = (16, 32, 64, 128, 256), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ends = [float(sample(gaussian_velocity(power), z, uniform_grid(s), method)) for s in steps]
    errors = [abs(end - math.sqrt(power)) for end in ends]
    assert order(steps, errors) == pytest.approx(expected, abs=0.15)
    assert errors[-1] < (0.01 if method == "euler" else 2e-4)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("power", [0.2, 3.0])
def test_the_stochastic_solver_keeps_the_marginals(power, scale):
    """Of weak order 1: at t = 0.75 the variance of Gaussian data is off by an error that halves with the step.

    A step is linear in z and noise, so the variance follows from what it does with (1, 0) and with (0, 1).
    """
    velocity = gaussian_velocity(power / scale**2)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    steps, errors = (64, 128, 256, 512), []
    for count in steps:
        grid, variance = torch.linspace(0, 0.75, count + 1), scale**2
        for t, t_next in zip(grid[:-1, None], grid[1:, None], strict=True):
            h = (t_next - t).double().view(1, 1, 1, 1)
            kept = sde_step(velocity, one, t, t_next, h, Trajectory(lambda: zero))
            added = sde_step(velocity, zero, t, t_next, h, Trajectory(lambda: scale * one))
            variance = float(kept**2 * variance + added**2)
        errors.append(abs(variance - (0.75**2 * power + 0.25**2 * scale**2)))
    assert order(steps, errors) == pytest.approx(1, abs=0.2) and errors[-1] < 0.01 * max(power, scale**2)


def test_the_stochastic_solver_takes_the_noise_of_its_step():
    z, grid, seen = normals(0, 2, 1, 2, 2), uniform_grid(4), []
    x = sample(gaussian_velocity(1.0), z, grid, "sde", lambda i: seen.append(i) or normals(i, 2, 1, 2, 2))
    assert seen == [0, 1, 2]  # the last step is Euler's
    assert x.equal(sample(gaussian_velocity(1.0), z, grid, "sde", lambda i: normals(i, 2, 1, 2, 2)))
    assert not x.equal(sample(gaussian_velocity(1.0), z, grid, "sde", lambda i: normals(i + 1, 2, 1, 2, 2)))
    torch.manual_seed(0)
    assert not x.equal(sample(gaussian_velocity(1.0), z, grid, "sde"))


@pytest.mark.parametrize("method", SOLVERS)
def test_evaluations_are_counted(method):
    velocity = Recorder()
    sample(lambda z, t: velocity(z, t, torch.zeros(1)), normals(0, 1, 1, 2, 2), uniform_grid(7), method)
    assert len(velocity) == SOLVERS[method].nfe(7)


def test_ab2_on_an_uneven_grid():
    """Exact where v is linear in t, but for the first step, which is Euler's."""
    grid = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.0])
    z = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    x = sample(lambda z, t: t.double()[:, None, None, None] + 0 * z, z, grid, "ab2")
    assert_same(x, 0 + (1 - 0.1**2) / 2)


def test_ab2_gains_from_its_last_step():
    """At as many evaluations it ends nearer to the exact end than with Euler's step, for data of little power."""
    z, power = torch.ones(1, 1, 1, 1, dtype=torch.float64), 0.05
    ends = []
    for last in ("ab2", "euler"):
        with pytest.MonkeyPatch.context() as patch:
            if last == "euler":
                patch.setitem(SOLVERS, "ab2", Solver(SOLVERS["ab2"].step, euler_step))
            ends.append(float(sample(gaussian_velocity(power), z, uniform_grid(20), "ab2")))
    errors = [abs(end - math.sqrt(power)) for end in ends]
    assert errors[0] < 0.7 * errors[1]


def test_heun_is_the_trapezoidal_rule_and_the_last_step_takes_the_left_end():
    """Where v depends on t alone, on an uneven grid."""
    grid = torch.tensor([0.0, 0.1, 0.4, 0.5, 1.0])
    f, h, z = grid.double() ** 2, grid.double().diff(), torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def velocity(z, t):
        return t.double()[:, None, None, None] ** 2 + 0 * z

    assert_same(sample(velocity, z, grid, "euler"), (h * f[:-1]).sum())
    trapezoids = h * (f[:-1] + f[1:]) / 2
    assert_same(sample(velocity, z, grid, "heun"), trapezoids[:-1].sum() + h[-1] * f[-2])


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
    z = normals(0, 4, 1, 8, 8)
    velocity = guided(Denoiser(Wiener(), t_eps=1e-3).velocity, y, NULL)
    x = sample(velocity, z, uniform_grid(200), "heun")
    expected = np.sqrt(power) * scipy.fft.dctn(z.double().numpy(), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho"), expected, atol=0.01)


@pytest.mark.parametrize("method", ["euler", "heun", "ab2"])
def test_a_grid_for_each_sample(method):
    z = normals(0, 3, 1, 2, 2)
    grids = torch.stack([torch.linspace(0, 1, 7) ** p for p in (0.5, 1.0, 2.0)], dim=1)  # (S + 1, B)
    together = sample(gaussian_velocity(3.0), z, grids, method)
    alone = [sample(gaussian_velocity(3.0), z[b : b + 1], grids[:, b], method) for b in range(3)]
    assert_same(together, torch.cat(alone))
    guidance = [guided(by_label, torch.tensor(y), NULL, 2.5, (0.2, 0.6)) for y in ([1], [4], [7], [1, 4, 7])]
    alone = [sample(guidance[b], z[b : b + 1], grids[:, b], method) for b in range(3)]
    assert_same(sample(guidance[3], z, grids, method), torch.cat(alone), 1e-5)


def test_solvers_are_a_registry(monkeypatch):
    z, seen = normals(0, 2, 1, 2, 2), []
    with pytest.raises(ValueError, match="0 sampling steps are too few"):
        uniform_grid(0)
    with pytest.raises(ValueError, match="'Heun'; it must be one of heun, euler, ab2, sde"):
        sample(gaussian_velocity(1.0), z, uniform_grid(2), "Heun")
    monkeypatch.setitem(
        SOLVERS, "still", Solver(lambda velocity, z, t, t_next, h, trajectory: seen.append((t, t_next, h)) or z)
    )
    before, grid = z.clone(), uniform_grid(3)
    assert_same(sample(lambda z, t: 3 * z, z, grid, "still"), 2 * z)  # the last step is Euler's
    assert z.equal(before) and [(t, t_next) for t, t_next, _ in seen] == [(grid[0], grid[1]), (grid[1], grid[2])]


def by_label(z, t, y):
    """A velocity that tells labels apart."""
    return (1 + y.float() * (1 + t))[:, None, None, None] * torch.cos(z)


class Recorder(list):
    """by_label, with the arguments of its calls."""

    def __call__(self, z, t, y):
        self.append((z, t, y))
        return by_label(z, t, y)


@pytest.mark.parametrize("cfg", [0.0, 1.0, 2.9])
@pytest.mark.parametrize("time", [0.05, 0.5])
def test_guidance_is_one_batch_of_both_branches_and_one_branch_where_its_scale_is_1(cfg, time):
    z, t, y, velocity = normals(0, 3, 2, 2, 2), torch.full((3,), time), torch.tensor([0, 4, 9]), Recorder()
    out = guided(velocity, y, NULL, cfg, (0.1, 1.0))(z, t)
    ((z_seen, t_seen, y_seen),) = velocity
    conditional, unconditional = by_label(z, t, y), by_label(z, t, torch.full((3,), NULL))
    if cfg == 1 or time < 0.1:
        assert out.equal(conditional) and y_seen.equal(y)
    else:
        assert (
            z_seen.equal(z.repeat(2, 1, 1, 1))
            and t_seen.equal(t.repeat(2))
            and y_seen.tolist() == [0, 4, 9] + 3 * [NULL]
        )
        assert_same(out, unconditional + cfg * (conditional - unconditional), 1e-5)


def test_interval_is_open_in_float32():
    """The edges 0.1 and 0.9 as float32 numbers are outside, and their neighbours are inside."""
    lo, hi = np.float32(0.1), np.float32(0.9)
    zero, one = np.float32(0), np.float32(1)
    times = [zero, np.nextafter(lo, zero), lo, np.nextafter(lo, one), np.nextafter(hi, zero), hi]
    times += [np.nextafter(hi, one), one]
    scale = guidance_scale(torch.tensor(np.array(times)), 2.9, 0.1, 0.9)
    assert scale.dtype == torch.float32
    assert_same(scale, [1, 1, 1, 2.9, 2.9, 1, 1, 1])
    assert_same(guidance_scale(torch.tensor([0.0, 1e-30, 1.0]), 2.0, 0.0, 1.0), [2, 2, 1])  # from 0 includes 0


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("first", "last"), [(0.1, 1.0), (0.3, 0.7), (0.0, 0.6)])
def test_interval_on_the_times_of_the_solver(steps, first, last):
    """At each of Heun's stages, with edges that fall on grid times: decided in float32, by numpy."""
    velocity = Recorder()
    y = torch.tensor([1, 2])
    sample(guided(velocity, y, NULL, 2.0, (first, last)), normals(0, 2, 1, 1, 1), uniform_grid(steps), "heun")
    grid = torch.linspace(0, 1, steps + 1).numpy()
    stages = [t for i in range(steps - 1) for t in (grid[i], grid[i + 1])] + [grid[-2]]
    inside = [t < np.float32(last) and (first == 0 or t > np.float32(first)) for t in stages]
    assert [len(z) for z, _, _ in velocity] == [4 if i else 2 for i in inside]
    assert [float(t[0]) for _, t, _ in velocity] == [float(t) for t in stages]
