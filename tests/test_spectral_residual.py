"""SpectralDiT's correction against scipy and its formulae, and through a run: spectral_residual.py, util/gates.py.

Shapes: B batch, N = side^2 patch tokens, K in-context tokens, D width.
"""

import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image

import main_jit
from model_jit import JiT, JiT_models
from spectral_residual import MODES, SpectralResidual, blur, blur_matrix
from tests.conftest import arguments, differences, raw, read_log, state_differences, train
from tests.golden_inputs import SMALL, fill, normals
from tests.test_export import start_weights
from util import checkpoint, gates, overhead
from util.checkpoint import NAME
from util.config import resolve
from util.errors import UserError
from util.export import export, load_denoiser
from util.spectrum import rings
from util.training_state import lacking

ON = MODES[1:]
WEIGHTS = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


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


# The blur.


@pytest.mark.parametrize("side", [1, 2, 3, 5, 16])
def test_blur_is_scipys(side):
    r = normals(1, 2, side * side, 3)
    assert_same(blur(r, blur_matrix(side)), by_scipy(r, side))


@pytest.mark.parametrize("side", [1, 2, 3, 5, 32])
def test_a_constant_passes(side):
    matrix = blur_matrix(side)
    assert matrix.sum(1).eq(1).all() and matrix.ge(0).all()
    assert matrix.bfloat16().float().equal(matrix)
    assert_same(blur(torch.full((1, side * side, 2), 0.7), matrix), torch.full((1, side * side, 2), 0.7), 1e-7)


@pytest.mark.parametrize("frequency", [(0.0, 0.25), (0.1, 0.3), (0.5, 0.5), (0.5, 0.0)])
def test_a_wave_is_scaled_by_the_transfer_function(frequency):
    """(1 + 4 z + 6 z^2 + 4 z^3 + z^4) / 16 = ((1 + z) / 2)^4, of modulus cos^4(pi f) at z = exp(2 pi i f)."""
    side, (fy, fx) = 24, frequency
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    wave = torch.cos(2 * math.pi * (fy * y + fx * x) + 0.3)
    out = blur(wave.reshape(1, -1, 1), blur_matrix(side)).view(side, side)
    gain = math.cos(math.pi * fy) ** 4 * math.cos(math.pi * fx) ** 4
    assert_same(out[2:-2, 2:-2], gain * wave[2:-2, 2:-2])


def test_power_in_each_ring_against_the_transfer_function():
    """On a field that is 0 near the border, where repeating and periodic continuation are the same."""
    side = 32
    field = torch.zeros(side, side, dtype=torch.float64)
    field[4:-4, 4:-4] = normals(2, side - 8, side - 8)
    low = blur(field.float().reshape(1, -1, 1), blur_matrix(side)).view(side, side)
    f = torch.fft.fftfreq(side, dtype=torch.float64)
    gain = (math.pi * f).cos() ** 4
    ring, count = rings(side)
    power = lambda modes: torch.zeros(len(count)).double().index_add_(0, ring.flatten(), modes.abs().square().flatten())  # noqa: E731
    measured = power(torch.fft.fft2(low.double()))
    expected = power(torch.fft.fft2(field) * gain[:, None] * gain[None, :])
    torch.testing.assert_close(measured[:16], expected[:16], rtol=1e-4, atol=0)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-6 * float(measured.max()))
    assert measured[1] > 0.9 * power(torch.fft.fft2(field))[1] and measured[22] < 1e-6 * measured[1]


