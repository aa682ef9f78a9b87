"""Spectrally-guided noise schedules: the times t of training and of sampling, from the spectrum of the data.

    lambda = 2 ln(t / (1 - t)),   t = sigmoid(lambda / 2),   nu = exp(-lambda) = ((1 - t) / t)^2

On z = t x + (1 - t) e the SNR of ring k is P_k e^lambda, and a Wiener filter passes the fraction
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
at most ln(1 + d) / 2 nats per mode. Noise of standard deviation s is noise of 1 for the data x / s: P, P^c and D^2 are
divided by s^2 throughout. The idea is Esteves and Makadia's (2026); the formulas are derived for this path.

Shapes: B spectra, K rings, n_k modes in ring k, N values for each spectrum. All is float64 but the times, float32.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spectral_forcing import num_rings, rings
from spectral_ops.spectrum import QUANTISATION

VARIANTS = ("mixed", "frequency", "power", "logsnr")
T_SAMPLERS = ("logit_normal", "uniform", "spectral_global", "spectral_instance")  # densities of training times
GRIDS = ("uniform", "spectral_global", "spectral_instance")  # of sampling
NODES, NEWTON_STEPS = 257, 2  # of the table of Q, and after each look-up in it
TINY = 1e-300  # replaces a divisor of 0, where Q is flat for float64
FIT = ("a", "alpha", "ln P^c_0", "ln P_min")  # ln P_k = a - alpha ln k for k >= 1; P_min = min_{k >= 1} P_k


class _InverseGain:
    """u -> lambda for B spectra: the inverse of Q as a fraction of its rise from Q(lambda_0) to Q(lambda_1).

    It is a table of NODES equidistant lambda and Newton's steps. A sum of sigmoids has |Q''| <= Q', so for nodes h
    apart the linear interpolation is off by at most h^2 / 8 e^(2h), and a Newton step takes an error r to at most
    r^2 / 2 e^h: below 1e-8 in u for any range up to 60, which no image reaches; where Q is flat, more in lambda.
    """

    def __init__(self, log_power: Tensor, weight: Tensor, low: Tensor, high: Tensor):  # (B, K) twice, (B, 1) twice
        self.log_power, self.weight = log_power[:, None], (weight / weight.sum(-1, keepdim=True))[:, None]
        steps = torch.linspace(0, 1, NODES, dtype=low.dtype, device=low.device)
        self.nodes = low + (high - low) * steps  # (B, NODES)
        self.nodes[:, -1:] = high
        q = self._gains(self.nodes).sum(-1)
        self.first, self.rise = q[:, :1], q[:, -1:] - q[:, :1]  # (B, 1)
        self.values = ((q - self.first) / self.rise).contiguous()  # (B, NODES), 0 .. 1

    def _gains(self, lam: Tensor) -> Tensor:
        """The terms of Q at lambda: (B, N) -> (B, N, K)."""
        return torch.sigmoid(lam[..., None] + self.log_power) * self.weight

    def __call__(self, u: Tensor) -> Tensor:
        left = (torch.searchsorted(self.values, u.contiguous(), right=True) - 1).clamp(0, NODES - 2)
        u0, u1 = self.values.gather(1, left), self.values.gather(1, left + 1)
        low, high = self.nodes.gather(1, left), self.nodes.gather(1, left + 1)
        lam = low + (high - low) * ((u - u0) / (u1 - u0).clamp_min(TINY))
        for _ in range(NEWTON_STEPS):
            gains = self._gains(lam)
            slope = (gains * torch.sigmoid(-lam[..., None] - self.log_power)).sum(-1) / self.rise  # du/dlambda
            lam = lam - ((gains.sum(-1) - self.first) / self.rise - u) / slope.clamp_min(TINY)
            lam = torch.minimum(torch.maximum(lam, low), high)
        return lam


class TightSchedule:
    """Lambda(u) of one spectrum, or of B spectra at once; everything stays on the device of `power`.

    A power below QUANTISATION counts as QUANTISATION, and the range of lambda is at least 1 wide, so that any image has
    a schedule, a constant one too. Times (M,) are M times of the one spectrum, or one time of each of M = B spectra.

    `power` is P_k, (K,) or (B, K); `largest` is max_k P^c_k and `smallest` min_{k >= 1} P_k, () or (B,). `img_size`
    decides K, `delta` is d, in (0, 1), and `noise_scale` s. Raises ValueError for other values.
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
            raise ValueError(f"The spectral variant {variant!r} must be one of {', '.join(VARIANTS)}.")
        counts = rings(img_size, power.device)[1]
        if power.ndim not in (1, 2) or power.shape[-1] != len(counts):
            raise ValueError(f"A spectrum at {img_size} pixels has {len(counts)} rings, not {tuple(power.shape)}.")
        self.single = power.ndim == 1
        nu_min, nu_max = noise_bounds(largest.double(), smallest.double(), delta, noise_scale)
        self.low, self.high = (-nu.log().reshape(-1, 1) for nu in (nu_max, nu_min))  # lambda_0, lambda_1 (B, 1)
        power = (power.double().clamp_min(QUANTISATION) / noise_scale**2).reshape(-1, len(counts))  # (B, K)
        rings_from_1 = (torch.arange(len(counts), device=power.device) > 0).double().expand_as(power)
        self.inverses = []  # u (B, N) -> lambda (B, N): Lambda is their mean
        if variant in ("frequency", "mixed"):
            self.inverses.append(_InverseGain(power.log(), rings_from_1, self.low, self.high))
        if variant in ("power", "mixed"):
            self.inverses.append(_InverseGain(power.log(), rings_from_1 * counts * power, self.low, self.high))
        if variant == "logsnr":
            self.inverses.append(partial(torch.lerp, self.low, self.high))

    @classmethod
    def of_spectrum(cls, power: Tensor, centred: Tensor, img_size: int, **settings) -> "TightSchedule":
        """Return the schedule of P_k and P^c_k, (K,) or (B, K) each."""
        if not all(bool((values.isfinite() & (values >= 0)).all()) for values in (power, centred)):
            raise ValueError("A spectrum must not contain negative powers, infinity or NaN.")
        return cls(power, centred.amax(-1), power[..., 1:].amin(-1), img_size, **settings)

    @classmethod
    def of_fits(cls, fits: Tensor, img_size: int, **settings) -> "TightSchedule":
        """Return the schedule of FIT (4,) or (B, 4) (spectrum.image_fits): a power law between measured ends."""
        a, alpha, log_centred, log_smallest = fits.double().unbind(-1)
        k = torch.arange(1, num_rings(img_size), dtype=torch.float64, device=fits.device)
        law = torch.exp(a[..., None] - alpha[..., None] * k.log())  # (B, K - 1)
        dc = log_centred.exp()  # stands for P_0 as well, which has no weight
        largest = torch.maximum(dc, law.amax(-1))
        return cls(torch.cat([dc[..., None], law], -1), largest, log_smallest.exp(), img_size, **settings)

    @property
    def logsnr_range(self) -> Tensor:
        """lambda_0 and lambda_1, float32 (B, 2)."""
        return torch.cat([self.low, self.high], dim=1).float()

    def log_snr(self, u: Tensor) -> Tensor:
        """Return Lambda(u), increasing in u: (B, N) or (1, N) in [0, 1] -> (B, N)."""
        u = u.double().expand(len(self.low), -1)
        return torch.stack([inverse(u) for inverse in self.inverses]).mean(0)

    def sampling_grid(self, steps: int) -> Tensor:
        """Return 0, sigmoid(Lambda((i - 1) / (S - 2)) / 2) for i = 1 .. S - 1, 1: strictly increasing, S >= 3.

        It is float32 on the CPU, (S + 1,) for one spectrum and (S + 1, B) for several.
        """
        if steps < 3:
            raise ValueError(f"{steps} sampling steps are too few for a spectral grid, which needs at least 3.")
        u = torch.linspace(0, 1, steps - 1, dtype=torch.float64, device=self.low.device)
        inner = torch.sigmoid(self.log_snr(u[None]) / 2).T.float().cpu()  # (S - 1, B)
        end = torch.ones(1, inner.shape[1])
        grid = strictly_increasing(torch.cat([0 * end, inner, end]))  # (S + 1, B)
        return grid[:, 0] if self.single else grid

    def time(self, u: Tensor) -> Tensor:
        """Return sigmoid(Lambda(u) / 2) for u (M,): float32 (M,), strictly between 0 and 1."""
        t = torch.sigmoid(self.log_snr(self._rows(u)) / 2).flatten().float()
        return t.clamp(2.0**-126, 1 - 2.0**-24)

    def cdf(self, t: Tensor) -> Tensor:
        """Return the probability of a time below t for uniform u: (M,) in [0, 1] -> float64 (M,)."""
        lam = self._rows(2 * t.double().logit())
        low, high = torch.zeros_like(lam + self.low), torch.ones_like(lam + self.low)  # u by bisection, (B, N)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.log_snr(middle) < lam
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).flatten().to(t.device)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.to(self.low)  # float64, on the device of the schedule
        return x[None] if self.single else x[:, None]  # (1, M) or (B, 1)


