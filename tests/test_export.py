"""Weights that leave a run: into another run (--init_from) and into a file of their own (util.export)."""

import shutil
import sys

import pytest
import torch

import main_jit
from tests.conftest import TINY, arguments, differences, flags, raw, read_log, state_differences, train
from util import checkpoint, export
from util.build import DenoiserConfig
from util.checkpoint import NAME
from util.errors import UserError
from util.export import load_denoiser
from util.training_loop import Loop

pytestmark = pytest.mark.usefixtures("tiny")


def start_weights(monkeypatch, folder, *switches, **settings):
    """Weights and settings with which a run begins."""
    seen, go = {}, Loop.run

    def record(loop, step):
        training = loop.training
        seen["weights"] = {k: v.clone() for k, v in training.denoiser.state_dict().items()}
        seen["averages"] = [{k: v.clone() for k, v in ema.averages.items()} for ema in training.emas]
        seen["optimizer"], seen["args"] = len(training.optimizer.state), loop.args
        seen["operator"] = training.denoiser.spectral_forcing
        return go(loop, step)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", record)
        assert main_jit.main([*arguments(output_dir=folder, **settings), *switches]) == 0
    return seen


# --- init_from ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "key"), [("model", "model"), ("ema1", "model_ema1"), ("ema2", "model_ema2")])
def test_a_new_run_starts_from_the_weights_that_were_named(trained, tmp_path, monkeypatch, choice, key):
    seen = start_weights(monkeypatch, tmp_path / "new", init_from=trained, init_weights=choice, epochs=1)
    assert differences(dict(seen["weights"]), raw(trained)[key]) == []
    for average in seen["averages"]:  # both averages start as copies of them
        assert differences(average, {k: v for k, v in raw(trained)[key].items() if k in average}) == []
    assert seen["optimizer"] == 0 and seen["args"].start_epoch == 0
    assert [(line["epoch"], line["step"], line["lr"]) for line in read_log(tmp_path / "new")] == [
        (0, 0, 0.0),
        (0, 1, 1e-3),
    ]
    start = read_log(tmp_path / "new", "start")[0]["started_from"]
    assert str(trained) in start and choice in start


def test_init_from_may_change_the_path_and_says_so(tmp_path, monkeypatch, capsys):
    """Plain JiT's weights into a run with Spectral Forcing, and settings of training that have no say in it."""
    base = tmp_path / "base"
    assert main_jit.main([*arguments(output_dir=base, epochs=1), "--disable_dct_patchify"]) == 0
    capsys.readouterr()
    settings = {"noise_scale": 2.0, "lr": 1e-4, "seed": 3, "weight_decay": 0.1, "epochs": 1}
    seen = start_weights(monkeypatch, tmp_path / "new", init_from=base, **settings)
    err = capsys.readouterr().err
    assert "were trained with disable_dct_patchify True, and this run has False" in err
    assert "were trained with noise_scale 1.0, and this run has 2.0" in err
    assert seen["operator"] is not None and differences(dict(seen["weights"]), raw(base)["model"]) == []
    args = raw(tmp_path / "new")["args"]
    assert (args.disable_dct_patchify, args.noise_scale, args.lr, args.seed) == (False, 2.0, 1e-4, 3)


def test_init_from_takes_the_shape_and_nothing_else(trained, tmp_path, monkeypatch, capsys):
    seen = start_weights(monkeypatch, tmp_path / "a", init_from=trained, model=None, img_size=None, epochs=1, cfg=None)
    assert (seen["args"].model, seen["args"].img_size, seen["args"].class_num) == (TINY, 16, 10)
    assert "warning: --init_from" not in capsys.readouterr().err
    for wrong in ({"model": "JiT-Demo/8"}, {"img_size": 32}):
        assert main_jit.main(arguments(output_dir=tmp_path / "b", init_from=trained, **wrong)) == 2
        assert f"--{next(iter(wrong))}" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_requeued_run_goes_on_instead_of_starting_over(trained, tmp_path):
    """The same command again: the checkpoint in the output folder wins over --init_from."""
    whole = train(tmp_path / "whole", init_from=trained, epochs=2)
    parts = train(tmp_path / "parts", init_from=trained, epochs=1)
    train(parts, init_from=trained, epochs=2)
    assert state_differences(whole, parts) == []
    assert [line["step"] for line in read_log(parts)] == [0, 1, 2, 3]


# --- export ---------------------------------------------------------------------------------------------------------


def inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=g), torch.tensor([0.0, 0.3, 0.8, 0.99]), torch.tensor([0, 3, 9, 10])


