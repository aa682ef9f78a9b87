"""Loss and velocity against their formulas and against an exact answer, and the random part of a step: denoiser.py.

Shapes: x, z, e, v (B, C, H, W); t, y (B,).
"""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.special
import scipy.stats
import torch

from denoiser import Denoiser, LogitNormal, draw, random_flip
from spectral_forcing import SpectralForcing
from util import rng
from util.rng import Stream

SHAPE = (3, 8, 8)
TIMES = torch.tensor([0.0, 0.2, 0.6, 0.94, 0.98, 1.0])
LABELS = torch.arange(6)


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


class Fixed(torch.nn.Module):
    """A network whose output is given, and which remembers its last input."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, z, t, y):
        self.seen = z, t, y
        return self.out


class Function(torch.nn.Module):
    """A network that is a function of (z, t)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z, t, y):
        return self.function(z, t)


def assert_same(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=tolerance)


# Loss and velocity.


def by_numpy(x, n, t, out, pred_param, t_eps, noise_scale):
    """(z, velocity, loss) one sample at a time, in float64."""
    zs, velocities, losses = [], [], []
    for b in range(len(x)):
        data, e, time, o = (
            x[b].double().numpy(),
            noise_scale * n[b].double().numpy(),
            float(t[b]),
            out[b].double().numpy(),
        )
        z = time * data + (1 - time) * e
        below = max(1 - time, t_eps)
        target = (data - z) / below if t_eps else data - e
        velocity = (o - z) / below if pred_param == "x" else o
        zs.append(z)
        velocities.append(velocity)
        losses.append(np.mean((target - velocity) ** 2))
    return np.stack(zs), np.stack(velocities), np.mean(losses)


@pytest.mark.parametrize(
    ("pred_param", "t_eps", "noise_scale"),
    [("x", 0.05, 1.0), ("x", 0.1, 2.0), ("v", 0.05, 1.0), ("v", 0.05, 2.0), ("v", 0.0, 0.5)],
)
@pytest.mark.parametrize("operator", [None, SpectralForcing(8)], ids=["plain", "forced"])
def test_loss_and_velocity_by_numpy(pred_param, t_eps, noise_scale, operator):
    """With Spectral Forcing too: it changes what the network sees, and no z in the formulas."""
    x, n, out = noise(6, *SHAPE, seed=1), noise(6, *SHAPE, seed=2), noise(6, *SHAPE, seed=3)
    z, velocity, loss = by_numpy(x, n, TIMES, out, pred_param, t_eps, noise_scale)
    net = Fixed(out)
    denoiser = Denoiser(net, operator, pred_param, t_eps, noise_scale)
    assert_same(denoiser(x, LABELS, TIMES, n), loss)
    z = torch.from_numpy(z).float()
    seen, t, y = net.seen
    assert_same(seen, z if operator is None else operator(z, TIMES))
    assert t.equal(TIMES) and y.equal(LABELS)
    assert_same(denoiser.velocity(z, TIMES, LABELS), velocity)


def test_defaults_are_the_published_ones():
    denoiser = Denoiser(torch.nn.Identity())
    settings = (denoiser.pred_param, denoiser.t_eps, denoiser.noise_scale, denoiser.spectral_forcing)
    assert settings == ("x", 0.05, 1.0, None)


@pytest.mark.parametrize("name", ["pred_param", "t_eps", "noise_scale"])
def test_what_the_loss_is_made_of_is_not_changed_later(name):
    denoiser = Denoiser(torch.nn.Identity())
    with pytest.raises(AttributeError):
        setattr(denoiser, name, getattr(denoiser, name))


def test_target_without_clamp_is_exactly_x_minus_e():
    """At t = 1 too, where the quotient (x - z) / (1 - t) would be 0 / 0."""
    x, n = noise(6, *SHAPE, seed=1), noise(6, *SHAPE, seed=2)
    assert float(Denoiser(Fixed(x - 2 * n), None, "v", 0.0, 2.0)(x, LABELS, TIMES, n)) == 0


def test_clamp():
    z, out = noise(2, *SHAPE, seed=1), noise(2, *SHAPE, seed=2)
    v = Denoiser(Fixed(out), t_eps=0.05).velocity(z, torch.tensor([0.99, 0.5]), LABELS[:2])
    assert_same(v[0], (out[0] - z[0]) * 20)
    assert_same(v[1], (out[1] - z[1]) * 2)