# The correction.


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
    grid = r.double()[:, -side * side :].transpose(1, 2).reshape(-1, d, side, side)
    kernel = torch.from_numpy(WEIGHTS).expand(d, 1, 5, 5)
    low = F.conv2d(F.pad(grid, (2, 2, 2, 2), mode="replicate"), kernel, groups=d)
    delta = (g_lo * low + g_hi * (grid - low)).flatten(2).transpose(1, 2)
    return F.pad(delta, (0, 0, r.shape[1] - side * side, 0))


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("mode", ON)
def test_output_and_gradients_against_the_formula(mode, context):
    side, dim = 4, 8
    module = filled(SpectralResidual(dim, side, mode, scale=0.7), std=0.6)
    leaves = [normals(s, *shape).requires_grad_() for s, shape in enumerate([(3, context + 16, dim)] * 2 + [(3, dim)])]
    x, r, c = leaves
    out, expected = module(x, r, c), x.double() + r.double() + correction(module, r, c, side)
    assert_same(out, expected.detach())
    assert (expected - x - r).abs().mean() > 0.05
    weights, where = normals(9, *out.shape), [*leaves, *module.parameters()]
    got = torch.autograd.grad((out * weights).sum(), where, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), where, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None) == (mode == "static" and b is None)
        if a is not None:
            assert a.abs().max() > 0.01
            assert_same(a, b, 1e-5)


@pytest.mark.parametrize("mode", ON)
def test_gates_are_bounded_and_one_pair_for_each_sample(mode):
    module = filled(SpectralResidual(8, 4, mode, scale=0.25), std=2.0)
    for gate in module.gates(3 * normals(1, 50, 8)):
        assert gate.shape == (() if mode == "static" else (50,)) and gate.dtype == torch.float32
        assert gate.abs().max() <= 0.25 and gate.abs().max() > 0.1
    small = filled(module, std=0.1)
    assert all(gate.abs().max() < 0.25 for gate in small.gates(normals(1, 50, 8)))


def test_the_context_takes_no_correction_and_the_grid_is_the_last_tokens():
    module = filled(SpectralResidual(8, 4, "time", 1.0))
    x, r, c = normals(1, 2, 21, 8), normals(2, 2, 21, 8), normals(3, 2, 8)
    out = module(x, r, c)
    assert out[:, :5].equal((x + r)[:, :5])
    assert out[:, 5:].equal(module(x[:, 5:], r[:, 5:], c))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("off", 1.0), "'off'"), (("label", 1.0), "time_label"), (("time", 0.0), "0.0"), (("time", math.inf), "inf")],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectralResidual(8, 4, *arguments)


# The network.


def inputs():
    return normals(11, 3, 3, 32, 32), torch.tensor([0.05, 0.5, 0.95]), torch.tensor([0, 3, 10])


def network(mode, seed=5, **changes):
    torch.manual_seed(seed)
    return JiT(**{**SMALL, **changes}, spectral_residual=mode)


def with_golden_weights(mode, **changes):
    """All shared parameters matter; those of the correction are as at the start of a run."""
    net = network(mode, **changes)
    state = fill(network("off", **changes)).state_dict()
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all(".spectral_residual." in name for name in missing)
    return net


def test_off_is_the_default_and_adds_nothing():
    plain, off = JiT(**SMALL), network("off")
    assert list(plain.state_dict()) == list(off.state_dict())
    assert plain.residual_mode == "off" and all(block.spectral_residual is None for block in plain.blocks)
    assert not any("residual" in name for name, _ in plain.named_modules() if name)


@pytest.mark.parametrize("mode", ON)
def test_initial_values_and_the_same_draws_for_all_others(mode):
    plain, net = network("off").state_dict(), network(mode).state_dict()
    new = [name for name in net if name not in plain]
    assert [name for name in net if name in plain] == list(plain)
    assert all(net[name].equal(plain[name]) for name in plain)
    names = ["raw_gates"] if mode == "static" else ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert new == [f"blocks.{i}.spectral_residual.{name}" for i in range(4) for name in names]
    for name in new:
        if name.endswith("fc1.weight"):
            bound = math.sqrt(6 / (64 + 16))
            assert net[name].shape == (16, 64) and 0.97 * bound < net[name].abs().max() <= bound
        else:
            assert net[name].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "change", [{}, {"attn_fp32": True}, {"attn_drop": 0.2, "proj_drop": 0.2}, {"in_context_len": 0}], ids=str
)
@pytest.mark.parametrize("mode", ON)
def test_at_the_start_output_and_gradients_are_those_of_the_plain_network(mode, change, dtype):
    """To the bit, with weights in which every branch matters."""
    outputs, gradients = [], []
    for net in (with_golden_weights("off", **change), with_golden_weights(mode, **change)):
        torch.manual_seed(1)  # dropout
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = net.train()(*inputs())
        out.float().square().mean().backward()
        outputs.append(out)
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    plain, corrected = gradients
    assert outputs[0].equal(outputs[1]) and outputs[0].std() > 0.1
    assert all(plain[name].equal(corrected[name]) and plain[name].any() for name in plain)
    new = {name: value for name, value in corrected.items() if name not in plain}
    assert all(value.any() != ("fc1" in name) for name, value in new.items())  # what is behind a zero does not move yet


