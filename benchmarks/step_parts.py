"""The profile of a training step: milliseconds of its parts, and the share of matrix products; one JSON line.

    python -m benchmarks.step_parts                                                    in small, on a CPU
    python -m benchmarks.step_parts --model JiT-B/32 --img_size 256 --batch_size 4 --precision fp32 bf16 --clock process
    python -m benchmarks.step_parts --model JiT-B/16 --img_size 256 --batch_size 128 --steps 10 --precision bf16 \
        --compile block

What runs is the loop of training, as in step.py, whose functions are surrounded by marks from here. On a GPU a mark is
an event, which nothing waits for, so a part ends when the device is done with it. "forward" contains Spectral Forcing;
"rest" is what lies between the parts: the check for values that are not finite, and a log line for each turn.

The shares are of the time within torch's operations, from torch.profiler and of another turn: what it notes of each
operation would be part of the milliseconds.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

import engine_jit
from benchmarks.common import COMPILE, DTYPES, add_model, emit, parser
from benchmarks.step import Steps, setting
from benchmarks.turns import clock_of, short, spread
from util.acceleration import prepare_device
from util.distributed import World
from util.ema import EMA

PLACES = (  # of functions, and the part that each belongs to
    ("images", engine_jit, "to_float"),
    ("images", engine_jit, "random_flip"),
    ("noise and t", engine_jit, "draw"),
    ("backward", Tensor, "backward"),
    ("norm", engine_jit, "total_norm"),
    ("AdamW", torch.optim.AdamW, "step"),
    ("zero_grad", torch.optim.Optimizer, "zero_grad"),
    ("zero_grad", nn.Module, "zero_grad"),
    ("averages", EMA, "update"),
)
WITHIN = "Spectral Forcing"  # the forward pass
PARTS = ("images", "noise and t", WITHIN, "forward", "backward", "norm", "AdamW", "zero_grad", "averages")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise", "convolution")
ATTENTION = ("attention",)  # its kernels contain products as well


class Marks:
    """Begin and end of each part of each step, in the order in which the device computes."""

    def __init__(self, device: torch.device, clock: str):
        self.device, self.clock = device, clock_of(clock, device)
        self.clear()

    def clear(self) -> None:
        self.marks = {name: [] for name in (*PARTS, "all")}

    def now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, part: str, function: Callable) -> Callable:
        def marked(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.marks[part].append((start, self.now()))
            return result

        return marked

    def milliseconds(self, part: str) -> float:
        """In all."""
        if self.device.type != "cuda":
            return 1e3 * sum(end - start for start, end in self.marks[part])
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in self.marks[part])


class _Marked(nn.Module):
    """A module between marks."""

    def __init__(self, module: nn.Module, marks: Marks, part: str):
        super().__init__()
        self.module, self.marked = module, marks.around(part, module)

    def forward(self, *args: Tensor) -> Tensor:
        return self.marked(*args)


@contextmanager
def marked(ours: Steps, marks: Marks) -> Iterator[None]:
    """Within the block each part of a step is between marks."""
    training, operator = ours.training, ours.operator
    originals = [getattr(owner, name) for _, owner, name in PLACES]
    ours.operator = _Marked(operator, marks, WITHIN)
    ours.training = replace(training, forward=marks.around("forward", training.forward))
    for (part, owner, name), original in zip(PLACES, originals, strict=True):
        setattr(owner, name, marks.around(part, original))
    try:
        yield
    finally:
        for (_, owner, name), original in zip(PLACES, originals, strict=True):
            setattr(owner, name, original)
        ours.training, ours.operator = training, operator


def parts(marks: Marks, steps: int) -> dict[str, float]:
    """Milliseconds of a step: "all", and what adds up to it, together with Spectral Forcing, which does not."""
    found = {name: marks.milliseconds(name) / steps for name in (*PARTS, "all")}
    return {**found, "rest": found["all"] - sum(found[name] for name in PARTS if name != WITHIN)}


def shares(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Of matrix products, and of attention, in the time of all operations: of their kernels on a GPU."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        call()
    # A kernel is an event of its own, beside the operation that has started it and carries its time.
    events, time = profiler.key_averages(), "self_device_time_total" if cuda else "self_cpu_time_total"
    where = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    everything = sum(getattr(e, time) for e in events if e.device_type == where and not (cuda and e.is_user_annotation))
    operations = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    return {
        name: short(sum(getattr(e, time) for e in operations if any(word in e.key for word in words)) / everything)
        for name, words in (("matrix products", PRODUCTS), ("attention", ATTENTION))
    }


def measure(ours: Steps, options: Namespace) -> dict[str, dict]:
    """For each precision; they take turns."""
    marks, each = Marks(torch.device(options.device), options.clock), {name: [] for name in options.precision}
    turns = {name: lambda name=name: ours((options.compile, False), True, DTYPES[name]) for name in options.precision}
    for call in turns.values():
        call()
    with marked(ours, marks):
        for _ in range(options.repeats):
            for name, call in turns.items():
                marks.clear()
                marks.around("all", call)()
                each[name].append(parts(marks, options.steps))
    results = {}
    for name, found in each.items():
        medians = {part: short(statistics.median(turn[part] for turn in found)) for part in found[0]}
        results[name] = {"milliseconds": medians, "all_range": spread([turn["all"] for turn in found])}
        results[name]["shares"] = shares(turns[name], marks.device)
    return results


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5)
    add_model(found)
    found.add_argument("--steps", type=int, default=1, help="steps of a turn")
    found.add_argument("--compile", default="off", choices=COMPILE)
    options = found.parse_args(argv)
    device = torch.device(options.device)
    prepare_device(device)
    args, batches = setting(options, options.steps)
    ours = Steps(args, [options.compile], options.steps, batches, World(device=device))
    emit("step_parts", options, {"results": measure(ours, options)})


if __name__ == "__main__":
    main()
