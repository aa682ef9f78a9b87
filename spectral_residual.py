"""The spectral residual correction of SpectralDiT: a block weights the low and the high frequencies of what it adds.

    low = Blur(r),    high = r - low
    (g_lo, g_hi) = s tanh(W2 SiLU(W1 c))
    x <- x + r + g_lo low + g_hi high                                                       (arXiv 2606.18765)

r is the MLP branch after its gate, on the grid of patch tokens, and c the embedding of time ("time"), of time and
label ("time_label"), or nothing: then the two numbers inside tanh are learned themselves ("static"). W2 is zero at
first, and the block is the plain one to the bit. In-context tokens are on no grid: x <- x + r.

Shapes: B batch, N = side^2 patch tokens in row-major order, K in-context tokens in front of them, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("off", "time", "time_label", "static")
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def blur_matrix(side: int) -> Tensor:
    """(side, side): the binomial filter along one axis, with the values at the ends repeated outwards.

    Away from the ends its transfer function is cos^4(pi f), f in cycles per token. All entries are multiples of 1/16,
    which bfloat16 holds exactly, and each row adds up to 1.
    """
    column = (torch.arange(side)[:, None] + torch.arange(-2, 3)).clamp(0, side - 1)  # (side, 5)
    return torch.zeros(side, side).scatter_add_(1, column, torch.tensor(BINOMIAL).expand(side, 5))


def blur(r: Tensor, matrix: Tensor) -> Tensor:
    """The 5x5 filter outer(BINOMIAL, BINOMIAL) on each channel of r (B, N, D), one axis after the other.

    Two products with `blur_matrix`, for which r stays in its layout. A depthwise convolution takes as long, but needs a
    padded copy, which the backward pass keeps and whose gradient on CUDA is not deterministic.
    """
    b, n, d = r.shape
    side = len(matrix)
    rows = torch.bmm(matrix.expand(b, side, side), r.view(b, side, side * d))  # (B, side, side D)
    return torch.bmm(matrix.expand(b * side, side, side), rows.view(b * side, side, d)).view(b, n, d)


class GateLinear(nn.Linear):
    """A linear layer that is made without drawing random numbers: the network that it is part of sets its values."""

    def reset_parameters(self) -> None:
        pass


class SpectralResidual(nn.Module):
    """The correction of one block. Its parameters have no values until `JiT.reset_parameters` sets them.

    Args:
        dim: D.
        side: of the grid of patch tokens.
        mode: what the gates depend on, one of MODES but "off".
        scale: s, which no gate exceeds.

    Raises:
        ValueError: another mode, a scale that is not a positive number.
    """

    def __init__(self, dim: int, side: int, mode: str, scale: float):
        super().__init__()
        if mode not in MODES[1:]:
            raise ValueError(f"the spectral residual is {mode!r}: it must be one of {', '.join(MODES)}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the scale of the spectral residual is {scale}: it must be a positive number")
        self.side, self.mode, self.scale = side, mode, scale
        if mode == "static":
            self.raw_gates = nn.Parameter(torch.empty(2))
        else:
            self.fc1 = GateLinear(dim, dim // 4)
            self.fc2 = GateLinear(dim // 4, 2)
        self.register_buffer("matrix", blur_matrix(side), persistent=False)

    def gates(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """(g_lo, g_hi) for c (B, D): (B,) each, or () for "static"; float32, between -s and s."""
        raw = self.raw_gates if self.mode == "static" else self.fc2(F.silu(self.fc1(c)))
        g_lo, g_hi = (self.scale * torch.tanh(raw.float())).unbind(-1)
        return g_lo, g_hi

    def forward(self, x: Tensor, r: Tensor, c: Tensor) -> Tensor:
        """x + r with the correction on the last N tokens; x, r (B, K + N, D), c (B, D).

        The blur is in the type of r (bfloat16 under autocast, whose rounding is no coarser than that of r itself), the
        gates and what they scale in float32.
        """
        context = r.shape[1] - self.side**2  # K
        g_lo, g_hi = (g[..., None, None] for g in self.gates(c))  # (B, 1, 1) each
        grid = r[:, context:]  # (B, N, D)
        change = g_hi * grid + (g_lo - g_hi) * blur(grid, self.matrix)
        if context:
            change = F.pad(change, (0, 0, context, 0))  # (B, K + N, D)
        # Added to a part of x + r in place, the change would alter the layout of gradients, and so the order of sums.
        return x + r + change.to(x.dtype)

    def extra_repr(self) -> str:
        return f"side={self.side}, mode={self.mode}, scale={self.scale}"
