"""Random numbers that are a function of (seed, step, sample index, stream) alone.

A counter-based generator has no state: it encrypts a counter. So one process and many, an interrupted run and an
uninterrupted one draw the same numbers for the same sample, and a GPU draws the integers that a CPU draws.

Shapes: B samples, n numbers a sample, K = ceil(n / 4) blocks of four numbers a sample.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

#: What the numbers are for -> its part of the counter. No two uses share a stream; a number here never changes.
STREAMS = {
    "time": 0,
    "noise": 1,
    "label_drop": 2,
    "flip": 3,
    "start_noise": 4,
    "validation": 5,
    "schedule": 6,
    "solver": 7,
    "latent": 8,
}
CPU_BLOCKS = 2**15  # that a CPU draws at a time: its cache holds them
_MASK = 0xFFFFFFFF

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


def to_uniform(words: Words) -> Tensor:
    """Map words (B, K) to float32 (B, K, 4), uniform in the open interval (0, 1)."""
    return ((torch.stack(words, dim=-1) >> 9).float() + 0.5) * 2.0**-23


def to_normal(words: Words) -> Tensor:
    """Map words (B, K) to standard normal float32 (B, K, 4), by Box and Muller: sqrt(-2 ln u) (cos, sin)(2 pi v)."""
    numbers = []
    for a, b in (words[:2], words[2:]):
        radius = (-2 * ((a.float() + 0.5) * 2.0**-32).log()).sqrt()
        angle = b.float() * (2 * math.pi * 2.0**-32)
        numbers += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(numbers, dim=-1)


@cache
def _kernel(transform: Callable[[Words], Tensor], compiled: bool) -> Callable[..., Tensor]:
    """Return the function of one draw, from addresses to numbers, so that a compiler makes one kernel of it."""

    def kernel(index: Tensor, step: Tensor, key: tuple[int, int], stream: int, n: int) -> Tensor:
        block = torch.arange(-(-n // 4), device=index.device)[None]  # (1, K)
        index = index[:, None]
        counter = (block, index & _MASK, step, (index >> 32) & 0xFFFFFF | (stream << 24))
        return transform(philox(counter, key)).flatten(1)[:, :n]

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
        self.counted = torch.full((), step, device=index.device)  # a tensor: a compiler takes a number for a constant

    def uniform(self, stream: str, n: int = 1) -> Tensor:
        """Draw (B, n) float32, uniform in the open interval (0, 1)."""
        return self._draw(to_uniform, STREAMS[stream], n)

    def normal(self, stream: str, n: int = 1) -> Tensor:
        """Draw (B, n) float32, standard normal."""
        return self._draw(to_normal, STREAMS[stream], n)

    def _draw(self, transform: Callable[[Words], Tensor], stream: int, n: int) -> Tensor:
        on_cpu = self.index.device.type == "cpu"
        kernel = _kernel(transform, _compiled and not on_cpu)
        samples = max(1, CPU_BLOCKS // max(1, -(-n // 4)) if on_cpu else len(self.index))
        parts = [kernel(index, self.counted, self.key, stream, n) for index in self.index.split(samples)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
