"""Spectral Forcing: what the network sees, z -> low-passed z.

    SF_t(z) = IDCT( DCT(z) * M(t) ),   M(t)[u,v] = sigmoid(kappa * (c(t) - r[u,v]))        (arXiv 2606.15236)

At time t the data shows above the noise only up to some spatial frequency. The operator removes what lies above
a cutoff c(t) that opens as t goes from noise (0) to data (1). It acts on the input of the network alone, never
on the z of the loss, of the velocity, or of the sampler's state.

Shapes: B batch, C channels, H = W image size, n window size, G = H / n windows along a side.
"""

import math

import torch
from torch import Tensor, nn

from util.cpu_layers import sandwich


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
        fixed_scale: a constant f in place of f(t) = t, which makes the mask independent of time.

    Raises:
        ValueError: a window that does not divide the image or is smaller than 2, a `kappa` that is not positive, a
            cutoff or scale that is not finite.
    """

    def __init__(
        self,
        img_size: int,
        window_size: int | None = None,
        c_min: float = 0.05,
        c_max: float = 1.0,
        kappa: float = 30.0,
        fixed_scale: float | None = None,
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
        self.register_buffer("dct", dct_matrix(n, torch.float32), persistent=False)
        self.register_buffer("radius", radius_grid(n, torch.float32), persistent=False)

    def _apply(self, fn, recurse=True):
        """Move with the module, but stay in float32 where it is cast: bfloat16 tables would cost 5e-3 of accuracy."""
        super()._apply(fn, recurse)
        if self.dct.dtype != torch.float32:
            n, device = self.window_size, self.dct.device
            self.dct = dct_matrix(n, torch.float32).to(device)
            self.radius = radius_grid(n, torch.float32).to(device)
        return self

    def cutoff(self, t: Tensor) -> Tensor:
        """c(t) = c_min + (c_max - c_min) * f(t), in units of r; same shape as `t`."""
        f = t if self.fixed_scale is None else torch.full_like(t, self.fixed_scale)
        return self.c_min + (self.c_max - self.c_min) * f

    def mask(self, t: Tensor) -> Tensor:
        """M(t): gains in (0, 1) for t (B,), shape (B, n, n)."""
        return torch.sigmoid(self.kappa * (self.cutoff(t.float())[:, None, None] - self.radius))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """z (B, C, H, W) and t (B,) in [0, 1] -> (B, C, H, W) in float32, whatever autocast says.

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
            f"kappa={self.kappa}, fixed_scale={self.fixed_scale}"
        )