def test_clamp_of_a_sampling_grid():
    """It is the sampler's alone, and a velocity that is predicted has none."""
    z, out, t = noise(2, *SHAPE, seed=1), noise(2, *SHAPE, seed=2), torch.tensor([0.99, 0.5])
    denoiser = Denoiser(Fixed(out), t_eps=0.05)
    assert_same(denoiser.velocity(z, t, LABELS[:2], 0.005)[0], (out[0] - z[0]) * 100, 1e-3)
    assert denoiser.velocity(z, t, LABELS[:2]).equal(denoiser.velocity(z, t, LABELS[:2], 0.05))
    assert Denoiser(Fixed(out), pred_param="v").velocity(z, t, LABELS[:2], 0.5).equal(out)


def test_network_that_knows_the_data_has_no_loss():
    x, n = noise(6, *SHAPE, seed=1), noise(6, *SHAPE, seed=2)
    assert float(Denoiser(Fixed(x))(x, LABELS, TIMES, n)) == 0


def test_gradient_reaches_the_network():
    out = noise(6, *SHAPE, seed=3).requires_grad_()
    x, n = noise(6, *SHAPE, seed=1), noise(6, *SHAPE, seed=2)
    Denoiser(Fixed(out), SpectralForcing(8))(x, LABELS, TIMES, n).backward()
    below = (1 - TIMES).clamp_min(0.05)[:, None, None, None]
    assert_same(out.grad, 2 * (out.detach() - x) / below**2 / x.numel(), 1e-6)


def test_predictions_are_float32_under_autocast():
    seen = []

    def function(z, t):
        product = z @ z
        seen.append(product.dtype)
        return product

    z = noise(2, *SHAPE)
    for dtype in (None, torch.bfloat16):
        denoiser = Denoiser(Function(function), SpectralForcing(8), autocast_dtype=dtype)
        assert denoiser.predict(z, TIMES[:2], LABELS[:2]).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pred_param": "e"}, "pred_param is 'e'"),
        ({"t_eps": 0.0}, "together with pred_param v"),
        ({"t_eps": 1.0}, "t_eps is 1.0"),
        ({"t_eps": -0.1, "pred_param": "v"}, "t_eps is -0.1"),
        ({"t_eps": math.nan}, "t_eps is nan"),
        ({"noise_scale": 0.0}, "noise_scale is 0.0"),
        ({"noise_scale": -1.0}, "noise_scale is -1.0"),
        ({"noise_scale": math.nan}, "noise_scale is nan"),
    ],
)
def test_settings_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(torch.nn.Identity(), **kwargs)


# A toy with an exact answer: x is a Gaussian field whose DCT coefficients have known variances P. The best
# prediction of x from z is then a gain per frequency, t P / (t^2 P + (1-t)^2 s^2), for noise of deviation s, and what
# it leaves has variance (1-t)^2 s^2 P / (t^2 P + (1-t)^2 s^2).
U, V = np.mgrid[:16, :16]
POWER = 4 / (1 + U**2 + V**2)


def dct(z):
    return torch.from_numpy(scipy.fft.dctn(z.double().numpy(), axes=(2, 3), norm="ortho"))


def idct(z):
    return torch.from_numpy(scipy.fft.idctn(z.double().numpy(), axes=(2, 3), norm="ortho"))


def wiener(s, factor=1.0):
    def predict(z, t):
        t = t.double()[:, None, None, None]
        power = torch.from_numpy(POWER)
        return idct(factor * t * power / (t**2 * power + (1 - t) ** 2 * s**2) * dct(z)).float()

    return predict


@pytest.mark.parametrize("s", [1.0, 2.0])
def test_loss_of_the_optimal_denoiser_of_a_gaussian_field(s):
    batch = 256
    t = torch.linspace(0.02, 0.99, batch)
    white, n = noise(batch, 3, 16, 16, seed=1), noise(batch, 3, 16, 16, seed=2)
    x = idct(white * torch.from_numpy(POWER).sqrt()).float()
    y = torch.zeros(batch, dtype=torch.int64)

    def loss(factor):
        return float(Denoiser(Function(wiener(s, factor)), noise_scale=s)(x, y, t, n))

    time = t.double().numpy()[:, None, None]
    left = (1 - time) ** 2 * s**2 * POWER / (time**2 * POWER + (1 - time) ** 2 * s**2)
    per_coefficient = left / np.maximum(1 - time, 0.05) ** 2
    deviation = math.sqrt(2 / 3 * np.mean(per_coefficient**2) / per_coefficient.size)
    assert abs(loss(1.0) - per_coefficient.mean()) < 4 * deviation
    assert deviation < 0.02 * per_coefficient.mean()
    assert loss(0.9) > 1.02 * loss(1.0) and loss(1.1) > 1.02 * loss(1.0)


