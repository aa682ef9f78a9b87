"""Faster layers for a network on a CPU, equal to torch's own up to rounding (docs/performance.md).

- Linear layers in float32: torch calls MKL, which takes its path for AVX2 on processors that are not Intel's. oneDNN,
  a part of the same torch, uses AVX-512 if it is there: about twice as fast.
- The rotary embedding as a product of complex numbers: one operation instead of seven.
- Attention in float32 under bf16 autocast: torch's bf16 attention is slow on a CPU.

Shapes: R rows, K and N widths of a linear layer, d width of a head.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from denoiser import Denoiser
from model_jit import Attention, rotate

SMALLEST = 2**14  # elements of a weight; for a smaller one the overhead of a call exceeds the gain


@cache
def onednn_pays() -> bool:
    """Return whether this is an AMD processor with AVX-512, and a torch with oneDNN."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _Product(torch.autograd.Function):
    """x (..., K), weight (N, K) in any layout, bias (N,) or None -> x weight^T + bias (..., N), all float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # as torch.compile emits on a CPU

    @staticmethod  # of differentiable products: second derivatives are right
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = g.flatten(0, -2)  # (R, N)
        return (
            _Product.apply(g, weight.t(), None) if for_x else None,
            _Product.apply(rows.t(), x.flatten(0, -2).t(), None) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


class OneDNNLinear(nn.Linear):
    """nn.Linear by oneDNN. In other types than float32 and within torch.compile it is the plain layer."""

    def forward(self, x: Tensor) -> Tensor:
        float32 = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if float32 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Product.apply(x, self.weight, self.bias)
        return super().forward(x)


def rotate_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `model_jit.rotate` by complex numbers."""
    if torch.compiler.is_compiling():
        return rotate(x, cos, sin)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (..., d/2)
    return torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(-2).to(x.dtype)


def speed_up_on_cpu(denoiser: Denoiser) -> None:
    """Replace the layers of a denoiser on a CPU in place; parameters, their names and results are as before.

    torch raises an error for forward-mode derivatives and vmap of these layers: use a denoiser as built for those.
    """
    for module in denoiser.modules():
        if isinstance(module, Attention):
            module.rotate, module.attn_fp32 = rotate_complex, True
        elif type(module) is nn.Linear and onednn_pays() and module.weight.numel() >= SMALLEST:
            module.__class__ = OneDNNLinear
