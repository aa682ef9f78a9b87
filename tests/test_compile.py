"""torch.compile: what it traces, which needs no compiler for C++, and what it then computes, which does."""

import shutil
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from denoiser import Denoiser
from engine_jit import Sampling, generate
from model_jit import JiT
from sampler import guided, sample, uniform_grid
from spectral_conditioning import ImageSchedules
from spectral_forcing import SpectralForcing
from tests.conftest import ONE, raw, train
from tests.golden_inputs import SMALL, fill, normals, small_denoiser
from util import acceleration
from util.acceleration import check_compiler, compile_network, pad_swiglu, resolve
from util.build import DenoiserConfig
from util.distributed import process_group
from util.ema import EMA
from util.errors import UserError
from util.parallel import build_sharded, checkpoint_activations, gathered, initialise

BLOCK, MODEL = "block", "model"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
T, Y = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 3, 9, 10])


def test_auto(monkeypatch):
    monkeypatch.setattr(acceleration, "lacking", lambda: None)
    assert (resolve("auto", CPU), resolve("auto", GPU)) == ("off", "block")
    assert all(resolve(mode, device) == mode for mode in ("off", BLOCK, MODEL) for device in (CPU, GPU))
    assert check_compiler("auto", GPU) == check_compiler(BLOCK, GPU) == []


def test_a_machine_that_cannot_compile_for_its_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(acceleration.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "Python.h" in acceleration.lacking()
    (tmp_path / "Python.h").touch()
    assert acceleration.lacking() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in acceleration.lacking()
    assert resolve("auto", GPU) == "off" and "C compiler" in check_compiler("auto", GPU)[0]
    with pytest.raises(UserError, match="--compile block needs a C compiler"):
        check_compiler(BLOCK, GPU)
    assert check_compiler("off", GPU) == check_compiler(BLOCK, CPU) == []


@pytest.mark.parametrize(("mode", "count"), [("off", 0), (BLOCK, 4 + 3), (MODEL, 1 + 3)])
def test_what_is_compiled(mode, count):
    """And Spectral Forcing, z and v, the loss."""
    denoiser = Denoiser(JiT(**SMALL), SpectralForcing(32))
    names = list(denoiser.state_dict())
    compile_network(denoiser, mode)
    assert sum(m._compiled_call_impl is not None for m in denoiser.modules()) == count
    assert list(denoiser.state_dict()) == names


# ---- what is traced --------------------------------------------------------------------------------------------------


def traced(fullgraph: bool = True):
    """Module.compile that executes what it traces as it is, and what counts the graphs."""
    graphs = CompileCounter()
    return partialmethod(nn.Module.compile, backend=graphs, fullgraph=fullgraph), graphs


@pytest.fixture
def graphs(monkeypatch):
    """`.frame_count` graphs so far. A call that needs more than one is an error."""
    compile_as_traced, graphs = traced()
    monkeypatch.setattr(nn.Module, "compile", compile_as_traced)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True):  # compile_network sets it for the process
        yield graphs
    torch._dynamo.reset()


VARIANTS = {
    "float32": {"dtype": None},
    "windows": {"forcing": {"window_size": 8}},
    "power": {"forcing": {"schedule": "power", "alpha": 2.0}},
    "snr": {"forcing": {"schedule": "snr", "power": [k**-2.9 for k in range(1, 24)]}},
    "no_context": {"in_context_len": 0},
    "attn_fp32": {"attn_fp32": True},
    "told": {"told_schedule": True},
    "recomputed": {"recomputed": True},
    "padded": {"padded": True},
    **{mode: {"spectral_residual": mode} for mode in ("time", "time_label", "static")},
    "recomputed_time": {"spectral_residual": "time", "recomputed": True},
}


def variant(dtype=torch.bfloat16, forcing=None, recomputed=False, padded=False, **network) -> Denoiser:
    schedules = ImageSchedules(32, [0.1, 0.0, -0.1], 0.1) if "told_schedule" in network else None
    net = fill(JiT(**{**SMALL, **network}))
    denoiser = Denoiser(net, SpectralForcing(32, **(forcing or {})), autocast_dtype=dtype, schedules=schedules)
    pad_swiglu(denoiser, padded)
    if recomputed:
        checkpoint_activations(denoiser)
    return denoiser


def step(denoiser: Denoiser) -> torch.Tensor:
    loss = denoiser(normals(1, 4, 3, 32, 32), Y, T, normals(2, 4, 3, 32, 32))
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_block_is_one_graph(graphs, name):
    """For each length of the sequence, shared by all blocks; Spectral Forcing, z and v, and the loss are three more."""
    denoiser, plain = (variant(**VARIANTS[name]) for _ in range(2))
    compile_network(denoiser, BLOCK)
    for _ in range(2):
        loss = step(denoiser)
        assert graphs.frame_count == (4 if name == "no_context" else 5)
    torch.testing.assert_close(loss, step(plain), rtol=1e-2 if name != "float32" else 1e-5, atol=0)


@pytest.mark.parametrize("dropout", [{"proj_drop": 0.1}, {"attn_drop": 0.1, "recomputed": True}])
def test_blocks_with_dropout_have_graphs_of_their_own(graphs, dropout):
    """They are 1 and 2 of 4, and the in-context tokens come before 2."""
    denoiser = variant(**dropout)
    compile_network(denoiser, BLOCK)
    for _ in range(2):
        step(denoiser)
        assert graphs.frame_count == 4 + 3


@pytest.mark.parametrize("name", ["float32", "told", "recomputed_time"])
def test_the_network_is_one_graph(graphs, name):
    denoiser = variant(**VARIANTS[name])
    compile_network(denoiser, MODEL)
    for _ in range(2):
        step(denoiser)
        assert graphs.frame_count == 1 + 3


