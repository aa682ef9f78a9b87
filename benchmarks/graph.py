"""A candidate for the default on one GPU: forward and backward pass as one CUDA graph.

A step of JiT-B/16 launches about a thousand kernels, and the host takes longer for that than the GPU for the kernels. A
recorded graph is one launch. `benchmarks.step --graph` and `benchmarks.sampler --graph` measure it in turns with what
training and sampling do; it moves there if it pays.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls that run as usual: they compile, choose kernels and make tables


@dataclass
class Recording:
    """A CUDA graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    gradients: list[Tensor | None]


class Graphed:
    """A function on the GPU that is recorded once for each shape of its tensors, and then replayed.

    Only the values of tensors may differ between calls: whatever the host decides, the recording keeps. Activations
    stay reserved between calls, so nothing else can use that memory.

    Args:
        function: (tensors, and what is no tensor) -> a tensor. It may not wait for the device or copy from the host.
        parameters: those whose gradients it sets. They must have none before each call.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: Iterable[torch.nn.Parameter] = ()):
        self.function, self.parameters = function, list(parameters)
        self.calls: dict[Any, int] = {}
        self.recordings: dict[Any, Recording] = {}

    def __call__(self, *args: Any) -> Tensor:
        key = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= WARM_UP:
            return self.function(*args)
        if any(p.grad is not None for p in self.parameters):
            raise ValueError("A recorded backward pass replaces gradients. Set them to None first.")
        if key not in self.recordings:
            self.recordings[key] = self._record(args)
        recording = self.recordings[key]
        given = [a for a in args if isinstance(a, Tensor)]
        for buffer, value in zip(recording.inputs, given, strict=True):
            buffer.copy_(value, non_blocking=True)
        recording.graph.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.output.clone()  # the next replay overwrites it

    def _record(self, args: tuple[Any, ...]) -> Recording:
        fixed = [a.clone() if isinstance(a, Tensor) else a for a in args]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on using the GPU
            output = self.function(*fixed)
        inputs = [a for a in fixed if isinstance(a, Tensor)]
        return Recording(graph, inputs, output, [p.grad for p in self.parameters])
