"""CUDA graphs of a step and of a velocity compute what they record, shown on a CPU by a stand-in that is as blind."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import sampler, step
from benchmarks.graph import WARM_UP, Graphed
from spectral_forcing import SpectralForcing
from util.dist.context import find_context

aten = torch.ops.aten
TINY = {"model": "JiT-Demo/8", "img_size": 16, "batch_size": 2, "device": "cpu"}


class Tape(TorchDispatchMode):
    """Does the recorded operations again with the same memory and the same numbers, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (aten._local_scalar_dense.default, aten.lift_fresh.default):  # x.item() and torch.tensor(1)
            raise RuntimeError("a number is copied to the host or from it")
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, out in self.calls:
                for place, value in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    made = []

    @contextmanager
    def graph(tape, capture_error_mode):
        made.append(tape)
        with tape:
            yield

    # As on a GPU, where Spectral Forcing looks at the range of times in its first call alone.
    monkeypatch.setattr(SpectralForcing, "flow_time", lambda self, t: t.clamp(0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made


def test_recorded_steps_are_the_steps_to_the_bit(tapes):
    """Learning rate, flips, times, noise, dropped labels and weights change from step to step."""
    ctx, flags = find_context("cpu"), {**TINY, "spectral_residual": "time_label", "warmup_epochs": 5}
    trainers = []
    for graph in (False, True):
        torch.manual_seed(0)  # of the images
        trainers.append(step.Steps(flags, WARM_UP + 3, ctx, graph).trainer)
    plain, recorded = trainers
    assert len(tapes) == 1 and len(tapes[0].calls) > 1000
    assert plain.metrics.read()["loss"] == recorded.metrics.read()["loss"]
    for (name, a), b in zip(plain.denoiser.named_parameters(), recorded.denoiser.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(plain.emas[0].shadow.values(), recorded.emas[0].shadow.values(), strict=True):
        assert torch.equal(a, b)


def test_a_second_microbatch_cannot_be_recorded():
    """It would replace the gradient of the first."""
    with pytest.raises(ValueError, match="replaces gradients"):
        step.Steps({**TINY, "accum_iter": 2}, WARM_UP + 1, find_context("cpu"), True)


def test_recorded_velocities_are_the_velocities(monkeypatch, capsys, tapes):
    """Of both sizes of a batch: with guidance and without."""
    images, generate = [], sampler.generate

    def kept(*args):
        for index, x in generate(*args):
            images.append(x)
            yield index, x

    monkeypatch.setattr(sampler, "generate", kept)
    argv = ["--repeats", "1", "--graph", "--model", "JiT-Demo/8", "--img_size", "16", "--gen_bsz", "2", "--cfg", "3"]
    monkeypatch.setattr(sys, "argv", ["x", *argv, "--interval_min", "0.4", "--num_sampling_steps", "8"])
    sampler.main()
    line = json.loads(capsys.readouterr().out)
    assert line["graph"][0] > 0 and len(tapes) == 2 and len(images) == 4
    assert all(torch.equal(x, images[0]) for x in images)


def test_shapes_and_numbers_have_their_own_recordings_and_results_stay(tapes):
    double = Graphed(lambda x, factor: factor * x)
    for n, factor in ((2, 2.0), (3, 2.0), (2, 5.0)):
        results = [double(torch.full((n,), float(i)), factor) for i in range(WARM_UP + 2)]
        assert [r.tolist() for r in results] == [[factor * i] * n for i in range(WARM_UP + 2)]
    assert len(tapes) == 3


@pytest.mark.parametrize("function", [lambda x: x * x.item(), lambda x: x * torch.tensor(2.0)])
def test_what_a_gpu_cannot_record_fails_here_too(function):
    graphed = Graphed(function)
    with pytest.raises(RuntimeError, match="a number is copied"):
        [graphed(torch.ones(())) for _ in range(WARM_UP + 1)]
