"""Power per ring of spatial frequency: the grey spectrum, the RAPSD, the gap between two spectra and its picture.

    n  pixels per side            B  images in a batch, (B, 3, n, n) or (B, C, n, n)
    u, v  a mode's frequencies in cycles per image, -n/2 .. n/2 - 1
    F  orthonormal FFT: white noise of variance 1 has power 1 in every mode
    k  ring: floor(sqrt(u^2 + v^2)), 0 .. K - 1, corners included: K = 23 at n = 32        n_k  modes in ring k

Two quantities go by the name of spectrum here and must not be mixed:

    grey_spectrum   of grey in [0, 1]; the spectrum gap of generated images is defined on it
    rapsd           P_k, mean over channels of x in [-1, 1]; noise schedules are defined on it
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
NO_POWER = 1e-12  # float64 finds less than this, not 0, in a ring without power; 8-bit images have far more or none
Spectrum = Tensor | np.ndarray | Sequence[float]


@lru_cache(maxsize=8)
def rings(n: int) -> tuple[Tensor, Tensor]:
    """(k of each mode (n, n) int64 in the order of torch.fft.fft2, n_k (K,) int64). Do not write to them."""
    f = torch.arange(n, device="cpu")  # and not on a default device of the moment
    f = torch.where(f < (n + 1) // 2, f, f - n)  # (n,): 0, 1, ..., -2, -1
    squared = f[:, None] ** 2 + f[None, :] ** 2  # (n, n)
    ring = squared.double().sqrt().floor().long()  # exact: the square root of a square is
    return ring, torch.bincount(ring.flatten())


@lru_cache(maxsize=8)
def rings_on(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rings` on a device. Do not write to them. Copied once: a copy waits for the device."""
    ring, count = rings(n)
    return ring.to(device), count.to(device)


def num_rings(n: int) -> int:
    """K, the number of rings of n x n pixels."""
    return len(rings(n)[1])


@lru_cache(maxsize=8)
def ring_radii(n: int) -> Tensor:
    """Mean radius sqrt(u^2 + v^2) of each ring's modes, (K,) float64 in cycles per image. Do not write to it."""
    f = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device="cpu")
    ring, count = rings(n)
    total = torch.zeros(len(count), dtype=torch.float64, device="cpu")
    return total.index_add_(0, ring.flatten(), torch.hypot(f[:, None], f[None, :]).flatten()) / count


def ring_power(x: Tensor) -> Tensor:
    """Mean of |F x|^2 over the modes of each ring: real (..., n, n) -> float64 (..., K)."""
    n = x.shape[-1]
    if x.ndim < 2 or x.shape[-2] != n:
        raise ValueError(f"rings are defined for square images, not for {tuple(x.shape)}")
    ring, count = rings_on(n, x.device)
    modes = torch.fft.fft2(x.double(), norm="ortho")  # (..., n, n)
    power = (modes.real.square() + modes.imag.square()).flatten(-2)  # (..., n*n)
    total = power.new_zeros(*power.shape[:-1], len(count)).index_add_(-1, ring.flatten(), power)
    return total / count


def grey_spectrum(images: Tensor) -> Tensor:
    """S_k of each image: ring_power of .299 R + .587 G + .114 B in [0, 1].

    Args:
        images: uint8 (B, 3, n, n).
    Returns: float64 (B, K). The spectrum of a set of images is the mean over them.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"grey_spectrum takes uint8 (B, 3, n, n), not {images.dtype} {tuple(images.shape)}")
    weights = torch.tensor(GREY, dtype=torch.float64, device=images.device) / 255
    return ring_power(torch.einsum("bchw,c->bhw", images.double(), weights))


def rapsd(x: Tensor) -> Tensor:
    """P_k = mean over channels and the ring's modes of |F x|^2, of each image: (B, C, n, n) -> float64 (B, K)."""
    return ring_power(x).mean(dim=1)


def fit_power_law(power: Tensor) -> Tensor:
    """(a, alpha) of ln P_k = a - alpha ln k, least squares over the rings k >= 1 with weights 1 / k.

    Args:
        power: (..., K) with K >= 3. A power of 0, which a constant image has, counts as NO_POWER.
    Returns: float64 (..., 2).
    """
    k = torch.arange(1, power.shape[-1], dtype=torch.float64, device=power.device)
    weight = 1 / k / (1 / k).sum()
    x, y = k.log(), power[..., 1:].double().clamp_min(NO_POWER).log()
    x = x - (weight * x).sum()
    mean = (weight * y).sum(-1)  # (...)
    alpha = -(weight * x * y).sum(-1) / (weight * x * x).sum()
    return torch.stack([mean + alpha * (weight * k.log()).sum(), alpha], dim=-1)


