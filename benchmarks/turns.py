"""Variants that take turns: seconds and peak memory of each.

A machine that others use is slow for one variant and fast for the next. So the variants take turns (A B C, A B C, ...),
a ratio is that of two neighbours, and what is reported is the median with the range. A variant that a GPU has too
little memory for drops out, and the others go on.

Nothing but torch is imported: reference_process.py needs this file where other modules have the names of ours.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import memory

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
Shared = TypeVar("Shared")


def short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> list[float]:
    return [short(min(values)), short(max(values))]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch(size: int, img_size: int, class_num: int, pinned: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 (B, 3, H, W) and labels (B,) on the host."""
    images = torch.randint(256, (size, 3, img_size, img_size), dtype=torch.uint8)
    labels = torch.randint(class_num, (size,))
    return (images.pin_memory(), labels.pin_memory()) if pinned else (images, labels)


@dataclass(frozen=True)
class Turns:
    """Seconds of each turn of each variant, and its peak memory in bytes; or why it has none."""

    seconds: Mapping[str, Sequence[float]]
    peaks: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def of(self, name: str) -> dict[str, Any]:
        if name in self.failed:
            return {"failed": self.failed[name]}
        peak = {"peak_gb": short(self.peaks[name] / 1e9)} if name in self.peaks else {}
        return {"seconds": short(self.median(name)), "seconds_range": spread(self.seconds[name]), **peak}

    def ratio(self, over: str, under: str) -> dict[str, Any]:
        """Time of one variant in units of another's, turn by turn."""
        each = [a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)]
        return {"median": short(statistics.median(each)), "range": spread(each)}

    def share(self, name: str, flop: float, ceiling: str, ceiling_flop: float) -> dict[str, Any]:
        """Arithmetic per second of a variant in units of the ceiling's, turn by turn."""
        pairs = zip(self.seconds[name], self.seconds[ceiling], strict=True)
        each = [flop / a * b / ceiling_flop for a, b in pairs]
        return {"median": short(statistics.median(each)), "range": spread(each)}


def clock_of(name: str, device: torch.device) -> Callable[[], float]:
    if name != "wall" and device.type != "cpu":
        raise SystemExit("--clock process says nothing about a GPU")
    return CLOCKS[name]


class Variants:
    """What takes turns: each has been called twice before the first of them."""

    def __init__(self, device: torch.device, clock: str = "wall"):
        self.device, self.now = device, clock_of(clock, device)
        self.turns: dict[str, Callable[[], float]] = {}  # each returns its seconds
        self.peaks: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def add(self, build: Callable[[], Shared], uses: Mapping[str, Callable[[Shared], object]]) -> Shared | None:
        """Add the variants `uses`, name -> function of what `build` makes for all of them.

        The first call of each compiles and allocates, the second one shows its peak: above what was held before
        `build`, hence with weights, optimizer and averages, and without what other variants hold.

        Returns:
            What `build` has made; None where memory did not suffice for it.
        """
        before = memory.held(self.device)
        try:
            shared = build()
        except torch.OutOfMemoryError as error:
            self.failed |= dict.fromkeys(uses, reason(error))
            return None
        for name, use in uses.items():
            call = partial(use, shared)
            try:
                call()
                memory.held(self.device)
                self.peaks[name] = memory.peak(call, self.device) - before
                self.turns[name] = partial(self._timed, call)
            except torch.OutOfMemoryError as error:
                self.failed[name] = reason(error)
        return shared

    def _timed(self, call: Callable[[], object]) -> float:
        wait(self.device)
        start = self.now()
        call()
        wait(self.device)
        return self.now() - start

    def take_turns(self, repeats: int) -> Turns:
        seconds = {name: [] for name in self.turns}
        gc.collect()
        for _ in range(repeats):
            for name in list(seconds):
                try:
                    seconds[name].append(self.turns[name]())
                except torch.OutOfMemoryError as error:
                    self.failed[name] = reason(error)
                    del seconds[name]
        return Turns(seconds, self.peaks, self.failed)


def reason(error: torch.OutOfMemoryError) -> str:
    """The first sentences, without the advice that follows them."""
    return str(error).partition(" Including non-PyTorch memory")[0].splitlines()[0]
