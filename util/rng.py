"""Random numbers that are a function of (seed, stream, step, index) alone.

A counter-based generator has no state: it encrypts a counter. So one process and many, a run that was interrupted and
one that was not, draw the same numbers for the same sample, and a GPU draws the integers that a CPU draws.

Shapes: B samples, n numbers a sample.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from functools import cache

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_HALF = np.uint64(32)
PIECE = 2**15  # blocks of four numbers that a CPU draws at a time, in memory that its cache holds


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
    if all(c.device.type == "cpu" for c in counter):
        return _philox_on_cpu(counter, key)
    return _philox_on_device(counter, key)


def _philox_on_device(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
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


def _philox_on_cpu(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """In words of 32 bits, and of 64 for the products alone: less memory to go through."""
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
    return tuple(torch.from_numpy(c.astype(np.int64)) for c in (c0, c1, c2, c3))


def _counter(stream: Stream, step: int, index: Tensor, block: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 bits, broadcast (B, K), for samples `index` (B,) in 0 .. 2^56 - 1 and blocks `block` (K,)."""
    if not 0 <= step < 2**32:
        raise ValueError(f"the step is {step}: it must be in 0 .. 2^32 - 1")
    index = index[:, None]
    high = (index >> 32) & 0xFFFFFF | (int(stream) << 24)
    return block[None, :], index & _MASK, torch.full_like(index, step), high


def _key(seed: int) -> tuple[int, int]:
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed is {seed}: it must be in 0 .. 2^64 - 1")
    return seed & _MASK, seed >> 32


def uniform(seed: int, stream: Stream, step: int, index: Tensor, n: int = 1) -> Tensor:
    """(B, n) float32, uniform in the open interval (0, 1), for samples `index` (B,) int64, on its device."""
    block, key = torch.arange(-(-n // 4), device=index.device), _key(seed)
    counter = _counter(stream, step, index, block)
    numbers = _uniform(philox(counter, key)) if index.device.type == "cpu" else _drawn(_uniform_on_device)(counter, key)
    return numbers.flatten(1)[:, :n]


def normal(seed: int, stream: Stream, step: int, index: Tensor, n: int = 1) -> Tensor:
    """(B, n) float32, standard normal (Box and Muller), for samples `index` (B,) int64, on its device."""
    block, key = torch.arange(-(-n // 4), device=index.device), _key(seed)
    if index.device.type == "cpu":
        numbers = _normal_on_cpu(stream, step, index, block, key)
    else:
        numbers = _drawn(_normal_on_device)(_counter(stream, step, index, block), key)
    return numbers.flatten(1)[:, :n]


def _uniform(words: tuple[Tensor, ...]) -> Tensor:
    """(B, K, 4) of four words of 32 bits, each (B, K)."""
    return ((torch.stack(words, dim=-1) >> 9).float() + 0.5) * 2.0**-23


def _polar(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of two independent normal numbers, from two words of 32 bits."""
    radius = (-2 * ((a.float() + 0.5) * 2.0**-32).log()).sqrt()
    return radius, b.float() * (2 * math.pi * 2.0**-32)


def _normal_on_cpu(stream: Stream, step: int, index: Tensor, block: Tensor, key: tuple[int, int]) -> Tensor:
    """(B, K, 4) for samples `index` (B,) and blocks `block` (K,), PIECE of them at a time."""
    out = torch.empty(len(index), len(block), 4)
    tall = max(1, PIECE // max(1, len(block)))  # samples at a time
    for part, rows in zip(index.split(tall), out.split(tall), strict=True):
        for columns, numbers in zip(block.split(PIECE), rows.split(PIECE, dim=1), strict=True):
            words = philox(_counter(stream, step, part, columns), key)
            for i in (0, 2):
                radius, angle = _polar(words[i], words[i + 1])
                torch.mul(radius, angle.cos(), out=numbers[..., i])
                torch.mul(radius, angle.sin(), out=numbers[..., i + 1])
    return out


def _uniform_on_device(counter: tuple[Tensor, ...], key: tuple[int, int]) -> Tensor:
    """(B, K, 4)"""
    return _uniform(_philox_on_device(counter, key))


def _normal_on_device(counter: tuple[Tensor, ...], key: tuple[int, int]) -> Tensor:
    """(B, K, 4). Not compiled, each of the ten rounds goes through memory a dozen times."""
    c0, c1, c2, c3 = _philox_on_device(counter, key)
    (r0, a0), (r1, a1) = _polar(c0, c1), _polar(c2, c3)
    return torch.stack([r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()], dim=-1)


@cache
def _compiled(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(draw, dynamic=False)


def _drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return _compiled(draw) if _compiles else draw


_compiles = False


def use_compiler(on: bool) -> None:
    """Whether numbers on a GPU are drawn by compiled code: by a kernel or two instead of a hundred and more.

    The words are the same, and normal numbers are up to rounding.
    """
    global _compiles
    _compiles = on
