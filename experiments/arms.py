"""The arms of the studies: by what a run differs from plain JiT.

An arm is a name and some words: what the network sees (`input`), the correction of blocks (`residual`) and the
distribution of training times (`times`). Everything else is the same in all arms of a study, random numbers included.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from denoiser import LogitNormal, TimeSampler
from experiments.data import dct_ring_power, fft_ring_power, open_data
from model_jit import JiT
from spectral_forcing import SpectralForcing, dct_matrix, separable_transform
from spectral_ops.residual import SpectralResidual
from spectral_ops.resolution import LevelTimes, ResolutionSchedule
from spectral_ops.schedule import GlobalTimeSampler, TightSchedule
from spectral_ops.spectrum import fit_power_law

FLOORS = (1.0, 0.3, 0.1, 0.03)
BUDGETS = (0.001, 0.003, 0.01, 0.03)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"input": "scale"},  # control: only the loudness of z changes, as linear Spectral Forcing changes it
    "linear": {"input": "linear"},  # the published setting
    "power": {"input": "power"},  # the theory's contour, with the measured amplitude and exponent
    **{f"snr{floor:g}": {"input": "snr", "snr_floor": floor} for floor in FLOORS},
    **{f"budget{budget:g}": {"input": "budget", "budget": budget} for budget in BUDGETS},
    "budget0.1": {"input": "budget", "budget": 0.1},
    "unit": {"unit": True},  # what the network sees has a mean square of 1 at each t
    "linear_unit": {"input": "linear", "unit": True},
    "snr0.1_unit": {"input": "snr", "snr_floor": 0.1, "unit": True},
    "wiener": {"input": "wiener"},  # each mode times SNR / (1 + SNR)
    "residual": {"residual": "time"},
    "half": {"times": "half"},
    "linear_half": {"input": "linear", "times": "half"},
    "budget_half": {"input": "budget", "budget": 0.03, "times": "half"},
    "residual_half": {"residual": "time", "times": "half"},
    "linear_mixed": {"input": "linear", "times": "mixed"},
    "budget_residual": {"input": "budget", "budget": 0.003, "residual": "time"},
    "levels": {"levels": 1},  # resolution follows the spectrum, with layers of its own for the lower level
    "levels_shared": {"levels": 1, "own_layers": False},
    "two_levels": {"levels": 2},
    "levels0.01": {"levels": 1, "delta": 0.01},
    "levels0.2": {"levels": 1, "delta": 0.2},
    "linear_levels": {"levels": 1, "input": "linear"},
    "linear_two_levels": {"levels": 2, "input": "linear"},
    "levels_half": {"levels": 1, "times": "half"},
    "linear_levels_half": {"levels": 1, "input": "linear", "times": "half"},
}


class DefaultTimes:
    """The default density of training times, in the place of a noise schedule of GlobalTimeSampler."""

    def time(self, u: Tensor) -> Tensor:
        return torch.sigmoid(LogitNormal.P_mean + LogitNormal.P_std * torch.special.ndtri(u)).float()

    def cdf(self, t: Tensor) -> Tensor:
        return LogitNormal().cdf(t)


class WienerGain(nn.Module):
    """Multiplies each DCT mode of z by s / (1 + s), the SNR being s = P (t / (1 - t))^2 for variances P (n, n)."""

    def __init__(self, variance: Tensor):
        super().__init__()
        self.register_buffer("variance", variance, persistent=False)
        self.register_buffer("dct", dct_matrix(len(variance)).float(), persistent=False)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        t = t.double()[:, None, None]
        signal, noise = self.variance * t.square(), (1 - t).square()
        gain = (signal / (signal + noise)).float()[:, None]  # (B, 1, n, n)
        return separable_transform(self.dct.T, separable_transform(self.dct, z) * gain)


class UnitVariance(nn.Module):
    """Divides what is seen of z by its root mean square, for data with the second moment (n, n) of modes."""

    def __init__(self, forcing: SpectralForcing | None, second_moment: Tensor):
        super().__init__()
        self.forcing = forcing
        self.register_buffer("second_moment", second_moment, persistent=False)

    def rms(self, t: Tensor, mask: Tensor | float) -> Tensor:
        """Return the root mean square (B,) of z times a mask (B, n, n) at t (B,)."""
        t = t.double()[:, None, None]
        power = t.square() * self.second_moment + (1 - t).square()  # of z, in DCT modes
        return (mask * mask * power).mean((1, 2)).sqrt()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        seen, mask = (z, 1.0) if self.forcing is None else (self.forcing(z, t), self.forcing.mask(t.double()))
        return seen / self.rms(t, mask).to(z.dtype)[:, None, None, None]


class ScaleControl(UnitVariance):
    """Multiplies z by rms(SF_t(z)) / rms(z), the mean effect of Spectral Forcing on its loudness at time t."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        scale = self.rms(t, self.forcing.mask(t.double())) / self.rms(t, 1.0)
        return z * scale.to(z.dtype)[:, None, None, None]


