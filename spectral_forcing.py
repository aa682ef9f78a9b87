"""Spectral Forcing: what the network sees, z -> low-passed z.

    SF_t(z) = IDCT( DCT(z) * M(t) ),   M(t)[u,v] = sigmoid(kappa * (c(t) - r[u,v]))        (arXiv 2606.15236)

At time t the data shows above the noise only up to some spatial frequency. The operator removes what lies above
a cutoff c(t) that opens as t goes from noise (0) to data (1). It acts on the input of the network alone, never
on the z of the loss, of the velocity, or of the sampler's state.

Which frequencies show follows from the data: ring k's data-to-noise ratio is P_k (t / (1 - t))^2 (util.spectrum; noise
has power 1). Three schedules of c(t), all between c_min and c_max:

    linear   c_min + (c_max - c_min) t, the published one
    power    where the ratio of the spectrum k^-alpha falls to a floor:  k*(t) = ((t / (1 - t))^2 / floor)^(1 / alpha)
    snr      where the ratio of a measured spectrum P_k falls to the floor

A spectrum A k^-alpha is the schedule `power` with the floor divided by A. DCT index u is u / 2 cycles per window, so k
cycles per image are at radius r = 2 k (n / H) / (sqrt(2) (n - 1)): the same frequency in a window as in the image.

Shapes: B batch, C channels, H = W image size, n window size, G = H / n windows along a side.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from util.cpu_layers import sandwich
from util.spectrum import num_rings, ring_radii

SCHEDULES = ("linear", "power", "snr")


def dct_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Orthonormal DCT-II matrix D (n, n): D @ x transforms a column x, and D.T @ D = I.

    D[u, i] = a_u * cos(pi * (2i + 1) * u / (2n)), with a_0 = sqrt(1/n) and a_u = sqrt(2/n) otherwise.
    """
    u = torch.arange(n, dtype=torch.float64)[:, None]
    i = torch.arange(n, dtype=torch.float64)[None, :]
    matrix = math.sqrt(2.0 / n) * torch.cos(math.pi * (2 * i + 1) * u / (2 * n))
    matrix[0] = math.sqrt(1.0 / n)
    return matrix.to(dtype)


