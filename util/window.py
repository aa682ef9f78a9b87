"""What training adds up between two log lines, on the device: reading it is the only wait for the device."""

import math
import time

import torch
from torch import Tensor

_STATE = ("loss", "finite", "skipped", "in_a_row", "row_start")


class Window:
    """Mean loss since the last log line, and the steps that were not finite.

    Args:
        tolerated: how many steps in a row may be not finite.
    """

    def __init__(self, device: torch.device, tolerated: int = 0):
        self.device, self.tolerated = device, tolerated
        self.in_a_row, self.row_start = self._integer(0), self._integer(-1)
        self.fatal = self._integer(-1)  # first step of the first row of them that was too long
        self.reset()

    def _integer(self, value: int) -> Tensor:
        return torch.full((), value, dtype=torch.int64, device=self.device)

    def reset(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.finite, self.skipped = self._integer(0), self._integer(0)
        self.images, self.start = 0, time.perf_counter()

    def add(self, step: int, loss: Tensor, suppress: Tensor, images: int) -> None:
        """A step's mean loss, whether (0. or 1.) its update was suppressed, and the number of its images."""
        bad = suppress > 0
        self.loss += torch.where(bad, 0.0, loss)
        self.finite += ~bad
        self.skipped += bad
        self.row_start = torch.where(bad & (self.in_a_row == 0), step, self.row_start)
        self.in_a_row = torch.where(bad, self.in_a_row + 1, 0)
        too_many = (self.in_a_row > self.tolerated) & (self.fatal < 0)
        self.fatal = torch.where(too_many, self.row_start, self.fatal)
        self.images += images

    def read(self) -> dict[str, float | None]:
        """Mean loss of the finite steps (None without any), images per second and, if there are any, steps skipped."""
        finite, skipped = int(self.finite), int(self.skipped)
        values: dict[str, float | None] = {"loss": float(self.loss) / finite if finite else None}
        if skipped:
            values["skipped"] = skipped
        return {**values, "images_per_s": self.images / (time.perf_counter() - self.start)}

    def too_many(self) -> range | None:
        """The steps of a row of more than `tolerated` that were not finite, None while there is no such row."""
        first = int(self.fatal)
        return None if first < 0 else range(first, first + self.tolerated + 1)

    def state_dict(self) -> dict[str, float]:
        """As plain numbers, exact: a run that goes on in the middle of a window logs what it would have logged."""
        return {name: getattr(self, name).item() for name in _STATE}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Empty for a checkpoint that has none: then the next log line is about fewer steps."""
        for name in _STATE:
            if name in state:
                getattr(self, name).fill_(state[name])


def finite_or_none(value: float) -> float | None:
    """What JSON can hold."""
    return value if math.isfinite(value) else None
