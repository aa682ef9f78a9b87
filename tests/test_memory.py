"""Calculated memory against what a small network takes on a CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from denoiser import Denoiser
from spectral_forcing import SpectralForcing
from tests.conftest import TINY, TINY_MODEL
from tests.launcher_stand_ins import ROOT
from tests.test_golden import PUBLISHED
from util import cpu_layers, memory
from util.memory import count, measure
from util.parallel import checkpoint_activations

pytestmark = pytest.mark.usefixtures("tiny")

RNG_STATE = 5056  # bytes: of torch's generator on the CPU, which a recomputed block keeps for dropout's masks


def build(dtype):
    return Denoiser(TINY_MODEL(input_size=16, num_classes=10), SpectralForcing(16), autocast_dtype=dtype)


def kept_by_torch(denoiser: Denoiser, images: int) -> int:
    """Bytes that are allocated after a forward pass and were not before; its inputs are not among them."""
    x, t = torch.zeros(images, 3, 16, 16), torch.full((images,), 0.5)
    y = torch.zeros(images, dtype=torch.int64)
    cpu = [ProfilerActivity.CPU]
    with cpu_layers.switched_off(), profile(activities=cpu, profile_memory=True) as profiler:
        loss = denoiser(x, y, t, x)
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    return kept - loss.nbytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_counted_activations_are_what_torch_keeps(dtype, recompute):
    denoiser, images = build(dtype), 3
    counted = count(denoiser, images)
    if recompute:
        checkpoint_activations(denoiser)
    kept = kept_by_torch(denoiser, images) - recompute * RNG_STATE * len(denoiser.net.blocks)
    inputs = 12 * images  # t and y, which are saved and were there before
    assert abs((counted.recomputed if recompute else counted.total) - kept) <= inputs
    assert counted.recomputed + counted.block < counted.total


def test_counting_needs_no_memory_and_is_the_same_without():
    real = count(build(torch.bfloat16), 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert count(build(torch.bfloat16), 2) == real


def test_images_add_up():
    needs = measure(TINY, 16, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = Denoiser(TINY_MODEL(input_size=16), SpectralForcing(16))
        seven = count(denoiser, 7)
    for name in ("total", "recomputed", "block"):
        assert getattr(needs.fixed, name) + 7 * getattr(needs.image, name) == getattr(seven, name)


def test_large_models_have_the_published_parameters_and_fit_where_shards_do():
    needs = measure("JiT-7B", 256)
    assert needs.parameters == PUBLISHED["JiT-7B"]
    assert needs.state(1) == 24 * needs.parameters
    assert 24 * needs.parameters / 8 <= needs.state(8) < 1.001 * 24 * needs.parameters / 8
    copies, _ = needs.for_batch(8, "ddp", recompute=True)
    shards, image = needs.for_batch(8, "fsdp", recompute=True)
    assert copies > 141e9 and shards + 32 * image < 80e9
    assert needs.fixed.total == pytest.approx(2 * needs.parameters, rel=0.05)  # autocast's copies


def test_table(capsys):
    assert memory.main(["--models", TINY, "--gpus", "2", "4", "--img_size", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 3 and len({line.count("|") for line in lines}) == 1


def test_table_of_the_documentation(capsys):
    """docs/large_models.md shows what `python -m util.memory` prints."""
    assert memory.main([]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) > 20 and "\n".join(printed) in (ROOT / "docs" / "large_models.md").read_text()
