"""What the benchmarks share: flags, the ceiling of the same run, one JSON line.

The ceiling is a product of two large matrices, which takes its turn as other variants do (turns.py): "of_ceiling" is
the share of it that useful arithmetic reaches (util/flops.py).
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.turns import CLOCKS, Turns, Variants, short
from denoiser import Denoiser
from util import provenance, rng
from util.acceleration import compile_network, pad_swiglu, prepare_device
from util.cpu_layers import from_onednn, product

DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # name of a precision -> type of the autocast
COMPILE = ("off", "block", "model")
ON = {"off": False, "on": True}


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


def add_ways(found: argparse.ArgumentParser) -> None:
    """Flags of `Ways`."""
    found.add_argument("--compile", nargs="+", default=["off"], choices=COMPILE)
    found.add_argument("--pad_swiglu", nargs="+", default=["off"], choices=ON)


def ways(options: argparse.Namespace) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Name of each, and what `Ways.use` takes."""
    for mode in options.compile:
        for padded in options.pad_swiglu:
            yield f"compile {mode}{' padded' if ON[padded] else ''}", (mode, ON[padded])


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


def start(options: argparse.Namespace, precisions: Sequence[str]) -> tuple[Variants, dict[str, Ceiling]]:
    """The variants of a benchmark, with a ceiling for each precision; of both the names of precisions as given."""
    device = torch.device(options.device)
    prepare_device(device)
    variants = Variants(device, options.clock)
    ceilings = {
        name: variants.add(lambda name=name: Ceiling(device, DTYPES[name]), {f"ceiling {name}": Ceiling.__call__})
        for name in precisions
    }
    return variants, ceilings


def of_ceilings(turns: Turns, ceilings: Mapping[str, Ceiling]) -> dict[str, Any]:
    """What is reported on them."""
    keys = {f"ceiling {name}": ceiling for name, ceiling in ceilings.items()}
    return {key: turns.of(key) | ceiling.report(turns.median(key)) for key, ceiling in keys.items()}


def speed_ups(turns: Turns, key: str, references: Mapping[str, str]) -> dict[str, Any]:
    """Of a variant over those of another checkout that there are; name of a precision -> name of the variant."""
    there = {name: other for name, other in references.items() if other in turns.seconds}
    return {f"speed_up over {name}": turns.ratio(other, key) for name, other in there.items()}


class Ways:
    """The ways to compute one denoiser, which share its weights: `use` changes from one to another."""

    def __init__(self, denoiser: Denoiser, modes: Sequence[str]):
        self.denoiser, self.modules, self.calls = denoiser, list(denoiser.modules()), {}
        for mode in modes:
            compile_network(denoiser, mode)
            self.calls[mode] = [module._compiled_call_impl for module in self.modules]  # None where it is not compiled
            self._set([None] * len(self.modules))

    def use(self, mode: str, padded: bool) -> None:
        self._set(self.calls[mode])
        rng.use_compiler(mode != "off")
        pad_swiglu(self.denoiser, padded)

    def _set(self, calls: list) -> None:
        for module, call in zip(self.modules, calls, strict=True):
            module._compiled_call_impl = call


def emit(benchmark: str, args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """The JSON line."""
    device = torch.device(args.device)
    tf32 = {"tf32": torch.backends.cuda.matmul.allow_tf32} if device.type == "cuda" else {}
    load = {"load_average": short(os.getloadavg()[0]), "cores": len(os.sched_getaffinity(0))}
    about = {"benchmark": benchmark, "settings": vars(args), **content, **tf32, **load}
    print(json.dumps({**about, **provenance.provenance(device)}, default=str), flush=True)
