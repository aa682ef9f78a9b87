"""The network as a CUDA graph: recorded once for each shape of its inputs, and then started as a whole.

A forward pass launches hundreds of kernels. Where those of a small network or batch are done before the host has
launched the next ones, the graph takes their gaps away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from denoiser import Denoiser

WARM_UP = 3  # calls before the recording: what compiles, chooses kernels or makes tables does it there

Function = Callable[..., Tensor]  # of tensors, or None in the place of some


class Recording:
    """`function` for inputs of one shape, without gradients."""

    def __init__(self, function: Function, inputs: tuple[Tensor | None, ...], pool: tuple[int, int]):
        self.inputs = [None if given is None else given.clone() for given in inputs]
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*self.inputs)
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, which copy a checkpoint or watch over nccl, may call CUDA meanwhile.
        with torch.cuda.graph(self.graph, pool, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it


class Replayed:
    """Stands for `function`; makes a recording (by `record`) for each shape, and keeps it.

    They share their memory, since none of them leaves anything there that is used after another one was replayed.
    """

    def __init__(self, function: Function, record: Callable[..., Function] = Recording):
        self.function, self.record, self.pool = function, record, torch.cuda.graph_pool_handle()
        self.recordings: dict[tuple, Function] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        shapes = tuple(None if given is None else (given.shape, given.dtype) for given in inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = self.record(self.function, inputs, self.pool)
        return self.recordings[shapes](*inputs)


@contextmanager
def replayed(denoiser: Denoiser) -> Iterator[None]:
    """Within the block the network and Spectral Forcing are replayed; weights must not change."""
    denoiser.predict = Replayed(denoiser.predict)
    try:
        yield
    finally:
        del denoiser.predict
