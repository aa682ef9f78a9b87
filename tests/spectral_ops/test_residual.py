"""SpectralDiT's correction against scipy and its formulas, alone and in the blocks of a network.

Shapes: B batch, N = side^2 patch tokens, D width.
"""

import math
from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from model_jit import JiT, JiT_models
from spectral_ops.residual import MODES, SpectralResidual, blur, blur_matrix
from tests.golden_inputs import normals

WEIGHTS = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
SMALL = {
    **{"input_size": 32, "patch_size": 8, "hidden_size": 64, "depth": 4, "num_heads": 4, "num_classes": 10},
    **{"bottleneck_dim": 16, "in_context_len": 3, "in_context_start": 1},
}


def assert_same(actual, expected, tolerance=2e-6):
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=0)


def by_scipy(r, side):
    """The blur of r (B, N, D) in float64."""
    grid = r.detach().double().numpy().reshape(-1, side, side, r.shape[-1])
    out = np.empty(grid.shape)
    for b, d in np.ndindex(grid.shape[0], grid.shape[3]):
        out[b, :, :, d] = scipy.ndimage.convolve(grid[b, :, :, d], WEIGHTS, mode="nearest")
    return torch.from_numpy(out.reshape(r.shape))


def filled(module, seed=0, std=0.3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g))
    return module


# --- the blur


@pytest.mark.parametrize("side", [1, 2, 3, 5, 16])
def test_blur_is_scipys_and_keeps_a_constant(side):
    r, matrix = normals(1, 2, side * side, 3), blur_matrix(side)
    assert_same(blur(r, matrix), by_scipy(r, side))
    assert matrix.sum(1).eq(1).all() and matrix.bfloat16().float().equal(matrix)


# --- the correction


def correction(module, r, c, side):
    """g_lo low + g_hi high in float64, written out with a convolution; differentiable."""
    p = {name: value.double() for name, value in module.named_parameters()}
    if module.mode == "static":
        u = p["raw_gates"].expand(len(r), 2)
    else:
        hidden = c.double() @ p["fc1.weight"].T + p["fc1.bias"]
        u = hidden * torch.sigmoid(hidden) @ p["fc2.weight"].T + p["fc2.bias"]
    g_lo, g_hi = (module.scale * torch.tanh(u))[:, :, None, None, None].unbind(1)
    d = r.shape[-1]
    grid = r.double().transpose(1, 2).reshape(-1, d, side, side)
    kernel = torch.from_numpy(WEIGHTS).expand(d, 1, 5, 5)
    low = F.conv2d(F.pad(grid, (2, 2, 2, 2), mode="replicate"), kernel, groups=d)
    return (g_lo * low + g_hi * (grid - low)).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("side", [4, 2])
@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradients_follow_the_formula(mode, side):
    """On the grid of tokens that it was built for, and on that of an image half as wide."""
    dim = 8
    module = filled(SpectralResidual(dim, 4, mode, scale=0.7), std=0.6)
    shapes = [(3, side * side, dim), (3, dim), (3, dim)]
    r, t_emb, y_emb = leaves = [normals(s, *shape).requires_grad_() for s, shape in enumerate(shapes)]
    out = module(r, t_emb, y_emb)
    expected = correction(module, r, t_emb + y_emb if mode == "time_label" else t_emb, side)
    assert_same(out, expected.detach())
    assert out.dtype == torch.float32 and expected.abs().mean() > 0.05
    weights, where = normals(9, *out.shape), [*leaves, *module.parameters()]
    got = torch.autograd.grad((out * weights).sum(), where, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), where, allow_unused=True)
    assert [g is not None for g in got[:3]] == [True, mode != "static", mode == "time_label"]
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.abs().max() > 0.01
            assert_same(a, b, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_new_module_is_initialised_and_corrects_nothing(mode):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    module = SpectralResidual(192, 16, mode)
    assert torch.rand(2).equal(expected)  # torch's generator is where it was
    r, t_emb = normals(1, 2, 256, 192), normals(2, 2, 192)
    assert module(r, t_emb, t_emb).equal(torch.zeros(2, 256, 192))
    if mode != "static":
        bound = math.sqrt(6 / (192 + 48))  # Xavier's
        assert 0.97 * bound < module.fc1.weight.abs().max() <= bound
    assert SpectralResidual(192, 16).mode == "time" and SpectralResidual(192, 16).scale == 1


def test_matrices_are_right_after_a_move_from_the_meta_device_and_after_inference():
    r, t_emb, module = normals(1, 2, 16, 8), normals(2, 2, 8), SpectralResidual(8, 4)
    torch.nn.init.normal_(module.fc2.weight)
    with torch.device("meta"):
        moved = SpectralResidual(8, 4)
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(module.state_dict())
    assert torch.equal(moved(r, t_emb), module(r, t_emb))
    assert torch.equal(moved(r[:, :4], t_emb), module(r[:, :4], t_emb))
    with torch.inference_mode():
        module.to("cpu", torch.float64)
    module.matrix4.requires_grad_()  # an inference tensor refuses


@pytest.mark.parametrize("count", [15, 9, 64])
def test_tokens_of_another_grid_are_refused(count):
    with pytest.raises(ValueError, match=rf"{count} patch tokens are no square grid with a side of \[4, 2, 1\]"):
        SpectralResidual(8, 4)(normals(1, 2, count, 8), normals(2, 2, 8))


@torch.no_grad()
def test_a_small_gate_is_not_rounded_away_under_autocast():
    module = SpectralResidual(8, 4, "static")
    module.raw_gates.fill_(1e-3)
    r = normals(1, 2, 16, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(r, torch.zeros(2, 8))
    assert out.dtype == torch.float32
    assert_same(out / r.float() / 1e-3, torch.ones(2, 16, 8), 0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("off", 1.0), "'off'"), (("label", 1.0), "time_label"), (("time", 0.0), "0.0"), (("time", math.inf), "inf")],
)
def test_refused_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectralResidual(8, 4, *arguments)


