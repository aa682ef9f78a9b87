"""An operator before a network: what the network sees, and that all else stays as it was."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sampler
from spectral_forcing import SpectralForcing
from spectral_ops.attach import attach
from spectral_ops.grid import SpectralGrid
from spectral_ops.schedule import TightSchedule
from tests.golden_inputs import CIFAR10_SPECTRUM, normals

T = torch.tensor([0.2, 0.7])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z, t, *, label=None):
        return self.layer(z) * t[:, None, None, None]


class TimeFirst(Network):
    def forward(self, t, x):
        return super().forward(x, t)


@pytest.fixture
def z():
    return normals(0, 2, 3, 8, 12)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_network_sees_what_is_filtered_until_it_is_detached(z):
    network, operator = Network(), SpectralForcing()
    plain, state, raw = network(z, T), list(network.state_dict()), z.clone()
    expected = network(operator(z, T), T)
    attached = attach(network, operator)
    assert network(z, T).equal(expected) and network(z=z, t=T).equal(expected) and network(z, t=T).equal(expected)
    assert not plain.allclose(expected) and z.equal(raw) and list(network.state_dict()) == state
    attached.detach()
    attached.detach()  # once more does no harm
    assert network(z, T).equal(plain)
    with attach(network, operator):
        assert network(z, T, label=1).equal(expected)
    assert network(z, T).equal(plain) and not network._forward_pre_hooks


@pytest.mark.parametrize("where", [{"image": "x", "time": "t"}, {"image": 1, "time": 0}])
def test_arguments_in_another_order(z, where):
    network, operator = TimeFirst(), SpectralForcing()
    expected = network(T, operator(z, T))
    with attach(network, operator, **where):
        assert network(T, z).equal(expected) and network(x=z, t=T).equal(expected) and network(T, x=z).equal(expected)


def test_what_is_refused(z):
    network, operator = Network(), SpectralForcing()
    with pytest.raises(ValueError, match="forward takes z, t, label, and no sample"):
        attach(network, operator, image="sample")
    with attach(network, operator):
        with pytest.raises(ValueError, match="Network sees its input through an operator already"):
            attach(network, operator)
        with pytest.raises(TypeError, match="without its argument 't'"):
            network(z)
    with attach(network, operator, time=7), pytest.raises(TypeError, match="without its argument 7"):
        network(z, T)


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_within_a_compiled_network(z, first):
    network, operator = Network(), SpectralForcing()
    plain, expected = network(z, T), network(operator(z, T), T)
    if first == "compile":
        network.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(network(z, T), plain)
    attached = attach(network, operator)
    if first == "attach":
        network.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(network(z, T), expected)
    attached.detach()
    torch.testing.assert_close(network(z, T), plain)


@pytest.mark.parametrize("first", ["attach", "wrap"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_within_ddp_and_fully_shard(z, wrap, first, one_process):
    network, operator = Network(), SpectralForcing()
    expected = network(operator(z, T), T)
    (gradient,) = torch.autograd.grad(expected.sum(), network.layer.weight)

    def wrapped():
        if wrap == "ddp":
            return DistributedDataParallel(network)
        return fully_shard(network, mesh=init_device_mesh("cpu", (1,)))

    if first == "wrap":
        outer = wrapped()
        attach(outer, operator)  # DDP's own forward takes any arguments: by position
    else:
        attach(network, operator)
        outer = wrapped()
    out = outer(z, T)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    found = network.layer.weight.grad
    torch.testing.assert_close(found.full_tensor() if wrap == "fsdp" else found, gradient)


def schedule():
    power, centred = (torch.tensor(CIFAR10_SPECTRUM[name], dtype=torch.float64) for name in ("P", "P_centred"))
    return TightSchedule.of_spectrum(power, centred, 32)


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_scheduler_of_diffusers_makes_the_steps_of_our_solver(name, shift):
    """On Gaussian data of variance 3, for which the velocity is known."""
    diffusers = pytest.importorskip("diffusers")
    kind = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}[name]
    scheduler, grid = getattr(diffusers, kind)(shift=shift), SpectralGrid(schedule())

    def velocity(z, t):
        t = t.double()
        return (3 * t / (3 * t**2 + (1 - t) ** 2) - 1) / (1 - t) * z

    scheduler.set_timesteps(9)
    before = scheduler.sigmas.clone()
    attached = grid.attach(scheduler)
    with pytest.raises(ValueError, match="follows a grid already"):
        grid.attach(scheduler)
    scheduler.set_timesteps(sigmas=[0.1] * 9) if name == "euler" else scheduler.set_timesteps(9)
    z = torch.ones(1, 1, 1, 1)
    for timestep in scheduler.timesteps:
        z = scheduler.step(-velocity(z, 1 - timestep / 1000).float(), timestep, z).prev_sample
    expected = sampler.sample(velocity, torch.ones(1, 1, 1, 1), schedule().sampling_grid(9), name)
    assert float(z) == pytest.approx(float(expected), rel=1e-5)
    attached.detach()
    scheduler.set_timesteps(9)
    assert scheduler.sigmas.equal(before)


def test_grids_that_are_refused():
    diffusers = pytest.importorskip("diffusers")
    fits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="the schedule of one spectrum"):
        SpectralGrid(TightSchedule.of_fits(fits, 32))
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler of diffusers, not DDIMScheduler"):
        SpectralGrid(schedule()).attach(diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="at least 3"):
        SpectralGrid(schedule()).sigmas(2)
