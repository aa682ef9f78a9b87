"""Random numbers that are a function of (seed, stream, step, index) alone.

A counter-based generator has no state: it encrypts a counter. So one process and many, a run that was interrupted and
one that was not, draw the same numbers for the same sample, and a GPU draws the integers that a CPU draws.

Shapes: B samples, n numbers a sample.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What the numbers are for; no two uses share one."""

    TIME = 0
    NOISE = 1
    LABEL_DROP = 2
    FLIP = 3
    START_NOISE = 4
    VALIDATION = 5
    SCHEDULE = 6


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each holding 32 bits.
        key: two integers of 32 bits.

    Returns:
        Four int64 tensors, each holding 32 random bits. A product of two words wraps around in int64, and its
        low and high halves are still those of the unsigned product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(seed: int, stream: Stream, step: int, index: Tensor, n: int) -> Tensor:
    """(B, 4 * ceil(n / 4)) words of 32 bits for samples `index` (B,), each in 0 .. 2^56 - 1."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed is {seed}: it must be in 0 .. 2^64 - 1")
    if not 0 <= step < 2**32:
        raise ValueError(f"the step is {step}: it must be in 0 .. 2^32 - 1")
    index = index[:, None]
    block = torch.arange(-(-n // 4), device=index.device)[None, :]
    high = (index >> 32) & 0xFFFFFF | (int(stream) << 24)
    counter = (block, index & _MASK, torch.full_like(index, step), high)
    return torch.stack(philox(counter, (seed & _MASK, seed >> 32)), dim=-1).flatten(1)


def uniform(seed: int, stream: Stream, step: int, index: Tensor, n: int = 1) -> Tensor:
    """(B, n) float32, uniform in the open interval (0, 1), for samples `index` (B,) int64, on its device."""
    words = _words(seed, stream, step, index, n)[:, :n]
    return ((words >> 9).float() + 0.5) * 2.0**-23


def normal(seed: int, stream: Stream, step: int, index: Tensor, n: int = 1) -> Tensor:
    """(B, n) float32, standard normal (Box and Muller), for samples `index` (B,) int64, on its device."""
    a, b = _words(seed, stream, step, index, n).unflatten(1, (-1, 2)).unbind(-1)
    radius = (-2 * ((a.float() + 0.5) * 2.0**-32).log()).sqrt()
    angle = b.float() * (2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :n]
