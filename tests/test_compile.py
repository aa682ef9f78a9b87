"""torch.compile beside plain execution: util/acceleration.py. A compiler for C++ is needed."""

import shutil

import pytest
import torch

from denoiser import Denoiser
from model_jit import JiT
from spectral_forcing import SpectralForcing
from tests.conftest import raw, train
from tests.golden_inputs import SMALL, fill, normals
from util.acceleration import compile_network, resolve
from util.build import DenoiserConfig

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