def test_velocity_of_the_optimal_denoiser_is_the_flow_of_the_field():
    """v = a(t) z with a = d/dt log sqrt(t^2 P + (1-t)^2), per frequency, away from the clamp."""
    z, t = noise(4, 1, 16, 16), torch.tensor([0.1, 0.4, 0.7, 0.9])
    v = Denoiser(Function(wiener(1.0))).velocity(z, t, LABELS[:4])
    for b, time in enumerate(t.double().tolist()):
        step = 1e-5
        later, earlier = (0.5 * np.log(s**2 * POWER + (1 - s) ** 2) for s in (time + step, time - step))
        assert_same(v[b], idct(dct(z[b : b + 1]) * torch.from_numpy((later - earlier) / (2 * step)))[0], 1e-4)


# The random part of a step.


def drawn(position, seed=3, step=5, drop=0.1, y=None):
    position = torch.as_tensor(position)
    y = position % 10 if y is None else y
    return draw(seed, step, position, y, SHAPE, LogitNormal(), drop, null_class=10)


def test_times_are_logit_normal():
    position = torch.arange(20_000)
    for density in (LogitNormal(), LogitNormal(0.3, 1.5)):
        t = draw(0, 0, position, position, (1, 1, 1), density, 0.1, 10).t
        assert t.dtype == torch.float32 and t.shape == (20_000,)
        n = scipy.special.logit(t.double().numpy())
        assert scipy.stats.kstest(n, "norm", args=(density.P_mean, density.P_std)).pvalue > 0.01
    assert (LogitNormal().P_mean, LogitNormal().P_std) == (-0.8, 0.8)


def test_noise_is_standard_normal():
    n = drawn(range(100)).noise
    assert n.shape == (100, *SHAPE)
    assert scipy.stats.kstest(n.flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_rate_of_dropped_labels(probability):
    position = torch.arange(20_000)
    y = drawn(position, drop=probability).y
    dropped = y == 10
    assert y[~dropped].equal(position[~dropped] % 10)
    assert abs(dropped.double().mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / 20_000)


def test_no_label_or_every_label_dropped():
    position = torch.arange(1000)
    assert drawn(position, drop=0.0).y.equal(position % 10)
    assert drawn(position, drop=1.0).y.eq(10).all()


def test_draws_do_not_depend_on_how_the_batch_is_split():
    whole = drawn(range(12))
    parts = [drawn(p) for p in (range(0, 5), range(5, 6), range(6, 12))]
    backwards = drawn(range(11, -1, -1))
    for name in ("t", "noise", "y"):
        values = getattr(whole, name)
        assert values.equal(torch.cat([getattr(part, name) for part in parts]))
        assert values.equal(getattr(backwards, name).flip(0))


def test_draws_differ_between_steps_seeds_and_samples():
    first, step, seed = drawn(range(8)), drawn(range(8), step=6), drawn(range(8), seed=4)
    for name in ("t", "noise"):
        a, b, c = (getattr(d, name) for d in (first, step, seed))
        assert not (a == b).any() and not (a == c).any()
        assert len(a.unique(dim=0)) == 8


def test_time_noise_label_drop_and_flip_are_independent():
    position = torch.arange(20_000)
    d = draw(0, 0, position, position.new_zeros(20_000), (1, 1, 2), LogitNormal(), 0.5, 10)
    flip = random_flip(torch.tensor([0.0, 1.0]).expand(20_000, 1, 1, 2), 0, 0, position)[:, 0, 0, 0]
    columns = torch.stack([d.t, d.noise[:, 0, 0, 0], d.noise[:, 0, 0, 1], d.y.float(), flip])
    correlation = np.corrcoef(columns.numpy()) - np.eye(5)
    assert np.abs(correlation).max() < 5 / math.sqrt(20_000)


def test_starting_noise_is_not_the_noise_of_training():
    position = torch.arange(4)
    n = math.prod(SHAPE)
    assert not drawn(position, seed=0, step=0).noise.flatten(1).equal(rng.normal(0, Stream.START_NOISE, 0, position, n))


def test_flips():
    x, position = noise(2000, 1, 3, 4), torch.arange(2000)
    out = random_flip(x, 1, 2, position).numpy()
    mirrored = x.numpy()[:, :, :, ::-1]
    flipped = (out == mirrored).all((1, 2, 3))
    assert (out[~flipped] == x.numpy()[~flipped]).all()
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(2000)
    parts = [random_flip(x[s], 1, 2, position[s]) for s in (slice(0, 7), slice(7, 2000))]
    assert torch.cat(parts).numpy().tobytes() == out.tobytes()
    assert not np.array_equal(random_flip(x, 1, 3, position).numpy(), out)
    assert not np.array_equal(random_flip(x, 2, 2, position).numpy(), out)


def test_flips_keep_bytes():
    x = torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2)
    assert random_flip(x, 0, 0, torch.arange(4)).dtype == torch.uint8
