"""The transformer against a second implementation in numpy, and its parts against formulas: model_jit.py.

Shapes: B batch, N tokens, D width, h heads, d = D/h, K in-context tokens, p patch.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from denoiser import Denoiser
from model_jit import JiT, JiT_models, RMSNorm, rope_table, rotate, sincos_position_embedding
from spectral_forcing import SpectralForcing
from util import cpu_layers

SMALL = {
    "input_size": 16,
    "patch_size": 4,
    "hidden_size": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 5,
    "bottleneck_dim": 10,
    "in_context_len": 3,
    "in_context_start": 1,
}


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def filled(net, seed=0):
    """Every parameter gets numbers that matter, so that no branch is multiplied by zero."""
    g = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            a = g.standard_normal(tuple(p.shape)) / math.sqrt(p[0].numel() if p.dim() > 1 else 10)
            p.copy_(torch.from_numpy(1 + 0.3 * a if "norm" in name else a))
    return net.eval()


def inputs(net, batch=3, channels=3):
    x = noise(batch, channels, net.input_size, net.input_size, seed=1)
    t = torch.linspace(0.1, 0.95, batch)
    return x, t, torch.arange(batch) * 2 % (net.num_classes + 1)


def assert_same(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.detach().double(), expected.double(), atol=tolerance, rtol=0)


# The whole network a second time.


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


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"in_context_start": 0},
        {"in_context_start": 3, "in_context_len": 1},
        {"in_context_len": 0},
        {"input_size": 18, "patch_size": 6},
        {"input_size": 3, "patch_size": 1},
        {"in_channels": 1, "out_channels": 2},
        {"mlp_ratio": 2.5, "num_heads": 4},
    ],
    ids=str,
)
@torch.no_grad()
def test_forward_against_numpy(change):
    settings = {**SMALL, **change}
    net = filled(JiT(**settings))
    x, t, y = inputs(net, channels=settings.get("in_channels", 3))
    expected = numpy_jit(net, x, t, y, settings["num_heads"], settings["in_context_start"])
    assert np.abs(expected).std() > 0.1
    assert_same(net(x, t, y), expected, 1e-4)


@torch.no_grad()
def test_samples_do_not_see_each_other():
    net = filled(JiT(**SMALL))
    x, t, y = inputs(net)
    together = net(x, t, y)
    for i in range(3):
        assert_same(together[i : i + 1], net(x[i : i + 1], t[i : i + 1], y[i : i + 1]), 1e-4)


# Positions.


@pytest.mark.parametrize(("dim", "side"), [(8, 3), (48, 4), (64, 1)])
def test_position_embedding_against_its_formula(dim, side):
    expected = torch.tensor([[position(k, side, dim) for k in range(side * side)]])
    table = sincos_position_embedding(dim, side)
    assert table.dtype == torch.float32
    assert_same(table, expected, 1e-6)


def test_first_half_of_the_position_embedding_is_the_column():
    table = sincos_position_embedding(16, 4).view(4, 4, 16)  # (row, column, D)
    assert table[..., :8].equal(table[:1, :, :8].expand(4, -1, -1))
    assert table[..., 8:].equal(table[:, :1, 8:].expand(-1, 4, -1))


def test_rope_is_a_rotation_of_complex_numbers():
    x = noise(2, 3, 9, 16)
    assert_same(rotate(x, *rope_table(16, 3)), turn(x.double().numpy(), 3), 1e-5)


def test_rope_keeps_norms():
    x = noise(2, 3, 9, 16)
    pairs = rotate(x, *rope_table(16, 3)).unflatten(-1, (8, 2))
    assert_same(pairs.square().sum(-1), x.unflatten(-1, (8, 2)).square().sum(-1), 1e-5)


def test_attention_scores_depend_on_the_offset_alone():
    side = 4
    cos, sin = rope_table(16, side)
    q, k = (rotate(noise(1, 1, 1, 16, seed=s).expand(-1, -1, side * side, -1), cos, sin)[0, 0] for s in (0, 1))
    scores = (q @ k.T).view(side, side, side, side)  # row and column of the query, row and column of the key
    by_offset = {}
    for r1, c1, r2, c2 in np.ndindex(side, side, side, side):
        by_offset.setdefault((r1 - r2, c1 - c2), []).append(float(scores[r1, c1, r2, c2]))
    means = [np.mean(values) for values in by_offset.values()]
    assert max(np.ptp(values) for values in by_offset.values()) < 1e-5
    assert np.min(np.diff(np.sort(means))) > 1e-6  # and no two offsets have the same


@torch.no_grad()
def test_context_tokens_join_at_their_block_and_are_not_rotated():
    net, seen = filled(JiT(**SMALL)), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args))
    x, t, y = inputs(net)
    net(x, t, y)
    assert [args[0].shape[1] for args in seen] == [16, 19, 19, 19]
    cos, sin = rope_table(16, 4)
    for _, _, c, s in seen[1:]:
        assert c.equal(torch.cat([torch.ones(3, 8), cos])) and s.equal(torch.cat([torch.zeros(3, 8), sin]))
    assert_same(seen[1][0][:, :3], net.y_embedder(y)[:, None] + net.in_context_posemb, 1e-6)


# Parts.


@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_computes_in_float32(autocast):
    norm = RMSNorm(64).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * noise(64, seed=3))
    x = (3 * noise(50, 64)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = norm(x)
        assert norm(x.float()).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    expected = torch.from_numpy(rms(x.double().numpy(), norm.weight.detach().double().numpy()))
    error = (out.detach().double() - expected).abs() / expected.abs()
    assert error.max() < 2.0**-8 * 1.001  # one rounding to bfloat16, at the end


def test_rms_norm_epsilon():
    x = torch.full((1, 4), 1e-3)
    assert_same(RMSNorm(4)(x), np.full((1, 4), 1e-3 / math.sqrt(2e-6)), 1e-6)


@torch.no_grad()
def test_attention_in_float32_agrees_with_the_default():
    default, fp32 = (filled(JiT(**SMALL, attn_fp32=flag)) for flag in (False, True))
    x, t, y = inputs(default)
    assert_same(fp32(x, t, y), default(x, t, y), 1e-6)


@pytest.mark.parametrize(("attn_fp32", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
@torch.no_grad()
def test_precision_of_attention_under_autocast(monkeypatch, attn_fp32, dtype):
    product, seen = F.scaled_dot_product_attention, []

    def spy(q, k, v, **kwargs):
        out = product(q, k, v, **kwargs)
        seen.append((q.dtype, k.dtype, v.dtype, out.dtype))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    net = filled(JiT(**SMALL, attn_fp32=attn_fp32))
    with torch.autocast("cpu", dtype=torch.bfloat16), cpu_layers.switched_off():
        net(*inputs(net))
    assert seen == [(dtype,) * 4] * 4


def test_unpatchify_layout():
    net = JiT(**{**SMALL, "input_size": 6, "patch_size": 2, "out_channels": 3})
    patches = torch.arange(2 * 9 * 12).float().view(2, 9, 12)
    image = net.unpatchify(patches)
    assert image.shape == (2, 3, 6, 6)
    for b, c, row, column in np.ndindex(2, 3, 6, 6):
        token, inside = row // 2 * 3 + column // 2, (row % 2 * 2 + column % 2) * 3 + c
        assert image[b, c, row, column] == patches[b, token, inside]


# Dropout. With probability 1 a branch is what its last bias leaves of it, exactly.


@pytest.mark.parametrize(("depth", "dropped"), [(4, {1, 2}), (6, {1, 2}), (8, {2, 3, 4, 5}), (3, set())])
@pytest.mark.parametrize("kind", ["attn_drop", "proj_drop"])
@torch.no_grad()
def test_dropout_in_the_middle_blocks_only(depth, dropped, kind):
    net = filled(JiT(**{**SMALL, "depth": depth}, **{kind: 1.0}))
    x, c, (cos, sin) = noise(2, 16, 48), noise(2, 48, seed=2), rope_table(16, 4)
    for i, block in enumerate(net.blocks):
        in_eval = block.eval()(x, c, cos, sin)
        in_training = block.train()(x, c, cos, sin)
        if i not in dropped:
            assert in_training.equal(in_eval)
            continue
        gates = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        attention_bias = block.attn.proj.bias if kind == "attn_drop" else 0
        after_attention = x + gates[2] * attention_bias
        if kind == "proj_drop":
            assert_same(in_training, after_attention + gates[5] * block.mlp.w3.bias)
        else:
            modulated = block.norm2(after_attention) * (1 + gates[4]) + gates[3]
            assert_same(in_training, after_attention + gates[5] * block.mlp(modulated))


@torch.no_grad()
def test_no_dropout_by_default_and_none_in_evaluation():
    plain, dropping = filled(JiT(**SMALL)), filled(JiT(**SMALL, attn_drop=0.5, proj_drop=0.5))
    x, t, y = inputs(plain)
    assert plain.train()(x, t, y).equal(plain.eval()(x, t, y))
    assert dropping.eval()(x, t, y).equal(plain(x, t, y))
    assert not dropping.train()(x, t, y).allclose(plain(x, t, y))


# Initial values.


@pytest.mark.parametrize("sf", [False, True])
@torch.no_grad()
def test_output_is_exactly_zero_at_the_start(sf):
    net = JiT(**SMALL)
    out = Denoiser(net, SpectralForcing(16) if sf else None).predict(*inputs(net))
    assert out.shape == (3, 3, 16, 16) and out.eq(0).all()


def assert_xavier(weight):
    """Uniform within sqrt(6 / (fan in + fan out))."""
    fan_out, fan_in = weight.shape
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.97 * bound < weight.abs().max() <= bound
    assert_moments(weight, bound / math.sqrt(3), kurtosis=1.8)


def assert_moments(weight, std, kurtosis):
    """Mean, standard deviation and fourth moment, each within five of its own standard deviations or so."""
    n, scaled = weight.numel(), weight.double() / std
    assert abs(scaled.mean()) < 5 / math.sqrt(n)
    assert abs(scaled.square().mean() - 1) < 5 * math.sqrt((kurtosis - 1) / n)
    assert abs((scaled**4).mean() - kurtosis) < 5 * math.sqrt(96 / n)


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
        elif name in (
            "in_context_posemb",
            "y_embedder.embedding_table.weight",
            "t_embedder.mlp.0.weight",
            "t_embedder.mlp.2.weight",
        ):
            assert_moments(p, 0.02, kurtosis=3.0)
        else:
            assert_xavier(p.flatten(1))
            checked.add(name.rpartition("blocks.")[2].lstrip("0123456789."))
    linear = {"attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.w3.weight"}
    assert checked == linear | {"x_embedder.proj1.weight", "x_embedder.proj2.weight"}


def test_spectral_forcing_adds_no_parameter_and_takes_no_random_number():
    torch.manual_seed(5)
    plain = Denoiser(JiT(**SMALL))
    torch.manual_seed(5)
    forced = Denoiser(JiT(**SMALL), SpectralForcing(16))
    a, b = plain.state_dict(), forced.state_dict()
    assert list(a) == list(b) and all(a[name].equal(b[name]) for name in a)


def test_fixed_tables_are_not_trained():
    net = JiT(**SMALL)
    trained, stored = {name for name, _ in net.named_parameters()}, set(net.state_dict())
    assert stored - trained == {"pos_embed"}
    assert all(p.requires_grad for p in net.parameters())


# Sizes.


@pytest.mark.parametrize(("size", "patch"), [(4, 4), (12, 4), (20, 4), (15, 5), (3, 1), (14, 7)])
@torch.no_grad()
def test_any_size_that_the_patch_divides(size, patch):
    net = filled(JiT(**{**SMALL, "input_size": size, "patch_size": patch}))
    out = net(*inputs(net))
    assert out.shape == (3, 3, size, size) and out.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 18}, "image size 18 is not divisible by the patch size 4"),
        ({"input_size": 2}, "not divisible"),
        ({"num_heads": 5}, "48 over 5 heads"),
        ({"num_heads": 8}, "multiple of 4"),  # heads of width 6
        ({"in_context_start": 4}, "in_context_start is 4"),
        ({"in_context_start": -1}, "in_context_start is -1"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        JiT(**{**SMALL, **change})


@pytest.mark.parametrize("shape", [(18, 18), (16, 19)])
def test_image_of_another_size(shape):
    net = JiT(**SMALL)
    with pytest.raises(ValueError, match="16x16"):
        net(torch.zeros(1, 3, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_gradients_of_one_image_lie_in_memory_as_the_parameters_do():
    """DDP, which is given them in a pass over one image, warns of others, and copies."""
    net = filled(JiT(**SMALL))
    net(noise(1, 3, 16, 16), torch.tensor([0.5]), torch.tensor([3])).sum().backward()
    assert [(n, p.grad.stride()) for n, p in net.named_parameters()] == [
        (n, p.stride()) for n, p in net.named_parameters()
    ]


def test_start_of_the_context_does_not_matter_without_context():
    net = JiT(**{**SMALL, "in_context_len": 0, "in_context_start": 99})
    assert "in_context_posemb" not in net.state_dict()


#            L,    D,  h, bottleneck, K, in_context_start
SHAPES = {
    "JiT-Demo": (6, 128, 4, 48, 4, 2),
    "JiT-Ti": (8, 192, 4, 48, 8, 2),
    "JiT-S": (12, 384, 6, 96, 16, 4),
    "JiT-B": (12, 768, 12, 128, 32, 4),
    "JiT-L": (24, 1024, 16, 128, 32, 8),
    "JiT-H": (32, 1280, 16, 256, 32, 10),
    "JiT-700M": (36, 1024, 16, 128, 32, 12),
    "JiT-2B": (27, 2048, 32, 256, 32, 9),
    "JiT-7B": (24, 4096, 64, 512, 32, 8),
}
PATCHES = {
    "JiT-Demo": (8,),
    "JiT-Ti": (1, 2, 4, 8, 16),
    "JiT-S": (2, 4, 8, 16),
    "JiT-B": (8, 16, 32),
    "JiT-L": (16, 32),
    "JiT-H": (16, 32),
}
NAMES = {f"{family}/{patch}": (family, patch) for family, patches in PATCHES.items() for patch in patches}
NAMES |= {name: (name, 32) for name in ("JiT-700M", "JiT-2B", "JiT-7B")}


def test_names_of_the_models():
    assert set(JiT_models) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_the_models(name):
    family, patch = NAMES[name]
    depth, dim, heads, bottleneck, context, start = SHAPES[family]
    with torch.device("meta"):
        net = JiT_models[name](input_size=4 * patch, num_classes=10)
    assert len(net.blocks) == depth
    assert net.pos_embed.shape == (1, 16, dim)
    assert net.blocks[-1].attn.q_norm.weight.shape == (dim // heads,)
    assert net.x_embedder.proj1.weight.shape == (bottleneck, 3, patch, patch)
    assert net.in_context_posemb.shape == (1, context, dim)
    assert net.in_context_start == start
    assert net.blocks[0].mlp.w3.weight.shape == (dim, int(4 * dim * 2 / 3))
    assert net.final_layer.linear.weight.shape == (patch * patch * 3, dim)


# Precision, and the baseline.


@pytest.mark.parametrize("kind", ["autocast", "module"])
@torch.no_grad()
def test_bfloat16(kind):
    net = filled(JiT(**SMALL))
    x, t, y = inputs(net)
    expected = net(x, t, y)
    if kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x, t, y)
    else:
        out = net.bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert 1e-4 < (out.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_without_spectral_forcing_the_denoiser_is_the_network():
    net = filled(JiT(**SMALL))
    x, t, y = inputs(net)
    assert Denoiser(net, None).predict(x, t, y).equal(net(x, t, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(x, t, y)
    assert Denoiser(net, None, autocast_dtype=torch.bfloat16).predict(x, t, y).equal(expected.float())


@torch.no_grad()
def test_with_spectral_forcing_the_network_sees_the_filtered_image():
    net, operator = filled(JiT(**SMALL)), SpectralForcing(16)
    x, t, y = inputs(net)
    out = Denoiser(net, operator).predict(x, t, y)
    assert out.equal(net(operator(x, t), t, y))
    assert not out.allclose(net(x, t, y), atol=1e-2)
