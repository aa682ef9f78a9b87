"""What one process asks for and all must do at the same step, decided without waiting for the device.

A signal may reach one process alone, and clocks differ. So at each step every process posts what it asks for, and all
read the sum: of that step on a CPU; on a GPU of LAG steps before, which has been computed by then, while the device is
busy with the steps after it.

Shapes: K questions.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from util.distributed import World

LAG = 2


class Votes:
    """`names` are the K questions."""

    def __init__(self, names: tuple[str, ...], world: World):
        self.names, self.world = names, world
        self.lag = LAG if world.size > 1 and world.device.type == "cuda" else 0  # steps until an answer
        self._under_way: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __call__(self, asked: dict[str, bool]) -> set[str]:
        """Post what this process asks for at this step. Returns what is decided: the same on all processes."""
        if self.world.size == 1:
            return {name for name in self.names if asked[name]}
        ballot = torch.zeros(len(self.names), device=self.world.device)  # (K,)
        for i, name in enumerate(self.names):
            if asked[name]:
                ballot[i].fill_(1)  # a launch with the number in it, where torch.tensor(...) would wait for a copy
        dist.all_reduce(ballot)
        if self.lag == 0:
            return self._decided(ballot)
        host = torch.empty(len(self.names), pin_memory=True).copy_(ballot, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._under_way.append((host, copied))
        if len(self._under_way) <= self.lag:
            return set()
        host, copied = self._under_way.popleft()
        copied.synchronize()
        return self._decided(host)

    def _decided(self, ballot: Tensor) -> set[str]:
        return {name for name, votes in zip(self.names, ballot.tolist(), strict=True) if votes > 0}
