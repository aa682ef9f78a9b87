"""From data to the training loss, and from the network's output to a velocity.

    z = t x + (1 - t) e,    v = (x - z) / max(1 - t, t_eps)                               (arXiv 2511.13720)

t = 0 is noise and t = 1 is data. The network predicts x (`pred_param="x"`), v itself, or both, and sees z through an
input operator such as Spectral Forcing; z in the formulae is always the unfiltered one.

Shapes: x, z, e, v (B, C, H, W); t, y (B,), in sampling also t (1,) for all samples; logsnr_range (B, 2).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.special import ndtr, ndtri

from spectral_ops.conditioning import ImageSchedules, ScheduleEmbedder
from spectral_ops.resolution import LevelTimes, ResolutionSchedule
from spectral_ops.schedule import repeat_to

PREDICTIONS = ("x", "v", "hybrid")
HYBRID_MODES = ("one_minus_t", "snr_inverse", "snr")


class RandomNumbers(Protocol):
    """Random numbers (B, n) of the B samples of a batch, float32; each stream has its own (util.rng.CounterRNG)."""

    def normal(self, stream: str, n: int = 1) -> Tensor: ...
    def uniform(self, stream: str, n: int = 1) -> Tensor: ...


class TimeSampler(Protocol):
    """Distribution of training times: LogitNormal, or one of spectral_ops."""

    def for_images(self, x: Tensor) -> "TimeSampler": ...  # that of the images x (B, C, H, W)
    def within(self, low: Tensor, high: Tensor) -> "TimeSampler": ...  # sample i in low .. high (G,), number i % G
    def sample(self, rng: RandomNumbers) -> Tensor: ...  # t (B,), float32
    def cdf(self, t: Tensor) -> Tensor: ...  # probability of a time below t: (M,) in [0, 1] -> float64 (M,)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(P_mean + P_std n) with n ~ N(0, 1) (arXiv 2403.03206)."""

    P_mean: float = -0.8
    P_std: float = 0.8
    ends: tuple[Tensor, Tensor] | None = None  # set by `within`: probabilities (G,), float64

    def within(self, low: Tensor, high: Tensor) -> "LogitNormal":
        return replace(self, ends=(self.cdf(low), self.cdf(high)))

    @property
    def mass(self) -> Tensor:
        """The probability of the intervals of `within`, float64 (G,)."""
        return self.ends[1] - self.ends[0]

    def for_images(self, x: Tensor) -> "LogitNormal":
        return self

    def sample(self, rng: RandomNumbers) -> Tensor:
        if self.ends is None:
            return torch.sigmoid(self.P_mean + self.P_std * rng.normal("time")[:, 0])
        u = rng.uniform("time")[:, 0].double()
        low, high = (repeat_to(len(u), end).to(u.device, non_blocking=True) for end in self.ends)
        return torch.sigmoid(self.P_mean + self.P_std * ndtri(torch.lerp(low, high, u))).float()

    def cdf(self, t: Tensor) -> Tensor:
        return ndtr((t.double().logit() - self.P_mean) / max(abs(self.P_std), 1e-12))


@dataclass(frozen=True)
class StepNoise:
    """The random part of a training step: times t (B,), unit noise (B, C, H, W), labels y (B,) with some dropped."""

    t: Tensor
    noise: Tensor
    y: Tensor
    level: tuple[int, ...] | None = None  # of resolution (G,): sample i has level[i % G]
    weight: Tensor | None = None  # of each sample in the loss (B,)


def sample_step(
    rng: RandomNumbers,
    y: Tensor,
    image_shape: tuple[int, int, int],
    time_sampler: TimeSampler,
    label_drop_prob: float,
    null_class: int,
) -> StepNoise:
    """Draw times and noise, and replace labels y (B,) by `null_class` with probability `label_drop_prob`."""
    noise = rng.normal("noise", image_shape[0] * image_shape[1] * image_shape[2]).view(-1, *image_shape)
    dropped = rng.uniform("label_drop")[:, 0] < label_drop_prob
    noise_and_labels = noise, torch.where(dropped, null_class, y)
    if not isinstance(time_sampler, LevelTimes):
        return StepNoise(time_sampler.sample(rng), *noise_and_labels)
    weight = time_sampler.weight(len(y)).to(y.device, non_blocking=True)
    return StepNoise(time_sampler.sample(rng), *noise_and_labels, time_sampler.levels, weight)


def random_flip(x: Tensor, rng: RandomNumbers) -> Tensor:
    """Mirror each image of x (B, C, H, W) left to right with probability 1/2."""
    flip = rng.uniform("flip")[:, 0] < 0.5
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


def one_minus(t: Tensor, t_eps: float) -> Tensor:
    """Return the divisor of a velocity, max(1 - t, t_eps), (B, 1, 1, 1)."""
    return (1 - t).clamp_min(t_eps)[:, None, None, None]