def ring_ratio(real: Spectrum, generated: Spectrum) -> np.ndarray:
    """S_gen / S_real per ring (K,): below 1 where generated images have too little power."""
    return np.asarray(generated, dtype=np.float64) / np.asarray(real, dtype=np.float64)


def spectrum_gap(real: Spectrum, generated: Spectrum) -> float:
    """mean_k |ln S_real,k - ln S_gen,k| over all rings, the DC ring and the corners included, each with weight 1.

    Infinite or not a number where a power is zero or negative.
    Source: the radial spectrum gap that SpectralDiT reports for CIFAR-10.
    """
    real, generated = (np.asarray(s, dtype=np.float64) for s in (real, generated))
    if real.shape != generated.shape or real.ndim != 1:
        raise ValueError(f"two spectra of the same rings were expected, not {real.shape} and {generated.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.abs(np.log(real) - np.log(generated)).mean())


class SpectrumSums:
    """Sums over real images, batch by batch and mergeable between processes, from which all their spectra follow.

    The centred spectrum is that of x_i - m with m the mean image. F is linear, so no second pass is needed:

        P^c_k = mean_i P_k(x_i - m) = mean_i P_k(x_i) - P_k(m)
    """

    def __init__(self, n: int):
        self.n = n
        self.count = 0
        self.grey = np.zeros(num_rings(n))  # sum of S_k
        self.power = np.zeros(num_rings(n))  # sum of P_k
        self.image = np.zeros((3, n, n))  # sum of the 8-bit images: integers, so exact in any order

    def update(self, images: Tensor) -> Tensor:
        """Add uint8 images (B, 3, n, n), on any device. Returns their P_k (B, K)."""
        power = rapsd(images.double() / 127.5 - 1)
        self.count += len(images)
        self.grey += grey_spectrum(images).sum(dim=0).cpu().numpy()
        self.power += power.sum(dim=0).cpu().numpy()
        self.image += images.sum(dim=0, dtype=torch.int64).cpu().numpy()
        return power

    def merge(self, other: "SpectrumSums") -> None:
        """Add the sums of a disjoint set of images."""
        self.count += other.count
        self.grey += other.grey
        self.power += other.power
        self.image += other.image

    def pack(self) -> np.ndarray:
        """All sums as one float64 vector, to be sent to another process."""
        return np.concatenate([[self.count], self.grey, self.power, self.image.ravel()])

    def unpack(self, vector: np.ndarray) -> "SpectrumSums":
        """New sums of the same size from what `pack` returned."""
        sums, k = SpectrumSums(self.n), len(self.grey)
        sums.count = int(vector[0])
        grey, power, image = np.split(vector[1:], [k, 2 * k])
        sums.grey, sums.power, sums.image = grey.copy(), power.copy(), image.reshape(self.image.shape).copy()
        return sums

    def finish(self) -> dict[str, np.ndarray]:
        """grey_spectrum, rapsd and rapsd_centred, each (K,), means over all images."""
        mean_image = torch.from_numpy(self.image / self.count) / 127.5 - 1  # (3, n, n)
        power = self.power / self.count
        return {
            "grey_spectrum": self.grey / self.count,
            "rapsd": power,
            "rapsd_centred": power - rapsd(mean_image[None])[0].numpy(),
        }


def plot_spectra(real: Spectrum, generated: Spectrum, path: str | Path, title: str = "") -> Path:
    """Write a PNG: both spectra over the rings, and below them the ratio generated / real. Returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    k = np.arange(len(real))
    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(k, np.asarray(real), label="real", linewidth=1.5)
    above.plot(k, np.asarray(generated), label="generated", linewidth=1.5, linestyle="--")
    gap = f"spectrum gap {spectrum_gap(real, generated):.3f}"
    above.set(yscale="log", ylabel="power", title=f"{title}, {gap}" if title else gap)
    above.legend(frameon=False)
    below.plot(k, ring_ratio(real, generated), color="black", linewidth=1.5)
    below.axhline(1, color="grey", linewidth=0.8)
    below.set(yscale="log", ylabel="generated / real", xlabel="ring (cycles per image)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
