"""The spectral residual of SpectralDiT: a block reweights the low and the high frequencies of its MLP branch.

    low = Blur(r),    high = r - low
    (g_lo, g_hi) = s tanh(W2 SiLU(W1 c))
    x <- x + r + g_lo low + g_hi high                                                       (arXiv 2606.18765)

r is the MLP branch after its gate, on the grid of patch tokens, and c the embedding of time ("time"), of time and
label ("time_label"), or nothing: then the two numbers inside tanh are learned parameters ("static"). W2 starts at
zero, so the block is at first the plain one to the bit. In-context tokens are on no grid and take no correction.

Shapes: B batch, N = side^2 patch tokens in row-major order, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("time", "time_label", "static")
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def blur_matrix(side: int, device: torch.device | None = None) -> Tensor:
    """Return the binomial filter along one axis as a matrix (side, side), with replicate padding at the ends.

    Away from the ends its transfer function is cos^4(pi f), f in cycles per token. All entries are multiples of 1/16,
    which bfloat16 holds exactly, and each row sums to 1.
    """
    offsets, weights = torch.arange(-2, 3, device=device), torch.tensor(BINOMIAL, device=device)
    column = (torch.arange(side, device=device)[:, None] + offsets).clamp(0, side - 1)  # (side, 5)
    return torch.zeros(side, side, device=device).scatter_add_(1, column, weights.expand(side, 5))


def blur(r: Tensor, matrix: Tensor) -> Tensor:
    """Apply the 5x5 filter outer(BINOMIAL, BINOMIAL) to each channel of r (B, N, D), one axis after the other.

    A depthwise convolution takes as long, but needs a padded copy, whose gradient on CUDA is not deterministic.
    """
    b, n, d = r.shape
    side = len(matrix)
    rows = torch.bmm(matrix.expand(b, side, side), r.reshape(b, side, side * d))  # (B, side, side D)
    return torch.bmm(matrix.expand(b * side, side, side), rows.view(b * side, side, d)).view(b, n, d)


class SpectralResidual(nn.Module):
    """The correction g_lo low + g_hi high of one block; zero until its parameters have been trained.

    `side` is that of the grid of patch tokens; side / 2, side / 4, ... are taken as well. `mode`, one of MODES, is
    what the gates depend on, and `scale`, a positive number, is s, their bound. Raises ValueError for other values.
    """

    def __init__(self, dim: int, side: int, mode: str = "time", scale: float = 1.0):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"The spectral residual's mode {mode!r} must be one of {', '.join(MODES)}.")
        if not 0 < scale < math.inf:
            raise ValueError(f"The spectral residual's scale {scale} must be a positive number.")
        self.mode, self.scale = mode, scale
        with torch.random.fork_rng(devices=[]):  # the other parameters of a network are drawn as without this module
            if mode == "static":
                self.raw_gates = nn.Parameter(torch.empty(2))
            else:
                self.fc1 = nn.Linear(dim, dim // 4)
                self.fc2 = nn.Linear(dim // 4, 2)
            self.reset_parameters()
        self.sides = [side]  # and of smaller images, which have half as many tokens along a side
        while self.sides[-1] > 1 and self.sides[-1] % 2 == 0:
            self.sides.append(self.sides[-1] // 2)
        for side in self.sides:
            with torch.inference_mode(False):  # training may use it later
                self.register_buffer(f"matrix{side}", blur_matrix(side), persistent=False)

    def _apply(self, fn, recurse=True):
        """Make the matrices anew: `to_empty` leaves buffers uninitialised."""
        super()._apply(fn, recurse)
        for name, table in list(self._buffers.items()):
            with torch.inference_mode(False):
                self._buffers[name] = blur_matrix(len(table), table.device).to(table.dtype)
        return self

    def reset_parameters(self) -> None:
        """Draw W1 (Xavier) and set all else to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        if self.mode != "static":
            nn.init.xavier_uniform_(self.fc1.weight)

    def gates(self, t_emb: Tensor, y_emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (g_lo, g_hi) for t_emb, y_emb (B, D): (B,) each, or () for "static"; float32, between -s and s."""
        c = t_emb + y_emb if self.mode == "time_label" else t_emb
        raw = self.raw_gates if self.mode == "static" else self.fc2(F.silu(self.fc1(c)))
        g_lo, g_hi = (self.scale * torch.tanh(raw.float())).unbind(-1)
        return g_lo, g_hi

    def forward(self, r: Tensor, t_emb: Tensor, y_emb: Tensor | None = None) -> Tensor:
        """Return the correction of r (B, N, D), float32 and of the same shape; t_emb, y_emb (B, D).

        The blur is in the type of r (bfloat16 under autocast, no coarser than r itself), the rest in float32.
        """
        g_lo, g_hi = (g[..., None, None] for g in self.gates(t_emb, y_emb))  # (B, 1, 1) each
        count = r.shape[1]
        if (side := math.isqrt(count)) not in self.sides or side * side != count:
            raise ValueError(f"{count} patch tokens are no square grid with a side of {self.sides}.")
        return g_hi * r + (g_lo - g_hi) * blur(r, getattr(self, f"matrix{side}"))

    def extra_repr(self) -> str:
        return f"mode={self.mode}, scale={self.scale}"
