"""Resolution that follows the spectrum: at a time t the network computes on the frequencies that rise above the noise.

Level l holds the lowest (n / 2^l)^2 modes of the orthonormal DCT of an image, transformed back on n / 2^l pixels:

    x_l = L x L^T,   L = D_m^T D_n[:m],   m = n / 2^l,   L L^T = I

White noise stays white with the same variance, and each mode keeps its signal-to-noise ratio: t, path, loss and
guidance are the same at all levels. Level l is used for t < t_l, the first time at which a ring outside of its band
reaches the SNR delta, so t_1 >= t_2 >= ...; level 0, the whole image, for t >= t_1. A ring's SNR is the mean of its
modes: in photographs single modes, on the axes, have up to three times as much.

Modes outside of the band are not given to the network. Their data is estimated by Wiener's filter, for noise of
variance 1 and a variance P, the mean over the ring and the colour axes:

    x = t P / (t^2 P + (1 - t)^2) z,     v = (x - z) / (1 - t) = (t P - (1 - t)) / (t^2 P + (1 - t)^2) z

For independent Gaussian modes of mean 0 and variance P it is the best estimate, and the flow of v maps e to
sqrt(t^2 P + (1 - t)^2) e, which has the variance of the marginal at t. Predicting 0 instead would have the error P, a
factor of 1 + SNR, at most 1 + delta, above the least one. With correlated colours, as in photographs, the estimate lies
between the two.

Shapes: B batch, C channels, n image size, m size of a level, A colour axes, K rings of DCT modes.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from copy import copy

import torch
from torch import Tensor

from spectral_forcing import cached, dct_matrix, dct_rings, separable_transform
from spectral_ops.conditioning import InstanceTimeSampler
from spectral_ops.schedule import repeat_to

GROUP = 8  # positions in a batch after which the levels repeat


def band_matrix(n: int, m: int) -> Tensor:
    """Return L (m, n), float64: the lowest m of n DCT modes of a column, on m pixels. L L^T = I."""
    return dct_matrix(m).T @ dct_matrix(n)[:m]


def outside(n: int, m: int) -> Tensor:
    """Return which DCT modes (n, n) lie outside of the lowest m x m, bool."""
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[:m, :m] = False
    return mask


def level_times(power: Tensor, n: int, levels: int, delta: float) -> tuple[float, ...]:
    """Return t_1 >= ... >= t_levels: until t_l, no ring outside of level l has an SNR of `delta` or more.

    `power` are the variances of DCT modes in each ring, in units of the noise's: (K,), or (A, K) along colour axes.
    """
    power = torch.as_tensor(power, dtype=torch.float64, device="cpu")
    ring, times = dct_rings(n)[0], []
    for level in range(1, levels + 1):
        largest = float(power[..., ring[outside(n, n >> level)]].max())
        times.append(1 / (1 + math.sqrt(largest / delta)))
    return tuple(times)


class ResolutionSchedule:
    """The levels of images of `img_size` pixels.

    Args:
        power: variances of DCT modes in each ring divided by noise_scale^2, (K,), or (A, K) along colour axes. The
            times follow from the largest axis, the estimate of hidden modes from the mean over axes.
        levels: number of levels beside level 0.
        delta: SNR from which a ring must be seen.

    Raises:
        ValueError: a size that 2^levels does not divide into at least 2 pixels; a power of other rings, negative or not
            finite; a setting out of range.
    """

    def __init__(self, img_size: int, power: Tensor | Sequence, levels: int = 1, delta: float = 0.05):
        power = torch.as_tensor(power, dtype=torch.float64, device="cpu")
        if not 0 < levels < GROUP or img_size % 2**levels or img_size >> levels < 2:
            raise ValueError(
                f"{levels} levels do not fit {img_size} pixels: each halves the side, to 2 or more, and "
                f"{GROUP - 1} are the most."
            )
        if not 0 < delta < math.inf:
            raise ValueError(f"delta {delta}, the SNR from which a ring must be seen, must be a positive number.")
        ring, modes = dct_rings(img_size)
        if power.ndim not in (1, 2) or power.shape[-1] != len(modes):
            raise ValueError(f"{len(modes)} rings of DCT modes were expected, not {tuple(power.shape)}.")
        if not (power.isfinite() & (power >= 0)).all():
            raise ValueError("A spectrum must not contain negative powers, infinity or NaN.")
        self.img_size, self.levels, self.delta = img_size, levels, delta
        self.times = level_times(power, img_size, levels, delta)
        self.variance = power.reshape(-1, len(modes)).mean(0)[ring]  # of each mode (n, n), float64 on the CPU
        self._tables: dict[Hashable, Tensor] = {}

    def size(self, level: int) -> int:
        return self.img_size >> level

    def level_of(self, t: Tensor) -> Tensor:
        """Return the level (B,), int64, that is used at times t (B,)."""
        return (t[:, None] < t.new_tensor(self.times)).sum(1)

    def _of(self, level: int, z: Tensor) -> tuple[Tensor, ...]:
        """Return the DCT of level 0 and of `level`, L and the variance of modes, in the type and on the device of z."""
        n, m = self.img_size, self.size(level)

        def table(name: str, make: Callable[[], Tensor]) -> Tensor:
            return cached(self._tables, (name, level, z.dtype, z.device), lambda: make().to(z.device, z.dtype))

        return (
            table("dct", lambda: dct_matrix(n)),
            table("dct_low", lambda: dct_matrix(m)),
            table("band", lambda: band_matrix(n, m)),
            table("variance", lambda: self.variance),
        )

    def reduce(self, x: Tensor, level: int) -> Tensor:
        """Return x_l: (B, C, n, n) -> (B, C, m, m)."""
        return separable_transform(self._of(level, x)[2], x)

    def join(self, low: Tensor, z: Tensor, t: Tensor, velocity: bool) -> Tensor:
        """Return the image whose band is `low` (B, C, m, m) and whose other modes are estimated from z (B, C, n, n).

        The estimate is of the data, or of the velocity; t (B,), or (1,) for all.
        """
        m = low.shape[-1]
        dct, dct_low, _, p = self._of((self.img_size // m).bit_length() - 1, z)
        t = t.to(z)[:, None, None, None]
        gain = (t * p - (1 - t) if velocity else t * p) / (t * t * p + (1 - t) ** 2)  # (B, 1, n, n)
        modes = separable_transform(dct, z) * gain
        modes[..., :m, :m] = separable_transform(dct_low, low.to(z))
        return separable_transform(dct.T, modes)


class LevelTimes:
    """Training times that are spread over the levels: position i of a batch always has the level levels[i % GROUP].

    Its time is drawn from `sampler` within the interval of that level, and its loss has the weight
    (probability of the interval) / (share of the positions): the expectation is that of `sampler`. So the sizes of all
    groups are known before the times are drawn.

    `sampler` is a time sampler of denoiser.py; one of single images is asked for the times of each image.
    """

    def __init__(self, sampler, schedule: ResolutionSchedule):
        self.sampler = sampler
        ends = torch.tensor([0.0, *reversed(schedule.times), 1.0], dtype=torch.float64)  # of level L, L - 1, ..., 0
        mass = sampler.cdf(ends).cpu().diff()
        counts = torch.zeros_like(mass)
        for _ in range(GROUP):  # one position after the other to the level that lacks most
            counts[(mass * GROUP - counts + GROUP * (counts == 0)).argmax()] += 1
        place = torch.repeat_interleave(torch.arange(len(mass)), counts.long())  # (GROUP,), into the intervals
        self.levels = tuple((schedule.levels - place).tolist())
        self.low, self.high, self.share = ends[place], ends[place + 1], counts[place] / GROUP
        if not isinstance(sampler, InstanceTimeSampler):
            self.sampler_within = sampler.within(self.low, self.high)

    def for_images(self, x: Tensor) -> "LevelTimes":
        """Return the times for a batch x (B, C, H, W)."""
        sampler = self.sampler.for_images(x)
        if sampler is self.sampler:
            return self
        times = copy(self)
        times.sampler_within = sampler.within(*(repeat_to(len(x), end).to(x.device) for end in (self.low, self.high)))
        return times

    def weight(self, count: int) -> Tensor:
        """Return the weights (B,) of the positions of a batch.

        Raises ValueError for a batch that is no multiple of GROUP, whose weights would not have the mean 1.
        """
        if count % GROUP:
            raise ValueError(f"A batch of {count} images is no multiple of {GROUP}, which levels of resolution need.")
        mass = self.sampler_within.mass
        return (repeat_to(count, mass) / repeat_to(count, self.share).to(mass, non_blocking=True)).float()

    def sample(self, rng) -> Tensor:
        """Draw t (B,)."""
        return self.sampler_within.sample(rng)

    def cdf(self, t: Tensor) -> Tensor:
        """Return the probability of a time below t, with weights."""
        return self.sampler.cdf(t)
