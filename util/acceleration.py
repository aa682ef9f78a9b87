"""What makes a device fast: torch.compile, TF32 and padded widths on a GPU, memory that is kept on a CPU.

Whatever is on, parameters and their names stay as they are. A compiled block has one graph for each shape that it sees:
with and without the in-context tokens, in training and in sampling; all blocks share it, since they differ in their
weights alone.
"""

import ctypes
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from denoiser import Denoiser
from model_jit import SwiGLU
from util import rng
from util.errors import UserError

MODES = ("auto", "off", "block", "model")
MULTIPLE = 8  # bf16 rows of whole 16 bytes, which tensor cores and copies of a GPU are made for
MALLOPT = {-3: 2**25, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD (its largest), M_TRIM_THRESHOLD, M_TOP_PAD in bytes
GRAPHS = 64  # of one function: two lengths of the sequence, with and without gradients, a few sizes of a batch


def prepare_device(device: torch.device) -> None:
    """Settings of the process.

    On a GPU float32 products round their factors to 10 bits: what is left in float32 beside autocast is small.

    On a CPU what tensors free stays with the process, where the C library is glibc. It gives memory back to the system
    and asks for it again within each step otherwise, and every page of 4 kB is then cleared anew.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in MALLOPT.items() if mallopt else ():
        mallopt(parameter, value)


def resolve(mode: str, device: torch.device) -> str:
    """What `auto` means. Compiling costs minutes: on a CPU more than it saves (docs/performance.md)."""
    if mode == "auto":
        return "block" if device.type == "cuda" and not lacking() else "off"
    return mode


def lacking() -> str | None:
    """What Triton, by which torch.compile makes kernels for a GPU, needs on this machine and does not find."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang, or what CC names)"
    if not Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h").is_file():
        return "Python.h (package python3-dev on Debian)"
    return None


def check_compiler(mode: str, device: torch.device) -> list[str]:
    """Warnings. Raises UserError where compiling for a GPU was asked for and cannot be done."""
    missing = lacking() if device.type == "cuda" and mode != "off" else None
    if missing is None:
        return []
    if mode == "auto":
        return [f"nothing is compiled, and the GPU is slower for it: torch.compile needs {missing}"]
    raise UserError(f"--compile {mode} needs {missing}, which is not there; --compile off works without")


def compile_network(denoiser: Denoiser, mode: str) -> None:
    """`mode` is "off", "block" or "model": of the network. Besides, what lies around it: Spectral Forcing, a GPU's
    noise, and in training z, v and the loss. First calls compile."""
    rng.use_compiler(mode != "off")
    if mode == "off":
        return
    # Blocks are pieces for DDP's all-reduce already. torch would cut each in two to four, by its width.
    torch._dynamo.config.optimize_ddp = mode != "block"
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    around = [m for m in (denoiser.noisy_images, denoiser.spectral_forcing, denoiser.loss) if m is not None]
    for module in [*(denoiser.net.blocks if mode == "block" else [denoiser.net]), *around]:
        module.compile(dynamic=False)


def no_more_graphs(on: bool) -> AbstractContextManager:
    """Within the block nothing is compiled for a new shape, which is computed without: for a batch of its own size."""
    return torch.compiler.set_stance("eager_on_recompile") if on else nullcontext()


def pad_swiglu(denoiser: Denoiser, on: bool = True) -> None:
    """Compute the feed-forward products of widths such as 2730, 3413, 5461 or 10922 at the next multiple of 8."""
    for module in denoiser.modules():
        if isinstance(module, SwiGLU):
            module.multiple = MULTIPLE if on else 1
