"""SwiGLU's products at padded widths: the same numbers from the same parameters (--pad_swiglu)."""

import pytest
import torch

import main_jit
import model_jit
from model_jit import SwiGLU
from tests.conftest import ONE, raw, train
from tests.golden_inputs import normals, small_denoiser
from util import config
from util.acceleration import pad_swiglu
from util.resume import load_for_inference


@pytest.fixture
def shapes(monkeypatch):
    """Of the weights of padded products, in the order of the calls."""
    found, real = [], model_jit.linear
    monkeypatch.setattr(model_jit, "linear", lambda x, w, b: found.append(tuple(w.shape)) or real(x, w, b))
    return found


def test_padded_products_are_the_same(shapes):
    """And so are the gradients; the parameters keep their shapes."""
    mlp = SwiGLU(24, 4.0, 0.0).double()
    x = normals(1, 2, 5, 24).double().requires_grad_()
    expected, before = mlp(x), {name: value.shape for name, value in mlp.state_dict().items()}
    gradients = torch.autograd.grad(expected.sin().sum(), [x, *mlp.parameters()])
    mlp.multiple = 48
    found = mlp(x)
    assert mlp.inner == 64 and shapes == [(2 * 96, 24), (24, 96)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(found.sin().sum(), [x, *mlp.parameters()])
    for a, b in zip(again, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert {name: value.shape for name, value in mlp.state_dict().items()} == before


def test_which_widths_are_padded(shapes):
    denoiser = small_denoiser()  # 170, and its next multiple of 8 is 176
    for on, count in ((False, 0), (True, 4), (False, 0)):
        pad_swiglu(denoiser, on)
        shapes.clear()
        with torch.no_grad():
            denoiser(normals(1, 2, 3, 32, 32), torch.tensor([1, 2]), torch.full((2,), 0.5), normals(2, 2, 3, 32, 32))
        assert shapes == [(352, 64), (64, 176)] * count


@pytest.mark.parametrize("multiple", [1, 2, 10])
def test_widths_that_fit_are_left_alone(shapes, multiple):
    mlp = SwiGLU(60, 4.0, 0.0)
    mlp.multiple = multiple
    mlp(torch.zeros(1, 1, 60))
    assert mlp.inner == 160 and shapes == []


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
    denoiser, _ = main_jit.load_denoiser(args, saved, ONE)
    return [m for m in denoiser.modules() if isinstance(m, SwiGLU)]


@pytest.mark.parametrize(("model", "warned"), [("JiT-B/16", True), ("JiT-700M", False)])
def test_where_padding_changes_nothing_it_is_said(model, warned):
    args = config.resolve({"dataset": "cifar10", "model": model, "pad_swiglu": True}, None, training=True)
    args.img_size = 256
    assert any("--pad_swiglu has no effect" in w and "2048" in w for w in config.check(args, evaluates=False)) == warned