def radius_grid(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalised radial frequency (n, n): r[u,v] = sqrt(u^2 + v^2) / (sqrt(2) (n - 1)), 0 at DC, 1 in the corner."""
    u = torch.arange(n, dtype=torch.float64)
    return (torch.hypot(u[:, None], u[None, :]) / (math.sqrt(2.0) * (n - 1))).to(dtype)


def snr_cutoffs(power: Sequence[float], img_size: int, snr_floor: float) -> tuple[Tensor, Tensor]:
    """Where the schedule `snr` bends: (lambda (K,), non-decreasing; cutoff (K,) in cycles per image), float64, CPU.

    Ring k reaches the floor at lambda_k = ln(floor / max_{j >= k} P_j), with lambda = 2 ln(t / (1 - t)): the maximum
    makes the cutoff monotone in t, since a ring opens all below it. The cutoff is then the mean radius of the ring's
    modes, about k + 1/2.
    """
    envelope = torch.as_tensor(power, dtype=torch.float64, device="cpu").flip(0).cummax(0).values.flip(0)  # (K,)
    return (snr_floor / envelope).log(), ring_radii(img_size)


class SpectralForcing(nn.Module):
    """Time-conditional low-pass in the DCT domain, without parameters and without state-dict entries.

    It is close to the identity at t = 1 and not equal to it: with the defaults the mask is 0.95 at r = 0.9 and 0.5
    at r = 1. At t = 0 the gain at DC is 0.82. Hence `fixed_scale=1.0` is no switch to turn it off.

    Args:
        img_size: H = W of the images, in pixels.
        window_size: n, side of the non-overlapping windows that are transformed on their own; it divides `img_size`.
            None is the whole image. n = patch size is the setting of the method's predecessor.
        c_min, c_max: cutoff at t = 0 and at t = 1, in units of r.
        kappa: steepness of the mask's edge, per unit of r.
        fixed_scale: a constant f in place of f(t) = t, which makes the mask independent of time; `linear` alone.
        schedule: of c(t), one of SCHEDULES. `power` and `snr` are clamped to c_min .. c_max: at t = 0, where nothing
            shows, some of the lowest frequencies pass, and at t = 1 as much as in `linear`.
        alpha: for `power`, the exponent of the spectrum: 2 to 3 for natural images, 2.9 for CIFAR-10.
        snr_floor: for `power` and `snr`, the data-to-noise ratio at the cutoff; smaller is more open.
        power: for `snr`, P_k (K,) of the images, divided by noise_scale^2.

    Raises:
        ValueError: a window that does not divide the image or is smaller than 2, a `kappa`, `alpha`, `snr_floor` or
            power that is not positive, a cutoff or scale that is not finite, a schedule without what it needs.
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
        power: Sequence[float] | None = None,
    ):
        super().__init__()
        n = img_size if window_size is None else window_size
        if n < 2 or img_size % n:
            raise ValueError(
                f"the Spectral Forcing window is {n} and the image size {img_size}: "
                "the window must be at least 2 and divide the image size"
            )
        if not (math.isfinite(kappa) and kappa > 0):
            raise ValueError(f"kappa is {kappa}: the steepness of the mask must be a positive number")
        for name, value in (("c_min", c_min), ("c_max", c_max), ("fixed_scale", fixed_scale)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}: it must be a finite number")
        self.img_size, self.window_size = img_size, n
        self.c_min, self.c_max, self.kappa, self.fixed_scale = c_min, c_max, kappa, fixed_scale
        self.schedule, self.alpha, self.snr_floor = schedule, alpha, snr_floor
        self.power = None if power is None else tuple(float(p) for p in power)
        self._check_schedule()
        for name, table in self._tables().items():
            self.register_buffer(name, table, persistent=False)

    def _check_schedule(self) -> None:
        """ValueError where the schedule lacks what it needs."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"the cutoff's schedule is {self.schedule!r}: it must be one of {', '.join(SCHEDULES)}")
        if self.schedule != "linear" and self.fixed_scale is not None:
            raise ValueError(f"a mask that does not depend on time has no schedule {self.schedule!r}: leave one out")
        if not (math.isfinite(self.snr_floor) and self.snr_floor > 0):
            raise ValueError(f"snr_floor is {self.snr_floor}: it must be a positive number")
        if self.schedule == "power" and not (self.alpha is not None and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"the schedule 'power' needs the exponent of the spectrum, and alpha is {self.alpha}")
        if self.schedule == "snr":
            rings = num_rings(self.img_size)
            if self.power is None or len(self.power) != rings:
                found = "none" if self.power is None else f"one of {len(self.power)}"
                raise ValueError(
                    f"the schedule 'snr' needs a spectrum of {rings} rings for images of {self.img_size} pixels and "
                    f"was given {found}"
                )
            if not all(math.isfinite(p) and p > 0 for p in self.power):
                raise ValueError("the spectrum of the schedule 'snr' has a power that is not a positive number")
        if self.schedule != "linear" and not self.c_min <= self.c_max:
            raise ValueError(f"c_min is {self.c_min} and c_max {self.c_max}: the cutoff opens from c_min to c_max")

    def _tables(self) -> dict[str, Tensor]:
        """What depends on the settings alone, in float32."""
        n = self.window_size
        tables = {"dct": dct_matrix(n), "radius": radius_grid(n)}
        if self.schedule == "snr":
            tables["log_snr"], cycles = snr_cutoffs(self.power, self.img_size, self.snr_floor)
            tables["cutoffs"] = self.radius_per_cycle * cycles
        return {name: table.float().to(tables["dct"].device) for name, table in tables.items()}

    @property
    def radius_per_cycle(self) -> float:
        """r of one cycle per image: 2 (n / H) / (sqrt(2) (n - 1))."""
        n = self.window_size
        return math.sqrt(2.0) * n / self.img_size / (n - 1)

    def _apply(self, fn, recurse=True):
        """Move with the module, but stay in float32 where it is cast: bfloat16 tables would cost 5e-3 of accuracy."""
        super()._apply(fn, recurse)
        if self.dct.dtype != torch.float32:
            device = self.dct.device
            for name, table in self._tables().items():
                setattr(self, name, table.to(device))
        return self

    def cutoff(self, t: Tensor) -> Tensor:
        """c(t) in units of r; same shape as `t`. For linear c_min + (c_max - c_min) * f(t)."""
        if self.schedule == "linear":
            f = t if self.fixed_scale is None else torch.full_like(t, self.fixed_scale)
            return self.c_min + (self.c_max - self.c_min) * f
        odds = t / (1 - t)  # infinite at t = 1, where the clamp leaves c_max
        if self.schedule == "power":
            c = self.radius_per_cycle * (odds.square() / self.snr_floor).pow(1 / self.alpha)
        else:
            c = self._interpolate(2 * odds.log())
        return c.clamp(self.c_min, self.c_max)

    def _interpolate(self, log_snr: Tensor) -> Tensor:
        """The cutoff between its bends, 0 below the first one, and c_max above the last, from where all rings show."""
        x = log_snr.clamp(self.log_snr[0], self.log_snr[-1])
        right = torch.searchsorted(self.log_snr, x, right=True).clamp(1, len(self.log_snr) - 1)
        x0, x1 = self.log_snr[right - 1], self.log_snr[right]
        c0, c1 = self.cutoffs[right - 1], self.cutoffs[right]
        between = c0 + (c1 - c0) * ((x - x0) / (x1 - x0).clamp_min(1e-30))
        between = torch.where(log_snr < self.log_snr[0], 0.0, between)
        return torch.where(log_snr < self.log_snr[-1], between, self.c_max)

    def mask(self, t: Tensor) -> Tensor:
        """M(t): gains in (0, 1) for t (B,), shape (B, n, n)."""
        return torch.sigmoid(self.kappa * (self.cutoff(t.float())[:, None, None] - self.radius))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """z (B, C, H, W) and t (B,) in [0, 1] -> (B, C, H, W) in float32, whatever autocast says.

        Where TF32 is on for the process (util/acceleration.py), its products keep 10 bits of their factors: an error
        of 6e-4 of the output's rms if the hardware rounds them, 3e-3 if it truncates (calculated, not measured).

        Raises:
            ValueError: an image of another size than the one the tables were made for.
        """
        b, c, h, w = z.shape
        if (h, w) != (self.img_size, self.img_size):
            raise ValueError(f"Spectral Forcing was built for {self.img_size}x{self.img_size} images, got {h}x{w}")
        n, g = self.window_size, self.img_size // self.window_size
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            mask = self.mask(t)[:, None]  # (B, 1, n, n)
            if g > 1:
                z = z.view(b, c, g, n, g, n).transpose(3, 4).reshape(b, c * g * g, n, n)  # (B, C G G, n, n)
            z = sandwich(self.dct.T, sandwich(self.dct, z) * mask)
            if g > 1:
                z = z.view(b, c, g, g, n, n).transpose(3, 4).reshape(b, c, h, w)  # (B, C, H, W)
            return z

    def extra_repr(self) -> str:
        return (
            f"img_size={self.img_size}, window_size={self.window_size}, c_min={self.c_min}, c_max={self.c_max}, "
            f"kappa={self.kappa}, fixed_scale={self.fixed_scale}, schedule={self.schedule}, alpha={self.alpha}, "
            f"snr_floor={self.snr_floor}"
        )
