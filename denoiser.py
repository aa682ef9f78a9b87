"""From data to the training loss, and from the network's output to a velocity.

    z = t x + (1 - t) e,    v = (x - z) / max(1 - t, t_eps)                               (arXiv 2511.13720)

t = 0 is noise and t = 1 is data. The network predicts x (`pred_param="x"`) or v itself, and sees z through
Spectral Forcing where that is on; z in the formulae is always the unfiltered one.

Shapes: x, z, e, v (B, C, H, W); t, y (B,); in `predict` and `velocity` also t (1,), one time for all samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.special import ndtr

from spectral_conditioning import ImageSchedules, ScheduleEmbedder
from util import rng
from util.rng import Stream


class Density(Protocol):
    """Density of training times: LogitNormal, spectral_schedule.TrainingTimes, spectral_conditioning.InstanceTimes."""

    def of_images(self, x: Tensor) -> "Density":
        """The density that draws for the images x (B, C, H, W)."""

    def draw(self, seed: int, step: int, position: Tensor) -> Tensor:
        """t (B,) float32 of the samples at `position` (B,) in the global batch of `step`."""

    def cdf(self, t: Tensor) -> Tensor:
        """Probability of a time below t: (M,) in [0, 1] -> float64 (M,)."""


@dataclass(frozen=True)
class LogitNormal:
    """Density of training times: t = sigmoid(P_mean + P_std * n) with n ~ N(0, 1)."""

    P_mean: float = -0.8
    P_std: float = 0.8

    def __call__(self, n: Tensor) -> Tensor:
        return torch.sigmoid(self.P_mean + self.P_std * n)

    def of_images(self, x: Tensor) -> "LogitNormal":
        return self

    def draw(self, seed: int, step: int, position: Tensor) -> Tensor:
        return self(rng.normal(seed, Stream.TIME, step, position)[:, 0])

    def cdf(self, t: Tensor) -> Tensor:
        return ndtr((t.double().logit() - self.P_mean) / max(abs(self.P_std), 1e-12))


@dataclass(frozen=True)
class Draw:
    """The random part of a training step for B samples: time t (B,), unit noise (B, C, H, W), labels (B,)."""

    t: Tensor
    noise: Tensor
    y: Tensor


def draw(
    seed: int,
    step: int,
    position: Tensor,
    y: Tensor,
    image_shape: tuple[int, int, int],
    density: Density,
    label_drop_prob: float,
    null_class: int,
) -> Draw:
    """Time, noise and label drop of the samples at `position` (B,) in the global batch of `step`."""
    noise = rng.normal(seed, Stream.NOISE, step, position, image_shape[0] * image_shape[1] * image_shape[2])
    dropped = rng.uniform(seed, Stream.LABEL_DROP, step, position)[:, 0] < label_drop_prob
    return Draw(density.draw(seed, step, position), noise.view(-1, *image_shape), torch.where(dropped, null_class, y))


def random_flip(x: Tensor, seed: int, step: int, position: Tensor) -> Tensor:
    """Mirror each image of x (B, C, H, W) left to right with probability 1/2."""
    flip = rng.uniform(seed, Stream.FLIP, step, position)[:, 0] < 0.5
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


def one_minus(t: Tensor, t_eps: float) -> Tensor:
    """What a velocity is divided by: max(1 - t, t_eps), (B, 1, 1, 1)."""
    return (1 - t).clamp_min(t_eps)[:, None, None, None]


class NoisyImages(nn.Module):
    """Images x, unit noise (B, C, H, W) and t (B,) to z and v. Without parameters: a module is what can be compiled."""

    def __init__(self, noise_scale: float, t_eps: float):
        super().__init__()
        self.noise_scale, self.t_eps = noise_scale, t_eps

    def forward(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        e = self.noise_scale * noise
        t_ = t[:, None, None, None]
        z = t_ * x + (1 - t_) * e
        return z, x - e if self.t_eps == 0 else (x - z) / one_minus(t, self.t_eps)


class VelocityLoss(nn.Module):
    """Mean of (v - v_pred)^2, where v_pred follows from the network's output at (z, t). Without parameters."""

    def __init__(self, pred_param: str, t_eps: float):
        super().__init__()
        self.pred_param, self.t_eps = pred_param, t_eps

    def velocity(self, out: Tensor, z: Tensor, t: Tensor, t_eps: float | None = None) -> Tensor:
        if self.pred_param == "v":
            return out
        return (out - z) / one_minus(t, self.t_eps if t_eps is None else t_eps)

    def forward(self, v: Tensor, out: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return (v - self.velocity(out, z, t)).square().mean()


class Denoiser(nn.Module):
    """The network behind Spectral Forcing, with the loss and the velocity that follow from its output.

    Args:
        net: network(z (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W); with `schedules` it takes (B, 2) as well.
        spectral_forcing: operator(z, t) -> z as the network sees it; None for plain JiT.
        pred_param: "x" if the network's output is the data, "v" if it is the velocity.
        t_eps: lower bound of 1 - t where it divides; 0 is for `pred_param="v"`, whose target then is x - e exactly.
        noise_scale: standard deviation of e.
        autocast_dtype: type of the matrix products in the network; None for no autocast. Casting the module itself
            does not work with Spectral Forcing, whose output is float32.
        schedules: of images, where the network is told (lambda_0, lambda_1) of the schedule of each sample.
    """

    def __init__(
        self,
        net: nn.Module,
        spectral_forcing: nn.Module | None = None,
        pred_param: str = "x",
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
        autocast_dtype: torch.dtype | None = None,
        schedules: ImageSchedules | None = None,
    ):
        super().__init__()
        if pred_param not in ("x", "v"):
            raise ValueError(f"pred_param is {pred_param!r}: it must be 'x' or 'v'")
        if not 0 <= t_eps < 1 or (t_eps == 0 and pred_param == "x"):
            raise ValueError(f"t_eps is {t_eps}: it must be in (0, 1), or 0 together with pred_param v")
        if not noise_scale > 0:
            raise ValueError(f"noise_scale is {noise_scale}: it must be positive")
        self.net = net
        self.spectral_forcing = spectral_forcing
        self.schedules = schedules
        self.noisy_images = NoisyImages(noise_scale, t_eps)
        self.loss = VelocityLoss(pred_param, t_eps)
        self.autocast_dtype = autocast_dtype

    @property
    def noise_scale(self) -> float:
        return self.noisy_images.noise_scale

    @property
    def t_eps(self) -> float:
        return self.loss.t_eps

    @property
    def pred_param(self) -> str:
        return self.loss.pred_param

    def predict(self, z: Tensor, t: Tensor, y: Tensor, bounds: Tensor | None = None) -> Tensor:
        """The network's output in float32: x or v, as `pred_param` says.

        Raises:
            ValueError: `bounds` (B, 2) given to a network that is not told them, or not given to one that is.
        """
        if (bounds is None) != (self.schedules is None):
            raise ValueError(
                "this network is told (lambda_0, lambda_1) of the schedule of each sample: `bounds` (B, 2) is missing"
                if bounds is None
                else "this network is not told of schedules, and `bounds` were given"
            )
        told = () if bounds is None else (bounds,)
        seen = z if self.spectral_forcing is None else self.spectral_forcing(z, t)
        # No cache: each weight is used once, and it would hold a copy of all until the end.
        on = self.autocast_dtype is not None
        with torch.autocast(z.device.type, dtype=self.autocast_dtype, enabled=on, cache_enabled=False):
            return self.net(seen, t, y, *told).float()

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Within the block the weights that autocast casts at each use are cast once; they must not change meanwhile.

        The same to the bit, and compiled blocks find them cast as well. It holds a copy of them in `autocast_dtype`.
        The parameters themselves are left alone, since DDP holds on to them, and are back afterwards.
        """
        layers = [m for m in self.net.modules() if isinstance(m, nn.Linear | nn.Conv2d | ScheduleEmbedder)]
        held = [(m, name, p) for m in layers for name, p in m.named_parameters(recurse=False)]
        if self.autocast_dtype is None:
            held = []
        for layer, name, parameter in held:
            layer._parameters[name] = nn.Parameter(parameter.detach().to(self.autocast_dtype), requires_grad=False)
        try:
            yield
        finally:
            for layer, name, parameter in held:
                layer._parameters[name] = parameter

    def velocity(
        self, z: Tensor, t: Tensor, y: Tensor, t_eps: float | None = None, bounds: Tensor | None = None
    ) -> Tensor:
        """v at (z, t) for labels y, clamped as in training or, for a sampling grid of its own, at `t_eps` > 0.

        bounds: (lambda_0, lambda_1) of each sample, (B, 2), for a network that is told them.
        """
        return self.loss.velocity(self.predict(z, t, y, bounds), z, t, t_eps)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean of (v - v_pred)^2 over the batch, a scalar. `noise` has unit variance."""
        z, v = self.noisy_images(x, noise, t)
        return self.loss(v, self.predict(z, t, y, self._bounds(x)), z, t)

    def error(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v - v_pred (B, C, H, W), of which `forward` is the mean square."""
        z, v = self.noisy_images(x, noise, t)
        return v - self.velocity(z, t, y, bounds=self._bounds(x))

    def _bounds(self, x: Tensor) -> Tensor | None:
        """(B, 2) of the schedules of x, for a network that is told them."""
        return None if self.schedules is None else self.schedules(x).bounds
