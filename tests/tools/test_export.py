"""Weights that leave a run as safetensors, a sharded checkpoint as one file, and exports of the previous version."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import main_jit
from model_jit import JiT_models
from tests.conftest import (
    TINY,
    RandomJiT,
    arguments,
    config_of,
    differences,
    flags,
    raw,
    read_log,
    state_differences,
    train,
)
from tests.util.checkpoint.helpers import KEYS
from tools.export import export, load_denoiser, main, merge
from util.build import build_denoiser, denoiser_settings
from util.checkpoint.files import NAME
from util.checkpoint.published import WEIGHTS, load
from util.errors import UserError
from util.io import REPOSITORY

PREVIOUS = REPOSITORY / "tests" / "golden" / "previous_version"
GOLDEN = partial(
    RandomJiT, patch_size=4, hidden_size=8, depth=1, num_heads=1, bottleneck_dim=2, in_context_len=1, in_context_start=0
)

pytestmark = pytest.mark.usefixtures("tiny")


def inputs(size=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, size, size, generator=g), torch.tensor([0.0, 0.3, 0.8, 0.99]), torch.tensor([0, 3, 9, 10])


def of_run(folder, key="model"):
    """The denoiser of a run with one of its weights."""
    denoiser = build_denoiser(config_of(folder)).eval()
    denoiser.load_state_dict(raw(folder)[key])
    return denoiser


def test_others_may_read_an_export_as_other_files(trained, tmp_path):
    (tmp_path / "plain").touch()
    export(trained, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_export_of_an_unknown_model_is_refused(trained, tmp_path, monkeypatch):
    export(trained, tmp_path / "x.safetensors")
    monkeypatch.delitem(JiT_models, TINY)
    with pytest.raises(UserError, match=f"{TINY} is unknown"):
        load_denoiser(tmp_path / "x.safetensors")


@pytest.mark.parametrize("choice", list(WEIGHTS))
def test_export_computes_the_same_velocity(trained, tmp_path, choice):
    config = export(trained, tmp_path / "x.safetensors", choice)
    denoiser, loaded = load_denoiser(tmp_path / "x.safetensors")
    assert denoiser_settings(loaded) == denoiser_settings(config)
    assert loaded.model == TINY and not denoiser.training
    velocities = {key: of_run(trained, key).velocity(*inputs()) for key in KEYS}
    same = [key for key, velocity in velocities.items() if torch.equal(denoiser.velocity(*inputs()), velocity)]
    assert same == [WEIGHTS[choice]]


@pytest.mark.parametrize(
    "settings",
    [
        {"disable_dct_patchify": True},
        {"window_size": 8},
        {"sf_c_min": 0.2, "sf_c_max": 0.8, "sf_kappa": 10},
        {"disable_dct_scale_schedule": True, "dct_fixed_scale": 0.4},
        {"pred_param": "v", "noise_scale": 1.5},
        {"t_eps": 0.01},
        {"spectral_residual": "time"},
        {"attn_dropout": 0.3, "proj_dropout": 0.3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_export_keeps_all_that_decides_the_velocity(trained, tmp_path, settings):
    run = train(tmp_path / "run", epochs=1, **settings)
    export(run, tmp_path / "x.safetensors", "model")
    loaded, _ = load_denoiser(tmp_path / "x.safetensors")
    assert torch.equal(loaded.velocity(*inputs()), of_run(run).velocity(*inputs()))
    plain = build_denoiser(config_of(trained)).eval()
    plain.load_state_dict(raw(run)["model"], strict=False)
    same = torch.equal(loaded.velocity(*inputs()), plain.velocity(*inputs()))
    assert same == ("attn_dropout" in settings)  # the settings matter, but for dropout, which is off here
    assert loaded.noise_scale == settings.get("noise_scale", 1.0)


def test_export_as_a_program(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "missing" / "x.safetensors"
    monkeypatch.setattr(sys, "argv", ["export", *flags(resume=trained, out=out, ema="ema2", checkpoint=NAME)])
    assert main() == 0 and out.exists() and TINY in capsys.readouterr().out
    before = out.read_bytes()
    assert main() == 2 and "--overwrite" in capsys.readouterr().err and out.read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite"])
    assert main() == 0
    monkeypatch.setattr(sys, "argv", ["export", *flags(resume=trained, out=out, ema="ema1"), "--overwrite"])
    assert main() == 0 and out.read_bytes() != before
    for resume, where in ((tmp_path, out), (trained, trained / "config.json" / "x.pth")):
        for kind in ("safetensors", "pth"):
            monkeypatch.setattr(sys, "argv", ["export", *flags(resume=resume, out=where, format=kind)])
            assert main() == 2 and "tools.export: error: " in capsys.readouterr().err


def test_other_files_are_no_exports(trained, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, str(other))
    (tmp_path / "text").write_text("no weights")
    wrong = tmp_path / "wrong.safetensors"
    save_file({"a": torch.zeros(1)}, str(wrong), metadata={"config": "[1]"})
    for path in (wrong, tmp_path / "text", tmp_path / "missing", trained / NAME):
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            load_denoiser(path)
    with pytest.raises(UserError, match="is not an export"):
        load_denoiser(other)


def test_weights_that_do_not_fit_are_not_exported(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    content = raw(folder)
    content["args"].img_size = 24
    torch.save(content, folder / NAME)
    with pytest.raises(UserError, match="does not fit"):
        export(folder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_sharded_run_as_one_file(tmp_path):
    """To the bit that of a run without shards, which one rank computes alike; it trains and samples on."""
    folder = train(tmp_path / "shards", parallel="fsdp")
    (tmp_path / "merged").mkdir()
    merge(folder, tmp_path / "merged" / NAME)
    assert state_differences(train(tmp_path / "plain"), tmp_path / "merged") == []
    images = []
    for name in ("shards", "merged"):
        out = tmp_path / f"of {name}"
        argv = flags(sample=True, resume=tmp_path / name, output_dir=out, labels="0-2", num_per_class=1, device="cpu")
        assert main_jit.main(argv) == 0
        images.append([path.read_bytes() for path in sorted(out.rglob("0*.png"))])
    assert len(images[0]) == 3 and images[0] == images[1]
    assert len(read_log(train(tmp_path / "on", resume=tmp_path / "merged", epochs=3))) == 2


# --- the previous version: a run of one block, written after step 3 of 6, in the middle of a log interval -------------


@pytest.mark.parametrize("kind", ["pth", "dcp"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_the_previous_version_continues_as_it_did_there(tmp_path, monkeypatch, kind, parallel):
    monkeypatch.setitem(JiT_models, TINY, GOLDEN)
    assert load(PREVIOUS / kind).at == "-step000000003"
    argv = arguments(resume=PREVIOUS / kind, output_dir=tmp_path, img_size=8, epochs=3, log_freq=2, parallel=parallel)
    assert main_jit.main(argv) == 0
    expected = [(3, 1.9759076833724976, 0.8537980318069458), (5, 1.8979229927062988, 1.0158389806747437)]
    found = [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(tmp_path)]
    assert found == [pytest.approx(line, rel=1e-5) for line in expected]


@pytest.mark.parametrize("fixed", [None, 0.4])
@pytest.mark.parametrize("forcing", [True, False])
def test_an_export_of_the_previous_version_loads(tmp_path, monkeypatch, fixed, forcing):
    monkeypatch.setitem(JiT_models, TINY, GOLDEN)
    with safe_open(str(PREVIOUS / "export.safetensors"), framework="pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    settings = {**json.loads(about["denoiser"]), "sf_fixed_scale": fixed, "spectral_forcing": forcing}
    save_file(tensors, str(tmp_path / "x.safetensors"), metadata={**about, "denoiser": json.dumps(settings)})
    denoiser, config = load_denoiser(tmp_path / "x.safetensors")
    assert differences(dict(sorted(denoiser.state_dict().items())), dict(sorted(tensors.items()))) == []
    assert (denoiser.input_operator is None) != forcing and config.disable_dct_patchify != forcing
    assert (config.disable_dct_scale_schedule, config.dct_fixed_scale) == (fixed is not None, fixed or 1.0)


def test_an_earlier_export_has_the_floor_that_was_the_default(trained, tmp_path):
    """They left out what was at its default, 1, which is another one now."""
    path = tmp_path / "x.safetensors"
    export(trained, path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    settings = json.loads(about["config"])
    assert "sf_snr_floor" not in settings
    settings |= {"sf_schedule": "power", "sf_alpha": 2.0, "disable_dct_patchify": False}
    save_file(tensors, path, metadata={**about, "config": json.dumps(settings)})
    denoiser, config = load_denoiser(path)
    assert config.sf_snr_floor == denoiser.input_operator.snr_floor == 1.0
