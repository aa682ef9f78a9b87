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

Models count time in different ways; TIME_CONVENTIONS lists them. The filter is linear, so the scale of z does not
matter: x + sigma e and sqrt(a) x + sqrt(1 - a) e are z / t for the t at which the SNR is the same.

Shapes: B batch, H and W image size, h and w those of a window, n its side if it is square, K rings of frequency.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

SCHEDULES = ("linear", "power", "snr", "budget")
MOST_TABLES = 64  # that are kept; a side of an image is one
ROUNDING = 2.0**-7  # of a time in bfloat16, relative to the last one
T_MIN, T_MAX = 1e-12, 1 - 2.0**-24  # the odds t / (1 - t) are finite between them, and so are derivatives


class TimeConvention(NamedTuple):
    """Times run from 0 to `last`; `to_flow` maps them to the t of this file, from noise (0) to data (1)."""

    last: float
    to_flow: Callable[[Tensor], Tensor]


#: "ddpm", the number of a step of a discrete chain, is the only other one: it needs a table (alphas_cumprod).
TIME_CONVENTIONS = {
    "flow": TimeConvention(1, lambda t: t),  # JiT, torchcfm, flow_matching: z = t x + (1 - t) e
    "flow_1000": TimeConvention(1000, lambda t: t / 1000),
    "sigma": TimeConvention(1, lambda sigma: 1 - sigma),  # z = (1 - sigma) x + sigma e: sigmas of diffusers, PRX
    "sigma_1000": TimeConvention(1000, lambda sigma: 1 - sigma / 1000),  # timesteps of diffusers' flow matching
    "edm": TimeConvention(math.inf, lambda sigma: 1 / (1 + sigma)),  # z = x + sigma e: k-diffusion, EDM
}


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


