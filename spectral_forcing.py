"""Spectral Forcing: the network sees a noisy image z only through a low-pass filter that opens with time.

    SF_t(z) = IDCT( DCT(z) * M(t) ),   M(t)[u,v] = sigmoid(kappa * (c(t) - r[u,v]))        (arXiv 2606.15236)

At time t the data rises above the noise only up to some spatial frequency. The operator removes what lies above a
cutoff c(t), which opens as t goes from noise (0) to data (1). It acts on the input of the network alone, never on the
z of the loss, of the velocity, or of the sampler's state.

Ring k of the spectrum has the signal-to-noise ratio P_k (t / (1 - t))^2, since the noise has power 1. There are four
schedules of c(t), all between c_min and c_max:

    linear   c_min + (c_max - c_min) t, the published one
    power    the frequency at which the SNR of the spectrum k^-alpha is `snr_floor`:
             k*(t) = ((t / (1 - t))^2 / snr_floor)^(1 / alpha)
    snr      the frequency at which the SNR of a measured spectrum P_k is `snr_floor`
    budget   the lowest frequency above which everything can be hidden for at most a share `budget` of the least
             possible loss, by a measured spectrum, plus 3 / kappa: up to there the mask is at least 0.95

For a spectrum A k^-alpha, use `power` with the floor divided by A. DCT index u is u / 2 cycles per window, so k cycles
per image are at the radius r = 2 k (n / H) / (sqrt(2) (n - 1)): the same frequency in a window as in the image.

Shapes: B batch, C channels, H = W image size, n window size, G = H / n windows along a side, K rings of frequency.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

SCHEDULES = ("linear", "power", "snr", "budget")
T_MIN, T_MAX = 1e-12, 1 - 2.0**-24  # the odds t / (1 - t) are finite between them, and so are derivatives


def num_rings(n: int) -> int:
    """Return K, the number of rings of an n x n image: ring k holds the Fourier modes with floor(|f|) = k."""
    return math.isqrt(2 * (n // 2) ** 2) + 1


@lru_cache(maxsize=8)
def rings(n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the ring of each mode (n, n), ordered as in torch.fft.fft2, and the modes per ring (K,). Do not modify."""
    f = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device="cpu").round()  # cycles per image
    ring = (f[:, None] ** 2 + f[None, :] ** 2).sqrt().floor().long()  # sqrt of a square is exact
    return ring.to(device), torch.bincount(ring.flatten()).to(device)


def ring_radii(n: int) -> Tensor:
    """Return the mean of |f| over the modes of each ring, (K,) float64 in cycles per image."""
    f = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device="cpu")
    ring, count = rings(n)
    total = torch.zeros(len(count), dtype=torch.float64, device="cpu")
    return total.index_add_(0, ring.flatten(), torch.hypot(f[:, None], f[None, :]).flatten()) / count


def dct_matrix(n: int) -> Tensor:
    """Return the orthonormal DCT-II matrix D (n, n), float64: D @ x transforms a column x, and D.T @ D = I.

    D[u, i] = a_u * cos(pi * (2i + 1) * u / (2n)), with a_0 = sqrt(1/n) and a_u = sqrt(2/n) otherwise.
    """
    u = torch.arange(n, dtype=torch.float64)[:, None]
    i = torch.arange(n, dtype=torch.float64)[None, :]
    matrix = math.sqrt(2.0 / n) * torch.cos(math.pi * (2 * i + 1) * u / (2 * n))
    matrix[0] = math.sqrt(1.0 / n)
    return matrix


def radius_grid(n: int) -> Tensor:
    """Return r[u,v] = sqrt(u^2 + v^2) / (sqrt(2) (n - 1)), (n, n) float64: 0 at DC, 1 in the corner."""
    u = torch.arange(n, dtype=torch.float64)
    return torch.hypot(u[:, None], u[None, :]) / (math.sqrt(2.0) * (n - 1))


