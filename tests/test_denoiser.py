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
from torch.nn.attention import SDPBackend, sdpa_kernel

from denoiser import Denoiser, HybridWeight, LogitNormal, random_flip, sample_step
from spectral_forcing import SpectralForcing
from spectral_ops.conditioning import ImageSchedules
from tests.golden_inputs import normals, small_denoiser
from util.rng import CounterRNG

SHAPE = (3, 8, 8)
TIMES = torch.tensor([0.0, 0.2, 0.6, 0.94, 0.98, 1.0])
LABELS = torch.arange(6)


class Network(torch.nn.Module):
    """A function of (z, t, ...) in the place of a network. It remembers its last input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        self.seen = args
        return self.function(*args)


def fixed(out):
    return Network(lambda *args: out)


def assert_same(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=tolerance)


def by_numpy(x, n, t, out, pred_param, t_eps, noise_scale):
    """(z, velocity, loss) one sample at a time, in float64."""
    zs, velocities, losses = [], [], []
    for b in range(len(x)):
        data, e, o = (a[b].double().numpy() for a in (x, noise_scale * n, out))
        time = float(t[b])
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
    x, n, out = normals(1, 6, *SHAPE), normals(2, 6, *SHAPE), normals(3, 6, *SHAPE)
    z, velocity, loss = by_numpy(x, n, TIMES, out, pred_param, t_eps, noise_scale)
    net = fixed(out)
    denoiser = Denoiser(net, operator, pred_param, t_eps, noise_scale)
    assert_same(denoiser(x, LABELS, TIMES, n), loss)
    z = torch.from_numpy(z).float()
    seen, t, y = net.seen
    assert_same(seen, z if operator is None else operator(z, TIMES))
    assert t.equal(TIMES) and y.equal(LABELS)
    assert_same(denoiser.velocity(z, TIMES, LABELS), velocity)
    assert_same(denoiser.residual(x, LABELS, TIMES, n).square().mean(), loss)


HYBRIDS = {  # mode -> w of t, by hand, with t_eps 0.05
    "one_minus_t": lambda t: max(1 - t, 0.05),
    "snr_inverse": lambda t: 1 / (1 + (max(t, 0.05) / max(1 - t, 0.05)) ** 2),
    "snr": lambda t: 1 - 1 / (1 + (max(t, 0.05) / max(1 - t, 0.05)) ** 2),
}


@pytest.mark.parametrize("mode", HYBRIDS)
@pytest.mark.parametrize(("power", "low", "high"), [(1.0, 0.0, 1.0), (2.5, 0.1, 0.6)])
def test_hybrid_prediction_by_numpy(mode, power, low, high):
    """The first C channels are the data, the rest the velocity."""
    x, n, data, v = (normals(seed, 6, *SHAPE) for seed in range(1, 5))
    hybrid = HybridWeight(mode, power, low, high)
    denoiser = Denoiser(fixed(torch.cat([data, v], 1)), pred_param="hybrid", hybrid=hybrid)
    z, from_data, _ = by_numpy(x, n, TIMES, data, "x", 0.05, 1.0)
    w = np.array([min(max(HYBRIDS[mode](float(t)) ** power, low), high) for t in TIMES])[:, None, None, None]
    expected = w * from_data + (1 - w) * v.double().numpy()
    assert_same(denoiser.velocity(torch.from_numpy(z).float(), TIMES, LABELS), expected)
    target = (x.double().numpy() - z) / np.maximum(1 - TIMES.double().numpy(), 0.05)[:, None, None, None]
    assert_same(denoiser(x, LABELS, TIMES, n), np.mean((target - expected) ** 2), 1e-4)


def test_defaults_are_the_published_ones():
    denoiser = Denoiser(torch.nn.Identity())
    settings = (denoiser.loss.pred_param, denoiser.loss.t_eps, denoiser.noise_scale, denoiser.input_operator)
    assert settings == ("x", 0.05, 1.0, None)
    with pytest.raises(AttributeError):
        denoiser.noise_scale = 2.0  # the loss would not see it


def test_clamp_of_a_sampling_grid():
    """A velocity that is predicted has none."""
    z, out, t = normals(1, 2, *SHAPE), normals(2, 2, *SHAPE), torch.tensor([0.99, 0.5])
    assert_same(Denoiser(fixed(out)).velocity(z, t, LABELS[:2], 0.005)[0], (out[0] - z[0]) * 100, 1e-3)
    assert Denoiser(fixed(out), pred_param="v").velocity(z, t, LABELS[:2], 0.5).equal(out)


def test_predictions_are_float32_under_autocast():
    z, seen = normals(0, 2, *SHAPE), []
    for dtype in (None, torch.bfloat16):
        net = Network(lambda z, *args: seen.append(z @ z) or seen[-1])
        denoiser = Denoiser(net, SpectralForcing(8), autocast_dtype=dtype)
        assert denoiser.predict(z, TIMES[:2], LABELS[:2]).dtype == torch.float32
    assert [product.dtype for product in seen] == [torch.float32, torch.bfloat16]


def test_forward_mode_and_second_derivatives_of_a_network():
    """As docs/export.md says: torch's fused attention has none on a CPU, its plain one has all."""
    denoiser, z, w = small_denoiser(), normals(1, 2, 3, 32, 32), normals(2, 2, 3, 32, 32)
    t, one, h = torch.tensor([0.3, 0.6]), torch.ones(2), 1e-2

    def velocity(z, t):
        return denoiser.velocity(z, t, LABELS[:2])

    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(velocity, (z, t), (w, one))
        difference = (velocity(z + h * w, t + h) - velocity(z - h * w, t - h)) / (2 * h)
        assert (tangent - difference).norm() / difference.norm() < 1e-2
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(velocity(z, t).square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad((gradient * w).sum(), z)
        assert second.isfinite().all() and second.norm() > 0


MISTAKES = [
    *(({"pred_param": "e"}, "pred_param is 'e'"), ({"t_eps": 0.0}, "together with pred_param v")),
    *(({"t_eps": value, "pred_param": "v"}, f"t_eps is {value}") for value in (1.0, -0.1, math.nan)),
    *(({"noise_scale": value}, f"noise_scale is {value}") for value in (0.0, -1.0, math.nan)),
]


@pytest.mark.parametrize(("kwargs", "message"), MISTAKES)
def test_settings_out_of_range_are_refused(kwargs, message):
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
    def predict(z, t, y):
        t = t.double()[:, None, None, None]
        power = torch.from_numpy(POWER)
        return idct(factor * t * power / (t**2 * power + (1 - t) ** 2 * s**2) * dct(z)).float()

    return predict


@pytest.mark.parametrize("s", [1.0, 2.0])
def test_loss_of_the_optimal_denoiser_of_a_gaussian_field(s):
    batch = 256
    t = torch.linspace(0.02, 0.99, batch)
    white, n = normals(1, batch, 3, 16, 16), normals(2, batch, 3, 16, 16)
    x = idct(white * torch.from_numpy(POWER).sqrt()).float()
    y = torch.zeros(batch, dtype=torch.int64)

    def loss(factor):
        return float(Denoiser(Network(wiener(s, factor)), noise_scale=s)(x, y, t, n))

    time = t.double().numpy()[:, None, None]
    left = (1 - time) ** 2 * s**2 * POWER / (time**2 * POWER + (1 - time) ** 2 * s**2)
    per_coefficient = left / np.maximum(1 - time, 0.05) ** 2
    deviation = math.sqrt(2 / 3 * np.mean(per_coefficient**2) / per_coefficient.size)
    assert abs(loss(1.0) - per_coefficient.mean()) < 4 * deviation
    assert deviation < 0.02 * per_coefficient.mean()
    assert loss(0.9) > 1.02 * loss(1.0) and loss(1.1) > 1.02 * loss(1.0)


def test_times_are_logit_normal():
    position = torch.arange(20_000)
    for sampler, (mean, std) in ((LogitNormal(), (-0.8, 0.8)), (LogitNormal(0.3, 1.5), (0.3, 1.5))):
        t = sample_step(CounterRNG(0, 0, position), position, (1, 1, 1), sampler, 0.1, 10).t
        assert t.dtype == torch.float32 and t.shape == (20_000,) and sampler.for_images(t) is sampler
        assert scipy.stats.kstest(scipy.special.logit(t.double().numpy()), "norm", args=(mean, std)).pvalue > 0.01
        at = torch.tensor([0.0, 0.3, 0.7, 1.0])
        assert_same(sampler.cdf(at), scipy.stats.norm.cdf(scipy.special.logit(at.double().numpy()), mean, std))


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_rate_of_dropped_labels(probability):
    position = torch.arange(20_000)
    y = sample_step(CounterRNG(3, 5, position), position % 10, SHAPE, LogitNormal(), probability, null_class=10).y
    dropped = y == 10
    assert y[~dropped].equal(position[~dropped] % 10)
    assert abs(dropped.double().mean() - probability) <= 4 * math.sqrt(probability * (1 - probability) / 20_000)


def test_each_image_is_mirrored_with_probability_one_half():
    x, position = normals(0, 2000, 1, 3, 4), torch.arange(2000)
    out = random_flip(x, CounterRNG(1, 2, position))
    flipped = (out == x.flip(-1)).all((1, 2, 3))
    assert out[~flipped].equal(x[~flipped]) and abs(flipped.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(2000)
    assert random_flip(x.to(torch.uint8), CounterRNG(0, 0, position)).dtype == torch.uint8


def test_the_random_parts_of_a_step_are_independent():
    position = torch.arange(20_000)
    rng = CounterRNG(0, 0, position)
    d = sample_step(rng, position.new_zeros(20_000), (1, 1, 2), LogitNormal(), 0.5, 10)
    flip = random_flip(torch.tensor([0.0, 1.0]).expand(20_000, 1, 1, 2), rng)[:, 0, 0, 0]
    columns = torch.stack([d.t, d.noise[:, 0, 0, 0], d.noise[:, 0, 0, 1], d.y.float(), flip])
    assert np.abs(np.corrcoef(columns.numpy()) - np.eye(5)).max() < 5 / math.sqrt(20_000)


def test_a_network_with_schedules_gets_the_range_of_each_image_and_another_gets_none():
    x, schedules = normals(0, 6, 3, 32, 32), ImageSchedules(32, [0.1, 0.0, -0.1], 0.1)
    conditioned = Denoiser(fixed(x), schedules=schedules)
    conditioned(x, LABELS, TIMES, x)
    logsnr_range = conditioned.net.seen[3]
    assert logsnr_range.equal(schedules(x).logsnr_range) and logsnr_range.shape == (6, 2)
    conditioned.velocity(x, TIMES, LABELS, logsnr_range=2 * logsnr_range)
    assert conditioned.net.seen[3].equal(2 * logsnr_range)
    with pytest.raises(ValueError, match="it needs logsnr_range"):
        conditioned.predict(x, TIMES, LABELS)
    with pytest.raises(ValueError, match="it takes no logsnr_range"):
        Denoiser(fixed(x)).predict(x, TIMES, LABELS, logsnr_range)


@torch.no_grad()
def test_weights_that_are_cast_once_give_the_same_to_the_bit():
    denoiser, z = small_denoiser(autocast_dtype=torch.bfloat16), normals(0, 3, 3, 32, 32)
    args, before = (z, torch.tensor([0.2, 0.5, 0.9]), LABELS[:3]), dict(denoiser.named_parameters())
    expected = denoiser.predict(*args)
    with denoiser.cast_weights():
        assert denoiser.net.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        assert denoiser.predict(*args).equal(expected)
    assert all(p is before[name] for name, p in denoiser.named_parameters())
