"""Peak memory of a call, in bytes: what torch has allocated on a GPU, or what a process has in memory.

A peak counts from what is held at another moment (`held`), so that several things can be measured in one process. Of a
CPU it is the resident set, which is read in pages and contains what libraries keep for themselves: differences of
less than a few megabytes say nothing.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")  # of Linux


def held(device: torch.device) -> int:
    """What is in use now, after what nobody refers to has been given back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # else what is free, and still the process's, would hide what comes next
    return _status("VmRSS")


def peak(call: Callable[[], object], device: torch.device) -> int:
    """The most that is in use during a call, with all that is in use already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    (PROCESS / "clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    call()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024  # kB
