"""The transformer against a second implementation in numpy, and its parts against formulas: model_jit.py.

Shapes: B batch, N tokens, D width, h heads, d = D/h, K in-context tokens, p patch.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest

from model_jit import JiT, JiT_models, RMSNorm, rope_table
from tests.golden_inputs import fill, normals

SMALL = {
    **{"input_size": 16, "patch_size": 4, "hidden_size": 48, "depth": 4, "num_heads": 3},
    **{"num_classes": 5, "bottleneck_dim": 10, "in_context_len": 3, "in_context_start": 1},
}


def inputs(net, batch=3, channels=3):
    x = normals(1, batch, channels, net.input_size, net.input_size)
    t = torch.linspace(0.1, 0.95, batch)
    return x, t, torch.arange(batch) * 2 % (net.num_classes + 1)


def assert_same(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.detach().double(), expected.double(), atol=tolerance, rtol=0)


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def position(k, side, dim):
    """Sin-cos embedding (D,) of token k: the first half from its column."""
    out = []
    for where in (k % side, k // side):
        angles = [where / 10000 ** (j / (dim / 4)) for j in range(dim // 4)]
        out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return out


def turn(x, side):
    """2-D RoPE of x (B, h, K + N, d) as a product of complex numbers; the K tokens in front stay as they are."""
    d, image_tokens = x.shape[-1], side * side
    theta = 10000.0 ** (-2 * np.arange(d // 4) / (d // 2))
    angles = [np.concatenate([k // side * theta, k % side * theta]) for k in range(image_tokens)]
    angles = np.concatenate([np.zeros((x.shape[2] - image_tokens, d // 2)), angles])
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def attention(x, w, side, heads):
    batch, n, dim = x.shape
    q, k, v = np.split(x @ w["qkv.weight"].T + w["qkv.bias"], 3, axis=-1)
    q, k, v = (a.reshape(batch, n, heads, -1).swapaxes(1, 2) for a in (q, k, v))
    q, k = turn(rms(q, w["q_norm.weight"]), side), turn(rms(k, w["k_norm.weight"]), side)
    scores = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(dim // heads))
    out = (scores / scores.sum(-1, keepdims=True)) @ v
    return out.swapaxes(1, 2).reshape(batch, n, dim) @ w["proj.weight"].T + w["proj.bias"]


def swiglu(x, w):
    a, b = np.split(x @ w["w12.weight"].T + w["w12.bias"], 2, axis=-1)
    return (silu(a) * b) @ w["w3.weight"].T + w["w3.bias"]


def under(weights, prefix):
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def numpy_jit(net, x, t, y, heads, start):
    """The forward pass in float64, from the description of the network."""
    w = {name: p.detach().double().numpy() for name, p in net.state_dict().items()}
    x, t, y, p = x.double().numpy(), t.double().numpy(), y.numpy(), net.patch_size
    batch, channels, size = x.shape[:3]
    side, dim = size // p, w["pos_embed"].shape[-1]

    angle = t[:, None] * 10000.0 ** (-np.arange(128) / 128)
    hidden = silu(
        np.concatenate([np.cos(angle), np.sin(angle)], 1) @ w["t_embedder.mlp.0.weight"].T + w["t_embedder.mlp.0.bias"]
    )
    y_emb = w["y_embedder.embedding_table.weight"][y]
    c = silu(hidden @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"] + y_emb)[:, None]

    patches = [x[:, :, i : i + p, j : j + p].reshape(batch, -1) for i in range(0, size, p) for j in range(0, size, p)]
    tokens = np.stack(patches, 1) @ w["x_embedder.proj1.weight"].reshape(-1, channels * p * p).T
    tokens = tokens @ w["x_embedder.proj2.weight"][:, :, 0, 0].T + w["x_embedder.proj2.bias"]
    tokens = tokens + np.array([position(k, side, dim) for k in range(side * side)])

    for i in range(len(net.blocks)):
        if "in_context_posemb" in w and i == start:
            tokens = np.concatenate([y_emb[:, None] + w["in_context_posemb"], tokens], axis=1)
        block = under(w, f"blocks.{i}.")
        modulation = c @ block["adaLN_modulation.1.weight"].T + block["adaLN_modulation.1.bias"]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(modulation, 6, axis=-1)
        a = rms(tokens, block["norm1.weight"]) * (1 + scale_a) + shift_a
        tokens = tokens + gate_a * attention(a, under(block, "attn."), side, heads)
        m = rms(tokens, block["norm2.weight"]) * (1 + scale_m) + shift_m
        tokens = tokens + gate_m * swiglu(m, under(block, "mlp."))

    final = under(w, "final_layer.")
    shift, scale = np.split(c @ final["adaLN_modulation.1.weight"].T + final["adaLN_modulation.1.bias"], 2, axis=-1)
    out = rms(tokens[:, -side * side :], final["norm_final.weight"]) * (1 + scale) + shift
    out = out @ final["linear.weight"].T + final["linear.bias"]
    image = np.empty((batch, net.out_channels, size, size))
    for k in range(side * side):
        i, j = k // side * p, k % side * p
        image[:, :, i : i + p, j : j + p] = out[:, k].reshape(batch, p, p, -1).transpose(0, 3, 1, 2)
    return image


CHANGES = [
    *({}, {"in_context_start": 0}, {"in_context_start": 3, "in_context_len": 1}),
    *({"in_context_len": 0, "in_context_start": 99}, {"input_size": 18, "patch_size": 6}),
    *({"input_size": 3, "patch_size": 1}, {"in_channels": 1, "out_channels": 2}, {"mlp_ratio": 2.5, "num_heads": 4}),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@torch.no_grad()
def test_forward_against_numpy(change):
    settings = {**SMALL, **change}
    net = fill(JiT(**settings))
    x, t, y = inputs(net, channels=settings.get("in_channels", 3))
    expected = numpy_jit(net, x, t, y, settings["num_heads"], settings["in_context_start"])
    assert np.abs(expected).std() > 0.1
    assert_same(net(x, t, y), expected, 1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_computes_in_float32(autocast):
    norm = RMSNorm(64).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * normals(3, 64))
    x = (3 * normals(0, 50, 64)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = norm(x)
        assert norm(x.float()).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    expected = torch.from_numpy(rms(x.double().numpy(), norm.weight.detach().double().numpy()))
    error = (out.detach().double() - expected).abs() / expected.abs()
    assert error.max() < 2.0**-8 * 1.001  # one rounding to bfloat16, at the end
    assert_same(RMSNorm(4)(torch.full((1, 4), 1e-3)), np.full((1, 4), 1e-3 / math.sqrt(2e-6)), 1e-6)


@pytest.mark.parametrize(("attn_fp32", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
@torch.no_grad()
def test_precision_of_attention_under_autocast(monkeypatch, attn_fp32, dtype):
    product, seen = F.scaled_dot_product_attention, []

    def spy(q, k, v, **kwargs):
        out = product(q, k, v, **kwargs)
        seen.append((q.dtype, k.dtype, v.dtype, out.dtype))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    net = fill(JiT(**SMALL, attn_fp32=attn_fp32))
    expected, seen[:] = net(*inputs(net)), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*inputs(net))
    assert seen == [(dtype,) * 4] * 4 and out.dtype == torch.bfloat16
    assert 1e-4 < (out.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(("depth", "dropped"), [(6, {1, 2}), (8, {2, 3, 4, 5}), (3, set())])
@pytest.mark.parametrize("kind", ["attn_drop", "proj_drop"])
@torch.no_grad()
def test_dropout_in_the_middle_blocks_only(depth, dropped, kind):
    """With probability 1 a branch is what its last bias leaves of it, exactly."""
    net = fill(JiT(**{**SMALL, "depth": depth}, **{kind: 1.0}))
    x, c, (cos, sin) = normals(0, 2, 16, 48), normals(2, 2, 48), rope_table(16, 4)
    args = x, c, cos, sin, c, c
    for i, block in enumerate(net.blocks):
        in_eval, in_training = block.eval()(*args), block.train()(*args)
        if i not in dropped:
            assert in_training.equal(in_eval)
            continue
        gates = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        after_attention = x + gates[2] * (block.attn.proj.bias if kind == "attn_drop" else 0)
        modulated = block.norm2(after_attention) * (1 + gates[4]) + gates[3]
        branch = block.mlp(modulated) if kind == "attn_drop" else block.mlp.w3.bias
        assert_same(in_training, after_attention + gates[5] * branch)


def test_initial_values_of_every_parameter():
    torch.manual_seed(0)
    net = JiT(**{**SMALL, "num_classes": 100, "in_context_len": 20})
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    checked = set()
    for name, p in parameters.items():
        if "norm" in name:
            assert p.eq(1).all(), name
        elif name.endswith(".bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert p.eq(0).all(), name
        elif name == "in_context_posemb" or name.startswith(("y_embedder", "t_embedder")):
            assert kstest(p.detach().flatten().numpy(), "norm", args=(0, 0.02)).pvalue > 1e-3, name
        else:
            fan_out, fan_in = p.flatten(1).shape
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert kstest(p.detach().flatten().numpy(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3, name
            checked.add(name.rpartition("blocks.")[2].lstrip("0123456789."))
    linear = {"attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.w3.weight"}
    assert checked == linear | {"x_embedder.proj1.weight", "x_embedder.proj2.weight"}


MISTAKES = [
    ({"input_size": 18}, "image size 18 must be a multiple of the patch size 4"),
    *(({"num_heads": 5}, "5 heads do not fit width 48"), ({"num_heads": 8}, "multiple of 4")),  # heads of width 6
    *(({"in_context_start": 4}, "in_context_start is 4"), ({"in_context_start": -1}, "in_context_start is -1")),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        JiT(**{**SMALL, **change})


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="16x16"):
        JiT(**SMALL)(torch.zeros(1, 3, 16, 19), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_gradients_of_one_image_lie_in_memory_as_the_parameters_do():
    """DDP, which is given them in a pass over one image, warns of others, and copies."""
    net = fill(JiT(**SMALL))
    net(normals(0, 1, 3, 16, 16), torch.tensor([0.5]), torch.tensor([3])).sum().backward()
    assert all(p.grad.stride() == p.stride() for p in net.parameters())


# Their other sizes are in the published state dicts and counts of parameters: tests/test_golden.py
PUBLISHED_STARTS = {"B": 4, "L": 8, "H": 10, "700M": 12, "2B": 9, "7B": 8}


def test_in_context_tokens_start_where_the_published_models_have_them():
    for name, model in JiT_models.items():
        size = name.removeprefix("JiT-").partition("/")[0]
        if size in PUBLISHED_STARTS:
            assert model.keywords["in_context_start"] == PUBLISHED_STARTS[size], name


class Scaled(torch.nn.Linear):
    """A block operator: the residual times a function of both embeddings."""

    def __init__(self, dim, side):
        super().__init__(dim, dim)

    def forward(self, r, t_emb, y_emb):
        return r * super().forward(t_emb + 2 * y_emb)[:, None]


@torch.no_grad()
def test_each_block_operator_sees_the_residual_and_not_what_another_one_adds():
    net = fill(JiT(**SMALL, block_operators={"first": Scaled, "second": Scaled}))
    block, args = net.blocks[0], (normals(0, 2, 16, 48), normals(1, 2, 48), *rope_table(16, 4), *normals(3, 2, 2, 48))
    outputs = {}
    for names in ((), ("first",), ("second",), ("first", "second")):
        block.operator_names = list(names)
        outputs[names] = block(*args)
    plain, first, second, both = outputs.values()
    assert_same(both - plain, (first - plain) + (second - plain), 1e-4)
    assert (first - plain).abs().max() > 0.1 < (second - plain).abs().max()


@torch.no_grad()
def test_conditioning_on_schedules_changes_no_other_initial_value():
    torch.manual_seed(5)
    plain = JiT(**SMALL)
    torch.manual_seed(5)
    extended = JiT(**SMALL, schedule_cond=True)
    assert plain(*inputs(plain)).eq(0).all()  # the output is zero at the start
    assert extended(*inputs(extended), torch.ones(3, 2)).eq(0).all()
    assert all(extended.state_dict()[name].equal(p) for name, p in plain.state_dict().items())
    assert len(extended.state_dict()) > len(plain.state_dict())


@torch.no_grad()
def test_conditioning_on_schedules_is_part_of_adaln_and_of_nothing_else():
    net, seen = fill(JiT(**SMALL, schedule_cond=True)), []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    x, t, y = inputs(net)
    logsnr_range = torch.tensor([[-8.0, 12.0], [-7.0, 10.0], [-3.0, 4.0]])
    net(x, t, y, logsnr_range)
    _, c, _, _, t_emb, y_emb, _ = seen[0]
    assert_same(c, net.t_embedder(t) + net.y_embedder(y) + net.schedule_embedder(logsnr_range))
    assert t_emb.equal(net.t_embedder(t)) and y_emb.equal(net.y_embedder(y))


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_recomputation_changes_no_gradient(drop):
    net = fill(JiT(**SMALL, proj_drop=drop)).train()
    gradients = []
    for recompute in (False, True):
        for block in net.blocks:
            block.recompute = recompute
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(net(*inputs(net)).square().mean(), list(net.parameters())))
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))
