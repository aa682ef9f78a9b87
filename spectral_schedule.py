"""Spectrally-guided noise schedules: which t, in training and in sampling.

    lambda = 2 ln(t / (1 - t)),   t = sigmoid(lambda / 2),   nu = exp(-lambda) = ((1 - t) / t)^2

On z = t x + (1 - t) e the data-to-noise ratio of ring k is P_k e^lambda, and a Wiener filter passes the fraction
sigmoid(lambda + ln P_k) of it. A tight schedule spends all of its steps between the largest noise nu_max, above which
nothing of the data shows, and the smallest nu_min, below which nothing is left to decide:

    nu_min = max(D^2 / 12, d / (1 - d) min_{k >= 1} P_k)    D = 2 / 255, the step of 8-bit images
    nu_max = max_k P^c_k / d                                d = delta, the neglected fraction of Wiener gain
    lambda_0 = -ln nu_max,   lambda_1 = -ln nu_min

    Lambda(u) = Q^-1(Q(lambda_0) + u (Q(lambda_1) - Q(lambda_0))),   Q(lambda) = sum_k w_k sigmoid(lambda + ln P_k)

    frequency   w_k = 1 for k >= 1: equal log-SNR time for each ring        w_0 = 0 in both
    power       w_k = n_k P_k for k >= 1
    mixed       the mean of frequency's and power's Lambda
    logsnr      lambda_0 + u (lambda_1 - lambda_0)

Stopping at nu_min with one Euler step costs a spectrum gap of mean_k ln(1 + nu_min / P_k); starting at nu_max ignores
at most ln(1 + d) / 2 nats a mode. Noise of standard deviation s is noise of 1 for the data x / s: P, P^c and D^2 are
divided by s^2 throughout. The idea is Esteves and Madakia's (2026); the formulae are derived here, for this path.

Shapes: B spectra, K rings, n_k modes in ring k, N values for each spectrum. All in float64 but the times, float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from util import rng
from util.rng import Stream
from util.spectrum import num_rings, rings_on

VARIANTS = ("mixed", "frequency", "power", "logsnr")
T_SAMPLERS = ("logit_normal", "uniform", "spectral_global", "spectral_instance")  # densities of training times
GRIDS = ("uniform", "spectral_global", "spectral_instance")  # of sampling
QUANTISATION = (2 / 255) ** 2 / 12  # D^2 / 12: power of rounding to 8 bits, in x of [-1, 1]
NODES, NEWTON_STEPS = 257, 2  # of the table of Q and after looking up in it
ONE_BITS = 0x3F800000  # of 1.0 in float32
ROUNDING = 1e-4  # of lambda, where t is float32: a time that was drawn at an end has a density, too
TINY = 1e-300  # in the place of a divisor that is 0, where Q is flat for float64
FIT = ("a", "alpha", "ln P^c_0", "ln P_min")  # ln P_k = a - alpha ln k for k >= 1; P_min = min_{k >= 1} P_k


class _Gain:
    """Q on [lambda_0, lambda_1] for B spectra, as the fraction u of its way from Q(lambda_0) to Q(lambda_1).

    The inverse is a table of NODES equidistant lambda and Newton's steps. A sum of sigmoids has |Q''| <= Q', so where
    nodes are h apart the linear interpolation is off by at most h^2 / 8 e^(2h), and a Newton step takes an error r to
    at most r^2 / 2 e^h: below 1e-8 in u for any range up to 60, which no image
    reaches; where Q is flat, that is more in lambda.
    """

    def __init__(self, log_power: Tensor, weight: Tensor, low: Tensor, high: Tensor):
        """log_power, weight (B, K); low, high (B, 1): lambda_0 and lambda_1."""
        self.log_power, self.weight = log_power, weight / weight.sum(-1, keepdim=True)
        steps = torch.linspace(0, 1, NODES, dtype=low.dtype, device=low.device)
        self.nodes = low + (high - low) * steps  # (B, NODES)
        self.nodes[:, -1:] = high
        q = self._q(self.nodes)
        self.first, self.rise = q[:, :1], q[:, -1:] - q[:, :1]  # (B, 1)
        self.values = ((q - self.first) / self.rise).contiguous()  # (B, NODES), 0 .. 1

    def _q(self, lam: Tensor) -> Tensor:
        return (torch.sigmoid(lam[..., None] + self.log_power[:, None]) * self.weight[:, None]).sum(-1)

    def fraction(self, lam: Tensor) -> Tensor:
        """u of lambda: (B, N) -> (B, N)."""
        return (self._q(lam) - self.first) / self.rise

    def density(self, lam: Tensor) -> Tensor:
        """du / dlambda: (B, N) -> (B, N)."""
        x = lam[..., None] + self.log_power[:, None]
        return (torch.sigmoid(x) * torch.sigmoid(-x) * self.weight[:, None]).sum(-1) / self.rise

    def inverse(self, u: Tensor) -> Tensor:
        """lambda of u: (B, N) -> (B, N)."""
        left = (torch.searchsorted(self.values, u.contiguous(), right=True) - 1).clamp(0, NODES - 2)
        u0, u1 = self.values.gather(1, left), self.values.gather(1, left + 1)
        low, high = self.nodes.gather(1, left), self.nodes.gather(1, left + 1)
        lam = low + (high - low) * ((u - u0) / (u1 - u0).clamp_min(TINY))
        for _ in range(NEWTON_STEPS):
            lam = lam - (self.fraction(lam) - u) / self.density(lam).clamp_min(TINY)
            lam = torch.minimum(torch.maximum(lam, low), high)
        return lam


class _Line:
    """The variant logsnr in the form of _Gain: u is proportional to lambda."""

    def __init__(self, low: Tensor, high: Tensor):
        self.low, self.high = low, high

    def fraction(self, lam: Tensor) -> Tensor:
        return (lam - self.low) / (self.high - self.low)

    def density(self, lam: Tensor) -> Tensor:
        return (1 / (self.high - self.low)).expand_as(lam)

    def inverse(self, u: Tensor) -> Tensor:
        return torch.lerp(self.low, self.high, u)


class TightSchedule:
    """Lambda(u) of one spectrum, or of B spectra at once; everything stays on the device of `power`.

    A power below QUANTISATION counts as QUANTISATION, and the range of lambda is at least 1 wide, so that any image has
    a schedule, a constant one too. Times (M,) are M times of the one spectrum, or one time of each of M = B spectra.

    Args:
        power: P_k, (K,) or (B, K).
        largest: max_k P^c_k, () or (B,).
        smallest: min_{k >= 1} P_k, () or (B,).
        img_size: pixels per side of the images; it decides K.
        variant: one of VARIANTS.
        delta: d, in (0, 1).
        noise_scale: s.
    """

    def __init__(
        self,
        power: Tensor,
        largest: Tensor,
        smallest: Tensor,
        img_size: int,
        variant: str = "mixed",
        delta: float = 0.1,
        noise_scale: float = 1.0,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"the spectral variant is {variant!r}: it must be one of {', '.join(VARIANTS)}")
        counts = rings_on(img_size, power.device)[1]
        if power.ndim not in (1, 2) or power.shape[-1] != len(counts):
            raise ValueError(f"a spectrum at {img_size} pixels has {len(counts)} rings, not {tuple(power.shape)}")
        self.single = power.ndim == 1
        nu_min, nu_max = noise_bounds(largest.double(), smallest.double(), delta, noise_scale)
        self.low, self.high = (-nu.log().reshape(-1, 1) for nu in (nu_max, nu_min))  # lambda_0, lambda_1 (B, 1)
        power = (power.double().clamp_min(QUANTISATION) / noise_scale**2).reshape(-1, len(counts))  # (B, K)
        ones = torch.ones_like(power)
        ones[:, 0] = 0
        weights = {"frequency": ones, "power": ones * counts * power}
        names = ("frequency", "power") if variant == "mixed" else (variant,)
        self.parts = [
            _Gain(power.log(), weights[name], self.low, self.high) if name in weights else _Line(self.low, self.high)
            for name in names
        ]

    @classmethod
    def of_spectrum(cls, power: Tensor, centred: Tensor, img_size: int, **settings) -> "TightSchedule":
        """From P_k and P^c_k, (K,) or (B, K) each. Raises ValueError where one is negative or not finite."""
        for values in (power, centred):
            if not bool((values.isfinite() & (values >= 0)).all()):
                raise ValueError("a spectrum has a power that is negative or not finite")
        return cls(power, centred.amax(-1), power[..., 1:].amin(-1), img_size, **settings)

    @classmethod
    def of_fits(cls, fits: Tensor, img_size: int, **settings) -> "TightSchedule":
        """From FIT (B, 4), as util.spectrum_file stores it: a power law between measured ends."""
        a, alpha, log_centred, log_smallest = fits.double().unbind(-1)
        k = torch.arange(1, num_rings(img_size), dtype=torch.float64, device=fits.device)
        law = torch.exp(a[..., None] - alpha[..., None] * k.log())  # (B, K - 1)
        dc = log_centred.exp()  # stands for P_0 as well, which has no weight
        largest = torch.maximum(dc, law.amax(-1))
        return cls(torch.cat([dc[..., None], law], -1), largest, log_smallest.exp(), img_size, **settings)

    @property
    def bounds(self) -> Tensor:
        """lambda_0 and lambda_1, float32 (B, 2)."""
        return torch.cat([self.low, self.high], dim=1).float()

    def log_snr(self, u: Tensor) -> Tensor:
        """Lambda(u): (B, N) or (1, N) in [0, 1] -> (B, N), increasing in u."""
        u = u.double().expand(len(self.low), -1)
        return torch.stack([part.inverse(u) for part in self.parts]).mean(0)

    def sampling_grid(self, steps: int) -> Tensor:
        """0, sigmoid(Lambda((i - 1) / (S - 2)) / 2) for i = 1 .. S - 1, 1: strictly increasing, float32 on the CPU.

        Returns: (S + 1,) for one spectrum, (S + 1, B) for several.
        Raises: ValueError for fewer than 3 steps.
        """
        if steps < 3:
            raise ValueError(f"{steps} sampling steps on a spectral grid: at least 3 are needed")
        u = torch.linspace(0, 1, steps - 1, dtype=torch.float64, device=self.low.device)
        inner = torch.sigmoid(self.log_snr(u[None]) / 2).T.float().cpu()  # (S - 1, B)
        end = torch.ones(1, inner.shape[1])
        grid = strictly_increasing(torch.cat([0 * end, inner, end]))  # (S + 1, B)
        return grid[:, 0] if self.single else grid

    def time(self, u: Tensor) -> Tensor:
        """sigmoid(Lambda(u) / 2) for u (M,): float32 (M,), strictly between 0 and 1."""
        t = torch.sigmoid(self.log_snr(self._rows(u)) / 2).flatten().float()
        return t.clamp(2.0**-126, 1 - 2.0**-24)

    def cdf(self, t: Tensor) -> Tensor:
        """Probability of a time below t, where u is uniform: (M,) in [0, 1] -> float64 (M,)."""
        return self._fraction(self._rows(2 * t.double().logit())).flatten().to(t.device)

    def density(self, t: Tensor) -> Tensor:
        """p(t) = du/dlambda 2 / (t (1 - t)), where u is uniform: (M,) in (0, 1) -> float64 (M,)."""
        lam = self._rows(2 * t.double().logit())
        u = self._fraction(lam)
        slopes = [1 / part.density(part.inverse(u)) for part in self.parts]  # dlambda/du
        inside = (lam >= self.low - ROUNDING) & (lam <= self.high + ROUNDING)
        p = torch.where(inside, 1 / torch.stack(slopes).mean(0), 0.0)
        return p.flatten() * 2 / (t * (1 - t)).double()

    def _rows(self, x: Tensor) -> Tensor:
        x = x.to(self.low)  # float64, on the device of the schedule
        return x[None] if self.single else x[:, None]  # (1, M) or (B, 1)

    def _fraction(self, lam: Tensor) -> Tensor:
        """u of lambda (B, N), 0 below lambda_0 and 1 above lambda_1; for a mean of two Lambda by bisection."""
        lam = torch.minimum(torch.maximum(lam, self.low), self.high)
        if len(self.parts) == 1:
            return self.parts[0].fraction(lam).clamp(0, 1)
        low, high = torch.zeros_like(lam), torch.ones_like(lam)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.log_snr(middle) < lam
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def noise_bounds(largest: Tensor, smallest: Tensor, delta: float, noise_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(nu_min, nu_max) from max_k P^c_k and min_{k >= 1} P_k, in their shape; nu_max is at least e nu_min."""
    if not 0 < delta < 1:
        raise ValueError(f"the neglected fraction of Wiener gain is {delta}: it must be above 0 and below 1")
    if not noise_scale > 0:
        raise ValueError(f"noise_scale is {noise_scale}: it must be positive")
    nu_min = (smallest * (delta / (1 - delta))).clamp_min(QUANTISATION) / noise_scale**2
    return nu_min, torch.maximum(largest / (delta * noise_scale**2), math.e * nu_min)


