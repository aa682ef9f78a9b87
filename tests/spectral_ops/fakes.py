"""Random numbers for time samplers, from torch's own generator: what util.rng.CounterRNG offers."""

import torch
from torch import Tensor


class FakeRNG:
    """Numbers of `count` samples; a stream gives the same ones on each call."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.seed = count, seed

    def _generator(self, stream: str) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + sum(stream.encode()))

    def uniform(self, stream: str, n: int = 1) -> Tensor:
        return torch.rand(self.count, n, generator=self._generator(stream)).clamp_min(2.0**-24)

    def normal(self, stream: str, n: int = 1) -> Tensor:
        return torch.randn(self.count, n, generator=self._generator(stream))


class GivenRNG:
    """The given uniform numbers, (B, n), whatever the stream."""

    def __init__(self, *columns: Tensor):
        self.numbers = torch.stack(columns, dim=1)

    def uniform(self, stream: str, n: int = 1) -> Tensor:
        assert n == self.numbers.shape[1]
        return self.numbers
