"""The spectral options are independent: whole runs with any two choices together, resumed, sampled and evaluated.

A further option is one more line in FACTORS.
"""

import dataclasses
import json
import os
from functools import partial
from itertools import combinations, product

import numpy as np
import pytest
import torch

import main_jit
from spectral_forcing import num_rings
from tests.conftest import (
    arguments,
    as_torchrun,
    config_of,
    few_digits,
    flags,
    raw,
    read_log,
    register,
    run_on,
    spectrum_of_digits,
    state_differences,
    train,
)
from tools.export import export, load_denoiser
from tools.measure_spectrum import measure
from tools.report import row_of
from util import config
from util.build import build_denoiser, denoiser_settings
from util.checkpoint.published import load
from util.data.spectrum_file import load_spectrum, save_spectrum

pytestmark = pytest.mark.usefixtures("tiny")

FACTORS = {  # option -> {choice: its flags}
    "forcing": {
        "off": {"disable_dct_patchify": True},
        "linear": {},
        "power": {"sf_schedule": "power", "sf_alpha": 2.5},
        "snr": {"sf_schedule": "snr"},
        "budget": {"sf_schedule": "budget", "sf_budget": 0.01},
    },
    "times": {
        name: {"t_sampler": name} for name in ("logit_normal", "uniform", "spectral_global", "spectral_instance")
    },
    "grid": {name: {"sampling_grid": name} for name in ("uniform", "spectral_global", "spectral_instance")},
    "residual": {name: {"spectral_residual": name} for name in ("off", "time", "time_label", "static")},
    "resolution": {"off": {}, "spectrum": {"resolution_schedule": "spectrum"}},
    "prediction": {
        "x": {"sampling_method": "heun"},
        "v": {"pred_param": "v", "t_eps": 0.0, "sampling_method": "sde"},
        "hybrid": {"pred_param": "hybrid", "hybrid_x_weight_mode": "snr_inverse", "sampling_method": "heun"},
    },
}


def pairs_of(combination):
    return set(combinations(sorted(combination.items()), 2))


def covering():
    """Combinations of choices in which any two choices of different options meet, few of them, always the same."""
    every = [dict(zip(FACTORS, choice, strict=True)) for choice in product(*FACTORS.values())]
    left, chosen = set().union(*map(pairs_of, every)), []
    while left:
        chosen.append(max(every, key=lambda combination: len(left & pairs_of(combination))))
        left -= pairs_of(chosen[-1])
    return chosen


def flags_of(combination):
    return {name: value for option, choice in combination.items() for name, value in FACTORS[option][choice].items()}


@pytest.fixture(scope="module")
def spectrum_file(tmp_path_factory):
    return spectrum_of_digits(tmp_path_factory.mktemp("spectrum") / "digits.npz")


@pytest.fixture(scope="module")
def settings(spectrum_file):
    return {"num_sampling_steps": 3, "spectrum_file": spectrum_file, "flip": True, "cfg": 2.0, "eval_freq": 9}


def inference(folder, **given):
    assert main_jit.main(flags(resume=folder, device="cpu", **given)) == 0


def report_of(folder):
    return json.loads(next((folder / "eval").glob("*.json")).read_text())


COVERING = covering()


def test_any_two_choices_meet():
    met = set().union(*map(pairs_of, COVERING))
    for a, b in combinations(FACTORS, 2):
        assert {(a, b, x, y) for x in FACTORS[a] for y in FACTORS[b]} <= {
            (a, b, *(dict(pair)[name] for name in (a, b))) for pair in met if set(dict(pair)) == {a, b}
        }


@pytest.mark.parametrize("combination", COVERING, ids=lambda combination: "-".join(combination.values()))
def test_a_run(combination, settings, tmp_path):
    """Two steps, two more after a restart, as if it had not been interrupted; then images and their metric."""
    changes = {**settings, **flags_of(combination)}
    folder = train(tmp_path / "run", epochs=1, **changes)
    train(folder, epochs=2, **changes)
    assert state_differences(folder, train(tmp_path / "whole", epochs=2, **changes)) == []
    assert all(np.isfinite(line["loss"]) for line in read_log(folder))

    inference(folder, sample=True, labels="0-4", num_per_class=1)
    drawn = next((folder / "samples").glob("*labels0-4x1"))
    described = json.loads((drawn / "settings.json").read_text())
    assert described.get("grid", "uniform") == combination["grid"]
    assert len(list(drawn.glob("0000*.png"))) == 5
    inference(folder, evaluate_gen=True, num_images=20)
    report = report_of(folder)
    assert 0 <= report["metrics"]["class_agreement"] <= 1
    spectral_x = combination["grid"] != "uniform" and combination["prediction"] != "v"
    assert ("sample_t_eps" in report) == spectral_x and (not spectral_x or 0 < report["sample_t_eps"] < 0.05)
    has_levels = any(".levels." in name for name in raw(folder)["model"])
    assert has_levels == (combination["resolution"] == "spectrum")
    conditioned = combination["times"] == "spectral_instance"
    assert ("net.schedule_embedder.weight" in raw(folder)["model"]) == conditioned
    assert ("spectrum_sha256" in report) == (conditioned or combination["grid"] != "uniform")
    on = "" if combination["grid"] == "uniform" else f" {combination['grid']} mixed 0.1"
    assert row_of(report)["solver"] == f"{'sde' if combination['prediction'] == 'v' else 'heun'}3{on}"


