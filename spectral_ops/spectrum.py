"""Power per ring of spatial frequency: spectra of images, their power laws, and the gap between two spectra.

F is the orthonormal FFT, so white noise of variance 1 has power 1 in every mode. Two quantities are called spectrum
here and must not be mixed:

    grey_spectrum   S_k of grey in [0, 1]: the spectrum gap of generated images is defined on it
    rapsd           P_k, mean over channels of x in [-1, 1]: noise schedules are defined on it

Shapes: n pixels per side, B images (B, 3, n, n) or (B, C, n, n), K rings, n_k modes in ring k (spectral_forcing.rings).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_forcing import dct_matrix, dct_rings, rings, separable_transform

GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
NO_POWER = 1e-12  # rounding leaves less than this in a ring without power; 8-bit images have far more, or none
QUANTISATION = (2 / 255) ** 2 / 12  # power of rounding to 8 bits, in x of [-1, 1]


def ring_means(values: Tensor, ring: Tensor, count: Tensor) -> Tensor:
    """Return the mean over the modes of each ring, (..., K), of values (..., n, n); `ring` (n, n), `count` (K,)."""
    total = values.new_zeros(*values.shape[:-2], len(count))
    return total.index_add_(-1, ring.flatten(), values.flatten(-2)) / count


def ring_power(x: Tensor) -> Tensor:
    """Return the mean of |F x|^2 over the modes of each ring: real (..., n, n) -> float64 (..., K)."""
    n = x.shape[-1]
    if x.ndim < 2 or x.shape[-2] != n:
        raise ValueError(f"Rings of frequency need square images, not {tuple(x.shape)}.")
    modes = torch.fft.fft2(x.double(), norm="ortho")  # (..., n, n)
    return ring_means(modes.real.square() + modes.imag.square(), *rings(n, x.device))


def grey_spectrum(images: Tensor) -> Tensor:
    """Return S_k of each image: uint8 (B, 3, n, n) -> float64 (B, K). The spectrum of a set is the mean over it."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"grey_spectrum needs uint8 images (B, 3, n, n), not {images.dtype} {tuple(images.shape)}.")
    weights = torch.tensor(GREY, dtype=torch.float64, device=images.device) / 255
    return ring_power(torch.einsum("bchw,c->bhw", images.double(), weights))


def rapsd(x: Tensor) -> Tensor:
    """Return P_k of each image, radially averaged: (B, C, n, n) -> float64 (B, K)."""
    return ring_power(x).mean(dim=1)


def fit_power_law(power: Tensor) -> Tensor:
    """Return (a, alpha) of ln P_k = a - alpha ln k, by least squares over the rings k >= 1 with weights 1 / k.

    (..., K) with K >= 3 -> float64 (..., 2). A power of 0, which a constant image has, counts as NO_POWER.
    """
    k = torch.arange(1, power.shape[-1], dtype=torch.float64, device=power.device)
    weight = 1 / k / (1 / k).sum()
    x, y = k.log(), power[..., 1:].double().clamp_min(NO_POWER).log()
    x = x - (weight * x).sum()
    mean = (weight * y).sum(-1)  # (...)
    alpha = -(weight * x * y).sum(-1) / (weight * x * x).sum()
    return torch.stack([mean + alpha * (weight * k.log()).sum(), alpha], dim=-1)


def image_fits(power: Tensor, level: Tensor, mean_level: Tensor, img_size: int) -> Tensor:
    """Return FIT = (a, alpha, ln P^c_0, ln P_min) of each image, float64 (B, 4): what its noise schedule depends on.

    P^c_0 and P_min = min_{k >= 1} P_k are measured, not taken from the power law, which is far above the last rings.
    Both are at least QUANTISATION, below which a schedule does not tell them apart. `power` is P_k (B, K), `level` the
    mean pixel of each channel of each image (B, C), in [-1, 1], and `mean_level` that of all images (C,).
    """
    centred_dc = (level - mean_level).double().square().mean(1) * img_size**2
    ends = torch.stack([centred_dc, power[:, 1:].double().amin(1)], dim=1).clamp_min(QUANTISATION).log()
    return torch.cat([fit_power_law(power), ends], dim=1)


def ring_ratio(real: Tensor | Sequence[float], generated: Tensor | Sequence[float]) -> Tensor:
    """Return S_gen / S_real of each ring, float64 (K,): below 1 where generated images have too little power."""
    real, generated = (torch.as_tensor(s, dtype=torch.float64, device="cpu") for s in (real, generated))
    if real.shape != generated.shape or real.ndim != 1:
        raise ValueError(
            f"The spectra {tuple(real.shape)} and {tuple(generated.shape)} must be of the same rings (K,)."
        )
    return generated / real


def spectrum_gap(real: Tensor | Sequence[float], generated: Tensor | Sequence[float]) -> float:
    """Return mean_k |ln S_real,k - ln S_gen,k| over all rings, DC and the corners included.

    It is infinite or NaN if a power is zero or negative. Source: SpectralDiT's radial spectrum gap (arXiv 2606.18765).
    """
    return float(ring_ratio(real, generated).log().abs().mean())


class DCTSums:
    """Sums over images x, batch by batch, for the variance of DCT modes along colour axes.

    Colour axes are the eigenvectors of the covariance of the channels, the largest variance first: along them channels
    are uncorrelated, and an orthonormal change of axes leaves white noise white.
    """

    def __init__(self, n: int, channels: int = 3):
        self.dct, self.rings, self.count = dct_matrix(n), dct_rings(n), 0
        self.products = torch.zeros(channels, channels, n, n, dtype=torch.float64)  # of the modes of two channels
        self.total = torch.zeros(channels, n, n, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add images x (B, C, n, n), on any device."""
        modes = separable_transform(self.dct.to(x.device), x.double())  # (B, C, n, n)
        self.products += torch.einsum("bcuv,bduv->cduv", modes, modes).cpu()
        self.total += modes.sum(0).cpu()
        self.count += len(x)

    def finish(self) -> Tensor:
        """Return the variance of the modes in each ring along each colour axis, float64 (C, K)."""
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, None] * mean[None, :]  # (C, C, n, n)
        axes = torch.linalg.eigh(covariance.sum((2, 3)))[1].flip(1)  # (C, C), in columns
        variance = torch.einsum("ca,cduv,da->auv", axes, covariance, axes)  # (C, n, n)
        return ring_means(variance, *self.rings).clamp_min(0)  # grey images have one axis; the others are nearly 0
