"""Schedules of single images in training, networks that are told of them, and the grids of generated images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from denoiser import Denoiser, LogitNormal, draw
from model_jit import JiT
from sampler import guided, uniform_grid
from spectral_conditioning import ImageSchedules, InstanceTimes, ScheduleEmbedder
from spectral_schedule import TightSchedule, TrainingTimes, latest_time
from tests.conftest import few_digits
from util.data import to_float
from util.generation import Sampling, first_bad_steps, make_images, setting_name
from util.held_out import bin_weights
from util.measure_spectrum import measure
from util.schedules import GeneratedSchedules

N = 16  # pixels
SETTINGS = {
    "input_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "bottleneck_dim": 8,
    "in_context_len": 0,
}


@pytest.fixture(scope="module")
def spectrum():
    return replace(measure(few_digits(N), np.arange(40)), sha256="5" * 64)


@pytest.fixture(scope="module")
def schedules(spectrum):
    return ImageSchedules(N, spectrum.level.tolist(), 0.1)


def digits(count=8):
    return to_float(torch.stack([few_digits(N)[i][0] for i in range(count)]))


def network(told, seed=0):
    torch.manual_seed(seed)
    return JiT(**SETTINGS, told_schedule=told)


# --- schedules of images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["mixed", "logsnr"])
def test_an_images_schedule_is_that_of_its_fit_in_the_file(spectrum, schedules, variant):
    x = digits()
    own, filed = schedules(x, variant), TightSchedule.of_fits(torch.from_numpy(spectrum.fits[:8]), N, variant=variant)
    torch.testing.assert_close(own.bounds, filed.bounds, rtol=1e-5, atol=1e-5)  # the file is in float32
    torch.testing.assert_close(own.time(torch.full((8,), 0.3)), filed.time(torch.full((8,), 0.3)), rtol=1e-5, atol=1e-6)
    assert own.bounds.shape == (8, 2) and own.bounds[:, 0].unique().numel() == 8
    torch.testing.assert_close(schedules(x.flip(-1)).bounds, own.bounds)  # a mirrored image has the same


def test_bounds_follow_the_definition(schedules):
    """lambda_1 of the smallest power of an image, with the Fourier transform of numpy."""
    x = digits(3).double().numpy()
    f = np.fft.fftfreq(N, 1 / N)
    ring = np.floor(np.hypot(f[:, None], f[None])).astype(int)
    power = np.abs(np.fft.fft2(x, norm="ortho")) ** 2
    smallest = [min(p[:, ring == k].mean() for k in range(1, ring.max() + 1)) for p in power]
    expected = [-math.log(max((2 / 255) ** 2 / 12, 0.1 / 0.9 * s)) for s in smallest]
    assert schedules(torch.from_numpy(x).float()).bounds[:, 1].tolist() == pytest.approx(expected, rel=1e-4)


def test_noise_scale_moves_all_bounds_alike(spectrum, schedules):
    twice = ImageSchedules(N, spectrum.level.tolist(), 0.1, noise_scale=2.0)
    moved = twice(digits()).bounds - schedules(digits()).bounds
    torch.testing.assert_close(moved, torch.full((8, 2), 2 * math.log(2.0)))


def test_a_constant_image_has_a_schedule(schedules):
    bounds = schedules(torch.zeros(1, 3, N, N)).bounds
    assert bounds.isfinite().all() and bounds[0, 1] > bounds[0, 0]


# --- times of training ----------------------------------------------------------------------------------------------


def test_times_are_drawn_from_each_images_schedule(schedules):
    x, position = digits(), torch.arange(8)
    density = InstanceTimes(schedules, "mixed", 0.0, torch.empty(0, 4)).of_images(x)
    t, own = density.draw(3, 5, position), schedules(x)
    low, high = (torch.sigmoid(own.bounds[:, i] / 2) for i in (0, 1))
    assert ((t >= low - 1e-6) & (t <= high + 1e-6)).all()
    for i in range(8):  # and not from another image's in the batch
        single = InstanceTimes(schedules, "mixed", 0.0, torch.empty(0, 4)).of_images(x[i : i + 1])
        assert torch.equal(single.draw(3, 5, position[i : i + 1]), t[i : i + 1])


def test_instance_times_cannot_be_drawn_without_images(schedules):
    with pytest.raises(TypeError, match="of_images"):
        InstanceTimes(schedules, "mixed", 0.1, torch.empty(0, 4)).draw(0, 0, torch.arange(2))


def test_logit_normal_is_drawn_as_before():
    from util import rng

    n = rng.normal(3, rng.Stream.TIME, 7, torch.arange(5))[:, 0]
    d = draw(3, 7, torch.arange(5), torch.zeros(5, dtype=torch.int64), (1, 1, 1), LogitNormal(), 0.1, 10)
    assert torch.equal(d.t, torch.sigmoid(-0.8 + 0.8 * n))


@pytest.mark.parametrize("kind", ["logit_normal", "uniform", "global", "instance"])
def test_weights_of_bins_are_the_frequencies_of_times(spectrum, schedules, kind):
    examples = torch.from_numpy(spectrum.fits)
    density = {
        "logit_normal": LogitNormal(),
        "uniform": TrainingTimes(),
        "global": TrainingTimes(spectrum.schedule(variant="mixed"), 0.1),
        "instance": InstanceTimes(schedules, "mixed", 0.1, examples),
    }[kind]
    count = 40_000
    if kind == "instance":  # every image equally often
        rows = TightSchedule.of_fits(examples.repeat(count // len(examples), 1), N)
        t = TrainingTimes(rows, 0.1).draw(0, 0, torch.arange(count))
    else:
        t = density.draw(0, 0, torch.arange(count))
    counted = torch.histc(t, 10, 0, 1).double() / count
    weights = bin_weights(density)
    assert weights.sum() == pytest.approx(1)
    assert (weights - counted).abs().max() < 5 * math.sqrt(0.25 / count)


# --- the network ----------------------------------------------------------------------------------------------------


def test_a_network_that_is_told_starts_as_one_that_is_not():
    plain, told = network(False), network(True)
    new = set(told.state_dict()) - set(plain.state_dict())
    assert new == {"schedule_embedder.weight"} and not told.schedule_embedder.weight.any()
    assert all(torch.equal(value, told.state_dict()[name]) for name, value in plain.state_dict().items())
    for net in (plain, told):
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name != "schedule_embedder.weight":
                    p += 0.05 * torch.randn(p.shape)
    z, t, y = torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2])
    bounds = torch.tensor([[-6.0, 8.0], [-7.0, 9.0]])
    assert torch.equal(told(z, t, y, bounds), plain(z, t, y))
    with torch.no_grad():
        told.schedule_embedder.weight.normal_(0, 0.1)
    out = told(z, t, y, bounds)
    assert not torch.equal(out, plain(z, t, y))
    changed = told(z, t, y, bounds + torch.tensor([[0.0, 0.0], [0.0, 0.5]]))
    assert torch.equal(changed[0], out[0]) and not torch.equal(changed[1], out[1])


def test_what_is_learned_of_schedules_has_a_gradient():
    net = network(True)
    torch.nn.init.normal_(net.final_layer.linear.weight)
    torch.nn.init.normal_(net.final_layer.adaLN_modulation[1].weight)
    net(
        torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2]), torch.tensor([[-6.0, 8.0]] * 2)
    ).sum().backward()
    assert net.schedule_embedder.weight.grad.any()


def test_features_tell_bounds_apart():
    embedder = ScheduleEmbedder(128)
    torch.nn.init.eye_(embedder.weight)
    grid = torch.arange(-12.0, 14.0, 0.25)
    features = embedder(torch.stack([grid, torch.zeros_like(grid)], 1))  # (M, 128)
    distance = torch.cdist(features, features) + torch.eye(len(grid)) * 9
    assert distance.min() > 0.3
    assert not torch.equal(embedder(torch.tensor([[1.0, 2.0]])), embedder(torch.tensor([[2.0, 1.0]])))


def test_denoiser_tells_the_images_own_schedules_and_asks_for_them(schedules):
    seen = []

    class Net(torch.nn.Module):
        def forward(self, z, t, y, bounds):
            seen.append(bounds)
            return z

    denoiser, x, y, t = Denoiser(Net(), schedules=schedules), digits(), torch.zeros(8, dtype=torch.int64), torch.rand(8)
    denoiser(x, y, t, torch.randn_like(x))
    assert torch.equal(seen[0], schedules(x).bounds)
    with pytest.raises(ValueError, match="is told"):
        denoiser.velocity(x, t, y)
    with pytest.raises(ValueError, match="is not told"):
        Denoiser(torch.nn.Identity()).velocity(x, t, y, bounds=seen[0])
    assert not denoiser.state_dict()


# --- generated images -----------------------------------------------------------------------------------------------


def of(spectrum, grid, **changes):
    return GeneratedSchedules(grid, spectrum, **changes)


@pytest.mark.parametrize("grid", ["uniform", "spectral_global", "spectral_instance"])
@pytest.mark.parametrize("told_delta", [None, 0.1])
def test_grids_and_bounds_depend_on_seed_index_and_label_alone(spectrum, grid, told_delta):
    generated, y = of(spectrum, grid, told_delta=told_delta), torch.tensor([0, 1, 2, 3, 4, 5])
    whole, bounds = generated.times(6, 7, range(6), y)
    part, other = generated.times(6, 7, [4, 1], y[[4, 1]])
    if grid == "spectral_instance":
        assert whole.shape == (7, 6) and torch.equal(part, whole[:, [4, 1]])
        assert not torch.equal(generated.times(6, 8, range(6), y)[0], whole)
        assert not torch.equal(generated.times(6, 7, range(6), y.flip(0))[0], whole)
    else:
        assert whole.shape == (7,) and torch.equal(part, whole)
        assert torch.equal(whole, uniform_grid(6)) == (grid == "uniform")
    assert (whole[0] == 0).all() and (whole[-1] == 1).all() and (whole.diff(dim=0) > 0).all()
    assert (bounds is None) == (told_delta is None)
    if bounds is not None:
        assert torch.equal(other, bounds[[4, 1]]) and bounds.shape == (6, 2)
        assert len(bounds.unique(dim=0)) == 6


def test_bounds_are_those_of_the_grid(spectrum):
    grid, bounds = of(spectrum, "spectral_instance", told_delta=0.1).times(5, 0, range(4), torch.arange(4))
    torch.testing.assert_close(torch.sigmoid(bounds[:, 0] / 2), grid[1])
    torch.testing.assert_close(torch.sigmoid(bounds[:, 1] / 2), grid[-2])
    other, same = of(spectrum, "spectral_instance", told_delta=0.1, delta=0.3).times(5, 0, range(4), torch.arange(4))
    assert torch.equal(same, bounds) and not torch.equal(other, grid)  # the network is told what it was trained with


def test_a_told_network_draws_what_it_is_told_on_every_grid(spectrum):
    """It has learned p(x | bounds): one pair for all images would be a slice of the images."""
    told = [
        of(spectrum, grid, told_delta=0.1).times(5, 0, range(6), torch.arange(6))[1]
        for grid in ("uniform", "spectral_global", "spectral_instance")
    ]
    assert torch.equal(told[0], told[1]) and torch.equal(told[0], told[2])
    assert len(told[0].unique(dim=0)) == 6


def test_without_a_spectrum_nothing_changes():
    generated = GeneratedSchedules()
    grid, bounds = generated.times(4, 0, range(2), torch.tensor([0, 1]))
    assert torch.equal(grid, uniform_grid(4)) and bounds is None
    assert (generated.describe(), generated.name, generated.t_eps(0.05)) == ({}, "", 0.05)


def test_the_clamp_of_sampling_leaves_the_grid_alone(spectrum):
    for grid in ("spectral_global", "spectral_instance"):
        generated = of(spectrum, grid)
        clamp = generated.t_eps(0.05)
        last = generated.times(8, 0, range(40), torch.arange(40) % 10)[0][-2]
        assert (1 - last).min() >= clamp > 0 and clamp < 0.05
    assert clamp == 1 - latest_time()  # the same for any batch


class Recorder(torch.nn.Module):
    """A denoiser that notes what it is asked."""

    noise_scale = 1.0

    def __init__(self):
        super().__init__()
        self.asked = []

    def velocity(self, z, t, y, t_eps=None, bounds=None):
        self.asked.append((t, y, t_eps, bounds))
        return -z


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_both_guidance_branches_have_the_same_grid_and_bounds(spectrum, solver):
    denoiser, generated = Recorder(), of(spectrum, "spectral_instance", told_delta=0.1)
    sampling = Sampling(solver, 5, 2.0, (0.0, 1.0), 7, 4, generated, 0.001)
    make_images(denoiser, sampling, range(4), [0, 1, 2, 3], torch.zeros(4, 3, N, N), 10, torch.device("cpu"))
    grid, bounds = generated.times(5, 7, range(4), torch.arange(4))
    assert len(denoiser.asked) == (5 if solver == "euler" else 9)
    for t, y, t_eps, told in denoiser.asked:
        assert torch.equal(t[:4], t[4:]) and torch.equal(told, torch.cat([bounds, bounds]))
        assert y.tolist() == [0, 1, 2, 3, 10, 10, 10, 10] and t_eps == 0.001
        assert any(torch.equal(t[:4], row) for row in grid)


def test_the_first_bad_step_is_named_with_the_images_own_time(spectrum):
    grid, _ = of(spectrum, "spectral_instance").times(4, 0, range(3), torch.arange(3))
    z = torch.zeros(3, 1, 2, 2)
    bad = torch.tensor([0.0, 1.0, 0.0])

    def velocity(z, t):
        poison = (bad > 0) & (t >= grid[2])
        return torch.where(poison[:, None, None, None], torch.nan, z)

    for solver in ("euler", "heun"):
        found = first_bad_steps(guided(lambda z, t, y: velocity(z, t), torch.zeros(3), 10), z, grid, solver)
        step = 2 if solver == "heun" else 3  # Heun's second step already asks at the third time
        assert found == ["", f" from step {step} of 4 (t = {float(grid[step - 1, 1]):.4g}) on", ""]


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_and_descriptions(spectrum):
    """Those of today's settings stay; wherever images differ, both do."""
    plain = Sampling("heun", 50, 2.9, (0.1, 1.0), 0, 128)
    assert setting_name(199, "ema1", plain) == "epoch0200-ema1-heun50-cfg2.9"
    assert plain.describe() == {"solver": "heun", "steps": 50, "cfg": 2.9, "interval": [0.1, 1.0], "seed": 0}
    other = replace(spectrum, sha256="6" * 64)
    generated = [
        *(of(spectrum, grid) for grid in ("spectral_global", "spectral_instance")),
        *(of(spectrum, "spectral_global", variant="power"), of(spectrum, "spectral_global", delta=0.2)),
        *(of(other, "spectral_global"), of(spectrum, "uniform", told_delta=0.1)),
        of(other, "uniform", told_delta=0.1),
    ]
    samplings = [plain, replace(plain, t_eps=0.01), replace(plain, t_eps=0.02)]
    samplings += [replace(plain, schedules=g) for g in generated]
    for distinct in ([setting_name(0, "ema1", s) for s in samplings], [str(s.describe()) for s in samplings]):
        assert len(set(distinct)) == len(samplings)