# --- two processes --------------------------------------------------------------------------------------------------

ALL_AT_ONCE = {
    **{"forcing": "snr", "times": "spectral_instance", "grid": "spectral_instance", "residual": "time"},
    **{"resolution": "spectrum", "prediction": "x"},
}
INSTANCE = {"val_split": "0.2", "grad_clip": 0.1, **flags_of(ALL_AT_ONCE)}


def _work(rank, folder, ports, changes):
    torch.set_num_threads(1)
    register(pytest.MonkeyPatch())
    calls = [
        arguments(output_dir=folder / "two", batch_size=8, **changes),
        flags(resume=folder / "two", evaluate_gen=True, num_images=30, gen_bsz=7, device="cpu"),
    ]
    for argv, port in zip(calls, ports, strict=True):
        as_torchrun(rank, 2, port)
        assert main_jit.main(argv) == 0
    os._exit(0)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_and_evaluate_as_one(parallel, settings, tmp_path):
    changes = {**settings, **INSTANCE}
    run_on(2, partial(_work, changes={**changes, "parallel": parallel}), tmp_path, calls=2)
    one = train(tmp_path / "one", **changes)
    for event, key in (("train", "loss"), ("val", "loss_ema1")):
        for a, b in zip(read_log(tmp_path / "two", event), read_log(one, event), strict=True):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    inference(tmp_path / "two", evaluate_gen=True, num_images=30, output_dir=tmp_path / "again")
    two, again = report_of(tmp_path / "two"), report_of(tmp_path / "again")
    assert (two["ranks"], again["ranks"]) == (2, 1)
    assert two["metrics"] == pytest.approx(again["metrics"], abs=1 / 30 + 1e-9)  # one image may be on the edge