@pytest.mark.parametrize(
    ("mode", "expected"), [(BLOCK, {"train": 5, "sample": 11, "own_grids": 13}), (MODEL, {"train": 4, "sample": 8})]
)
def test_how_many_graphs_a_run_needs(graphs, mode, expected):
    """Of batches of one size: training; sampling, with and without guidance; times of its own for each sample. And
    nothing is traced again: not for another step or batch, nor with averages of the weights, nor back in training."""
    denoiser = variant()
    compile_network(denoiser, mode)
    ema = EMA(denoiser, 0.9)
    for _ in range(2):
        step(denoiser)
        assert graphs.frame_count == expected["train"]
    velocity = guided(denoiser.velocity, Y, 10, 2.9, (0.3, 0.8))
    shared, own = uniform_grid(4), uniform_grid(4)[:, None].expand(-1, 4).contiguous()
    for name, grid in (("sample", shared), ("own_grids", own)):
        if name not in expected:
            continue
        for seed in range(2):
            with ema.applied_to(denoiser), torch.no_grad(), denoiser.fixed_weights():
                sample(velocity, normals(seed, 4, 3, 32, 32), grid)
            assert graphs.frame_count == expected[name]
    step(denoiser)
    assert graphs.frame_count == max(expected.values())


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_sharded_block_is_one_graph(monkeypatch, recomputed):
    """Around it, where weights are gathered and freed, nothing is compiled."""
    compile_as_traced, graphs = traced(fullgraph=False)
    monkeypatch.setattr(nn.Module, "compile", compile_as_traced)
    torch._dynamo.reset()

    def build() -> Denoiser:
        return Denoiser(JiT(**SMALL), SpectralForcing(32), autocast_dtype=torch.bfloat16)

    with process_group(ONE, also_alone=True):
        denoiser = build_sharded(build, ONE)
        initialise(denoiser, build, ONE)
        if recomputed:
            checkpoint_activations(denoiser)
        compile_network(denoiser, BLOCK)
        for _ in range(2):
            step(denoiser)
            assert graphs.frame_count == 5
        for _ in range(2):
            with torch.no_grad(), gathered(denoiser):
                denoiser.predict(normals(1, 4, 3, 32, 32), T, Y)
            assert graphs.frame_count == 8
    torch._dynamo.reset()


def test_what_ddp_wraps_is_not_cut_into_pieces(graphs):
    """torch cuts what is compiled within DDP at the limits of its buckets, the first of which is 1 MB."""
    wide = {"hidden_size": 256, "num_heads": 4}
    denoiser = Denoiser(fill(JiT(**{**SMALL, **wide})), SpectralForcing(32))
    compile_network(denoiser, BLOCK)
    assert sum(p.nbytes for p in denoiser.net.blocks[0].parameters()) > 2**21
    with process_group(ONE, also_alone=True):
        wrapped = nn.parallel.DistributedDataParallel(denoiser)
        for _ in range(2):
            wrapped(normals(1, 4, 3, 32, 32), Y, T, normals(2, 4, 3, 32, 32)).backward()
            assert graphs.frame_count == 5


# ---- what is computed ------------------------------------------------------------------------------------------------


def loss_and_gradients(mode: str, dtype: torch.dtype | None) -> list[torch.Tensor]:
    denoiser = Denoiser(fill(JiT(**SMALL)), SpectralForcing(32), autocast_dtype=dtype)
    compile_network(denoiser, mode)
    x = normals(1, 4, 3, 32, 32)
    loss = denoiser(x, Y, T, normals(2, 4, 3, 32, 32))
    with torch.no_grad():
        out = denoiser.predict(x, T, Y)
    return [loss.detach(), out, *torch.autograd.grad(loss, list(denoiser.parameters()))]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"), [(BLOCK, None, 1e-5), (BLOCK, torch.bfloat16, 5e-2), (MODEL, torch.bfloat16, 5e-2)]
)
def test_compiled_agrees_with_plain(mode, dtype, tolerance):
    """Relative to the largest value; bf16 has 8 bits."""
    for a, b in zip(loss_and_gradients(mode, dtype), loss_and_gradients("off", dtype), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-7


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_run_trains_samples_and_goes_on_plainly(tiny, tmp_path):
    compiled = train(tmp_path / "compiled", epochs=1, compile=BLOCK)
    plain = train(tmp_path / "plain", epochs=1)
    for name, value in raw(plain)["model"].items():
        torch.testing.assert_close(raw(compiled)["model"][name], value, rtol=1e-4, atol=1e-4)
    train(compiled, epochs=2, compile="off")
    assert raw(compiled)["epoch"] == 1


def test_every_mode_is_known_to_the_command_line(tiny, tmp_path, capsys):
    train(tmp_path / "run", code=2, compile="everything")
    assert "--compile" in capsys.readouterr().err
    assert "compile" not in DenoiserConfig.__dataclass_fields__  # no part of what a checkpoint computes


def test_a_last_batch_of_its_own_size_compiles_nothing():
    """Five images in batches of two: the graphs of the first batch are all there are."""
    counter, denoiser = CompileCounter(), small_denoiser()
    denoiser.net.compile(backend=counter, dynamic=False)
    sampling, made = Sampling("heun", 3, 2.9, (0.1, 1.0), 0, 2), []
    for batch in generate(denoiser, sampling, [0, 1, 2, 3, 4], (3, 32, 32), 10, ONE):
        made.append((len(batch), counter.frame_count))
    assert made == [(2, 2), (2, 2), (1, 2)]  # guided and not
