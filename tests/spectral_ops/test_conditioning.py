"""Schedules of single images, their training times, and the embedding of logsnr_range."""

import math

import pytest
import torch

from spectral_ops.conditioning import ImageSchedules, InstanceTimeSampler, ScheduleEmbedder
from spectral_ops.schedule import GlobalTimeSampler, TightSchedule
from spectral_ops.spectrum import image_fits, rapsd
from util.rng import CounterRNG

N, LEVEL = 16, [0.1, -0.2, 0.0]


def images(count=8):
    """Float images (count, 3, N, N) whose strengths and means differ."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, N, N, generator=g) * torch.rand(count, 1, 1, 1, generator=g) * 0.3
    return (x + torch.rand(count, 1, 1, 1, generator=g) - 0.5).clamp(-1, 1)


def fits(x):
    return image_fits(rapsd(x), x.double().mean((2, 3)), torch.tensor(LEVEL, dtype=torch.float64), N)


@pytest.mark.parametrize("variant", ["mixed", "logsnr"])
def test_an_images_schedule_is_that_of_its_fit(variant):
    x, schedules = images(), ImageSchedules(N, LEVEL, 0.1)
    own, expected = schedules(x, variant), TightSchedule.of_fits(fits(x), N, variant=variant)
    assert own.logsnr_range.shape == (8, 2) and own.logsnr_range[:, 0].unique().numel() == 8
    assert own.logsnr_range.equal(expected.logsnr_range)
    assert own.time(torch.full((8,), 0.3)).equal(expected.time(torch.full((8,), 0.3)))
    torch.testing.assert_close(schedules(x.flip(-1)).logsnr_range, own.logsnr_range)  # a mirrored image has the same
    assert list(schedules.state_dict()) == list(schedules.parameters()) == []


def test_noise_scale_moves_all_ranges_alike_and_a_constant_image_has_one():
    one, two = (ImageSchedules(N, LEVEL, 0.1, noise_scale=s) for s in (1.0, 2.0))
    moved = two(images()).logsnr_range - one(images()).logsnr_range
    torch.testing.assert_close(moved, torch.full((8, 2), 2 * math.log(2.0)))
    constant = one(torch.zeros(1, 3, N, N)).logsnr_range
    assert constant.isfinite().all() and constant[0, 1] > constant[0, 0]


def test_times_are_drawn_from_each_images_schedule():
    x, rng = images(), CounterRNG(0, 0, torch.arange(8))
    sampler = InstanceTimeSampler(ImageSchedules(N, LEVEL, 0.1), "mixed", 0.0, torch.empty(0, 4))
    t, own = sampler.for_images(x).sample(rng), sampler.schedules(x)
    low, high = torch.sigmoid(own.logsnr_range / 2).unbind(1)
    assert ((t >= low - 1e-6) & (t <= high + 1e-6)).all()
    for i in range(8):  # and not from another image's in the batch
        alone = sampler.for_images(x[i : i + 1]).sample(CounterRNG(0, 0, torch.tensor([i])))
        torch.testing.assert_close(alone, t[i : i + 1], rtol=1e-6, atol=0)
    with pytest.raises(TypeError, match="for_images"):
        sampler.sample(rng)


def test_cdf_is_the_share_of_times_of_all_images():
    examples, count = fits(images()), 2000
    sampler = InstanceTimeSampler(ImageSchedules(N, LEVEL, 0.1), "mixed", 0.1, examples)
    t = GlobalTimeSampler(TightSchedule.of_fits(examples.repeat(count // 8, 1), N), 0.1).sample(
        CounterRNG(0, 0, torch.arange(count))
    )
    edges = torch.linspace(0.2, 0.8, 4)
    counted = torch.tensor([float((t < edge).double().mean()) for edge in edges], dtype=torch.float64)
    assert (sampler.cdf(edges) - counted).abs().max() < 5 * math.sqrt(0.25 / count)


def test_embedding_is_zero_at_first_and_tells_ranges_apart():
    torch.manual_seed(0)
    embedder, drawn = ScheduleEmbedder(128), torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1).equal(drawn) and embedder(torch.tensor([[-6.0, 8.0]])).eq(0).all()
    torch.nn.init.eye_(embedder.weight)
    grid = torch.arange(-12.0, 14.0, 0.25)
    features = embedder(torch.stack([grid, torch.zeros_like(grid)], 1))  # (M, 128)
    assert (torch.cdist(features, features) + torch.eye(len(grid)) * 9).min() > 0.3
    assert not torch.equal(embedder(torch.tensor([[1.0, 2.0]])), embedder(torch.tensor([[2.0, 1.0]])))


def test_the_mean_pixel_is_right_after_a_move_from_the_meta_device_and_in_other_types():
    x, expected = images(), ImageSchedules(N, LEVEL, 0.1)(images()).logsnr_range
    with torch.device("meta"):
        moved = ImageSchedules(N, LEVEL, 0.1)
    for module in (moved.to_empty(device="cpu"), ImageSchedules(N, LEVEL, 0.1).bfloat16()):
        assert torch.equal(module(x).logsnr_range, expected)
