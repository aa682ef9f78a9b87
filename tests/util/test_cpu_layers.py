"""Layers of a CPU against float64 and against the plain ones: util/cpu_layers.py."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from denoiser import Denoiser
from model_jit import JiT, rotate
from spectral_forcing import SpectralForcing
from tests.golden_inputs import SMALL, fill, normals
from util import cpu_layers
from util.cpu_layers import OneDNNLinear, rotate_complex, speed_up_on_cpu


@pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_against_float64(shape, bias):
    """Values, gradients, and the gradient of a gradient's square."""
    layer, found, expected = OneDNNLinear(24, 40, bias=bias), [], []
    x, g = normals(1, *shape, 24), normals(2, *shape, 40)
    for module, numbers in ((layer, found), (nn.Linear(24, 40, bias=bias).double(), expected)):
        module.load_state_dict(layer.state_dict())
        a = x.to(module.weight.dtype).requires_grad_()
        y = module(a)
        gradients = torch.autograd.grad(y.square(), (a, *module.parameters()), g.to(a.dtype), create_graph=True)
        second = torch.autograd.grad(sum(q.square().sum() for q in gradients[:2]), (a, module.weight))
        numbers += [y, *gradients, *second]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_other_derivatives_are_refused():
    layer, x = OneDNNLinear(24, 40), normals(1, 5, 24)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
    for transformed in (torch.func.vmap(layer), lambda x: torch.func.jvp(layer, (x,), (x,))):
        with pytest.raises(RuntimeError, match="setup_context"):
            transformed(x)


def test_rotation():
    x, cos, sin = normals(10, 2, 7, 3, 8), normals(11, 7, 1, 4), normals(12, 7, 1, 4)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        a, b = rotate_complex(x.to(dtype), cos, sin), rotate(x.to(dtype), cos, sin)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 5e-2)])
def test_a_denoiser_computes_what_it_did(monkeypatch, dtype, tolerance):
    """Relative to the largest value; bf16 has 8 bits."""
    plain = Denoiser(fill(JiT(**SMALL)), SpectralForcing(32), autocast_dtype=dtype)
    fast = copy.deepcopy(plain)
    for pays, kinds in ((False, {nn.Linear}), (True, {nn.Linear, OneDNNLinear})):  # small ones stay
        monkeypatch.setattr(cpu_layers, "onednn_pays", lambda pays=pays: pays)
        speed_up_on_cpu(fast)
        assert {type(m) for m in fast.modules() if isinstance(m, nn.Linear)} == kinds
    x, t, y = normals(1, 4, 3, 32, 32), torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 3, 9, 10])
    results = []
    for denoiser in (plain, copy.deepcopy(fast)):
        loss = denoiser(x, y, t, normals(2, 4, 3, 32, 32))
        results.append([denoiser.predict(x, t, y).detach(), *torch.autograd.grad(loss, list(denoiser.parameters()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-7
    assert list(fast.state_dict()) == list(plain.state_dict())