@pytest.mark.parametrize("mode", ON)
@torch.no_grad()
def test_each_block_adds_the_correction_of_its_own_mlp_branch(mode):
    net = with_golden_weights(mode)
    seen = []
    for i, block in enumerate(net.blocks):
        filled(block.spectral_residual, seed=i)
        block.register_forward_pre_hook(lambda block, args, kwargs: seen.append([*args]), with_kwargs=True)
        block.mlp.register_forward_hook(lambda mlp, args, out: seen[-1].append(out))
        block.register_forward_hook(lambda block, args, out: seen[-1].append(out))
    x, t, y = inputs()
    t_emb = net.t_embedder(t)
    c_t = t_emb + net.y_embedder(y) if mode == "time_label" else t_emb
    corrected = net(x, t, y)
    for block, (tokens, c, cos, sin, mlp, out) in zip(net.blocks, list(seen), strict=True):
        r = block.adaLN_modulation(c).chunk(6, dim=-1)[5][:, None] * mlp
        residual, block.spectral_residual = block.spectral_residual, None
        expected = block(tokens, c, cos, sin).double() + correction(residual, r, c_t, 4)
        assert_same(out, expected, 1e-5)
        assert (out - block(tokens, c, cos, sin)).abs().max() > 0.01
    assert not net(x, t, y).allclose(corrected, atol=1e-2)


