"""torch.compile and padded widths beside plain execution: util/acceleration.py.

Tests that compile are slow, and need a compiler for C++.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import main_jit
from denoiser import Denoiser
from engine_jit import Sampling, generate
from model_jit import JiT, SwiGLU
from spectral_forcing import SpectralForcing
from tests.conftest import raw, train
from tests.golden_inputs import SMALL, fill, normals, small_denoiser
from util.acceleration import compile_network, pad_swiglu, resolve
from util.build import DenoiserConfig
from util.distributed import World
from util.resume import load_for_inference

BLOCK, MODEL = "block", "model"


def test_auto():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (resolve("auto", cpu), resolve("auto", gpu)) == ("off", "block")
    assert all(resolve(mode, device) == mode for mode in ("off", BLOCK, MODEL) for device in (cpu, gpu))


@pytest.mark.parametrize(("mode", "count"), [("off", 0), (BLOCK, 4 + 1), (MODEL, 1 + 1)])
def test_what_is_compiled(mode, count):
    """And Spectral Forcing."""
    denoiser = Denoiser(JiT(**SMALL), SpectralForcing(32))
    names = list(denoiser.state_dict())
    compile_network(denoiser, mode)
    assert sum(m._compiled_call_impl is not None for m in denoiser.modules()) == count
    assert list(denoiser.state_dict()) == names


def loss_and_gradients(mode: str, dtype: torch.dtype | None) -> list[torch.Tensor]:
    denoiser = Denoiser(fill(JiT(**SMALL)), SpectralForcing(32), autocast_dtype=dtype)
    compile_network(denoiser, mode)
    x, noise = normals(1, 4, 3, 32, 32), normals(2, 4, 3, 32, 32)
    t, y = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 3, 9, 10])
    loss = denoiser(x, y, t, noise)
    with torch.no_grad():
        out = denoiser.predict(x, t, y)
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
    for batch in generate(denoiser, sampling, [0, 1, 2, 3, 4], (3, 32, 32), 10, World()):
        made.append((len(batch), counter.frame_count))
    assert made == [(2, 2), (2, 2), (1, 2)]  # guided and not


# Padded widths.


def test_padded_feed_forward_is_the_same():
    mlp = SwiGLU(24, 4.0, 0.0).double()
    x = normals(1, 2, 5, 24).double().requires_grad_()
    expected = mlp(x)
    gradients = torch.autograd.grad(expected.sin().sum(), [x, *mlp.parameters()])
    state, widths = dict(mlp.state_dict()), []
    mlp.multiple = 48
    with Widths(widths):
        found = mlp(x)
    assert mlp.inner == 64 and widths == [192, 96]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(found.sin().sum(), [x, *mlp.parameters()])
    for a, b in zip(again, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert {n: v.shape for n, v in mlp.state_dict().items()} == {n: v.shape for n, v in state.items()}


class Widths(TorchFunctionMode):
    """Notes the inner width of linear layers: rows of the first, columns of the second."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.found.append(max(args[1].shape))
        return function(*args, **(kwargs or {}))


def test_which_widths_are_padded():
    denoiser, widths = small_denoiser(), []  # 170, which becomes 176
    pad_swiglu(denoiser)
    z, t, y = normals(1, 2, 3, 32, 32), torch.full((2,), 0.5), torch.tensor([1, 2])
    with Widths(widths), torch.no_grad():
        denoiser(z, y, t, z)
    assert widths.count(352) == widths.count(176) == 4 and 340 not in widths and 170 not in widths


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_padded_run_trains_as_a_plain_one_and_writes_the_same_shapes(tiny, tmp_path, precision):
    padded = train(tmp_path / "padded", epochs=1, pad_swiglu=True, precision=precision)
    plain = train(tmp_path / "plain", epochs=1, precision=precision)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for name, value in raw(plain)["model"].items():
        torch.testing.assert_close(raw(padded)["model"][name], value, rtol=tolerance, atol=tolerance)
    assert [m.multiple for m in seen_by_sampling(padded)] == [8] * 4
    train(padded, epochs=2, pad_swiglu=False)
    assert raw(padded)["epoch"] == 1


def seen_by_sampling(folder) -> list[SwiGLU]:
    args, saved = load_for_inference({"resume": str(folder)}, "sample")
    denoiser, _ = main_jit.load_denoiser(args, saved, World())
    return [m for m in denoiser.modules() if isinstance(m, SwiGLU)]
