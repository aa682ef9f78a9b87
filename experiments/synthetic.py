"""Gaussian images whose best possible denoiser is known exactly.

Given its class y an image is Gaussian, x = mean_y + B_y diag(sd_y) n, so the best prediction is linear in z:

    E[x | z, y] = mean_y + B_y diag(t v / (t^2 v + (1 - t)^2)) B_y^T (z - t mean_y),    v = sd_y^2

All data is 32 x 32 and grey, with 4 classes, a variance of 0.25 a pixel around the class mean (floor: 0.26), and power
k^-alpha at k cycles per image, in DCT modes:

    power1, power2, power3   that power alone, alpha = 1, 2, 3
    floor                    alpha = 3 and white noise of standard deviation 0.1, which is part of the data
    essential                alpha = 3 with 70% of the variance; the rest is a copy of the 8 x 8 lowest modes, times a
                             DCT mode that depends on the class: high frequencies that follow from the low ones
    noise                    the same power in each mode as essential, all modes independent

The covariance of `essential` is not diagonal in the DCT. Data that is favours any method that works mode by mode.

Shapes: B images, n = 32 pixels a side, N = n * n modes, Y = 4 classes; images (B, 1, n, n).
"""

from functools import cache

import torch
from torch import Tensor

from spectral_forcing import dct_matrix
from util.rng import CounterRNG

SIZE, CLASSES, VARIANCE, MEAN_VARIANCE = 32, 4, 0.25, 0.1
COPIED = 8  # modes along a side of the copied block
CARRIERS = ((24, 16), (16, 24), (24, 24), (20, 20))  # DCT mode (u, v) that multiplies the copy, for each class
COPY_SHARE = 0.3  # of the variance
KINDS = ("power1", "power2", "power3", "floor", "noise", "essential")


@cache
def dct_basis() -> Tensor:
    """Return the DCT modes as columns, float64 (N, N): row i is pixel i, column u * n + v is mode (u, v)."""
    d = dct_matrix(SIZE)
    return torch.einsum("ui,vj->ijuv", d, d).reshape(SIZE**2, SIZE**2)


def power_law(alpha: float, variance: float) -> Tensor:
    """Return variances (N,) of DCT modes, proportional to k^-alpha, with the mean `variance`; DC counts as k = 1/2."""
    u = torch.arange(SIZE, dtype=torch.float64)
    k = (torch.hypot(u[:, None], u[None, :]) / 2).clamp_min(0.5).flatten()
    power = k**-alpha
    return power * (variance / power.mean())


def class_means() -> Tensor:
    """Return the mean image of each class, float64 (Y, N): random in the 4 x 4 lowest modes, DC aside."""
    coefficients = torch.zeros(CLASSES, SIZE, SIZE, dtype=torch.float64)
    drawn = CounterRNG(0, 0, torch.arange(CLASSES)).normal("start_noise", 16).double().view(CLASSES, 4, 4)
    drawn[:, 0, 0] = 0
    coefficients[:, :4, :4] = drawn
    means = coefficients.flatten(1) @ dct_basis().T
    return means * (MEAN_VARIANCE / means.square().mean(1, keepdim=True)).sqrt()


def copy_operator(carrier: tuple[int, int]) -> Tensor:
    """Return the matrix (N, N) that multiplies the 8 x 8 lowest modes of an image by one DCT mode, pixel by pixel."""
    basis = dct_basis()
    u, v = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    lowest = basis[:, ((u < COPIED) & (v < COPIED)).flatten()]  # (N, 64)
    return basis[:, carrier[0] * SIZE + carrier[1], None] * (lowest @ lowest.T)


class GaussianImages:
    """One of KINDS: images, drawn in float32, with their exact posterior mean, in float64."""

    classes, channels, size = CLASSES, 1, SIZE

    def __init__(self, kind: str):
        if kind not in KINDS:
            raise ValueError(f"The data {kind!r} must be one of {', '.join(KINDS)}.")
        basis, self.mean = dct_basis(), class_means()  # (Y, N)
        if kind.startswith("power"):
            self.basis, self.variance = basis[None], power_law(float(kind.removeprefix("power")), VARIANCE)[None]
        elif kind == "floor":
            self.basis, self.variance = basis[None], power_law(3.0, VARIANCE)[None] + 0.01
        else:
            covariances = torch.stack([self._with_copy(carrier) for carrier in CARRIERS])  # (Y, N, N)
            if kind == "essential":
                self.variance, self.basis = torch.linalg.eigh(covariances)
                self.variance = self.variance.clamp_min(0)
            else:
                self.basis = basis[None]
                self.variance = torch.einsum("pm,ypq,qm->ym", basis, covariances, basis)
        self.basis = self.basis.expand(CLASSES, -1, -1)  # (Y, N, N), in columns
        self.variance = self.variance.expand(CLASSES, -1)  # (Y, N)
        self.root = (self.basis * self.variance.sqrt()[:, None]).float()  # (Y, N, N)

    @staticmethod
    def _with_copy(carrier: tuple[int, int]) -> Tensor:
        """Return the covariance (N, N) of low + a M low, where a gives the copy M low its share of the variance."""
        basis, low = dct_basis(), power_law(3.0, VARIANCE * (1 - COPY_SHARE))
        covariance, copy = (basis * low) @ basis.T, copy_operator(carrier)
        copied = (copy @ covariance @ copy.T).diagonal().mean()
        total = torch.eye(SIZE**2, dtype=torch.float64) + (VARIANCE * COPY_SHARE / copied).sqrt() * copy
        return total @ covariance @ total.T

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Draw images (B, 1, n, n) float32 and classes (B,): a function of (seed, step)."""
        rng = CounterRNG(seed, step, torch.arange(size))
        y = (rng.uniform("flip")[:, 0] * CLASSES).long()
        n = rng.normal("start_noise", SIZE**2)  # (B, N)
        x = torch.empty_like(n)
        for c in range(CLASSES):
            own = y == c
            x[own] = self.mean[c].float() + n[own] @ self.root[c].T
        return x.view(-1, 1, SIZE, SIZE), y

    def posterior_mean(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return E[x | z, y], float64 (B, 1, n, n), for z (B, 1, n, n) at times t (B,)."""
        z, t = z.double().flatten(1), t.double()[:, None]
        out = torch.empty_like(z)
        for c in range(CLASSES):
            own = y == c
            v, time = self.variance[c], t[own]
            gain = time * v / (time**2 * v + (1 - time) ** 2)
            out[own] = self.mean[c] + ((z[own] - time * self.mean[c]) @ self.basis[c] * gain) @ self.basis[c].T
        return out.view(-1, 1, SIZE, SIZE)

    def least_loss(self, t: Tensor) -> Tensor:
        """Return the least possible mean of |x - E[x | z, y]|^2 a pixel, over all classes: t (T,) -> float64 (T,)."""
        t = t.double()[:, None, None]
        return (self.variance * (1 - t) ** 2 / (t**2 * self.variance + (1 - t) ** 2)).mean((1, 2))

    def mode_power(self) -> tuple[Tensor, Tensor]:
        """Return variance and second moment of each DCT mode, (1, n, n) each: those of all classes together."""
        basis = dct_basis()
        modes = torch.stack([((basis.T @ b) ** 2) @ v for b, v in zip(self.basis, self.variance, strict=True)]).mean(0)
        means = self.mean @ basis  # (Y, N)
        variance = modes + means.var(0, correction=0)
        return variance.view(1, SIZE, SIZE), (modes + means.square().mean(0)).view(1, SIZE, SIZE)