def separable_transform(matrix: Tensor, z: Tensor) -> Tensor:
    """Apply a linear transform along both axes: matrix @ z @ matrix.T, for matrix (n, n) and z (..., n, n)."""
    return matrix @ z @ matrix.T


@lru_cache(maxsize=8)
def dct_rings(n: int) -> tuple[Tensor, Tensor]:
    """Return the ring floor(|f|) of each DCT mode (n, n), f = (u, v) / 2 cycles per image, and the modes per ring."""
    u = torch.arange(n, dtype=torch.float64, device="cpu")
    ring = (torch.hypot(u[:, None], u[None, :]) / 2).floor().long()
    return ring, torch.bincount(ring.flatten())


def snr_cutoffs(power: Sequence[float], img_size: int, snr_floor: float) -> tuple[Tensor, Tensor]:
    """Return the knots of the schedule `snr`: log-SNR (K,), non-decreasing, and cutoff (K,) in cycles per image.

    Ring k reaches the floor at lambda_k = ln(floor / max_{j >= k} P_j), with lambda = 2 ln(t / (1 - t)). The maximum
    makes the cutoff monotone in t: a ring that opens, opens all rings below it. The cutoff at lambda_k is the mean
    radius of the ring's modes, about k + 1/2. Both are float64 on the CPU.
    """
    envelope = torch.as_tensor(power, dtype=torch.float64, device="cpu").flip(0).cummax(0).values.flip(0)  # (K,)
    return (snr_floor / envelope).log(), ring_radii(img_size)


def budget_cutoffs(power: Tensor, img_size: int, budget: float) -> tuple[Tensor, Tensor]:
    """Return the knots of the schedule `budget`: log-SNR (K,), increasing, and cutoff (K,) in cycles per image.

    A mode of variance P and SNR s = P e^lambda has the least possible error P / (1 + s) of x, and the error P if it is
    not seen. So hiding the rings from j on costs, summed over modes and colour axes,

        H_j(lambda) = sum_{k >= j} n_k P_k s_k / (1 + s_k)     of     E(lambda) = sum_k n_k P_k / (1 + s_k)

    H_j / E grows with lambda and reaches `budget` at lambda_j. From there on ring j must be seen: the cutoff is then
    j + 1. Below lambda_0 nothing need be seen. The division of a velocity by 1 - t cancels.

    Args:
        power: variance P of the DCT modes in each ring, (K,), or (A, K) along A uncorrelated colour axes.
    """
    power, count = power.double().reshape(-1, power.shape[-1]), dct_rings(img_size)[1]  # (A, K), (K,)
    low, high = (torch.full((power.shape[-1],), end, dtype=torch.float64) for end in (-60.0, 60.0))
    for _ in range(60):
        middle = (low + high) / 2  # (K,): lambda_j is in low .. high
        seen = 1 / (1 + power[:, None] * middle.exp()[None, :, None])  # (A, j, k)
        hidden = ((1 - seen) * (power * count)[:, None]).sum(0).triu().sum(1)  # (j,)
        least = (seen * (power * count)[:, None]).sum((0, 2))
        below = hidden < budget * least
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low, torch.arange(1.0, power.shape[-1] + 1, dtype=torch.float64)


