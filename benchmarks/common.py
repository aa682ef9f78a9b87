"""Shared by the benchmarks: images in memory, timing in turns, the measured ceiling, one JSON line."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from spectral_forcing import dct_rings
from util.cpu_layers import OneDNNLinear, onednn_pays
from util.data.datasets import DATASETS, DatasetInfo
from util.data.images import Images
from util.io import provenance


class RandomImages(Images):
    """Images of random pixels in memory: the loader costs nothing."""

    def __init__(self, data_path: str | None, img_size: int, split: str, count: int = 4096, classes: int = 1000):
        super().__init__(img_size, [str(i) for i in range(classes)], np.arange(count) % classes)
        self.image = torch.randint(0, 256, (3, img_size, img_size), dtype=torch.uint8)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.image, int(self.labels[i])


DATASETS["random"] = DatasetInfo(RandomImages, 256, 1000, flip=False, in_memory=True)


def with_spectrum(config: Any) -> Any:
    """Return the configuration with what --resolution_schedule needs: about the spectrum of photographs.

    The variance of DCT modes at k cycles per image is 0.08 n^2 k^-2.75, which fits seven photographs of n = 256 and 512
    pixels to within a factor of 1.5 at k = n / 4.
    """
    if not config.levels:
        return config
    k = torch.arange(len(dct_rings(config.img_size)[1])).clamp_min(1).double()
    return replace(config, resolution_power=(0.08 * config.img_size**2 * k**-2.75).tolist())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(variants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time each variant once per turn, after one untimed turn. Return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product."""
    side, calls = (8192, 20) if device.type == "cuda" else (1024, 4)
    kind = OneDNNLinear if onednn_pays() else torch.nn.Linear  # the faster one on a CPU
    layer = kind(side, side, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(side, side, device=device, dtype=dtype)
    seconds = in_turns({"product": lambda: [layer(x) for _ in range(calls)]}, 3, device)["product"]
    return 2 * side**3 * calls / statistics.median(seconds)


def median_and_range(values: Sequence[float], digits: int) -> list[float]:
    """Return the median, the smallest and the largest of the values of all turns, rounded."""
    return [round(x, digits) for x in (statistics.median(values), min(values), max(values))]


def emit(benchmark: str, device: torch.device, content: Mapping[str, Any]) -> None:
    """Print one JSON line with date, command, commit, versions and hardware."""
    load = {"load_average": round(os.getloadavg()[0], 2), "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({"benchmark": benchmark, **content, **load, **provenance(device)}), flush=True)
