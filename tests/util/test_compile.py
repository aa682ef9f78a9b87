"""torch.compile: the graphs that it traces, which needs no compiler for C++, and their results, which do."""

from functools import partial, partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from denoiser import Denoiser
from model_jit import JiT
from sampler import guided, sample, uniform_grid
from spectral_forcing import SpectralForcing
from spectral_ops.conditioning import ImageSchedules
from spectral_ops.residual import SpectralResidual
from spectral_ops.resolution import ResolutionSchedule
from tests.golden_inputs import SMALL, fill, normals
from util import compile as compilation
from util import cpu_layers
from util.compile import check_compiler, compile_denoiser, no_recompile, resolve_mode
from util.dist.context import DistContext, process_group
from util.errors import UserError
from util.optim import EMA

CPU, GPU = torch.device("cpu"), torch.device("cuda")
X, T, Y = normals(1, 4, 3, 32, 32), torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 3, 9, 10])


def test_auto_compiles_for_a_gpu_if_the_machine_can(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(compilation.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"--compile model needs Python\.h"):
        check_compiler("model", GPU)
    (tmp_path / "Python.h").touch()
    assert [resolve_mode("auto", device) for device in (CPU, GPU)] == ["off", "block"]
    assert resolve_mode("model", CPU) == "model"
    assert check_compiler("auto", GPU) == check_compiler("block", GPU) == []
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resolve_mode("auto", GPU) == "off" and "C compiler" in check_compiler("auto", GPU)[0]
    with pytest.raises(UserError, match="--compile block needs a C compiler"):
        check_compiler("block", GPU)
    assert check_compiler("off", GPU) == check_compiler("block", CPU) == []


@pytest.fixture
def graphs(monkeypatch):
    """`.frame_count` graphs so far, each executed as traced. A call that needs more than one is an error."""
    counter = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True):  # compile_denoiser sets it for the process
        yield counter
    torch._dynamo.reset()


POWER = [k**-2.9 for k in range(1, 24)]
RESIDUAL = {"spectral_residual": partial(SpectralResidual, mode="time_label")}
VARIANTS = {
    "plain": {},
    "sped_up": {"dtype": None, "sped_up": True},
    "no_context": {"in_context_len": 0, "forcing": {"window_size": 8}},
    "all": {
        **{"block_operators": RESIDUAL, "schedule_cond": True, "recompute": True},
        **{"forcing": {"schedule": "snr", "power": POWER}},
    },
}


def variant(dtype=torch.bfloat16, forcing=None, recompute=False, sped_up=False, **network) -> Denoiser:
    schedules = ImageSchedules(32, [0.1, 0.0, -0.1], 0.1) if "schedule_cond" in network else None
    net = fill(JiT(**{**SMALL, **network}))
    denoiser = Denoiser(net, SpectralForcing(32, **(forcing or {})), autocast_dtype=dtype, schedules=schedules)
    for block in net.blocks:
        block.recompute = recompute
    if sped_up:
        cpu_layers.speed_up_on_cpu(denoiser)
    return denoiser


def step(denoiser: nn.Module) -> torch.Tensor:
    loss = denoiser(X, Y, T, normals(2, 4, 3, 32, 32))
    loss.backward()
    return loss.detach()


CASES = [("off", "plain", 0), ("model", "all", 4)]
CASES += [("block", name, 4 if name == "no_context" else 5) for name in VARIANTS]


@pytest.mark.parametrize(("mode", "name", "count"), CASES)
def test_number_of_graphs_of_a_training_step(graphs, monkeypatch, mode, name, count):
    """One for each length of the sequence, shared by all blocks, and three for input operator, z and v, loss."""
    monkeypatch.setattr(cpu_layers, "SMALLEST", 0)
    denoiser, plain = (variant(**VARIANTS[name]) for _ in range(2))
    compile_denoiser(denoiser, mode, CPU)
    assert list(denoiser.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        loss = step(denoiser)
        assert graphs.frame_count == count
    torch.testing.assert_close(loss, step(plain), rtol=1e-2 if "dtype" not in VARIANTS[name] else 1e-5, atol=0)


def test_a_level_of_resolution_adds_a_graph_for_each_length_of_its_sequences(graphs):
    """And no step traces again."""
    denoiser = variant(levels=1)
    denoiser.resolution = ResolutionSchedule(32, POWER[:22])
    compile_denoiser(denoiser, "block", CPU)
    for _ in range(2):
        denoiser(X, Y, T, normals(2, 4, 3, 32, 32), level=(1, 0), weight=torch.ones(4)).backward()
        assert graphs.frame_count == 7


def test_sampling_reuses_its_graphs_and_traces_none_for_a_last_batch(graphs):
    """Nor for another batch, EMA weights, or back in training."""
    denoiser = variant()
    compile_denoiser(denoiser, "block", CPU)
    ema = EMA(denoiser, 0.9)
    step(denoiser)
    for batch in (4, 4, 3):
        velocity = guided(denoiser.velocity, Y[:batch], 10, 2.9, (0.3, 0.8))
        with ema.applied(), torch.no_grad(), denoiser.cast_weights(), no_recompile(batch < 4):
            sample(velocity, normals(batch, batch, 3, 32, 32), uniform_grid(4))
        assert graphs.frame_count == 11
    step(denoiser)
    assert graphs.frame_count == 11


def test_a_block_under_ddp_is_not_cut_into_pieces(graphs):
    """torch cuts what is compiled within DDP at the limits of its buckets, the first of which is 1 MB."""
    denoiser = variant(hidden_size=256)
    compile_denoiser(denoiser, "block", CPU)
    assert sum(p.nbytes for p in denoiser.net.blocks[0].parameters()) > 2**21
    with process_group(DistContext(), single_process=True):
        step(nn.parallel.DistributedDataParallel(denoiser))
    assert graphs.frame_count == 5
