"""The process in which another checkout is timed; reference.py starts it, and says what it expects of the checkout.

Its modules have the names of ours, and it may import them at any time: dynamo imports modules by name while
torch.compile traces a first call, and keeps what it has found for as long as the process lives. So nothing of ours but
`benchmarks.turns` is imported here, and nothing of ours is found.

Lines of JSON: settings come in, peaks and failures go out; then for each name that comes in its seconds go out.
"""

import argparse
import copy
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.turns import Variants, batch, reason, wait

DTYPES = {"fp32": None, "bf16": torch.bfloat16}
GRAPHS = 128  # of one function, before torch.compile gives up on it


def _identity(function=None, **options):
    return function if function is not None else lambda f: f


def find_theirs(folder: Path, decorators: bool) -> None:
    """From here on modules are found in `folder`, and ours are not."""
    ours = Path(__file__).resolve().parent.parent
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ours)]
    if not decorators:
        torch.compile = _identity


def load(args: argparse.Namespace) -> nn.Module:
    """Its Denoiser with fresh weights and averages."""
    denoiser = importlib.import_module("denoiser").Denoiser(args).to(args.device)
    for name in ("ema_params1", "ema_params2"):
        setattr(denoiser, name, copy.deepcopy(list(denoiser.parameters())))
    return denoiser


class Training:
    """A turn is `steps` steps on one batch."""

    def __init__(self, denoiser: nn.Module, args: argparse.Namespace):
        self.denoiser, self.device, self.steps = denoiser.train(), torch.device(args.device), args.steps
        self.images, self.labels = batch(args.batch_size, args.img_size, args.class_num, args.device == "cuda")
        self.optimizer = torch.optim.AdamW(denoiser.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def forward(self) -> Tensor:
        x = self.images.to(self.device, non_blocking=True).to(torch.float32).div_(255) * 2 - 1
        return self.denoiser(x, self.labels.to(self.device, non_blocking=True))

    def __call__(self, autocast: torch.autocast) -> None:
        for _ in range(self.steps):
            with autocast:
                loss = self.forward()
            loss.item()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            wait(self.device)
            self.denoiser.update_ema()


class Sampling:
    """A turn is `batches` batches."""

    def __init__(self, denoiser: nn.Module, args: argparse.Namespace):
        self.denoiser, self.batches = denoiser.eval(), args.batches
        self.labels = torch.arange(args.batch_size, device=args.device) % args.class_num

    def forward(self) -> Tensor:
        return self.denoiser.generate(self.labels)

    def __call__(self, autocast: torch.autocast) -> None:
        for _ in range(self.batches):
            with autocast:
                self.forward()


TASKS = {"step": Training, "sampler": Sampling}


class _Cast(Exception):
    """The type that autocast has where the network is called."""


def own_cast(task: Training | Sampling, device: torch.device) -> torch.dtype | None:
    """The type to which the checkout casts by itself, seen where it first calls a module; None where it does not."""

    def look(module: nn.Module, _) -> None:
        if module is not task.denoiser:
            raise _Cast(torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None)

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        task.forward()
    except _Cast as found:
        return found.args[0]
    finally:
        handle.remove()
    raise SystemExit("the Denoiser of the other checkout calls no module")


def build(args: argparse.Namespace) -> Variants:
    """A variant for each of the names in args.variants, name -> precision."""
    device = torch.device(args.device)
    if args.decorators:
        torch._dynamo.config.recompile_limit = GRAPHS
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as ours
    variants, uses = Variants(device, args.clock), {}
    try:
        own = own_cast(TASKS[args.task](load(args), args), device)
    except torch.OutOfMemoryError as error:
        variants.failed |= dict.fromkeys(args.variants, reason(error))
        return variants
    for name, precision in args.variants.items():
        dtype = DTYPES[precision]
        if own not in (None, dtype):
            variants.failed[name] = f"it casts to {str(own).removeprefix('torch.')} by itself"
            continue
        cast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None and own is None)  # once, not twice
        uses[name] = lambda task, cast=cast: task(cast)
    variants.add(lambda: TASKS[args.task](load(args), args), uses)
    return variants


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the checkout prints is no answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    args = argparse.Namespace(**json.loads(sys.stdin.readline()))
    find_theirs(Path(args.folder), args.decorators)
    variants = build(args)
    answer({"peaks": variants.peaks, "failed": variants.failed})
    for line in sys.stdin:
        try:
            answer({"seconds": variants.turns[json.loads(line)]()})
        except torch.OutOfMemoryError as error:
            answer({"failed": reason(error)})


if __name__ == "__main__":
    main()
