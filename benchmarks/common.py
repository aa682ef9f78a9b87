"""What the benchmarks share: variants that take turns, the ceiling of the same run, one JSON line.

A machine that others use is slow for one variant and fast for the next. So the variants take turns (A B C, A B C, ...),
a ratio is that of two neighbours, and what is reported is the median with the range. The ceiling is a product of two
large matrices, which takes its turn as well: "of_ceiling" is the share of it that useful arithmetic reaches
(util/flops.py).
"""

import argparse
import gc
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from util import provenance
from util.acceleration import use_tf32
from util.cpu_layers import from_onednn, product

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # name of a precision -> type of the autocast
Call = Callable[[], object]


def parser(doc: str, repeats: int, device: bool = True, clock: bool = True) -> argparse.ArgumentParser:
    """The flags that benchmarks share; without `device` it is the CPU, without `clock` the wall's."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--repeats", type=int, default=repeats, help="turns of each variant")
    found.set_defaults(device="cpu", clock="wall")
    if device:
        there = "cuda" if torch.cuda.is_available() else "cpu"
        found.add_argument("--device", default=there, choices=("cpu", "cuda"))
    if clock:
        found.add_argument(
            "--clock",
            default="wall",
            choices=CLOCKS,
            help="process: the processor time of this process, with one thread what an idle machine would take",
        )
    return found


def add_model(found: argparse.ArgumentParser, model: str = "JiT-Ti/4", img_size: int = 32, batch: int = 8) -> None:
    """Flags of the network; the defaults are for a CPU."""
    found.add_argument("--model", default=model)
    found.add_argument("--img_size", type=int, default=img_size)
    found.add_argument("--class_num", type=int, default=1000)
    found.add_argument("--batch_size", type=int, default=batch)
    found.add_argument("--precision", nargs="+", default=["fp32"], choices=DTYPES)


@dataclass(frozen=True)
class Turns:
    """Seconds of each turn of each variant, after a warm-up."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def of(self, name: str) -> dict[str, Any]:
        return {"seconds": short(self.median(name)), "seconds_range": spread(self.seconds[name])}

    def ratio(self, over: str, under: str) -> dict[str, Any]:
        """Time of one variant in units of another's, turn by turn."""
        each = [a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)]
        return {"median": short(statistics.median(each)), "range": spread(each)}

    def share(self, name: str, flop: float, ceiling: str, ceiling_flop: float) -> dict[str, Any]:
        """Arithmetic per second of a variant in units of the ceiling's, turn by turn."""
        pairs = zip(self.seconds[name], self.seconds[ceiling], strict=True)
        each = [flop / a * b / ceiling_flop for a, b in pairs]
        return {"median": short(statistics.median(each)), "range": spread(each)}


def take_turns(variants: Mapping[str, Call], repeats: int, device: torch.device, clock: str = "wall") -> Turns:
    """Call the variants in turns, `repeats` times each, after one call each that does not count."""
    use_tf32(device)
    if clock != "wall" and device.type != "cpu":
        raise SystemExit("--clock process says nothing about a GPU")
    now, seconds = CLOCKS[clock], {name: [] for name in variants}
    for call in variants.values():
        call()
    gc.collect()
    for _ in range(repeats):
        for name, call in variants.items():
            wait(device)
            start = now()
            call()
            wait(device)
            seconds[name].append(now() - start)
    return Turns(seconds)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ceiling:
    """Products of two square matrices: `calls` of them a turn, `flop` operations in all."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None):
        side, self.calls = (8192, 20) if device.type == "cuda" else (1024, 10)
        self.a, self.b = torch.randn(2, side, side, device=device, dtype=dtype or torch.float32)
        self.product = product if from_onednn(self.a, self.b) else torch.mm  # the faster one
        self.flop = 2 * side**3 * self.calls
        self.about = {"matrices": side, "dtype": str(self.a.dtype).removeprefix("torch.")}
        self.about["library"] = "oneDNN" if self.product is product else "torch.mm"

    def __call__(self) -> None:
        for _ in range(self.calls):
            self.product(self.a, self.b)

    def report(self, seconds: float) -> dict[str, Any]:
        return {**self.about, "gflop_per_s": short(self.flop / seconds / 1e9)}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Largest use so far, in GB: of the GPU's memory, or of the process as a whole."""
    if device.type == "cuda":
        return {"peak_gb_gpu": short(torch.cuda.max_memory_allocated(device) / 1e9)}
    return {"peak_gb_process": short(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)}


def short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> list[float]:
    return [short(min(values)), short(max(values))]


def emit(benchmark: str, args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """The JSON line."""
    device = torch.device(args.device)
    tf32 = {"tf32": torch.backends.cuda.matmul.allow_tf32} if device.type == "cuda" else {}
    load = {"load_average": short(os.getloadavg()[0]), "cores": len(os.sched_getaffinity(0))}
    about = {"benchmark": benchmark, "settings": vars(args), **content, **tf32, **load}
    print(json.dumps({**about, **provenance.provenance(device)}, default=str), flush=True)