class NoisyImages(nn.Module):
    """Images x, unit noise (B, C, H, W) and t (B,) -> z, v. A module, since modules can be compiled in place."""

    def __init__(self, noise_scale: float, t_eps: float):
        super().__init__()
        self.noise_scale, self.t_eps = noise_scale, t_eps

    def forward(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        e = self.noise_scale * noise
        t_ = t[:, None, None, None]
        z = t_ * x + (1 - t_) * e
        v = x - e if self.t_eps == 0 else (x - z) / one_minus(t, self.t_eps)
        return z, v


@dataclass(frozen=True)
class HybridWeight:
    """Weight of the data prediction beside the velocity prediction, of the release of arXiv 2606.15236.

        w = max(1 - t, t_eps)     mode "one_minus_t"
        w = 1 / (1 + snr)         mode "snr_inverse",   snr = (max(t, t_eps) / max(1 - t, t_eps))^2
        w = snr / (1 + snr)       mode "snr"

    raised to `power`, then clamped to minimum .. maximum.
    """

    mode: str = "one_minus_t"
    power: float = 1.0
    minimum: float = 0.0
    maximum: float = 1.0

    def __call__(self, t: Tensor, t_eps: float) -> Tensor:
        """Return w (B, 1, 1, 1) at t (B,)."""
        rest = one_minus(t, t_eps)
        snr = (t.clamp_min(t_eps)[:, None, None, None] / rest).square()
        w = {"one_minus_t": rest, "snr_inverse": 1 / (1 + snr), "snr": snr / (1 + snr)}[self.mode]
        return w.pow(self.power).clamp(self.minimum, self.maximum)


class VelocityLoss(nn.Module):
    """Mean of weight (v - v_pred)^2, where v_pred follows from the network's output at (z, t). It has no parameters."""

    def __init__(self, pred_param: str, t_eps: float, hybrid: HybridWeight):
        super().__init__()
        self.pred_param, self.t_eps, self.hybrid = pred_param, t_eps, hybrid

    def velocity(self, out: Tensor, z: Tensor, t: Tensor, t_eps: float | None = None) -> Tensor:
        """Return v_pred (B, C, H, W) of an output that predicts

        v         v_pred = out
        x         v_pred = (out - z) / max(1 - t, t_eps)
        hybrid    v_pred = w (x - z) / max(1 - t, t_eps) + (1 - w) v,   out (B, 2 C, H, W) = x and v
        """
        t_eps = self.t_eps if t_eps is None else t_eps
        if self.pred_param == "v":
            return out
        if self.pred_param == "x":
            return (out - z) / one_minus(t, t_eps)
        x, v = out.chunk(2, dim=1)
        w = self.hybrid(t, t_eps)
        return w * (x - z) / one_minus(t, t_eps) + (1 - w) * v

    def forward(self, v: Tensor, out: Tensor, z: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
        error = (v - self.velocity(out, z, t)).square()
        return error.mean() if weight is None else (weight[:, None, None, None] * error).mean()


class Denoiser(nn.Module):
    """The network behind its input operator, with the loss and the velocity that follow from its output.

    Args:
        net: network(z (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W), or (B, 2 C, H, W) for `pred_param="hybrid"`; with
            `schedules` it takes logsnr_range as well.
        input_operator: operator(z, t) -> z as the network sees it; None for plain JiT.
        pred_param: "x" if the network's output is the data, "v" if it is the velocity, "hybrid" if it is both.
        t_eps: lower bound of 1 - t as a divisor; 0 is for `pred_param="v"`, whose target then is x - e exactly.
        noise_scale: standard deviation of e.
        autocast_dtype: type of the matrix products in the network; None for no autocast.
        schedules: of images, for a network that is conditioned on (lambda_0, lambda_1) of each sample's schedule.
        hybrid: weight of the data prediction, for `pred_param="hybrid"`.
        resolution: for a network that takes smaller images as well: the one that each time needs.
    """

    def __init__(
        self,
        net: nn.Module,
        input_operator: nn.Module | None = None,
        pred_param: str = "x",
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
        autocast_dtype: torch.dtype | None = None,
        schedules: ImageSchedules | None = None,
        hybrid: HybridWeight | None = None,
        resolution: ResolutionSchedule | None = None,
    ):
        super().__init__()
        if pred_param not in PREDICTIONS:
            raise ValueError(f"pred_param is {pred_param!r}; it must be one of {', '.join(PREDICTIONS)}.")
        if not 0 <= t_eps < 1 or (t_eps == 0 and pred_param != "v"):
            raise ValueError(f"t_eps is {t_eps}; it must be in (0, 1), or 0 together with pred_param v.")
        if not noise_scale > 0:
            raise ValueError(f"noise_scale is {noise_scale}; it must be positive.")
        self.net, self.input_operator, self.schedules = net, input_operator, schedules
        self.resolution = resolution
        self.autocast_dtype = autocast_dtype
        self.noisy_images = NoisyImages(noise_scale, t_eps)
        self.loss = VelocityLoss(pred_param, t_eps, hybrid or HybridWeight())

    @property
    def noise_scale(self) -> float:
        return self.noisy_images.noise_scale

    def predict(
        self, z: Tensor, t: Tensor, y: Tensor, logsnr_range: Tensor | None = None, level: Sequence[int] | None = None
    ) -> Tensor:
        """Return the network's output in float32: what `pred_param` says.

        `level` (G,) are levels of resolution: sample i has level[i % G]. Without it t decides; the host waits for it.
        """
        if self.schedules is None and logsnr_range is not None:
            raise ValueError("The network is not conditioned on schedules: it takes no logsnr_range.")
        if self.schedules is not None and logsnr_range is None:
            raise ValueError("The network is conditioned on schedules: it needs logsnr_range (B, 2).")
        condition = () if logsnr_range is None else (logsnr_range,)
        seen = z if self.input_operator is None else self.input_operator(z, t)
        if self.resolution is None:
            return self._network(seen, t, y, *condition)
        if by_time := level is None:
            level = self.resolution.level_of(t.cpu())  # (B,)
        else:
            level = repeat_to(len(z), torch.tensor(level, device="cpu"))
        levels = level.unique().tolist()
        if len(levels) == 1:
            return self._at_level(levels[0], z, seen, t, y, *condition)
        groups = [(level == number).nonzero().flatten() for number in levels]
        order = torch.cat(groups).argsort().to(z.device, non_blocking=True)
        groups = [group.to(z.device, non_blocking=True) for group in groups]
        parts = zip(levels, groups, strict=True)
        with torch.compiler.set_stance("eager_on_recompile") if by_time else nullcontext():  # groups of any size
            out = [self._at_level(n, *(part[group] for part in (z, seen, t, y, *condition))) for n, group in parts]
        return torch.cat(out)[order]

    def _network(self, seen: Tensor, t: Tensor, y: Tensor, *condition: Tensor) -> Tensor:
        on = self.autocast_dtype is not None  # without a cache: each weight is used once, and it would hold them all
        with torch.autocast(seen.device.type, dtype=self.autocast_dtype, enabled=on, cache_enabled=False):
            return self.net(seen, t, y, *condition).float()

    def _at_level(self, level: int, z: Tensor, seen: Tensor, t: Tensor, y: Tensor, *condition: Tensor) -> Tensor:
        """Apply the network to the level's band of what it sees, and estimate the rest of the spectrum from z."""
        if level == 0:
            return self._network(seen, t, y, *condition)
        low = self._network(self.resolution.reduce(seen, level), t, y, *condition)
        kinds = {"x": (False,), "v": (True,), "hybrid": (False, True)}[self.loss.pred_param]
        parts = zip(low.chunk(len(kinds), dim=1), kinds, strict=True)
        return torch.cat([self.resolution.join(part, z, t, velocity) for part, velocity in parts], dim=1)

    @contextmanager
    def cast_weights(self) -> Iterator[None]:
        """Cast the weights that autocast casts at each use once for the block, in which they must not change.

        Results are the same to the bit, and compiled blocks use the copies as well. The parameters themselves are set
        aside, since DDP refers to them, and are back afterwards.
        """
        held = []
        if self.autocast_dtype is not None:
            layers = [m for m in self.net.modules() if isinstance(m, nn.Linear | nn.Conv2d | ScheduleEmbedder)]
            held = [(m, name, p) for m in layers for name, p in m.named_parameters(recurse=False)]
        for layer, name, parameter in held:
            layer._parameters[name] = nn.Parameter(parameter.detach().to(self.autocast_dtype), requires_grad=False)
        try:
            yield
        finally:
            for layer, name, parameter in held:
                layer._parameters[name] = parameter

    def velocity(
        self, z: Tensor, t: Tensor, y: Tensor, t_eps: float | None = None, logsnr_range: Tensor | None = None
    ) -> Tensor:
        """Return v at (z, t) for labels y, with the divisor clamped at `t_eps` > 0, or as in training."""
        return self.loss.velocity(self.predict(z, t, y, logsnr_range), z, t, t_eps)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        noise: Tensor,
        level: Sequence[int] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the mean of weight (v - v_pred)^2 over the batch, a scalar. `noise` has unit variance.

        `level` is that of `predict`, and `weight` (B,) that of each sample (default: 1).
        """
        z, v = self.noisy_images(x, noise, t)
        return self.loss(v, self.predict(z, t, y, self._logsnr_range(x), level), z, t, weight)

    def residual(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return v - v_pred (B, C, H, W), the mean square of which is the loss."""
        z, v = self.noisy_images(x, noise, t)
        return v - self.velocity(z, t, y, logsnr_range=self._logsnr_range(x))

    def _logsnr_range(self, x: Tensor) -> Tensor | None:
        return None if self.schedules is None else self.schedules(x).logsnr_range