def input_operator(arm: Mapping[str, Any], data: str) -> nn.Module | None:
    """Build what the network of an arm sees z through; None for z itself."""
    if arm.get("unit"):
        forcing = input_operator({name: value for name, value in arm.items() if name != "unit"}, data)
        return UnitVariance(forcing, open_data(data).mode_power()[1].mean(0))
    kind, size = arm.get("input"), open_data(data).size
    variance, second_moment = open_data(data).mode_power()
    if kind is None:
        return None
    if kind == "linear":
        return SpectralForcing(size)
    if kind == "power":
        a, alpha = fit_power_law(fft_ring_power(data)[0]).tolist()
        return SpectralForcing(size, schedule="power", alpha=alpha, snr_floor=math.exp(-a))
    if kind == "snr":
        power = fft_ring_power(data)[0].tolist()
        return SpectralForcing(size, schedule="snr", power=power, snr_floor=arm["snr_floor"])
    if kind == "budget":
        return SpectralForcing(size, schedule="budget", power=dct_ring_power(data), budget=arm["budget"])
    if kind == "wiener":
        return WienerGain(variance.mean(0))
    if kind == "scale":
        return ScaleControl(SpectralForcing(size), second_moment.mean(0))
    raise ValueError(f"The input {kind!r} of an arm is unknown.")


def block_operators(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JiT takes as block_operators."""
    return {"spectral_residual": partial(SpectralResidual, mode=arm["residual"])} if "residual" in arm else {}


class ScaledLayer(nn.Module):
    """A layer of the whole image for the pixels of a lower level, which differ by a factor. It has no parameters."""

    def __init__(self, layer: nn.Module, before: float = 1.0, after: float = 1.0):
        super().__init__()
        self.layer, self.before, self.after = [layer], before, after  # in a list: it stays a part of its owner alone

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        return self.after * self.layer[0](self.before * x, *inputs)


def share_layers(net: JiT) -> None:
    """Let all levels use the layers of the whole image."""
    for level in net.levels:
        level.x_embedder = ScaledLayer(net.x_embedder, before=1 / level.scale)
        level.final_layer = ScaledLayer(net.final_layer, after=level.scale)


def resolution(arm: Mapping[str, Any], data: str) -> ResolutionSchedule | None:
    if "levels" not in arm:
        return None
    return ResolutionSchedule(open_data(data).size, dct_ring_power(data), arm["levels"], arm.get("delta", 0.05))


def time_sampler(arm: Mapping[str, Any], data: str, device: torch.device) -> TimeSampler:
    """Return the distribution of training times of an arm, with its tables on the device."""
    times, sampler, schedule = arm.get("times"), LogitNormal(), resolution(arm, data)
    if times == "half":  # uniform for half of the draws
        sampler = GlobalTimeSampler(DefaultTimes(), 0.5)
    elif times is not None:
        power, centred = (values.to(device) for values in fft_ring_power(data))
        tight = TightSchedule.of_spectrum(power, centred, open_data(data).size, variant=times)
        sampler = GlobalTimeSampler(tight, 0.1)
    return sampler if schedule is None else LevelTimes(sampler, schedule)