class SpectralForcing(nn.Module):
    """Time-conditional low-pass filter in the DCT domain, without parameters and without state-dict entries.

    At t = 1 it is close to the identity, not equal: with the defaults the mask is 0.95 at r = 0.9 and 0.5 at r = 1,
    hence `fixed_scale=1.0` does not turn it off. At t = 0 the gain at DC is 0.82.

    Args:
        img_size: H = W of the images, in pixels.
        window_size: n, side of the non-overlapping windows that are transformed independently; it divides `img_size`.
            None is the whole image. n = patch size is the setting of the method's predecessor.
        c_min, c_max: cutoff at t = 0 and at t = 1, in units of r.
        kappa: steepness of the mask's edge, per unit of r.
        fixed_scale: a constant f in place of f(t) = t, which makes the mask independent of time; `linear` alone.
        schedule: one of SCHEDULES. `power` and `snr` are clamped to c_min .. c_max: at t = 0 some of the lowest
            frequencies pass, and at t = 1 as much as in `linear`.
        alpha: exponent of the spectrum, for `power`: 2 to 3 for natural images, 2.9 for CIFAR-10.
        snr_floor: SNR at the cutoff, for `power` and `snr`; a smaller one opens the filter earlier.
        power: of the images, divided by noise_scale^2: P_k (K,) of the Fourier transform for `snr`, and for `budget`
            the variances of DCT modes, (K,) or (A, K) along A colour axes.
        budget: share of the least possible loss that hiding may cost, for `budget`.

    Raises:
        ValueError: a window that does not divide the image or is below 2; a setting out of range or not finite; a
            schedule without the settings that it needs.
    """

    def __init__(
        self,
        img_size: int,
        window_size: int | None = None,
        c_min: float = 0.05,
        c_max: float = 1.0,
        kappa: float = 30.0,
        fixed_scale: float | None = None,
        schedule: str = "linear",
        alpha: float | None = None,
        snr_floor: float = 1.0,
        power: Sequence[float] | Sequence[Sequence[float]] | None = None,
        budget: float = 0.03,
    ):
        super().__init__()
        self.img_size, self.window_size = img_size, img_size if window_size is None else window_size
        self.c_min, self.c_max, self.kappa, self.fixed_scale = c_min, c_max, kappa, fixed_scale
        self.schedule, self.alpha, self.snr_floor, self.budget = schedule, alpha, snr_floor, budget
        self.power = None if power is None else torch.as_tensor(power, dtype=torch.float64, device="cpu")
        self._check()
        for name, table in self._tables().items():
            self.register_buffer(name, table, persistent=False)

    def _check(self) -> None:
        n, size = self.window_size, self.img_size
        if n < 2 or size % n:
            raise ValueError(f"window_size {n} must be at least 2 and divide the image size {size}.")
        for name in ("c_min", "c_max", "fixed_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} {value} must be a finite number.")
        for name in ("kappa", "snr_floor", "alpha", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value} must be a positive number.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"The schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}.")
        if self.schedule == "linear":
            return
        if self.fixed_scale is not None:
            raise ValueError(f"fixed_scale {self.fixed_scale} needs the schedule 'linear', not {self.schedule!r}.")
        if self.c_min > self.c_max:
            raise ValueError(f"c_min {self.c_min} must not exceed c_max {self.c_max} in schedule {self.schedule!r}.")
        if self.schedule == "power" and self.alpha is None:
            raise ValueError("The schedule 'power' needs alpha, the exponent of the spectrum.")
        if self.schedule in ("snr", "budget"):
            count = num_rings(size) if self.schedule == "snr" else len(dct_rings(size)[1])
            given = torch.zeros(0) if self.power is None else self.power
            if given.ndim not in (1, 2) or given.shape[-1] != count or (self.schedule == "snr" and given.ndim == 2):
                raise ValueError(
                    f"The schedule {self.schedule!r} needs the power of {count} rings, not {tuple(given.shape)}."
                )
            if not (given.isfinite() & ((given > 0) | (self.schedule == "budget") & (given == 0))).all():
                raise ValueError(f"The schedule {self.schedule!r} needs a power above 0 and finite in each ring.")

    def _tables(self) -> dict[str, Tensor]:
        tables = {"dct": dct_matrix(self.window_size), "radius": radius_grid(self.window_size)}
        if self.schedule == "snr":
            tables["log_snr"], cycles = snr_cutoffs(self.power, self.img_size, self.snr_floor)
            tables["cutoffs"] = self.radius_per_cycle * cycles
        if self.schedule == "budget":
            tables["log_snr"], cycles = budget_cutoffs(self.power, self.img_size, self.budget)
            tables["cutoffs"] = self.radius_per_cycle * cycles + 3 / self.kappa
        return {name: table.float().to(tables["dct"].device) for name, table in tables.items()}

    def _apply(self, fn, recurse=True):
        """Follow the module to its device, but stay in float32: bfloat16 tables would cost an accuracy of 5e-3."""
        super()._apply(fn, recurse)
        device = self.dct.device
        for name, table in self._tables().items():
            setattr(self, name, table.to(device))
        return self

    @property
    def radius_per_cycle(self) -> float:
        """r of one cycle per image: 2 (n / H) / (sqrt(2) (n - 1))."""
        n = self.window_size
        return math.sqrt(2.0) * n / self.img_size / (n - 1)

    def cutoff(self, t: Tensor) -> Tensor:
        """Return c(t) in units of r, in the shape of `t`."""
        if self.schedule == "linear":
            f = t if self.fixed_scale is None else torch.full_like(t, self.fixed_scale)
            return self.c_min + (self.c_max - self.c_min) * f.clamp(0, 1)
        inside = t.clamp(T_MIN, T_MAX)
        odds = inside / (1 - inside)
        if self.schedule == "power":
            c = self.radius_per_cycle * self.snr_floor ** (-1 / self.alpha) * odds.pow(2 / self.alpha)
        else:
            c = self._interpolate(2 * odds.log())
        return torch.where(t < 1, c.clamp(self.c_min, self.c_max), self.c_max)

    def _interpolate(self, log_snr: Tensor) -> Tensor:
        """Return the cutoff between its knots: 0 below the first, and c_max from the last on, where all rings show."""
        knots, cutoffs = self.log_snr.to(log_snr.dtype), self.cutoffs.to(log_snr.dtype)
        x = log_snr.clamp(knots[0], knots[-1])
        right = torch.searchsorted(knots, x, right=True).clamp(1, len(knots) - 1)
        x0, x1 = knots[right - 1], knots[right]
        c0, c1 = cutoffs[right - 1], cutoffs[right]
        between = c0 + (c1 - c0) * ((x - x0) / (x1 - x0).clamp_min(1e-30))
        between = torch.where(log_snr < knots[0], 0.0, between)
        return torch.where(log_snr < knots[-1], between, self.c_max)

    def mask(self, t: Tensor) -> Tensor:
        """Return M(t) = sigmoid(kappa (c(t) - r)): t (B,) -> (B, n, n), in float64 if t is, else in float32."""
        double = t.dtype == torch.float64
        radius = radius_grid(self.window_size).to(t.device) if double else self.radius
        cutoff = self.cutoff(t if double else t.float())
        return torch.sigmoid(self.kappa * (cutoff[:, None, None] - radius))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Filter z (B, C, H, W) at times t (B,), or one t for all; times outside [0, 1] count as 0 and 1.

        The result is float64 if z is, else float32, under autocast too: to a relative error of 6e-7, with TF32 6e-4.
        Raises ValueError for an image of another size and for a number of times that is neither 1 nor B.
        """
        b, c, h, w = z.shape
        if (h, w) != (self.img_size, self.img_size):
            raise ValueError(f"Spectral Forcing was built for {self.img_size}x{self.img_size} images, not {h}x{w}.")
        if t.numel() not in (1, b):
            raise ValueError(f"t has the shape {tuple(t.shape)}; one time or one for each of {b} images was expected.")
        double = z.dtype == torch.float64
        z, t = (z, t.double()) if double else (z.float(), t.float())
        dct = dct_matrix(self.window_size).to(z.device) if double else self.dct
        n, g = self.window_size, self.img_size // self.window_size
        with torch.autocast(z.device.type, enabled=False):
            z = z.reshape(b, c, g, n, g, n).transpose(3, 4)  # (B, C, G, G, n, n)
            z = separable_transform(dct, z) * self.mask(t.reshape(-1))[:, None, None, None]
            return separable_transform(dct.T, z).transpose(3, 4).reshape(b, c, h, w)  # (B, C, H, W)

    def extra_repr(self) -> str:
        names = ("img_size", "window_size", "c_min", "c_max", "kappa", "fixed_scale", "schedule", "alpha", "snr_floor")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
