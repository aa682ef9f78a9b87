"""Settings of a device and torch.compile.

Parameters and their names stay as they are. A compiled block has one graph for each shape that it sees: with and
without the in-context tokens, in training and in sampling. All blocks share it, since only their weights differ.
"""

import ctypes
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from denoiser import Denoiser
from util import rng
from util.errors import UserError

MODES = ("auto", "off", "block", "model")
MALLOPT = {-3: 2**25, -1: 2**31 - 1, -2: 2**26}  # M_MMAP_THRESHOLD (its largest), M_TRIM_THRESHOLD, M_TOP_PAD in bytes
GRAPHS = 64  # of one function: two lengths of the sequence, with and without gradients, a few sizes of a batch


def prepare_device(device: torch.device) -> None:
    """Set up the process for its device.

    On a GPU float32 products use TF32, with factors of 10 bits: little is left in float32 beside autocast. On a CPU
    with glibc, freed memory stays with the process; otherwise it returns to the system and is asked for again within
    each step, and every page of 4 kB is then cleared anew. Numbers below 1e-38 count as 0: the first gradients of
    layers that start at zero are full of them, and a processor takes far longer for each.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        return
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in MALLOPT.items() if mallopt else ():
        mallopt(parameter, value)


def missing_tool() -> str | None:
    """Return what Triton, by which torch.compile makes kernels for a GPU, needs and does not find on this machine."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang, or the one that CC names)"
    if not Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h").is_file():
        return "Python.h (package python3-dev on Debian)"
    return None


def resolve_mode(mode: str, device: torch.device) -> str:
    """Return "off", "block" or "model": `auto` compiles on a GPU alone, as a CPU loses more time than it gains."""
    if mode == "auto":
        return "block" if device.type == "cuda" and not missing_tool() else "off"
    return mode


def check_compiler(mode: str, device: torch.device) -> list[str]:
    """Return warnings; raise UserError if --compile was given for a GPU and a tool for it is missing."""
    missing = missing_tool() if device.type == "cuda" and mode != "off" else None
    if missing is None:
        return []
    if mode == "auto":
        return [f"Nothing is compiled, so the GPU is slower: torch.compile needs {missing}."]
    raise UserError(f"--compile {mode} needs {missing}, which is missing. Install it or use --compile off.")


def compile_denoiser(denoiser: Denoiser, mode: str, device: torch.device) -> None:
    """Compile the network's blocks or the whole network (`mode`), the input operator, a GPU's noise and the loss.

    The first calls compile.
    """
    mode = resolve_mode(mode, device)
    rng.use_compiler(mode != "off")
    if mode == "off":
        return
    # Blocks are pieces for DDP's all-reduce already. torch would cut each in two to four, by its width.
    torch._dynamo.config.optimize_ddp = mode != "block"
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    around = [m for m in (denoiser.noisy_images, denoiser.input_operator, denoiser.loss) if m is not None]
    for module in [*(denoiser.net.blocks if mode == "block" else [denoiser.net]), *around]:
        module.compile(dynamic=False)


def no_recompile(on: bool) -> AbstractContextManager:
    """Compute new shapes within the block without compiling them, if `on`: for a batch of its own size."""
    return torch.compiler.set_stance("eager_on_recompile") if on else nullcontext()
