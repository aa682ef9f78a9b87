"""Linear layers in float32 on a CPU: from oneDNN instead of MKL where MKL is slow.

torch computes float32 products with MKL, which takes its path for AVX2 on processors that are not Intel's. oneDNN, in the
same torch, takes AVX-512 where it is there: twice as fast (docs/performance.md). Which of the two is used depends on the
processor and on the shape of the weights, never on the batch, so that an image does not depend on what is computed with it.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**14  # elements of a weight: below, what a call costs is more than is saved


@cache
def pays() -> bool:
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
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = g.flatten(0, -2)  # (R, N)
        return (
            product(g, weight.t()) if of_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """nn.Linear, with the products of oneDNN where they are faster."""

    def forward(self, x: Tensor) -> Tensor:
        if self._from_onednn(x):
            return _Linear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def _from_onednn(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and self.weight.numel() >= SMALLEST
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and pays()
        )
