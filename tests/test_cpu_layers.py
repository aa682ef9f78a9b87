"""Layers of a CPU against float64 and against what other devices compute: util/cpu_layers.py."""

import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from denoiser import Denoiser
from model_jit import JiT
from spectral_forcing import SpectralForcing
from tests.golden_inputs import SMALL, fill, normals
from util import cpu_layers
from util.cpu_layers import Linear, applies, from_onednn, product, rms_norm, rotate_pairs, sandwich, switched_off


@pytest.fixture
def onednn(monkeypatch):
    """Products of oneDNN whatever the processor and the size; they are right on every one."""
    monkeypatch.setattr(cpu_layers, "onednn_pays", lambda: True)
    monkeypatch.setattr(cpu_layers, "SMALLEST", 0)


def test_small_and_other_things_stay_with_torch(monkeypatch):
    monkeypatch.setattr(cpu_layers, "onednn_pays", lambda: True)
    x, weight = torch.zeros(3, 128), torch.zeros(128, 128)
    assert from_onednn(x, weight)
    assert not from_onednn(x, weight[:, :127]) and not from_onednn(x.double(), weight.double())
    assert not from_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not from_onednn(x, weight)
    with switched_off():
        assert not from_onednn(x, weight) and not applies(x)
    assert applies(x)
    monkeypatch.setattr(cpu_layers, "onednn_pays", lambda: False)
    assert not from_onednn(x, weight)


@pytest.mark.parametrize("shape", [(5,), (2, 7), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_against_float64(onednn, shape, bias):
    layer = Linear(24, 40, bias=bias)
    x, g = normals(1, *shape, 24).requires_grad_(), normals(2, *shape, 40)
    assert from_onednn(x, layer.weight)
    y = layer(x)
    y.backward(g)
    x64, g64, w64 = (a.detach().double().numpy() for a in (x, g, layer.weight))
    expected = x64 @ w64.T + (layer.bias.detach().double().numpy() if bias else 0)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), g64 @ w64, atol=1e-5)
    rows = g64.reshape(-1, 40)
    np.testing.assert_allclose(layer.weight.grad.numpy(), rows.T @ x64.reshape(-1, 24), atol=1e-5)
    if bias:
        np.testing.assert_allclose(layer.bias.grad.numpy(), rows.sum(0), atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(onednn):
    weight, x = normals(3, 96, 64), normals(4, 50, 64)
    whole = product(x, weight)
    for i in (0, 17, 49):
        torch.testing.assert_close(product(x[i : i + 1], weight), whole[i : i + 1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (2, 3, 6, 6)])
def test_sandwich(onednn, shape):
    matrix, z = normals(5, 6, 6), normals(6, *shape)
    expected = torch.einsum("ui,...ij,vj->...uv", matrix.double(), z.double(), matrix.double())
    torch.testing.assert_close(sandwich(matrix, z).double(), expected, atol=1e-5, rtol=0)


def test_gradient_of_the_norm_by_differences():
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (5,)))
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))


def test_norm_is_torchs():
    x, weight = normals(7, 4, 5, 16).requires_grad_(), normals(8, 16).requires_grad_()
    found = rms_norm(x, weight, 1e-6)
    with switched_off():
        expected = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(found, expected)
    g = normals(9, 4, 5, 16)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), g), torch.autograd.grad(expected, (x, weight), g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rotation():
    pairs, cos, sin = normals(10, 2, 3, 7, 4, 2), normals(11, 7, 4), normals(12, 7, 4)
    found = rotate_pairs(pairs, cos, sin)
    with switched_off():
        torch.testing.assert_close(found, rotate_pairs(pairs, cos, sin))


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 5e-2)])
def test_network_and_gradients_agree_with_other_devices(onednn, dtype, tolerance):
    """Relative to the largest value; bf16 has 8 bits."""
    denoiser = Denoiser(fill(JiT(**SMALL)), SpectralForcing(32), autocast_dtype=dtype)
    x, noise = normals(1, 4, 3, 32, 32), normals(2, 4, 3, 32, 32)
    t, y = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 3, 9, 10])

    def computed() -> list[torch.Tensor]:
        loss = denoiser(x, y, t, noise)
        return [denoiser.predict(x, t, y).detach(), *torch.autograd.grad(loss, list(denoiser.parameters()))]

    fast = computed()
    with switched_off():
        plain = computed()
    for a, b in zip(fast, plain, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-7


def test_a_gradient_through_the_dct_is_that_of_plain_products():
    matrix, z = torch.randn(128, 128), torch.randn(1, 1, 128, 128, requires_grad=True)
    of_ours = torch.autograd.grad(cpu_layers.sandwich(matrix, z).square().sum(), z)[0]
    of_torch = torch.autograd.grad((matrix @ z @ matrix.T).square().sum(), z)[0]
    torch.testing.assert_close(of_ours, of_torch, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(not cpu_layers.onednn_pays(), reason="another processor")
def test_a_second_derivative_is_refused_rather_than_wrong():
    layer, x = cpu_layers.Linear(256, 256), torch.randn(2, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---- memory ----------------------------------------------------------------------------------------------------------

PAGES = """
import ctypes, resource, sys, torch
from util.acceleration import prepare_device
ctypes.CDLL(None).mallopt(-3, 2**17)  # glibc's default, which it changes as it goes on: what comes of it is chance
if sys.argv[1] == "keep":
    prepare_device(torch.device("cpu"))
def step():
    tensors = [torch.ones(2**21) for _ in range(8)]  # 8 MB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_memory_that_is_freed_stays_with_the_process():
    """Without that, each page may be asked for anew in each step."""
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", PAGES, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "plain")
    }
    assert faults["keep"] < 100 and faults["plain"] > 10 * 8 * 2**23 / 4096 / 2