# --- in a network


def inputs():
    return normals(11, 3, 3, 32, 32), torch.tensor([0.05, 0.5, 0.95]), torch.tensor([0, 3, 10])


def network(mode, seed=5, **changes):
    torch.manual_seed(seed)
    operators = {} if mode is None else {"spectral_residual": partial(SpectralResidual, mode=mode)}
    return JiT(**{**SMALL, **changes}, block_operators=operators)


def with_random_weights(mode, **changes):
    """All shared parameters matter; those of the correction are as at the start of a run."""
    net = network(mode, **changes)
    missing, unexpected = net.load_state_dict(filled(network(None, **changes), std=0.1).state_dict(), strict=False)
    assert not unexpected and all(".spectral_residual." in name for name in missing)
    return net


@pytest.mark.parametrize("mode", MODES)
def test_initial_values_and_the_same_draws_for_all_others(mode):
    plain, net = network(None).state_dict(), network(mode).state_dict()
    new = [name for name in net if name not in plain]
    assert [name for name in net if name in plain] == list(plain)
    assert all(net[name].equal(plain[name]) for name in plain)
    names = ["raw_gates"] if mode == "static" else ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert new == [f"blocks.{i}.spectral_residual.{name}" for i in range(4) for name in names]
    for name in new:
        assert net[name].any() == name.endswith("fc1.weight")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("mode", "change"),
    [*((mode, {}) for mode in MODES), ("time", {"attn_drop": 0.2, "proj_drop": 0.2}), ("time", {"in_context_len": 0})],
)
def test_at_the_start_output_and_gradients_are_those_of_the_plain_network(mode, change, autocast):
    """To the bit, with weights in which every branch matters."""
    outputs, gradients = [], []
    for net in (with_random_weights(None, **change), with_random_weights(mode, **change)):
        torch.manual_seed(1)  # dropout
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = net.train()(*inputs())
        out.float().square().mean().backward()
        outputs.append(out)
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    plain, corrected = gradients
    assert outputs[0].equal(outputs[1]) and outputs[0].std() > 0.1
    assert all(plain[name].equal(corrected[name]) and plain[name].any() for name in plain)
    new = {name: value for name, value in corrected.items() if name not in plain}
    assert all(value.any() != ("fc1" in name) for name, value in new.items())  # what is behind a zero does not move yet


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_each_block_adds_the_correction_of_its_own_mlp_branch(mode):
    net = with_random_weights(mode)
    seen = []
    for i, block in enumerate(net.blocks):
        operator = filled(block.spectral_residual, seed=i)
        block.mlp.register_forward_hook(lambda mlp, args, out: seen.append([out]))
        operator.register_forward_hook(lambda operator, args, out: seen[-1].extend([*args, out]))
        block.register_forward_hook(lambda block, args, out: seen[-1].extend([args, out]))
    x, t, y = inputs()
    net(x, t, y)
    for block, (mlp, r, t_emb, y_emb, added, args, out) in zip(net.blocks, list(seen), strict=True):
        context = mlp.shape[1] - 16
        assert_same(r, (block.adaLN_modulation(args[1]).chunk(6, dim=-1)[5][:, None] * mlp)[:, context:])
        assert_same(t_emb, net.t_embedder(t))
        assert_same(y_emb, net.y_embedder(y))
        conditioning = t_emb + y_emb if mode == "time_label" else t_emb
        assert_same(added, correction(block.spectral_residual, r, conditioning, 4), 1e-5)
        block.operator_names = []
        change = out - block(*args)
        assert_same(change[:, context:], added, 1e-5)
        assert change[:, :context].eq(0).all()  # in-context tokens are on no grid
        assert added.abs().max() > 1e-3


def test_number_of_parameters_is_the_published_one():
    count = {}
    for mode in (None, *MODES):
        operators = {} if mode is None else {"spectral_residual": partial(SpectralResidual, mode=mode)}
        with torch.device("meta"):
            net = JiT_models["JiT-Ti/1"](input_size=32, num_classes=10, block_operators=operators)
        count[mode] = sum(p.numel() for p in net.parameters())
    added = {mode: count[mode] - count[None] for mode in MODES}
    assert added == {"time": 74_896, "time_label": 74_896, "static": 16}
    assert round(100 * 74_896 / count[None], 2) == 1.36  # of 5.5 M
