"""What training accumulates on the device between two log lines; reading it is the only wait for the device."""

import math
import time
from typing import Any

import torch
from torch import Tensor

SAVED = ("loss", "finite", "skipped", "consecutive", "row_start")


class TrainMetrics:
    """Mean loss since the last log line, and the steps whose loss or gradient was not finite.

    Args:
        tolerated: how many consecutive steps may be non-finite.
    """

    def __init__(self, device: torch.device, tolerated: int = 0):
        self.device, self.tolerated = device, tolerated
        self.consecutive, self.row_start = self._integer(0), self._integer(-1)
        self.fatal = self._integer(-1)  # first step of the first row of non-finite steps that was too long
        self.reset()

    def _integer(self, value: int) -> Tensor:
        return torch.full((), value, dtype=torch.int64, device=self.device)

    def reset(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.finite, self.skipped = self._integer(0), self._integer(0)
        self.images, self.start = 0, time.perf_counter()

    def add(self, step: int, loss: Tensor, found_inf: Tensor, images: int) -> None:
        """Add a step: its mean loss, whether (0. or 1.) its update was skipped, and the number of its images."""
        bad = found_inf > 0
        self.loss += torch.where(bad, 0.0, loss)
        self.finite += ~bad
        self.skipped += bad
        self.row_start = torch.where(bad & (self.consecutive == 0), step, self.row_start)
        self.consecutive = torch.where(bad, self.consecutive + 1, 0)
        too_many = (self.consecutive > self.tolerated) & (self.fatal < 0)
        self.fatal = torch.where(too_many, self.row_start, self.fatal)
        self.images += images

    def read(self) -> dict[str, Any]:
        """Return the mean loss of the finite steps (None without any), images per second and, if any, steps skipped."""
        finite, skipped = int(self.finite), int(self.skipped)
        values: dict[str, Any] = {"loss": float(self.loss) / finite if finite else None}
        if skipped:
            values["skipped"] = skipped
        return {**values, "images_per_s": self.images / (time.perf_counter() - self.start)}

    def non_finite_steps(self) -> range | None:
        """Return the steps of a row of more than `tolerated` that were non-finite; None while there is none."""
        first = int(self.fatal)
        return None if first < 0 else range(first, first + self.tolerated + 1)

    def state_dict(self) -> dict[str, float]:
        """Return exact plain numbers, so that a run resumed between two log lines logs what it would have logged."""
        return {name: getattr(self, name).item() for name in SAVED}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in SAVED:
            if name in state:  # a published checkpoint has none
                getattr(self, name).fill_(state[name])


def finite_or_none(value: float) -> float | None:
    """Return what JSON can hold."""
    return value if math.isfinite(value) else None
