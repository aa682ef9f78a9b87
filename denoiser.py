"""From data to the training loss, and from the network's output to a velocity.

    z = t x + (1 - t) e,    v = (x - z) / max(1 - t, t_eps)                               (arXiv 2511.13720)

t = 0 is noise and t = 1 is data. The network predicts x (`pred_param="x"`) or v itself, and sees z through
Spectral Forcing where that is on; z in the formulae is always the unfiltered one.

Shapes: x, z, e, v (B, C, H, W); t, y (B,); in `predict` and `velocity` also t (1,), one time for all samples.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from util import rng
from util.rng import Stream


@dataclass(frozen=True)
class LogitNormal:
    """Density of training times: t = sigmoid(P_mean + P_std * n) with n ~ N(0, 1)."""

    P_mean: float = -0.8
    P_std: float = 0.8

    def __call__(self, n: Tensor) -> Tensor:
        return torch.sigmoid(self.P_mean + self.P_std * n)


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
    density: LogitNormal,
    label_drop_prob: float,
    null_class: int,
) -> Draw:
    """Time, noise and label drop of the samples at `position` (B,) in the global batch of `step`."""
    n = rng.normal(seed, Stream.TIME, step, position)[:, 0]
    noise = rng.normal(seed, Stream.NOISE, step, position, image_shape[0] * image_shape[1] * image_shape[2])
    dropped = rng.uniform(seed, Stream.LABEL_DROP, step, position)[:, 0] < label_drop_prob
    return Draw(density(n), noise.view(-1, *image_shape), torch.where(dropped, null_class, y))


def random_flip(x: Tensor, seed: int, step: int, position: Tensor) -> Tensor:
    """Mirror each image of x (B, C, H, W) left to right with probability 1/2."""
    flip = rng.uniform(seed, Stream.FLIP, step, position)[:, 0] < 0.5
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


class Denoiser(nn.Module):
    """The network behind Spectral Forcing, with the loss and the velocity that follow from its output.

    Args:
        net: network(z (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W).
        spectral_forcing: operator(z, t) -> z as the network sees it; None for plain JiT.
        pred_param: "x" if the network's output is the data, "v" if it is the velocity.
        t_eps: lower bound of 1 - t where it divides; 0 is for `pred_param="v"`, whose target then is x - e exactly.
        noise_scale: standard deviation of e.
        autocast_dtype: type of the matrix products in the network; None for no autocast. Casting the module itself
            does not work with Spectral Forcing, whose output is float32.
    """

    def __init__(
        self,
        net: nn.Module,
        spectral_forcing: nn.Module | None = None,
        pred_param: str = "x",
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
        autocast_dtype: torch.dtype | None = None,
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
        self.pred_param, self.t_eps, self.noise_scale = pred_param, t_eps, noise_scale
        self.autocast_dtype = autocast_dtype

    def predict(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output in float32: x or v, as `pred_param` says."""
        seen = z if self.spectral_forcing is None else self.spectral_forcing(z, t)
        on, keeps = self.autocast_dtype is not None, torch.is_autocast_enabled(z.device.type)
        # No cache without `fixed_weights`: each weight is used once, and it would hold a copy of all until the end.
        with torch.autocast(z.device.type, dtype=self.autocast_dtype, enabled=on, cache_enabled=keeps):
            return self.net(seen, t, y).float()

    def fixed_weights(self, device: torch.device) -> AbstractContextManager:
        """Within the block weights must not change: under autocast each is cast once, at its first use, and kept."""
        return torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def velocity(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """v at (z, t) for labels y, clamped as in training."""
        out = self.predict(z, t, y)
        return out if self.pred_param == "v" else (out - z) / self._one_minus(t)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean of (v - v_pred)^2 over the batch, a scalar. `noise` has unit variance."""
        return self.error(x, y, t, noise).square().mean()

    def error(self, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v - v_pred (B, C, H, W), of which `forward` is the mean square."""
        e = self.noise_scale * noise
        t_ = t[:, None, None, None]
        z = t_ * x + (1 - t_) * e
        v = x - e if self.t_eps == 0 else (x - z) / self._one_minus(t)
        return v - self.velocity(z, t, y)

    def _one_minus(self, t: Tensor) -> Tensor:
        return (1 - t).clamp_min(self.t_eps)[:, None, None, None]
