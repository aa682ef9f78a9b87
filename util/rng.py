"""Random numbers that are a function of (seed, step, sample index, stream) alone.

A counter-based generator has no state: it encrypts a counter. So one process and many, an interrupted run and an
uninterrupted one draw the same numbers for the same sample, and a GPU draws the integers that a CPU draws.

Shapes: B samples, n numbers a sample, K = ceil(n / 4) blocks of four numbers a sample.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

#: What the numbers are for -> its part of the counter. No two uses share a stream; a number here never changes.
STREAMS = {"time": 0, "noise": 1, "label_drop": 2, "flip": 3, "start_noise": 4, "validation": 5, "schedule": 6}
PIECE = 2**15  # blocks that a CPU draws at a time, in memory that its cache holds
_MASK = 0xFFFFFFFF
_HALF = np.uint64(32)

Words = tuple[Tensor, Tensor, Tensor, Tensor]  # of 32 bits, in int64


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt a counter by Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    The four counters broadcast; a key has two words of 32 bits. A product of two words wraps around in int64, and its
    low and high halves are still those of the unsigned product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def philox_on_cpu(counter: Words, key: tuple[int, int]) -> Words:
    """Compute `philox` by numpy, several times as fast, in words of uint32 and products of uint64."""
    c0, c1, c2, c3 = (c.astype(np.uint32) for c in np.broadcast_arrays(*(c.numpy() for c in counter)))
    k0, k1 = key
    p0, p1 = np.empty(c0.shape, np.uint64), np.empty(c0.shape, np.uint64)
    for _ in range(10):
        np.multiply(c0, np.uint64(0xD2511F53), out=p0)
        np.multiply(c2, np.uint64(0xCD9E8D57), out=p1)
        c1 ^= np.uint32(k0)
        c3 ^= np.uint32(k1)
        c0, c1 = (p1 >> _HALF).astype(np.uint32) ^ c1, p1.astype(np.uint32)
        c2, c3 = (p0 >> _HALF).astype(np.uint32) ^ c3, p0.astype(np.uint32)
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return tuple(torch.from_numpy(c) for c in (c0, c1, c2, c3))


def to_uniform(words: Words, out: Tensor | None = None) -> Tensor:
    """Map words (B, K) to float32 (B, K, 4), uniform in the open interval (0, 1)."""
    return torch.mul((torch.stack(words, dim=-1).long() >> 9).float() + 0.5, 2.0**-23, out=out)


def to_normal(words: Words, out: Tensor | None = None) -> Tensor:
    """Map words (B, K) to standard normal float32 (B, K, 4), by Box and Muller."""
    radii = [(a.float().add_(0.5).mul_(2.0**-32).log_().mul_(-2)).sqrt_() for a in words[0::2]]
    angles = [b.float().mul_(2 * math.pi * 2.0**-32) for b in words[1::2]]
    numbers = [r * f(angle) for r, angle in zip(radii, angles, strict=True) for f in (torch.cos, torch.sin)]
    return torch.stack(numbers, dim=-1, out=out)


@cache
def _kernel(transform: Callable[[Words], Tensor], compiled: bool) -> Callable[[Words, tuple[int, int]], Tensor]:
    def kernel(counter: Words, key: tuple[int, int]) -> Tensor:
        return transform(philox(counter, key))

    return torch.compile(kernel, dynamic=False) if compiled else kernel


_compiled = False


def use_compiler(on: bool) -> None:
    """Set whether compiled code draws a GPU's numbers: one or two kernels, not a hundred, equal up to rounding."""
    global _compiled
    _compiled = on


class CounterRNG:
    """The random numbers of the samples `index` (B,), int64 in 0 .. 2^56 - 1, in a step; on the device of `index`."""

    def __init__(self, seed: int, step: int, index: Tensor):
        if not 0 <= seed < 2**64:
            raise ValueError(f"The seed is {seed}; it must be in 0 .. 2^64 - 1.")
        if not 0 <= step < 2**32:
            raise ValueError(f"The step is {step}; it must be in 0 .. 2^32 - 1.")
        self.key, self.step, self.index = (seed & _MASK, seed >> 32), step, index

    def uniform(self, stream: str, n: int = 1) -> Tensor:
        """Draw (B, n) float32, uniform in the open interval (0, 1)."""
        return self._draw(to_uniform, STREAMS[stream], n)

    def normal(self, stream: str, n: int = 1) -> Tensor:
        """Draw (B, n) float32, standard normal."""
        return self._draw(to_normal, STREAMS[stream], n)

    def _draw(self, transform: Callable[[Words], Tensor], stream: int, n: int) -> Tensor:
        block = torch.arange(-(-n // 4), device=self.index.device)  # (K,)
        if self.index.device.type != "cpu":
            return _kernel(transform, _compiled)(self._counter(stream, self.index, block), self.key).flatten(1)[:, :n]
        out = torch.empty(len(self.index), len(block), 4)
        tall = max(1, PIECE // max(1, len(block)))  # samples at a time
        for index, rows in zip(self.index.split(tall), out.split(tall), strict=True):
            for columns, piece in zip(block.split(PIECE), rows.split(PIECE, dim=1), strict=True):
                transform(philox_on_cpu(self._counter(stream, index, columns), self.key), piece)
        return out.flatten(1)[:, :n]

    def _counter(self, stream: int, index: Tensor, block: Tensor) -> Words:
        index = index[:, None]
        high = (index >> 32) & 0xFFFFFF | (stream << 24)
        return block[None], index & _MASK, torch.full_like(index, self.step), high