@pytest.mark.parametrize(("choice", "key"), [("model", "model"), ("ema1", "model_ema1"), ("ema2", "model_ema2")])
def test_export_computes_the_same_velocity(trained, tmp_path, choice, key):
    settings = export.export(trained, tmp_path / "x.safetensors", choice)
    saved = checkpoint.load(trained)
    denoiser = DenoiserConfig.from_args(raw(trained)["args"]).build().eval()
    denoiser.load_state_dict(saved.weights[key])
    loaded, config = load_denoiser(tmp_path / "x.safetensors")
    assert config == settings and config.model == TINY and not loaded.training
    assert torch.equal(loaded.velocity(*inputs()), denoiser.velocity(*inputs()))
    others = {"model", "model_ema1", "model_ema2"} - {key}
    for other in others:
        denoiser.load_state_dict(saved.weights[other])
        assert not torch.equal(loaded.velocity(*inputs()), denoiser.velocity(*inputs()))


@pytest.mark.parametrize(
    ("switches", "settings"),
    [
        (["--disable_dct_patchify"], {}),
        ([], {"window_size": 8}),
        ([], {"sf_c_min": 0.2}),
        ([], {"sf_c_max": 0.8}),
        ([], {"sf_kappa": 10}),
        (["--disable_dct_scale_schedule"], {"dct_fixed_scale": 0.4}),
        ([], {"pred_param": "v", "noise_scale": 1.5}),
        ([], {"t_eps": 0.01}),
        ([], {"attn_dropout": 0.3, "proj_dropout": 0.3}),
    ],
    ids=["off", "window", "c_min", "c_max", "kappa", "fixed", "path", "t_eps", "dropout"],
)
def test_export_keeps_all_that_decides_the_velocity(trained, tmp_path, switches, settings):
    run = tmp_path / "run"
    assert main_jit.main([*arguments(output_dir=run, epochs=1, **settings), *switches]) == 0
    export.export(run, tmp_path / "x.safetensors", "model")
    loaded, _ = load_denoiser(tmp_path / "x.safetensors")
    denoiser = DenoiserConfig.from_args(raw(run)["args"]).build().eval()
    denoiser.load_state_dict(raw(run)["model"])
    assert torch.equal(loaded.velocity(*inputs()), denoiser.velocity(*inputs()))
    plain = DenoiserConfig.from_args(raw(trained)["args"]).build().eval()
    plain.load_state_dict(raw(run)["model"])
    same = torch.equal(loaded.velocity(*inputs()), plain.velocity(*inputs()))
    assert same == ("attn_dropout" in settings)  # the settings matter, but for dropout, which is off here
    assert (loaded.noise_scale, loaded.t_eps) == (settings.get("noise_scale", 1.0), settings.get("t_eps", 0.05))


def test_export_as_a_program(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x.safetensors"
    monkeypatch.setattr(sys, "argv", ["export", "--resume", str(trained), "--out", str(out), "--ema", "ema2"])
    assert export.main() == 0 and out.exists()
    assert TINY in capsys.readouterr().out
    out.unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(sys, "argv", ["export", "--resume", str(empty), "--out", str(out)])
    assert export.main() == 2 and not out.exists()
    assert str(empty) in capsys.readouterr().err


def test_other_files_are_no_exports(trained, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, str(other))
    (tmp_path / "text").write_text("no weights")
    for path in (other, tmp_path / "text", tmp_path / "missing", trained / NAME):
        with pytest.raises(UserError, match="is not an export"):
            load_denoiser(path)


def test_export_of_weights_that_do_not_fit(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    content = raw(folder)
    content["args"].img_size = 24
    torch.save(content, folder / NAME)
    with pytest.raises(UserError, match="does not fit"):
        export.export(folder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_sampling_from_a_run_and_from_its_export_agree(trained, tmp_path):
    """The images that --sample writes are those of the exported denoiser."""
    import numpy as np
    from PIL import Image

    from sampler import guided, sample, start_noise, uniform_grid

    folder = shutil.copytree(trained, tmp_path / "run")
    argv = flags(resume=folder, sample=True, labels="2,5", num_per_class=1, seed=4, num_sampling_steps=3, cfg=2.0)
    assert main_jit.main([*argv, "--device", "cpu"]) == 0
    export.export(folder, tmp_path / "x.safetensors")
    denoiser, config = load_denoiser(tmp_path / "x.safetensors")
    velocity = guided(denoiser.velocity, torch.tensor([2, 5]), config.null_class, 2.0, (0.1, 1.0))
    with torch.inference_mode():
        x = sample(velocity, start_noise(4, [0, 1], (3, 16, 16)), uniform_grid(3), "heun")
    expected = ((x + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)
    for i in (0, 1):
        path = next((folder / "samples").glob(f"*seed4-*/{i:06d}.png"))
        assert np.array_equal(np.asarray(Image.open(path)), expected[i].permute(1, 2, 0).numpy())