# --- what a run keeps -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instance_run(settings, tmp_path_factory):
    """Everything at once. Read it, do not write to it."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        return train(tmp_path_factory.mktemp("instance") / "run", **{**settings, **INSTANCE, "val_split": None})


def test_checkpoints_and_exports_need_no_file(instance_run, spectrum_file, tmp_path):
    spectrum = load_spectrum(spectrum_file, 16, 10)
    args = raw(instance_run)["args"]
    assert args.sf_power == spectrum.power.tolist() and args.spectrum_sha256 == spectrum.sha256
    export(instance_run, tmp_path / "net.safetensors")
    denoiser, settings = load_denoiser(tmp_path / "net.safetensors")
    assert denoiser_settings(settings) == denoiser_settings(config_of(instance_run))
    assert denoiser.input_operator.power == pytest.approx(spectrum.power.tolist())
    z, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 2])
    v = denoiser.velocity(z, t, y, logsnr_range=torch.tensor([[-4.0, 8.0]] * 2))
    assert v.isfinite().all()
    with pytest.raises(ValueError, match="logsnr_range"):
        denoiser.velocity(z, t, y)


def test_weights_alone_with_levels_need_the_spectrum_file(instance_run, spectrum_file, tmp_path, capsys):
    torch.save(raw(instance_run)["model_ema1"], tmp_path / "checkpoint-last.pth")
    given = {"model": "JiT-Test/8", "img_size": 16, "class_num": 10, "dataset": "digits", "spectral_residual": "time"}
    given |= {"t_sampler": "spectral_instance", "sf_schedule": "snr", "ema": "model", "sample": True, "labels": "1"}
    given |= {"resume": tmp_path, "num_per_class": 1, "num_sampling_steps": 3, "device": "cpu"}
    assert "only the file has levels: --resolution_schedule" in refused(
        capsys, *flags(**given, spectrum_file=spectrum_file)
    )
    given["resolution_schedule"] = "spectrum"
    assert "does not exist" in refused(capsys, *flags(**given, spectrum_file="/nowhere.npz"))
    assert main_jit.main(flags(**given, spectrum_file=spectrum_file)) == 0


def test_a_run_with_levels_resumes_with_its_own_spectrum_alone(settings, tmp_path, capsys):
    folder = train(tmp_path / "run", epochs=1, **settings, resolution_schedule="spectrum")
    other = tmp_path / "other.npz"
    save_spectrum(
        dataclasses.replace(load_spectrum(settings["spectrum_file"], 16, 10), dct_power=np.ones((3, 11))), other
    )
    argv = arguments(output_dir=folder, epochs=2, **{**settings, "spectrum_file": other})
    assert "is not the spectrum file that this run was trained with" in refused(capsys, *argv)
    train(folder, epochs=2, **settings)


def refused(capsys, *words):
    assert main_jit.main(list(words)) == 2
    return capsys.readouterr().err


def test_another_spectrum_file_is_refused(instance_run, settings, tmp_path, capsys):
    other = tmp_path / "other.npz"
    spectrum = measure(few_digits(16), np.arange(39))
    spectrum.meta["split"] = "train"
    save_spectrum(spectrum, other)
    changes = {**settings, **INSTANCE, "val_split": None, "epochs": 3, "spectrum_file": other}
    argv = arguments(resume=instance_run, output_dir=tmp_path / "on", **changes)
    assert "is not the spectrum file" in refused(capsys, *argv)
    assert not (tmp_path / "on").exists()
    inference(instance_run, sample=True, labels="1", num_per_class=1, spectrum_file=other, output_dir=tmp_path / "s")
    (drawn,) = (tmp_path / "s" / "samples").iterdir()  # sampling may: its name says from what
    assert load_spectrum(other, 16, 10).sha256[:8] in drawn.name


def test_weights_of_an_unconditional_network_start_a_conditional_one(trained, settings, tmp_path, capsys):
    folder = train(tmp_path / "run", init_from=trained, epochs=1, **{**settings, **INSTANCE, "val_split": None})
    assert "new parameters" in capsys.readouterr().out
    assert raw(folder)["args"].schedule_delta == 0.1
    argv = arguments(init_from=folder, output_dir=tmp_path / "back", **settings)
    assert "net.schedule_embedder.weight is unknown" in refused(capsys, *argv)


def test_levels_start_from_the_layers_of_a_network_without(trained, settings, tmp_path, capsys):
    """Before the first update: learning rate 0. A run that starts from one with levels has them as well."""
    changes = {**settings, "resolution_schedule": "spectrum", "epochs": 1, "lr": 0.0}
    folder = train(tmp_path / "run", init_from=trained, **changes)
    assert "new parameters of --resolution_schedule" in capsys.readouterr().out
    weights = raw(folder)["model"]
    for layer in ("x_embedder.proj2.weight", "final_layer.adaLN_modulation.1.weight"):
        assert torch.equal(weights[f"net.levels.0.{layer}"], weights[f"net.{layer}"])
    assert torch.equal(weights["net.levels.0.x_embedder.proj1.weight"], weights["net.x_embedder.proj1.weight"] / 2)
    assert torch.equal(weights["net.levels.0.final_layer.linear.weight"], weights["net.final_layer.linear.weight"] * 2)
    again = train(tmp_path / "again", init_from=folder, epochs=1, lr=0.0, **settings)
    assert torch.equal(
        raw(again)["model"]["net.levels.0.final_layer.linear.bias"], weights["net.final_layer.linear.bias"] * 2
    )


def test_spectral_options_rename_runs_and_defaults_do_not():
    def name(**given):
        return config.run_name(config.split_global_batch(config.resolve({"dataset": "digits", **given}), 8))

    plain = name()
    assert plain == "digits_JiT-B-16_32_sf_x_162b5e"  # the name it had before there were spectral options
    assert plain == name(sampling_grid="spectral_global", spectrum_file="/x", sample_t_eps=0.01)
    values = {"t_sampler": "uniform", "t_uniform_mix": 0.2}
    values |= {"sf_schedule": "power", "sf_alpha": 2.0, "sf_snr_floor": 0.5, "warmup_steps": 10}
    values |= {"beta1": 0.8, "beta2": 0.99, "grad_clip": 1.0, "resolution_schedule": "spectrum"}
    names = [name(**{flag: value}) for flag, value in values.items()]
    variants = ({}, {"spectral_variant": "power"}, {"spectral_delta": 0.2})
    names += [name(t_sampler="spectral_global", **variant) for variant in variants]
    assert len({plain, *names}) == len(values) + len(variants) + 1


# --- what is refused, and what has no effect ------------------------------------------------------------------------

SPECTRAL = {"sampling_grid": "spectral_global"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spectrum_file": "/nowhere.npz", "t_sampler": "spectral_global"}, "does not exist"),
        ({"spectrum_file": "/nowhere.npz", "sf_schedule": "snr"}, "does not exist"),
        ({"spectrum_file": "/nowhere.npz", **SPECTRAL}, "does not exist"),
        ({"img_size": 32, "t_sampler": "spectral_global"}, "was measured with img_size 16 and this run has 32"),
        ({"class_num": 7, **SPECTRAL}, "was measured with class_num 10 and this run has 7"),
        ({"num_sampling_steps": 2, **SPECTRAL}, "needs at least 3"),
        ({"spectral_delta": 0.0, **SPECTRAL}, "--spectral_delta 0.0 is out of range; it must be above 0"),
        ({"spectral_delta": 1.0}, "--spectral_delta 1.0 is out of range; it must be below 1"),
        ({"t_uniform_mix": 1.5}, "--t_uniform_mix 1.5 is out of range; it must be at most 1"),
        ({"sample_t_eps": 0.0}, "--sample_t_eps 0.0 is out of range; it must be above 0"),
        ({"sf_schedule": "power"}, "needs the spectrum's exponent"),
        ({"spectrum_file": "/nowhere.npz", "resolution_schedule": "spectrum"}, "does not exist"),
        ({"resolution_schedule": "spectrum", "batch_size": 12}, "--batch_size 12 must be a multiple of 8"),
        ({"resolution_schedule": "spectrum", "resolution_levels": 2}, "needs an --img_size that 32 divides"),
        ({"resolution_delta": 2.0}, "--resolution_delta 2.0 is out of range; it must be at most 1"),
        ({"sf_snr_floor": 0.0}, "--sf_snr_floor 0.0 is out of range; it must be above 0"),
        ({"grad_clip": 0.0}, "--grad_clip 0.0 is out of range; it must be above 0"),
        ({"beta2": 1.5}, "--beta2 1.5 is out of range; it must be below 1"),
        ({"warmup_steps": 3}, "--warmup_epochs (WARMUP_EPOCHS) and --warmup_steps are mutually exclusive"),
    ],
)
def test_refused_before_any_work(changes, message, settings, tmp_path, capsys):
    argv = arguments(output_dir=tmp_path / "run", **{**settings, **changes})
    assert message in refused(capsys, *argv)
    assert not (tmp_path / "run").exists()


def test_time_independent_mask_excludes_a_schedule(settings, tmp_path, capsys):
    argv = arguments(output_dir=tmp_path / "run", **settings, sf_schedule="snr", disable_dct_scale_schedule=True)
    assert "are mutually exclusive" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("name", "value"), [("power", 0.0), ("power", np.nan), ("centred", 0.0), ("centred", np.inf), ("mean", np.nan)]
)
def test_a_file_with_wrong_numbers_is_refused(name, value, settings, spectrum_file, tmp_path, capsys):
    with np.load(spectrum_file) as file:
        content = dict(file)
    content[name].flat[1] = value
    np.savez(tmp_path / "bad.npz", **content)
    changes = {**settings, "spectrum_file": tmp_path / "bad.npz", "t_sampler": "spectral_instance"}
    message = refused(capsys, *arguments(output_dir=tmp_path / "run", **changes))
    assert f"{name} in {tmp_path / 'bad.npz'}" in message


def test_sampling_is_refused_like_training(trained, capsys):
    argv = flags(resume=trained, sample=True, device="cpu", num_sampling_steps=5, spectrum_file="/nowhere", **SPECTRAL)
    assert "does not exist" in refused(capsys, *argv)
    argv = flags(resume=trained, sample=True, device="cpu", num_sampling_steps=2, spectrum_file="/nowhere", **SPECTRAL)
    assert "needs at least 3" in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("given", "silent"),
    [
        ({"t_uniform_mix": 0.2}, {"t_sampler": "spectral_global"}),
        ({"spectral_variant": "power"}, {"sampling_grid": "spectral_global"}),
        ({"spectral_delta": 0.2}, {"t_sampler": "spectral_instance"}),
        ({"spectrum_file": "x"}, {"sf_schedule": "snr"}),
        ({"P_mean": 0.0, "t_sampler": "uniform"}, {"t_sampler": "logit_normal"}),
        ({"sample_t_eps": 0.01, "pred_param": "v"}, {"pred_param": "x"}),
        ({"sf_alpha": 2.0}, {"sf_schedule": "power"}),
        ({"sf_snr_floor": 0.5}, {"sf_schedule": "snr"}),
        ({"sf_budget": 0.5}, {"sf_schedule": "budget"}),
        ({"resolution_delta": 0.1}, {"resolution_schedule": "spectrum"}),
        ({"resolution_levels": 2}, {"resolution_schedule": "spectrum"}),
        ({"sf_schedule": "snr", "disable_dct_patchify": True}, {"disable_dct_patchify": False}),
    ],
)
def test_flags_without_effect_are_reported(given, silent):
    def warnings(values):
        return config.check(config.resolve({"dataset": "digits", "model": "JiT-Test/8", **values}), evaluates=False)

    assert len(warnings(given)) == 1
    assert warnings({**given, **silent}) == []


# --- the published recipes ------------------------------------------------------------------------------------------


def test_optimizer_and_warm_up_as_asked(tmp_path):
    folder = train(tmp_path / "run", warmup_epochs=None, warmup_steps=3, beta1=0.8, beta2=0.99)
    groups = raw(folder)["optimizer"]["param_groups"]
    assert all(group["betas"] == (0.8, 0.99) for group in groups)
    assert [line["lr"] for line in read_log(folder)] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3])


def test_clipping(trained, tmp_path):
    """A limit that no gradient reaches changes nothing; the logged norm is that before clipping."""
    loose = train(tmp_path / "loose", grad_clip=1e6)
    assert load(loose).args["grad_clip"] == 1e6
    assert state_differences(loose, trained) == []
    tight = train(tmp_path / "tight", grad_clip=1e-3)
    assert read_log(tight)[0]["grad_norm"] == read_log(trained)[0]["grad_norm"] > 1e-3
    moments = raw(tight)["optimizer"]["state"]
    assert all(value.isfinite().all() for slot in moments.values() for value in slot.values())
    # After the first step the first moment is (1 - beta1) times the clipped gradient.
    one = train(tmp_path / "one", grad_clip=1e-3, epochs=1, global_batch=32, batch_size=32)
    norm = torch.stack([s["exp_avg"].norm() for s in raw(one)["optimizer"]["state"].values()]).norm() / 0.1
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_a_checkpoint_without_an_added_flag_has_its_default(trained, tmp_path, capsys):
    """An older one, or a published one."""
    content = raw(trained)
    for name, field in config.all_flags().items():
        if field.metadata["added"]:
            delattr(content["args"], name)
    torch.save(content, tmp_path / "checkpoint-last.pth")
    argv = ["--sample", *flags(resume=tmp_path, labels="0", sf_schedule="power", sf_alpha=2.5, device="cpu")]
    assert "--sf_schedule power (the checkpoint has linear)" in refused(capsys, *argv)
    for changes in ({"t_sampler": "uniform"}, {"beta2": 0.5}, {"spectral_residual": "time"}, {"grad_clip": 1.0}):
        (name, value), *_ = changes.items()
        error = refused(capsys, *arguments(output_dir=tmp_path, epochs=4, **changes))
        assert f"--{name} {value} (the checkpoint has" in error


def test_variant_of_a_sampling_grid_does_not_concern_training(trained, settings, tmp_path):
    plain = config.resolve({"dataset": "digits"})
    given = {"sampling_grid": "spectral_global", "spectral_variant": "logsnr", "spectral_delta": 0.2}
    on = config.resolve(given, vars(raw(trained)["args"]))
    assert on.spectral_variant == "logsnr"
    assert config.run_name(plain) == config.run_name(config.resolve({"dataset": "digits", **given}))


def test_power_counts_the_scale_of_the_noise():
    """The contour of P = A k^-alpha is that of snr with the same P, at any scale of the noise."""
    rings = num_rings(32)
    k = np.arange(rings) + 0.5
    k[0] = 1
    shared = {
        "dataset": "digits",
        "noise_scale": 2.0,
        "sf_alpha": 2.5,
        "sf_c_min": 0.0,
        "sf_c_max": 2.0,
        "sf_snr_floor": 1.0,
    }
    power = config.resolve({**shared, "sf_schedule": "power"})
    snr = config.resolve({**shared, "sf_schedule": "snr"})
    snr = dataclasses.replace(snr, sf_power=(k**-2.5).tolist())
    t = torch.linspace(0.85, 0.97, 9)
    a, b = (build_denoiser(settings).input_operator.cutoff(t) for settings in (power, snr))
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.01)