def strictly_increasing(grid: Tensor) -> Tensor:
    """A non-decreasing float32 `grid` (S + 1, B) from 0 to 1 with equal times moved apart by the least there is.

    The bits of positive floats are integers in the same order; b_i strictly increases where b_i - i does not decrease.
    """
    i = torch.arange(len(grid))[:, None]
    bits = grid.contiguous().view(torch.int32).long()
    bits = (bits - i).cummax(0).values + i
    bits = torch.minimum(bits, ONE_BITS - i.flip(0))
    return bits.int().view(torch.float32)


@dataclass(frozen=True)
class TrainingTimes:
    """Density of training times: uniform with probability `uniform_mix`, else that of a schedule.

    schedule: of one spectrum, or of the spectra of the samples; None: uniform alone. A schedule of each sample's own
    tilts the data that the network sees at each t: it is sound where the network is told (lambda_0, lambda_1), or with
    the loss weighted by p(t) of one density for all samples / p(t) of this one. The mix keeps that weight bounded.
    """

    schedule: TightSchedule | None = None
    uniform_mix: float = 0.1

    def __post_init__(self):
        if not 0 <= self.uniform_mix <= 1:
            raise ValueError(f"the part of uniform times is {self.uniform_mix}: it must be from 0 to 1")

    def of_images(self, x: Tensor) -> "TrainingTimes":
        """The density for a batch x (B, C, H, W): the same for all images."""
        return self

    def draw(self, seed: int, step: int, position: Tensor) -> Tensor:
        """t (M,) float32 of the samples at `position` (M,) in the global batch of `step`."""
        u, v = rng.uniform(seed, Stream.TIME, step, position, 2).unbind(1)
        return self.time(u, v)

    def time(self, u: Tensor, v: Tensor) -> Tensor:
        """t (M,) float32, strictly between 0 and 1, of uniform u and v (M,) in (0, 1)."""
        return u if self.schedule is None else torch.where(v < self.uniform_mix, u, self.schedule.time(u))

    def density(self, t: Tensor) -> Tensor:
        """p(t): (M,) in (0, 1) -> float64 (M,)."""
        if self.schedule is None:
            return torch.ones_like(t, dtype=torch.float64)
        return self.uniform_mix + (1 - self.uniform_mix) * self.schedule.density(t)

    def cdf(self, t: Tensor) -> Tensor:
        """Probability of a time below t: (M,) in [0, 1] -> float64 (M,)."""
        if self.schedule is None:
            return t.double()
        return self.uniform_mix * t.double() + (1 - self.uniform_mix) * self.schedule.cdf(t)