def noise_bounds(largest: Tensor, smallest: Tensor, delta: float, noise_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (nu_min, nu_max) for max_k P^c_k and min_{k >= 1} P_k, in their shape; nu_max is at least e nu_min."""
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta}, the neglected fraction of Wiener gain, must be above 0 and below 1.")
    if not noise_scale > 0:
        raise ValueError(f"noise_scale {noise_scale} must be positive.")
    nu_min = (smallest * (delta / (1 - delta))).clamp_min(QUANTISATION) / noise_scale**2
    return nu_min, torch.maximum(largest / (delta * noise_scale**2), math.e * nu_min)


def strictly_increasing(grid: Tensor) -> Tensor:
    """Move equal times of a non-decreasing float32 `grid` (S + 1, B) from 0 to 1 apart by the least possible.

    The bits of positive floats are integers in the same order; b_i strictly increases where b_i - i does not decrease.
    """
    i = torch.arange(len(grid))[:, None]
    bits = grid.contiguous().view(torch.int32).long()
    bits = (bits - i).cummax(0).values + i
    bits = torch.minimum(bits, 0x3F800000 - i.flip(0))  # the bits of 1.0
    return bits.int().view(torch.float32)


def repeat_to(count: int, values: Tensor) -> Tensor:
    """Return (count,): number i is values[i mod G], for values (G,)."""
    return values.repeat(-(-count // len(values)))[:count]


@dataclass(frozen=True)
class GlobalTimeSampler:
    """Training times: uniform with probability `uniform_mix`, else those of a schedule (None: uniform alone).

    The schedule is of one spectrum, or of the spectra of the samples of a batch (see spectral_ops/conditioning.py).
    """

    schedule: TightSchedule | None = None
    uniform_mix: float = 0.1
    ends: tuple[Tensor, ...] | None = None  # set by `within`

    def within(self, low: Tensor, high: Tensor) -> "GlobalTimeSampler":
        """Return the sampler given that sample i lies between low and high (G,), i mod G; G = B for B schedules."""
        tight = () if self.schedule is None else (self.schedule.cdf(low), self.schedule.cdf(high))
        return replace(self, ends=(low, high, *tight))

    @property
    def mass(self) -> Tensor:
        """The probability of the intervals of `within`, float64 (G,)."""
        low, high, *tight = self.ends
        if self.schedule is None:
            return high - low
        return self.uniform_mix * (high - low) + (1 - self.uniform_mix) * (tight[1] - tight[0])

    def for_images(self, x: Tensor) -> "GlobalTimeSampler":
        """Return the sampler for a batch x (B, C, H, W): the same for all images."""
        return self

    def sample(self, rng) -> Tensor:
        """Draw t (B,) float32, strictly between 0 and 1; rng.uniform(stream, n) gives (B, n) numbers in (0, 1)."""
        u, v = rng.uniform("time", 2).unbind(1)
        if self.ends is None:
            return u if self.schedule is None else torch.where(v < self.uniform_mix, u, self.schedule.time(u))
        low, high, *tight = (
            repeat_to(len(u), end).to(u.device, non_blocking=True) for end in self.ends
        )  # (B,), float64
        uniform = torch.lerp(low, high, u.double()).float()
        if self.schedule is None:
            return uniform
        mass = self.uniform_mix * (high - low), (1 - self.uniform_mix) * (tight[1] - tight[0])
        among_tight = self.schedule.time(torch.lerp(*tight, u.double()))
        return torch.where(v * (mass[0] + mass[1]) < mass[0], uniform, among_tight)

    def cdf(self, t: Tensor) -> Tensor:
        """Return the probability of a time below t: (M,) in [0, 1] -> float64 (M,)."""
        if self.schedule is None:
            return t.double()
        return self.uniform_mix * t.double() + (1 - self.uniform_mix) * self.schedule.cdf(t)


@dataclass(frozen=True)
class FitDistribution:
    """A Gaussian over FIT for each class c: mean (C, 4), covariance (C, 4, 4), 1% and 99% quantiles (C, 4)."""

    mean: Tensor
    covariance: Tensor
    low: Tensor
    high: Tensor

    def sample(self, rng, y: Tensor) -> Tensor:
        """Draw FIT (B, 4) for labels y (B,), clamped to the quantiles of their class; all on the CPU."""
        y, n = y.cpu(), rng.normal("schedule", len(FIT)).double()  # (B, 4)
        values, vectors = torch.linalg.eigh(self.covariance)  # a Cholesky factor needs more images than numbers
        root = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT  # symmetric, (C, 4, 4)
        fits = self.mean[y] + (root[y] @ n[..., None])[..., 0]
        return torch.minimum(torch.maximum(fits, self.low[y]), self.high[y])


def latest_time(noise_scale: float = 1.0) -> float:
    """Return the largest t < 1 of any spectral grid: that of nu = D^2 / 12, rounded up in float32."""
    nu = torch.tensor(QUANTISATION / noise_scale**2, dtype=torch.float64)
    return float(torch.nextafter(1 / (1 + nu.sqrt()).float(), torch.tensor(1.0)))