@torch.no_grad()
def test_bfloat16():
    net = with_golden_weights("time_label")
    for i, block in enumerate(net.blocks):
        filled(block.spectral_residual, seed=i)
    expected = net(*inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*inputs())
    assert out.dtype == torch.bfloat16 and 1e-4 < (out.float() - expected).norm() / expected.norm() < 0.05
    x, t, y = inputs()
    out = net.bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16 and (out.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_a_small_gate_is_not_rounded_away_under_autocast():
    module = filled(SpectralResidual(8, 4, "static", 1.0), std=0.0)
    module.raw_gates.fill_(1e-3)
    r = normals(1, 2, 16, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(torch.zeros(2, 16, 8), r, torch.zeros(2, 8))
    assert out.dtype == torch.float32
    assert_same((out / r.float() - 1) / 1e-3, torch.ones(2, 16, 8), 0.02)


def test_parameters():
    count = {}
    for mode in MODES:
        with torch.device("meta"):
            net = JiT_models["JiT-Ti/1"](input_size=32, num_classes=10, spectral_residual=mode)
        count[mode] = sum(p.numel() for p in net.parameters())
    added = {mode: count[mode] - count["off"] for mode in ON}
    assert added == {"time": 74_896, "time_label": 74_896, "static": 16}
    assert round(100 * 74_896 / count["off"], 2) == 1.36  # as published, of 5.5 M


@pytest.mark.parametrize(("patch", "published", "percent"), [(1, 0.6, 0.57), (2, 0.9, 0.87), (4, 0.9, 0.95)])
def test_operations(patch, published, percent):
    """Against sums of products; 0.6 % and 0.9 % are published."""
    o = overhead.overhead(f"JiT-Ti/{patch}", 32, 10)
    n, d, inner, k = (32 // patch) ** 2, 192, 512, 8
    of_token = 2 * (3 * d * d + d * d + 3 * d * inner)
    blocks = sum(m * of_token + 4 * m * m * d for m in [n] * 2 + [n + k] * 6) + 8 * 2 * 6 * d * d
    ends = n * 2 * (3 * patch**2 * 48 + 48 * d) + n * 2 * d * 3 * patch**2 + 2 * (2 * d * d + 256 * d + d * d)
    assert o.flops == blocks + ends
    gate = 8 * 2 * (d * d // 4 + d // 4 * 2)
    assert o.extra_flops == 50 * n * d * 8 + gate and o.extra_flops_executed == 4 * o.side * n * d * 8 + gate
    share = 100 * o.extra_flops / o.flops
    assert round(share, 2) == percent and abs(share - published) < 0.06


# A run. The network has the real initial values, so that gates start at zero.

REAL = "JiT-Real/8"
REAL_MODEL = partial(
    JiT, patch_size=8, hidden_size=32, depth=4, num_heads=2, bottleneck_dim=8, in_context_len=2, in_context_start=1
)


@pytest.fixture(scope="module")
def real(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(JiT_models, REAL, REAL_MODEL)
        yield


@pytest.fixture(scope="module")
def plain_run(real, tmp_path_factory):
    return train(tmp_path_factory.mktemp("residual") / "plain", model=REAL)


@pytest.fixture(scope="module")
def run(real, tmp_path_factory):
    """A finished run with the correction. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("residual") / "run"
    settings = {
        "spectral_residual": "time",
        "spectral_residual_scale": 0.5,
        "epochs": 8,
        "lr": 1e-2,
        "proj_dropout": 0.1,
    }
    return train(folder, model=REAL, eval_freq=4, **settings)


def test_gates_leave_zero_in_training(run):
    lines = read_log(run, "gates")
    assert [line["step"] for line in lines] == [8, 16] and {line["ema"] for line in lines} == {"ema1"}
    early, late = ([np.abs(line[name]).max() for name in ("low", "high")] for line in lines)
    assert min(late) > 1e-4 and max(late) < 0.5 and min(early) > 0
    assert all(np.shape(line[name]) == (4, gates.TIMES) for line in lines for name in ("low", "high"))
    assert Image.open(run / gates.NAME).size[0] == 960
    assert np.isfinite([line["loss"] for line in read_log(run)]).all()


def test_a_plain_run_has_no_gates(plain_run, capsys):
    assert read_log(plain_run, "gates") == [] and not (plain_run / gates.NAME).exists()
    assert gates.main([str(plain_run)]) == 2
    assert "--spectral_residual" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_to_the_same_end(run, real, tmp_path):
    settings = {"spectral_residual": "time", "spectral_residual_scale": 0.5, "lr": 1e-2, "proj_dropout": 0.1}
    train(tmp_path / "run", model=REAL, eval_freq=4, epochs=3, **settings)
    train(tmp_path / "run", model=None, eval_freq=4, epochs=8, lr=None)
    assert state_differences(run, tmp_path / "run") == []


def test_another_value_is_refused(run, plain_run, tmp_path, capsys):
    for folder, wrong in ((run, "off"), (run, "time_label"), (plain_run, "static")):
        code = main_jit.main(arguments(model=REAL, output_dir=folder, spectral_residual=wrong, epochs=9))
        assert code == 2 and f"--spectral_residual {wrong} (the checkpoint was" in capsys.readouterr().err
    sample = ["--sample", "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--resume"]
    for folder, wrong in ((run, ["--spectral_residual", "off"]), (run, ["--spectral_residual_scale", "1"])):
        assert main_jit.main([*sample, str(folder), *wrong]) == 2
        assert f"{wrong[0]} {wrong[1]}" in capsys.readouterr().err
    assert main_jit.main(arguments(model=REAL, output_dir=tmp_path / "new", spectral_residual_scale=0.0)) == 2
    assert "--spectral_residual_scale 0.0" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_is_plain(plain_run, tmp_path):
    """Published ones, and ours that are older."""
    content = raw(plain_run)
    del content["args"].spectral_residual, content["args"].spectral_residual_scale
    torch.save(content, tmp_path / NAME)
    assert resolve({}, checkpoint.load(tmp_path).args, training=True).spectral_residual == "off"
    with pytest.raises(UserError, match="--spectral_residual time"):
        resolve({"spectral_residual": "time"}, checkpoint.load(tmp_path).args, training=False)


def test_weights_and_network_that_do_not_fit(run, plain_run):
    plain, time = (
        REAL_MODEL(input_size=16, num_classes=10),
        REAL_MODEL(input_size=16, num_classes=10, spectral_residual="time"),
    )
    plain, time = torch.nn.ModuleDict({"net": plain}), torch.nn.ModuleDict({"net": time})
    with pytest.raises(UserError, match="the file has a spectral residual and the network has none"):
        checkpoint.load_weights(plain, raw(run)["model"], run)
    with pytest.raises(UserError, match="the network has a spectral residual and the file has none"):
        checkpoint.load_weights(time, raw(plain_run)["model"], plain_run)
    assert len(lacking(time.state_dict(), raw(plain_run)["model"], ".spectral_residual.")) == 4 * 4
    for lost in ("net.blocks.1.spectral_residual.fc2.bias", "net.blocks.1.norm1.weight"):
        state = {name: value for name, value in raw(run)["model"].items() if name != lost}
        assert lacking(time.state_dict(), state, ".spectral_residual.") == []  # all of them or none
        with pytest.raises(UserError, match=f"{lost} is missing"):
            checkpoint.load_weights(time, state, run)


def test_a_plain_checkpoint_starts_a_run_with_the_correction(plain_run, tmp_path, monkeypatch, capsys):
    settings = {"model": REAL, "init_from": plain_run, "epochs": 1}
    seen = start_weights(monkeypatch, tmp_path / "new", spectral_residual="time_label", **settings)["weights"]
    old = raw(plain_run)["model"]
    assert differences({name: seen[name] for name in old}, dict(old)) == []
    assert len(seen) == len(old) + 4 * 4
    assert not any(value.any() for name, value in seen.items() if ".spectral_residual.fc2." in name)
    (start,) = read_log(tmp_path / "new", "start")
    text = f"{4 * (33 * 8 + 9 * 2):,} new parameters of --spectral_residual, whose gates start at zero"
    assert text in start["started_from"] and text in capsys.readouterr().out


def test_init_from_takes_the_correction_with_it(run, tmp_path, monkeypatch, capsys):
    settings = {"model": REAL, "init_from": run, "epochs": 1}
    seen = start_weights(monkeypatch, tmp_path / "new", **settings)
    assert (seen["args"].spectral_residual, seen["args"].spectral_residual_scale) == ("time", 0.5)
    assert differences(dict(seen["weights"]), dict(raw(run)["model"])) == []
    assert main_jit.main(arguments(output_dir=tmp_path / "b", spectral_residual="off", **settings)) == 2
    assert "--spectral_residual off (the checkpoint was trained with time)" in capsys.readouterr().err


@torch.no_grad()
def test_export_round_trip(run, plain_run, tmp_path):
    config = export(run, tmp_path / "run.safetensors", "model")
    denoiser, loaded = load_denoiser(tmp_path / "run.safetensors")
    assert loaded == config and (config.spectral_residual, config.spectral_residual_scale) == ("time", 0.5)
    x, t, y = normals(1, 2, 3, 16, 16), torch.tensor([0.2, 0.8]), torch.tensor([3, 10])
    expected = config.build().eval()
    expected.load_state_dict(raw(run)["model"])
    assert denoiser.velocity(x, t, y).equal(expected.velocity(x, t, y))
    assert export(plain_run, tmp_path / "plain.safetensors").spectral_residual == "off"


# The gates of a network.


@torch.no_grad()
def test_gates_over_time_and_labels():
    net = network("time_label")
    for i, block in enumerate(net.blocks):
        filled(block.spectral_residual, seed=i)
    found = gates.evaluate_gates(net)
    assert found.value.shape == found.spread.shape == (2, 4, gates.TIMES)
    assert found.t[0] == 0 and found.t[-1] == 1
    for i, k in ((0, 0), (3, 17)):
        each = [
            torch.stack(
                net.blocks[i].spectral_residual.gates(
                    net.t_embedder(found.t[k : k + 1]) + net.y_embedder.embedding_table.weight[y]
                )
            )
            for y in range(10)
        ]
        each = np.array([pair.flatten().numpy() for pair in each])  # (10, 2)
        assert_same(found.value[:, i, k], each.mean(0), 1e-6)
        assert_same(found.spread[:, i, k], each.std(0), 1e-6)
    assert found.spread.max() > 1e-4


@torch.no_grad()
def test_gates_without_labels():
    net = network("time")
    for i, block in enumerate(net.blocks):
        filled(block.spectral_residual, seed=i)
    found = gates.evaluate_gates(net)
    expected = torch.stack([torch.stack(b.spectral_residual.gates(net.t_embedder(found.t))) for b in net.blocks], 1)
    assert_same(found.value, expected, 1e-6)
    assert found.spread is None and "low_spread" not in found.describe()
    net = network("static")
    for i, block in enumerate(net.blocks):
        block.spectral_residual.raw_gates.copy_(torch.tensor([i, -1.0]))
    found = gates.evaluate_gates(net).value
    expected = torch.tanh(torch.tensor([[0.0, 1, 2, 3], [-1] * 4]))[..., None].expand(2, 4, gates.TIMES)
    assert_same(found, expected, 1e-6)
    assert gates.evaluate_gates(network("off")) is None


@pytest.mark.parametrize("mode", ON)
def test_picture_of_gates(mode, tmp_path):
    net = network(mode)
    path = gates.plot_gates(gates.evaluate_gates(net), tmp_path / "zero.png", "gates that are zero")
    flat = np.asarray(Image.open(path))
    for block in net.blocks:
        filled(block.spectral_residual)
    picture = np.asarray(Image.open(gates.plot_gates(gates.evaluate_gates(net), tmp_path / "gates.png", "gates")))
    assert picture.shape == flat.shape and (picture != flat).any(axis=-1).mean() > 0.1


def test_gates_that_have_hardly_left_zero_look_like_zero(tmp_path):
    """In levels of 255, with the axes and their numbers."""

    def picture(size):
        value = torch.linspace(-size, size, gates.TIMES).expand(2, 4, -1)
        found = gates.Gates(torch.linspace(0, 1, gates.TIMES), value, value.abs())
        return np.asarray(Image.open(gates.plot_gates(found, tmp_path / "gates.png", "gates"))).astype(int)

    zero, hardly, some = (picture(size) for size in (0.0, 1e-5, 0.01))
    assert np.abs(hardly - zero).max() < 8 < 100 < np.abs(some - zero).max()


def test_command(run, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / NAME).symlink_to(run / NAME)
    monkeypatch.setattr(sys, "argv", ["util.gates"])
    assert gates.main([str(copy), "--ema", "model"]) == 0
    assert str(copy / gates.NAME) in capsys.readouterr().out and (copy / gates.NAME).is_file()
    (line,) = (json.loads(text) for text in (copy / "log.jsonl").read_text().splitlines())
    assert (line["event"], line["step"], line["ema"]) == ("gates", 16, "model")
    last = read_log(run, "gates")[-1]
    assert line["t"] == last["t"] and line["low"] != last["low"]  # of other weights
    assert gates.main([str(copy)]) == 0
    assert json.loads((copy / "log.jsonl").read_text().splitlines()[-1])["low"] == last["low"]
    assert gates.main([str(tmp_path / "nowhere")]) == 2


@torch.no_grad()
def test_gates_of_a_network_that_is_told_schedules_depend_on_time_and_label_alone():
    """They are those of gates.png."""
    net = REAL_MODEL(input_size=16, num_classes=10, spectral_residual="time_label", told_schedule=True)
    for parameter in net.parameters():
        parameter += 0.3 * torch.randn(parameter.shape)
    seen = []
    net.blocks[1].spectral_residual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    t, y = torch.tensor([0.5]), torch.tensor([3])
    for bounds in ([[-4.0, 8.0]], [[-1.0, 2.0]]):
        net(torch.randn(1, 3, 16, 16), t, y, bounds=torch.tensor(bounds))
    assert torch.equal(*seen) and torch.equal(seen[0], net.t_embedder(t) + net.y_embedder(y))
