"""What training measures between two log lines. The device keeps it; reading it is the only wait for the device."""

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

    def __init__(self, tolerated: int = 0):
        self.tolerated = tolerated
        self.unread: list[tuple[int, Tensor]] = []  # step; loss and found_inf, on the device (2,)
        self.consecutive, self.row_start = 0, -1  # length and first step of the present row of non-finite steps
        self.fatal: int | None = None  # first step of the first row that was too long
        self.reset()

    def reset(self) -> None:
        self.loss, self.finite, self.skipped = 0.0, 0, 0
        self.images, self.start = 0, time.perf_counter()

    def add(self, step: int, loss: Tensor, found_inf: Tensor, images: int) -> None:
        """Add a step: its mean loss, whether (0. or 1.) its update was skipped, and the number of its images."""
        self.unread.append((step, torch.stack([loss, found_inf])))
        self.images += images

    def _read(self) -> None:
        values = torch.stack([value for _, value in self.unread]).tolist() if self.unread else []
        for (step, _), (loss, found_inf) in zip(self.unread, values, strict=True):
            if not found_inf:
                self.loss += loss
                self.finite += 1
                self.consecutive = 0
                continue
            self.skipped += 1
            self.row_start = self.row_start if self.consecutive else step
            self.consecutive += 1
            if self.consecutive > self.tolerated and self.fatal is None:
                self.fatal = self.row_start
        self.unread = []

    def read(self) -> dict[str, Any]:
        """Return the mean loss of the finite steps (None without any), images per second and, if any, steps skipped."""
        self._read()
        values: dict[str, Any] = {"loss": self.loss / self.finite if self.finite else None}
        if self.skipped:
            values["skipped"] = self.skipped
        return {**values, "images_per_s": self.images / (time.perf_counter() - self.start)}

    def non_finite_steps(self) -> range | None:
        """Return the steps of a row of more than `tolerated` that were non-finite; None while there is none."""
        self._read()
        return None if self.fatal is None else range(self.fatal, self.fatal + self.tolerated + 1)

    def state_dict(self) -> dict[str, float]:
        """Return exact plain numbers, so that a run resumed between two log lines logs what it would have logged."""
        self._read()
        return {name: getattr(self, name) for name in SAVED}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))  # a published checkpoint has none


def finite_or_none(value: float) -> float | None:
    """Return what JSON can hold."""
    return value if math.isfinite(value) else None
