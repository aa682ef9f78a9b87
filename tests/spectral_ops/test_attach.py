"""An operator before a network: what the network sees, and that all else stays as it was."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sampler
from spectral_forcing import SpectralForcing
from spectral_ops.attach import attach, detach
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
    assert network(z, T).equal(plain)
    again = attach(network, operator)
    attached.detach()  # once more does no harm, not even to another one
    assert network(z, T).equal(expected)
    again.detach()
    with attach(network, operator):
        assert network(z, T, label=1).equal(expected)
    assert network(z, T).equal(plain) and not network._forward_pre_hooks


@pytest.mark.parametrize("where", [{}, {"image": "x", "time": "t"}, {"image": 1, "time": 0}])
def test_arguments_in_another_order(z, where):
    """The time is known by its name, and the image is the first of the others."""
    network, operator = TimeFirst(), SpectralForcing()
    expected = network(T, operator(z, T))
    with attach(network, operator, **where):
        assert network(T, z).equal(expected) and network(x=z, t=T).equal(expected) and network(T, x=z).equal(expected)


class AnyArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def forward(self, *args, **kwargs):
        return self.network(*args, **kwargs)


class NoTime(Network):
    def forward(self, x, noise):
        return super().forward(x, noise)


def test_a_wrapper_that_takes_any_arguments(z):
    wrapper, operator = AnyArguments(), SpectralForcing()
    expected = wrapper(operator(z, T), T)
    with attach(wrapper, operator, image=0, time=1):
        assert wrapper(z, T).equal(expected)
    with attach(wrapper, operator, image="z", time="t"):
        assert wrapper(z=z, t=T).equal(expected)
        with pytest.raises(TypeError, match="without its argument 't'"):
            wrapper(z=z, s=T)


@pytest.mark.parametrize(
    ("module", "where", "sentence"),
    [
        (Network, {"image": "sample"}, "Network.forward takes z, t, label, and no argument 'sample'"),
        (Network, {"time": 7}, "and no argument 7"),
        (Network, {"image": -1}, "and no argument -1"),
        (NoTime, {}, "NoTime.forward takes x, noise: say which one is the time"),
        (AnyArguments, {}, "takes any arguments: say which one is the time"),
    ],
)
def test_arguments_that_are_not_there(module, where, sentence):
    with pytest.raises(ValueError, match=sentence):
        attach(module(), SpectralForcing(), **where)


def test_what_is_no_module_or_no_operator(z):
    with pytest.raises(TypeError, match=r"is no module. Of a function f, .* lambda z, t: f\(operator\(z, t\), t\)"):
        attach(lambda z, t: z, SpectralForcing())
    for operator in (SpectralForcing, None):
        with pytest.raises(TypeError, match="is no operator"):
            attach(Network(), operator)
    network = Network()
    attach(network, SpectralForcing())
    with pytest.raises(ValueError, match="Network sees its input through an operator already"):
        attach(network, SpectralForcing())


def test_a_copy_has_an_operator_of_its_own(z):
    """As of an average of the weights, or after pickling."""
    network, operator = Network(), SpectralForcing()
    attached = attach(network, operator)
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.no_grad():
            copied.layer.weight.mul_(2)
            copied.layer.bias.mul_(2)
            torch.testing.assert_close(copied(z, T), 2 * network(z, T))
        detach(copied)
        torch.testing.assert_close(copied(z, T), 2 * network.layer(z) * T[:, None, None, None])
    assert network(z, T).equal(network.layer(operator(z, T)) * T[:, None, None, None])
    attached.detach()


@pytest.mark.parametrize("call", [lambda n, z: n(z, T), lambda n, z: n(z=z, t=T), lambda n, z: n(z, t=T)])
@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
@pytest.mark.parametrize("first", ["attach", "compile"])
def test_within_a_compiled_network(z, first, compiled, call):
    network, operator = Network(), SpectralForcing()
    plain, expected = network(z, T), network(operator(z, T), T)

    def compile_it():
        if compiled == "wrapped":
            return torch.compile(network, backend="eager", fullgraph=True)
        network.compile(backend="eager", fullgraph=True)
        return network

    if first == "compile":
        outer = compile_it()
        torch.testing.assert_close(call(outer, z), plain)
        attach(outer, operator)
    else:
        attach(network, operator)
        outer = compile_it()
    torch.testing.assert_close(call(outer, z), expected)
    detach(outer)
    torch.testing.assert_close(call(outer, z), plain)


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
        attach(outer, operator)
    else:
        attach(network, operator)
        outer = wrapped()
    out = outer(z, t=T)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    found = network.layer.weight.grad
    torch.testing.assert_close(found.full_tensor() if wrap == "fsdp" else found, gradient)


def test_attached_after_fully_shard_it_sees_the_image_before_it_is_cast(z, one_process):
    network, seen = Network(), []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(network, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    attach(network, lambda z, t: seen.append((z.dtype, t.dtype)) or z)
    assert network(z, T).dtype == torch.bfloat16 and seen == [(torch.float32, torch.float32)]


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
    grid.attach(scheduler)
    attached.detach()  # is over
    scheduler.set_timesteps(9)
    assert not scheduler.sigmas.equal(before)


def test_a_copy_of_a_scheduler_follows_the_grid():
    diffusers = pytest.importorskip("diffusers")
    scheduler, grid = diffusers.FlowMatchEulerDiscreteScheduler(), SpectralGrid(schedule())
    attached = grid.attach(scheduler)
    scheduler.set_timesteps(9)
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        copied.set_timesteps(5)
        assert copied.sigmas[:-1].tolist() == pytest.approx(grid.sigmas(5)) and len(scheduler.sigmas) == 10
    attached.detach()


def test_arguments_of_set_timesteps():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    SpectralGrid(schedule()).attach(scheduler)
    scheduler.set_timesteps(6, "cpu", None, 0.8)
    for arguments, sentence in (
        ({}, "needs num_inference_steps"),
        ({"num_inference_steps": 2, "mu": 0.8}, "at least 3"),
        ({"num_inference_steps": 5, "sigmas": [1.0, 0.5, 0.2, 0.1], "mu": 0.8}, "same length"),
    ):
        with pytest.raises(ValueError, match=sentence):
            scheduler.set_timesteps(**arguments)
        assert len(scheduler.sigmas) == 7


def test_grids_that_are_refused():
    diffusers = pytest.importorskip("diffusers")
    fits = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="the schedule of one spectrum"):
        SpectralGrid(TightSchedule.of_fits(fits, 32))
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler of diffusers, not DDIMScheduler"):
        SpectralGrid(schedule()).attach(diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="this scheduler inverts them"):
        SpectralGrid(schedule()).attach(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="at least 3"):
        SpectralGrid(schedule()).sigmas(2)