@dataclass(frozen=True)
class FitDistribution:
    """Of each class c a Gaussian over FIT: mean (C, 4), covariance (C, 4, 4), and the 1% and 99% quantiles (C, 4)."""

    mean: Tensor
    covariance: Tensor
    low: Tensor
    high: Tensor

    def draw(self, seed: int, index: Sequence[int] | Tensor, y: Tensor) -> Tensor:
        """FIT (B, 4) of the generated images `index` (B,) with labels y (B,), clamped to the range of their class.

        On the CPU, and a function of (seed, image index, label) alone.
        """
        index, y = torch.as_tensor(index, dtype=torch.int64), y.cpu()
        n = rng.normal(seed, Stream.SCHEDULE, 0, index, len(FIT)).double()  # (B, 4)
        values, vectors = torch.linalg.eigh(self.covariance)  # a Cholesky factor needs more images than numbers
        root = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT  # symmetric, (C, 4, 4)
        fits = self.mean[y] + (root[y] @ n[..., None])[..., 0]
        return torch.minimum(torch.maximum(fits, self.low[y]), self.high[y])


def sample_t_eps(t_eps: float, last: float) -> float:
    """The largest clamp of 1 - t up to `t_eps` that leaves velocities as they are up to the time `last`.

    `last` is the last time of a grid before 1, or `latest_time` for all grids. With the clamp of training, .05, a tight
    grid loses its gain. The uniform grid does not use this: its clamp is `t_eps`, as published.
    """
    return min(t_eps, 1 - last)


def latest_time(noise_scale: float = 1.0) -> float:
    """No spectral grid has a later t before 1: that of nu = D^2 / 12, rounded up in float32."""
    nu = torch.tensor(QUANTISATION / noise_scale**2, dtype=torch.float64)
    return float(torch.nextafter(1 / (1 + nu.sqrt()).float(), torch.tensor(1.0)))
