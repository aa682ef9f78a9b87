"""From a denoiser to images: what comes out, noise drawn ahead, weights cast once; util/generation.py.

Shapes: z (B, C, H, W); t, y (B,).
"""

import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from denoiser import Denoiser
from engine_jit import Sampling, generate
from model_jit import JiT
from sampler import start_noise
from spectral_forcing import SpectralForcing
from tests.golden_inputs import SMALL, fill, small_denoiser
from util.distributed import World
from util.errors import UserError
from util.generation import ahead, batches_of_noise, split

NULL = 10


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# Images.


class Zero(torch.nn.Module):
    """A network without velocity, so that the starting noise comes out."""

    def forward(self, z, t, y):
        return torch.zeros_like(z)


def settings(**changes):
    return Sampling(
        **{"solver": "heun", "steps": 2, "cfg": 2.0, "interval": (0.1, 1.0), "seed": 4, "batch_size": 2, **changes}
    )


def images(denoiser, labels, world=None, **changes):
    shape = (3, 32, 32)
    return torch.cat(list(generate(denoiser, settings(**changes), labels, shape, NULL, world or World())))


def test_generated_images_start_from_scaled_noise():
    out = images(Denoiser(Zero(), pred_param="v", noise_scale=0.25), [0] * 5)
    expected = ((0.25 * start_noise(4, range(5), (3, 32, 32)) + 1) * 127.5).clamp(0, 255)
    assert out.dtype == torch.uint8
    assert (out.float() - expected).abs().max() < 0.501


def test_an_image_does_not_depend_on_its_batch_or_process():
    denoiser, labels = small_denoiser(), [3, 1, 4, 1, 5]
    whole = images(denoiser, labels, batch_size=5).int()
    assert (images(denoiser, labels, batch_size=2).int() - whole).abs().max() <= 1  # a rounding at most
    shares = [images(denoiser, labels, World(rank=r, size=2)).int() for r in range(2)]
    assert (torch.cat(shares) - whole).abs().max() <= 1
    assert not images(denoiser, [3, 2, 4, 1, 5]).int().equal(whole)
    assert not images(denoiser, labels, seed=5).int().equal(whole)


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_the_mode_as_it_was(training):
    modes = []

    class Watched(Zero):
        def forward(self, z, t, y):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(z, t, y)

    denoiser = Denoiser(Watched(), pred_param="v").train(training)
    images(denoiser, [0])
    assert denoiser.training == denoiser.net.training == training
    assert set(modes) == {(False, False)}


def test_images_that_are_not_finite_are_an_error():
    class Broken(Zero):
        def forward(self, z, t, y):
            return torch.where((y == 6)[:, None, None, None], torch.nan, z)

    denoiser = Denoiser(Broken(), pred_param="v")
    with pytest.raises(UserError, match=r"seed 4 .*image 3 \(label 6\)"):
        images(denoiser, [0, 1, 2, 6, 4])
    assert denoiser.training


# Starting noise beside the GPU's work.


def test_one_is_made_ahead():
    made = []
    found = ahead(lambda item: made.append(item) or item * 10, range(4))
    assert made == []
    assert next(found) == 0 and made[:1] == [0] and len(made) <= 2
    assert next(found) == 10 and made[:2] == [0, 1] and len(made) <= 3
    assert list(found) == [20, 30] and made == [0, 1, 2, 3]
    assert list(ahead(str, [])) == []


def test_errors_of_the_thread_are_raised():
    found = ahead(lambda item: 1 / item, [1, 0, 2])
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_who_leaves_early_leaves_no_thread():
    before = threading.active_count()
    found = ahead(str, range(3))
    next(found)
    assert threading.active_count() == before + 1
    found.close()
    assert threading.active_count() == before


def test_noise_is_the_same_for_a_gpu():
    batches, sampling = split(range(3, 10), 3), Sampling("heun", 4, 1.0, (0.0, 1.0), 5, 3)
    assert batches == [range(3, 6), range(6, 9), range(9, 10)]
    here, there = (list(batches_of_noise(batches, sampling, (3, 4, 4), torch.device(kind))) for kind in ("cpu", "cuda"))
    assert torch.equal(torch.cat(here), start_noise(5, range(3, 10), (3, 4, 4)))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


# Weights.


class Casts(TorchDispatchMode):
    """Counts what is cast to bfloat16 of the weights of a network."""

    def __init__(self, network):
        super().__init__()
        self.weights, self.count = {p.data_ptr() for p in network.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            self.count += kwargs["dtype"] == torch.bfloat16
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("residual", ["off", "time"])
@torch.no_grad()
def test_weights_are_cast_once_where_they_are_fixed(residual):
    denoiser = Denoiser(
        fill(JiT(**SMALL, spectral_residual=residual)), SpectralForcing(32), autocast_dtype=torch.bfloat16
    )
    z, t, y = noise(2, 3, 32, 32), torch.full((1,), 0.5), torch.tensor([0, 1])
    with Casts(denoiser) as each_time:
        first = denoiser.velocity(z, t, y)
    with Casts(denoiser) as casts, denoiser.fixed_weights():
        once = casts.count
        kept = [denoiser.velocity(z, t, y) for _ in range(2)]
    assert casts.count == once == each_time.count > 0
    assert all(torch.equal(k, first) for k in kept)


@torch.no_grad()
def test_fixed_weights_come_back_as_they_were():
    """The same objects, which DDP and the optimizer hold, also after an error; changed ones are used from then on."""
    denoiser = small_denoiser(autocast_dtype=torch.bfloat16)
    z, t, y = noise(2, 3, 32, 32), torch.full((1,), 0.5), torch.tensor([0, 1])
    before = dict(denoiser.named_parameters())
    with pytest.raises(KeyError), denoiser.fixed_weights():
        first = denoiser.velocity(z, t, y)
        raise KeyError
    assert list(before) == list(after := dict(denoiser.named_parameters()))
    assert all(after[name] is p and p.dtype == torch.float32 and p.requires_grad for name, p in before.items())
    denoiser.net.final_layer.linear.weight.mul_(2)
    with denoiser.fixed_weights():
        assert not torch.equal(denoiser.velocity(z, t, y), first)


def test_without_autocast_nothing_is_cast():
    denoiser = small_denoiser()
    with denoiser.fixed_weights():
        assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
