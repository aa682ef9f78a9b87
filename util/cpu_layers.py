"""What a CPU computes faster than torch does by itself, and the same up to rounding (docs/performance.md).

torch computes float32 products with MKL, which takes its path for AVX2 on processors that are not Intel's. oneDNN, in
the same torch, takes AVX-512 where it is there: twice as fast. Which of the two is used depends on the processor and on
the shape of the weights, never on the batch, so that an image does not depend on what is computed with it.

torch derives the backward pass of its RMS norm from a dozen operations; written by hand it takes a third of the time.
Rotations of pairs are products of complex numbers: one operation instead of seven.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_on = True
SMALLEST = 2**14  # elements of a weight: below, what a call costs is more than is saved


@contextmanager
def switched_off() -> Iterator[None]:
    """Within the block a CPU computes as other devices do."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def applies(x: Tensor) -> bool:
    """Whether x is computed with in the way of this file: it is on a CPU, and no compiler is at work."""
    return _on and x.device.type == "cpu" and not torch.compiler.is_compiling()


@cache
def onednn_pays() -> bool:
    """An AMD processor with AVX-512, and a torch with oneDNN."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias from oneDNN, for float32 x (..., K) and weight (N, K) in any layout."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # what torch.compile emits on a CPU


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = g.flatten(0, -2)  # (R, N)
        return (
            product(g, weight.t()) if of_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def from_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether x @ weight.T is to be a `product`."""
    return (
        applies(x)
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= SMALLEST
        and not torch.is_autocast_enabled("cpu")
        and onednn_pays()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, with the products of oneDNN where they are faster."""
    return _Linear.apply(x, weight, bias) if from_onednn(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def sandwich(matrix: Tensor, z: Tensor) -> Tensor:
    """matrix @ z @ matrix.T for matrix (n, n) and z (..., n, n)."""
    if from_onednn(z, matrix) and not (z.requires_grad and torch.is_grad_enabled()):
        right = product(z, matrix)
        return product(right.transpose(-2, -1), matrix).transpose(-2, -1)
    return matrix @ z @ matrix.T


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps), for float32 x (..., D) and w (D,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
        r = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = r (g w - x r mean(g w x r)),  dw = sum(g x r)."""
        x, weight, r = ctx.saved_tensors
        unit = x * r
        of_weight = (g * unit).flatten(0, -2)  # (R, D), summed over R below
        mean = torch.mv(of_weight, weight).view(r.shape).mul_(1 / x.shape[-1])
        return (g * weight).addcmul_(unit, mean, value=-1).mul_(r), of_weight.sum(0), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of float32 x over its last dimension."""
    if applies(x) and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate_pairs(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for float32 pairs (..., d/2, 2) and cos, sin (..., d/2).

    Elsewhere than on a CPU as a sum over whole pairs, which a compiler fuses with what comes before and after.
    """
    if applies(pairs):
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos.float(), sin.float()))
    return pairs * cos[..., None] + pairs.flip(-1) * torch.stack([-sin, sin], dim=-1)