def dct_matrix(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the orthonormal DCT-II matrix D (n, n), float64: D @ x transforms a column x, and D.T @ D = I.

    D[u, i] = a_u * cos(pi * (2i + 1) * u / (2n)), with a_0 = sqrt(1/n) and a_u = sqrt(2/n) otherwise.
    """
    u = torch.arange(n, dtype=torch.float64, device=device)[:, None]
    i = torch.arange(n, dtype=torch.float64, device=device)[None, :]
    scale = ((u.clamp(max=1) + 1) / n).sqrt()  # (n, 1): a_u
    return scale * torch.cos(math.pi * (2 * i + 1) * u / (2 * n))


def radius_grid(h: int, w: int, like: Tensor) -> Tensor:
    """Return r[u,v], (h, w): the frequency of a DCT mode in cycles per pixel, divided by that of the corner.

    It is sqrt((u / h)^2 + (v / w)^2) over the same at u = h - 1, v = w - 1; sqrt(u^2 + v^2) / (sqrt(2) (n - 1)) for
    h = w = n. Type and device are those of `like`.
    """
    u, v = (torch.arange(n, dtype=like.dtype, device=like.device) / n for n in (h, w))
    return torch.hypot(u[:, None], v[None, :]) / torch.hypot(u[-1], v[-1])


def separable_transform(rows: Tensor, z: Tensor, columns: Tensor | None = None) -> Tensor:
    """Return rows @ z @ columns.T for z (..., h, w), rows (h', h) and columns (w', w), by default the same."""
    return rows @ z @ (rows if columns is None else columns).T


def is_traced(*tensors: Tensor) -> bool:
    """Return whether a compiler, FakeTensorMode or functorch is at work, whose tensors are not to be kept or read."""
    stands_in = torch.compiler.is_compiling() or any(type(tensor) is not Tensor for tensor in tensors)
    return stands_in or torch._C._functorch.peek_interpreter_stack() is not None


def cached(cache: dict[Hashable, Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Return make(), from the cache if it is there. What is compiled makes the table anew in each call."""
    if torch.compiler.is_compiling():
        return make()
    if key in cache:
        return cache[key]
    with torch.inference_mode(False):  # training may use it later
        table = make()
    if not is_traced(table):
        if len(cache) >= MOST_TABLES:
            cache.pop(next(iter(cache)))  # the oldest one
        cache[key] = table
    return table


_TABLES: dict[Hashable, Tensor] = {}  # the DCT of all operators, by size, device and type


def _dct(n: int, like: Tensor) -> Tensor:
    make = partial(dct_matrix, n, like.device if torch.compiler.is_compiling() else "cpu")  # some devices lack float64
    return cached(_TABLES, (n, like.device, like.dtype), lambda: make().to(like.device, like.dtype))


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
    low, high = (torch.full((power.shape[-1],), end, dtype=torch.float64, device="cpu") for end in (-60.0, 60.0))
    for _ in range(60):
        middle = (low + high) / 2  # (K,): lambda_j is in low .. high
        seen = 1 / (1 + power[:, None] * middle.exp()[None, :, None])  # (A, j, k)
        hidden = ((1 - seen) * (power * count)[:, None]).sum(0).triu().sum(1)  # (j,)
        least = (seen * (power * count)[:, None]).sum((0, 2))
        below = hidden < budget * least
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low, torch.arange(1.0, power.shape[-1] + 1, dtype=torch.float64, device="cpu")


class SpectralForcing(nn.Module):
    """Time-conditional low-pass filter in the DCT domain, without parameters and without state-dict entries.

    At t = 1 it is close to the identity, not equal: with the defaults the mask is 0.95 at r = 0.9 and 0.5 at r = 1,
    hence `fixed_scale=1.0` does not turn it off. At t = 0 the gain at DC is 0.82.

    Args:
        img_size: H = W of the images, in pixels; others are then refused. None: images of any size, with `linear`.
        window_size: n, side of the non-overlapping windows that are transformed independently; it divides the image.
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
        time_convention: what the times are that the operator is called with: one of TIME_CONVENTIONS, or "ddpm".
        alphas_cumprod: for "ddpm": a_i (S,) of z = sqrt(a_i) x + sqrt(1 - a_i) e at step i.

    Raises:
        ValueError: a window that does not divide the image or is below 2; a setting out of range or not finite; a
            schedule or convention without the settings that it needs.
    """

    def __init__(
        self,
        img_size: int | None = None,
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
        time_convention: str = "flow",
        alphas_cumprod: Sequence[float] | None = None,
    ):
        super().__init__()
        self.img_size, self.window_size = img_size, img_size if window_size is None else window_size
        self.c_min, self.c_max, self.kappa, self.fixed_scale = c_min, c_max, kappa, fixed_scale
        self.schedule, self.alpha, self.snr_floor, self.budget = schedule, alpha, snr_floor, budget
        self.power = None if power is None else torch.as_tensor(power, dtype=torch.float64, device="cpu")
        alphas = [] if alphas_cumprod is None else alphas_cumprod
        alphas = torch.as_tensor(alphas, dtype=torch.float64, device="cpu")
        self.time_convention, self.num_steps = time_convention, len(alphas)
        self._check(alphas)
        self._tables = {"alphas_cumprod": alphas} if time_convention == "ddpm" else {}
        if self.window_size is not None:
            self._tables["dct"] = dct_matrix(self.window_size)
        if schedule == "snr":
            self._tables["log_snr"], cycles = snr_cutoffs(self.power, img_size, snr_floor)
            self._tables["cutoffs"] = self.radius_per_cycle * cycles
        if schedule == "budget":
            self._tables["log_snr"], cycles = budget_cutoffs(self.power, img_size, budget)
            self._tables["cutoffs"] = self.radius_per_cycle * cycles + 3 / kappa
        with torch.inference_mode(False):  # training may use them later
            for name, table in self._tables.items():
                self.register_buffer(name, table.float(), persistent=False)
        self._elsewhere: dict[Hashable, Tensor] = {}  # copies on the devices and in the types of images
        self._times_were_seen = False  # on a GPU

    def _apply(self, fn, recurse=True):
        """Follow the module to its device, but stay in float32: bfloat16 tables would cost an accuracy of 5e-3."""
        super()._apply(fn, recurse)
        with torch.inference_mode(False):
            for name, table in self._tables.items():
                setattr(self, name, table.float().to(getattr(self, name).device))
        return self

    def _table(self, name: str, like: Tensor) -> Tensor:
        table = getattr(self, name)
        if table.device == like.device and table.dtype == like.dtype:
            return table
        key = name, like.device, like.dtype
        return cached(self._elsewhere, key, lambda: self._tables[name].to(like.device, like.dtype))

    def _check(self, alphas: Tensor) -> None:
        n, size = self.window_size, self.img_size
        if n is not None and (n < 2 or (size is not None and size % n)):
            raise ValueError(
                f"window_size {n} must be at least 2 and divide the image size{f' {size}' if size else ''}."
            )
        for name in ("c_min", "c_max", "fixed_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} {value} must be a finite number.")
        for name in ("kappa", "snr_floor", "alpha", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value} must be a positive number.")
        if self.alpha is not None and abs(math.log(self.snr_floor)) > 60 * self.alpha:  # of 1e26 cycles and more
            raise ValueError(f"alpha {self.alpha} is too small for an snr_floor of {self.snr_floor}.")
        if self.time_convention not in (*TIME_CONVENTIONS, "ddpm"):
            names = ", ".join((*TIME_CONVENTIONS, "ddpm"))
            raise ValueError(f"The time convention {self.time_convention!r} must be one of {names}.")
        inside = alphas.ndim == 1 and len(alphas) and ((alphas >= 0) & (alphas <= 1)).all()
        if self.time_convention == "ddpm" and not (inside and (alphas.diff() <= 0).all()):
            raise ValueError("The time convention 'ddpm' needs alphas_cumprod, which fall from 1 towards 0.")
        if self.time_convention != "ddpm" and len(alphas):
            raise ValueError(f"alphas_cumprod is for the time convention 'ddpm', not {self.time_convention!r}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"The schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}.")
        if self.schedule == "linear":
            return
        if size is None:
            raise ValueError(f"The schedule {self.schedule!r} counts cycles per image: it needs img_size.")
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

    @property
    def radius_per_cycle(self) -> float:
        """r of one cycle per image: 2 (n / H) / (sqrt(2) (n - 1))."""
        n = self.window_size
        return math.sqrt(2.0) * n / self.img_size / (n - 1)

    def flow_time(self, t: Tensor) -> Tensor:
        """Return t of z = t x + (1 - t) e, up to scale, for times t in the operator's convention, in their shape.

        Raises ValueError for times out of the convention's range. On a GPU the values are looked at in the first call
        alone, since the host waits for them; later, and within a compiler or functorch, they count as its ends.
        """
        ddpm = self.time_convention == "ddpm"
        last = self.num_steps - 1 if ddpm else TIME_CONVENTIONS[self.time_convention].last
        if t.numel() and not (t.is_meta or is_traced(t) or (t.device.type != "cpu" and self._times_were_seen)):
            low, high, slack = t.min().item(), t.max().item(), ROUNDING * (last if math.isfinite(last) else 0)
            if not -slack <= low <= high <= last + slack:
                raise ValueError(
                    f"Times from {low:g} to {high:g} are not those of the convention {self.time_convention!r}, "
                    f"which are from 0 to {last:g}. See TIME_CONVENTIONS."
                )
            if ddpm and not bool((t == t.round()).all()):
                raise ValueError(f"Times from {low:g} to {high:g} are no steps of 'ddpm', which are whole numbers.")
            self._times_were_seen = True
        t = t.clamp(0, last)
        if ddpm:
            a = self._table("alphas_cumprod", t)[t.long()]
            return a.sqrt() / (a.sqrt() + (1 - a).sqrt())
        return TIME_CONVENTIONS[self.time_convention].to_flow(t)

    def cutoff(self, t: Tensor) -> Tensor:
        """Return c(t) in units of r, in the shape of `t`, which is from 0 (noise) to 1 (data) in all conventions."""
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
        knots, cutoffs = (self._table(name, log_snr) for name in ("log_snr", "cutoffs"))
        x = log_snr.clamp(knots[0], knots[-1])
        right = torch.searchsorted(knots, x, right=True).clamp(1, len(knots) - 1)
        x0, x1 = knots[right - 1], knots[right]
        c0, c1 = cutoffs[right - 1], cutoffs[right]
        between = c0 + (c1 - c0) * ((x - x0) / (x1 - x0).clamp_min(1e-30))
        between = torch.where(log_snr < knots[0], 0.0, between)
        return torch.where(log_snr < knots[-1], between, self.c_max)

    def mask(self, t: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return M(t) = sigmoid(kappa (c(t) - r)): t (B,), as for `cutoff`, -> (B, h, w), in float64 if t is, else in
        float32. `size` is (h, w) of a window, by default that of the constructor.
        """
        t = t if t.dtype == torch.float64 else t.float()
        h, w = size or (self.window_size, self.window_size)
        return torch.sigmoid(self.kappa * (self.cutoff(t)[:, None, None] - radius_grid(h, w, t)))

    def forward(self, z: Tensor, t: Tensor | float) -> Tensor:
        """Filter z (B, ..., H, W) at times t (B,), or one t for all: images, latents, or each frame of a video.

        Float64 is computed in float64 and all else in float32, under autocast too, to a relative error of 6e-7, with
        TF32 6e-4; the result has the type of z.

        Raises:
            ValueError: an image that is not of the size, or no multiple of the window, or no floating-point numbers; a
                number of times that is neither 1 nor B; times on another device, or out of the convention's range.
        """
        if not isinstance(t, Tensor):  # torch.full: a compiler takes any number without compiling again
            t = torch.full((1,), t, device=z.device) if isinstance(t, int | float) else torch.tensor(t, device=z.device)
        self._check_input(z, t)
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        (h, w), n = z.shape[-2:], self.window_size
        with torch.autocast(z.device.type, enabled=False):
            x, window = z.to(dtype), (h, w)
            if n is not None and (h, w) != (n, n):
                window = (n, n)
                x = x.unflatten(-1, (w // n, n)).unflatten(-3, (h // n, n)).transpose(-3, -2)  # (B, ..., n, n)
            mask = self.mask(self.flow_time(t.to(z.device, dtype).reshape(-1)), window)
            mask = mask.reshape(-1, *[1] * (x.ndim - 3), *window)
            rows, columns = (self._table("dct", x) if n == side else _dct(side, x) for side in window)
            x = separable_transform(rows.T, separable_transform(rows, x, columns) * mask, columns.T)
            x = x if window == (h, w) else x.transpose(-3, -2)
            return x.reshape(z.shape).to(z.dtype)

    def _check_input(self, z: Tensor, t: Tensor) -> None:
        if z.ndim < 3 or (z.ndim == 3 and t.numel() > 1):
            raise ValueError(f"z has the shape {tuple(z.shape)}; (B, ..., H, W) was expected (tokens: filter_patches).")
        (h, w), n = z.shape[-2:], self.window_size
        if self.img_size is not None and (h, w) != (self.img_size, self.img_size):
            raise ValueError(f"Spectral Forcing was built for {self.img_size}x{self.img_size} images, not {h}x{w}.")
        if min(h, w) < 2 or (n is not None and (h % n or w % n)):
            raise ValueError(f"An image of {h}x{w} pixels does not consist of windows of {n or 2} pixels.")
        if not z.is_floating_point():
            raise ValueError(f"z is {z.dtype}; noisy images are floating-point numbers.")
        if t.numel() not in (1, z.shape[0]):
            raise ValueError(
                f"t has the shape {tuple(t.shape)}; one time or one for each of {len(z)} images was expected."
            )
        if t.device != z.device and t.ndim:
            raise ValueError(f"t is on {t.device} and z on {z.device}; both must be on one device.")

    def extra_repr(self) -> str:
        names = ("img_size", "window_size", "c_min", "c_max", "kappa", "fixed_scale", "schedule", "alpha", "snr_floor")
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*names, "time_convention"))
