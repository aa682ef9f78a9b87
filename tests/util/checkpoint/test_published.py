"""Checkpoints in the published form, in both of its layouts: round trip, refusals, nothing executed."""

import argparse
import os
import pathlib
import pickle
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import main_jit
from tests.conftest import TINY, Payload, arguments, differences, flags, raw
from tests.util.checkpoint.helpers import KEYS, PATH, build, content_of, plain_adamw, published, steps, training, write
from tools.export import export
from util.checkpoint.files import NAME, find, save
from util.checkpoint.published import OPTIONAL, PROJ1, load, load_optimizer, load_weights, whole
from util.checkpoint.train_state import load_initial_weights, load_train_state
from util.errors import UserError
from util.optim import EMA, build_optimizer
from util.resume import load_for_inference

pytestmark = pytest.mark.usefixtures("tiny")


# --- round trip -----------------------------------------------------------------------------------------------------


def test_file_has_the_published_form(tmp_path):
    denoiser, optimizer, emas = training()
    save(tmp_path, content_of(denoiser, optimizer, emas))
    content = raw(tmp_path)
    assert set(content) == {*KEYS, "optimizer", "epoch", "args", "run"}
    names = list(denoiser.net.state_dict())
    assert "pos_embed" in names and not any("dct" in n or "radius" in n for n in names)
    assert all(list(content[key]) == [f"net.{n}" for n in names] for key in KEYS)
    assert content["model"][PROJ1].dim() == 4 and type(content["args"]) is argparse.Namespace
    assert content["epoch"] == 6 and content["run"] == {"step": 70, "steps_per_epoch": 10}
    for name, parameter in denoiser.named_parameters():
        assert torch.equal(content["model"][name], parameter)
        assert torch.equal(content["model_ema1"][name], emas[0].shadow[name])
        assert torch.equal(content["model_ema2"][name], emas[1].shadow[name])
        assert not torch.equal(content["model_ema1"][name], content["model_ema2"][name])
    plain_adamw(denoiser).load_state_dict(content["optimizer"])  # torch's own, as published code has it
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(tmp_path / NAME, weights_only=True)["epoch"] == 6


def test_round_trip(tmp_path):
    state = training()
    save(tmp_path, content_of(*state, step=73, metrics={"loss": 0.5}))
    checkpoint = load(tmp_path)
    assert (checkpoint.epoch, checkpoint.at, checkpoint.notes) == (6, "-step000000073", ())
    assert checkpoint.run["metrics"] == {"loss": 0.5} and checkpoint.args["img_size"] == 16
    denoiser = build(seed=1)
    resumed = denoiser, build_optimizer(denoiser, 0.3, (0.9, 0.95)), (EMA(denoiser, 0.9), EMA(denoiser, 0.5))
    load_train_state(checkpoint, *resumed)
    assert differences(content_of(*state, step=73), content_of(*resumed, step=73)) == []
    for denoiser, optimizer, _ in (state, resumed):
        steps(denoiser, optimizer, 2, seed=5)
    assert differences(content_of(*state), content_of(*resumed)) == []


# --- published files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_published_checkpoint_continues_as_it_would_have(tmp_path, linear, fused):
    """Two more steps from the file and two more without it give the same weights."""
    content, denoiser, optimizer = published(linear, fused=fused)
    checkpoint = load(write(tmp_path, content))
    assert checkpoint.run == {} and checkpoint.epoch == 3 and checkpoint.args["lr"] == 1e-3
    for i, key in enumerate(KEYS):
        assert not differences({k: v + 0.01 * i for k, v in denoiser.state_dict().items()}, checkpoint.weights[key])
    fresh = build(seed=1)
    ours = build_optimizer(fresh, 0.0, (0.5, 0.5))
    load_weights(fresh, checkpoint.weights["model"], checkpoint.path)
    load_optimizer(ours, checkpoint.optimizer, checkpoint.path)
    assert [g["weight_decay"] for g in ours.param_groups] == [0.0, 0.1]  # what it computes, is the checkpoint's
    assert all(g["fused"] and g["betas"] == (0.9, 0.95) for g in ours.param_groups)  # how it is executed is ours
    steps(denoiser, optimizer, 2, seed=5)
    steps(fresh, ours, 2, seed=5)
    for (name, a), b in zip(fresh.named_parameters(), denoiser.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("said", [None, False, True])
def test_spectral_forcing_is_inferred(tmp_path, linear, said):
    """What the settings say wins over the layout; without it linear means on. The message names the source."""
    checkpoint = load(write(tmp_path, published(linear, said)[0]))
    assert checkpoint.args["disable_dct_patchify"] == (said if said is not None else not linear)
    if said is not None:
        assert "settings say so" in checkpoint.sf_source
    else:
        assert ("linear" in checkpoint.sf_source, "convolution" in checkpoint.sf_source) == (linear, not linear)
    assert checkpoint.weights["model_ema2"][PROJ1].shape == (8, 3, 8, 8)


def test_published_settings_take_our_form(tmp_path):
    content = published()[0]
    vars(content["args"]).update(batch_size=4, world_size=8, window_size=0)
    args = load(write(tmp_path, content)).args
    assert args["global_batch"] == 32 and args["window_size"] is None


def with_prefix(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


VARIANTS = {  # as people pass checkpoints on -> a function of a published one's content
    "of DDP": lambda c: {**c, **{key: with_prefix(c[key], "module.") for key in KEYS}},
    "of torch.compile": lambda c: {**c, **{key: with_prefix(c[key], "_orig_mod.") for key in KEYS}},
    "of compiled blocks": lambda c: {
        **c,
        "model": {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in c["model"].items()},
    },
    "without EMAs": lambda c: {key: c[key] for key in ("model", "optimizer", "epoch", "args")},
    "weights alone": lambda c: {"model": c["model"]},
    "a bare state dict": lambda c: c["model"],
    "of the network": lambda c: {key.removeprefix("net."): value for key, value in c["model"].items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", [False, True])
def test_files_as_people_pass_them_on(tmp_path, variant, linear):
    content = published(linear)[0]
    checkpoint = load(write(tmp_path, VARIANTS[variant](content)))
    denoiser = build(seed=1)
    load_weights(denoiser, checkpoint.state("model"), checkpoint.path)
    expected = load(write(tmp_path / "plain", content)).state("model")
    assert not differences(dict(denoiser.state_dict()), dict(expected))
    assert checkpoint.args["disable_dct_patchify"] == (not linear)
    if "DDP" not in variant and "compile" not in variant:
        with pytest.raises(UserError, match="no weights ema1, only model"):
            checkpoint.state("ema1")


def test_safetensors(tmp_path):
    content = published()[0]
    save_file(content["model"], tmp_path / "x.safetensors")
    checkpoint = load(tmp_path, "x.safetensors")
    state = checkpoint.state("model")
    assert not differences({key: state[key] for key in content["model"]}, content["model"])
    assert "model" not in checkpoint.args
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load(tmp_path, "x.safetensors")


def test_weights_without_settings_need_the_architecture(tmp_path, capsys):
    """For sampling, evaluation and --init_from, which also takes a file; with the flags they work."""
    folder = write(tmp_path / "run", VARIANTS["weights alone"](published()[0]))
    architecture = {"model": TINY, "img_size": 16, "class_num": 10}
    sampling = {"resume": folder, "sample": True, "labels": "1", "num_sampling_steps": 2, "device": "cpu"}
    sampling["ema"] = "model"
    missing = flags(**sampling, model=TINY, dataset="digits")
    assert main_jit.main(missing) == 2
    assert "weights without settings: give --img_size, --class_num as well" in capsys.readouterr().err
    assert main_jit.main(flags(**sampling, **architecture)) == 0
    assert main_jit.main(flags(**{**sampling, "ema": "ema1"}, **architecture)) == 2
    assert "no weights ema1" in capsys.readouterr().err
    assert main_jit.main(arguments(output_dir=folder)) == 2
    assert "cannot be resumed: it lacks its settings" in capsys.readouterr().err
    init = arguments(output_dir=tmp_path / "new", epochs=1, init_from=folder / NAME, class_num=10)
    assert main_jit.main(init) == 0


def test_weights_that_do_not_say_whether_they_had_spectral_forcing(tmp_path, capsys):
    """A plain JiT's convolution is also that of this project's runs: the guess is said, and a flag wins over it."""
    folder = write(tmp_path / "run", VARIANTS["weights alone"](published()[0]))
    given = {"model": TINY, "img_size": 16, "class_num": 10, "resume": str(folder)}

    def settle(**more):
        config, checkpoint = load_for_inference(given | more, "sample")
        return config.input_operator, config.disable_dct_patchify, checkpoint.notes, checkpoint.sf_source

    name, disabled, notes, source = settle()
    assert (name, disabled) == ("none", True) and "does not say" in notes[0] and "a convolution" in source
    assert settle(input_operator="spectral_forcing") == ("spectral_forcing", False, (), "--input_operator says so")
    assert settle(disable_dct_patchify=False)[:3] == ("spectral_forcing", False, ())
    assert settle(disable_dct_patchify=True)[:3] == ("none", True, ())
    config, _ = load_for_inference(given | {"input_operator": "spectral_forcing", "sf_schedule": "power"}, "sample")
    assert config.sf_schedule == "power"
    write(folder, VARIANTS["weights alone"](published(linear=True)[0]))
    assert settle()[:3] == ("spectral_forcing", False, ())
    with pytest.raises(UserError, match="contradict"):
        settle(input_operator="none")
    with pytest.raises(UserError, match="weights without settings"):
        export(folder, tmp_path / "x.safetensors", ema="model")


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """torch.save never compresses, and a small file could hold any number of bytes."""
    path = write(tmp_path, published()[0]) / NAME
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="its records are compressed"):
        load(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path):
    content = published()[0]
    content["model"]["net.final_layer.linear.bias"][3] = float("inf")
    checkpoint = load(write(tmp_path, content))
    with pytest.raises(UserError, match=r"net\.final_layer\.linear\.bias holds NaN or infinite"):
        load_weights(build(), checkpoint.state("model"), checkpoint.path)


def test_torchs_old_format_loads(tmp_path):
    content = published()[0]
    torch.save(content, tmp_path / NAME, _use_new_zipfile_serialization=False)
    assert differences(load(tmp_path).weights["model"], content["model"]) == []


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(folder, *parts):
    with pytest.raises(UserError) as error:
        load(folder)
    for part in parts:
        assert part in str(error.value)
    return str(error.value)


def test_no_checkpoint(tmp_path):
    refused(tmp_path, str(tmp_path / NAME), "no checkpoint")
    refused(tmp_path / "missing", str(tmp_path / "missing"), "no such folder")
    assert find(tmp_path) is None and find(tmp_path / "missing") is None
    write(tmp_path, published()[0])
    for file in (NAME, "missing.pth"):
        refused(tmp_path / file, "name its folder instead", str(tmp_path))
    with pytest.raises(UserError, match=f"best.pth: that folder has {NAME}"):
        load(tmp_path, "best.pth")
    (tmp_path / NAME).rename(tmp_path / "best.pth")
    assert load(tmp_path, "best.pth").epoch == 3


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PK\x03\x04 no zip",
        b"\x80\x04",
        pickle.dumps([1, 2]),
        b"these are no weights\n",  # IndexError in the unpickler
        b"Get the weights elsewhere\n",  # struct.error
    ],
)
def test_other_files(tmp_path, content):
    """A pointer, a text, a pickle: each byte that a file may begin with reaches another error of torch."""
    (tmp_path / NAME).write_bytes(content)
    refused(tmp_path, NAME)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("all", foreign) for foreign in ([1, 2], torch.zeros(3), {"state_dict": {}}, None)],
        ("model", None),  # missing
        ("args", {"model": "x"}),
        ("epoch", "3"),
        ("model", [1]),
        ("model_ema1", {"net.weight": torch.zeros(1)}),
        ("model_ema2", {"net.weight": 1}),
        ("model_ema1", {PROJ1: torch.zeros(8, 190)}),  # no square patch of 3 channels
    ],
)
def test_entries_that_are_missing_or_something_else(tmp_path, key, value):
    content = value if key == "all" else {**published()[0], key: value}
    missing = value is None and key != "all"
    if missing:
        del content[key]
    refused(write(tmp_path, content), "not a JiT checkpoint", "no entry model" if missing else "")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_is_executed(tmp_path):
    marker = tmp_path / "executed"
    content = published()[0]
    for bad in (Payload(marker), {**content, "extra": Payload(marker)}):
        refused(write(tmp_path, bad), "plain settings")
    content["args"].hidden = Payload(marker)
    refused(write(tmp_path, content), "plain settings")
    torch.save(content, tmp_path / NAME, _use_new_zipfile_serialization=False)
    refused(tmp_path, "plain settings")
    (tmp_path / NAME).write_bytes(pickle.dumps(Payload(marker)))
    refused(tmp_path, "plain settings")
    assert not marker.exists()
    for harmless in (pathlib.PurePosixPath("/x"), SimpleNamespace(a=1), os.getcwd):  # Namespace alone is allowed
        content["args"].hidden = harmless
        refused(write(tmp_path, content), "plain settings")


def test_weights_that_do_not_fit_change_nothing():
    denoiser = build()
    good = {k: v.clone() for k, v in denoiser.state_dict().items()}
    other, name = {k: v + 1 for k, v in good.items()}, "net.blocks.2.attn.qkv.weight"
    wrong = {
        f"{name} is missing": {k: v for k, v in other.items() if k != name},
        "net.pos_embed is missing": {k: v for k, v in other.items() if k != "net.pos_embed"},
        "net.surplus is unknown": {**other, "net.surplus": torch.zeros(1)},
        f"{name} is [7] and the network's is [96, 32]": {**other, name: torch.zeros(7)},
        "net.in_context_posemb is missing": {k.removeprefix("net."): v for k, v in other.items()},
    }
    for message, state in wrong.items():
        with pytest.raises(UserError) as error:
            load_weights(denoiser, state, PATH)
        assert message in str(error.value) and str(PATH) in str(error.value)
        assert not differences(dict(denoiser.state_dict()), good)


def test_optimizer_that_does_not_fit(tmp_path):
    denoiser = build()
    ours, state = build_optimizer(denoiser, 0.0, (0.9, 0.95)), load(write(tmp_path, published()[0])).optimizer
    cut = {**state, "param_groups": [{**state["param_groups"][0], "params": [0]}, state["param_groups"][1]]}
    for bad in (cut, {**state, "exp_avg": {**state["exp_avg"], 0: torch.zeros(3)}}):
        with pytest.raises(UserError, match=r"x\.pth: its optimizer does not fit the network"):
            load_optimizer(ours, bad, PATH)
    assert not ours.state


# --- modules that not every network has -------------------------------------------------------------------------------

ADDED = {"spectral_residual": "time"}  # 4 blocks with 33 * 8 weights and biases for each of two gates, and 9 * 2


def test_the_flag_of_an_optional_module_is_named():
    assert set(OPTIONAL) >= {"spectral_residual", "schedule_embedder"}
    plain, residual = build(), build(**ADDED)
    for module, other, who in ((plain, residual, "file"), (residual, plain, "network")):
        with pytest.raises(UserError, match=rf"only the {who} has spectral_residual: --spectral_residual\)"):
            load_weights(module, other.state_dict(), PATH)


def test_optional_modules_are_added_to_the_weights_of_a_network_without(tmp_path):
    content = published()[0]
    denoiser = build(seed=1, **ADDED)
    fresh = {k: v.clone() for k, v in denoiser.state_dict().items() if ".spectral_residual." in k}
    notes = load_initial_weights(load(write(tmp_path, content)), "ema2", denoiser)
    assert notes == [f"{4 * (33 * 8 + 9 * 2):,} new parameters of --spectral_residual"]
    assert differences({k: v for k, v in denoiser.state_dict().items() if k in fresh}, fresh) == []
    assert differences({k: v for k, v in denoiser.state_dict().items() if k not in fresh}, content["model_ema2"]) == []


def test_optional_modules_are_taken_where_the_checkpoint_has_them(tmp_path):
    trained, denoiser = build(seed=2, **ADDED), build(seed=1, **ADDED)
    content = {**published()[0], **{key: dict(trained.state_dict()) for key in KEYS}}
    checkpoint = load(write(tmp_path, content))
    assert load_initial_weights(checkpoint, "model", denoiser) == []
    assert differences(dict(denoiser.state_dict()), dict(trained.state_dict())) == []
    with pytest.raises(UserError, match="is unknown"):  # and are not dropped
        load_initial_weights(checkpoint, "model", build())
    assert differences(whole(checkpoint.weights["model"]), content["model"]) == []


DAMAGED = {  # what an entry becomes -> part of the message
    "integers": (lambda c: c["model"].update({PROJ1: c["model"][PROJ1].long()}), "dense tensor of floating-point"),
    "a key that is no text": (lambda c: c["model"].update({3: torch.zeros(1)}), "not a state dict"),
    "an empty projection": (lambda c: c["model"].update({PROJ1: torch.zeros(0, 3, 8, 8)}), "square patches"),
    "a step that is no number": (lambda c: c.update(run={"step": "x"}), "entry run is damaged"),
    "metrics that are none": (lambda c: c.update(run={"step": 1, "metrics": None}), "entry run is damaged"),
    "a setting of another type": (
        lambda c: vars(c["args"]).update(noise_scale="1"),
        "--noise_scale '1' must be of the type float",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_entries_of_wrong_types_are_refused(tmp_path, capsys, what):
    content = published()[0]
    DAMAGED[what][0](content)
    folder = write(tmp_path / "run", content)
    for argv in (flags(resume=folder, sample=True, device="cpu"), arguments(output_dir=folder)):
        assert main_jit.main(argv) == 2
        assert DAMAGED[what][1] in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["x", [], {}, {"state": {}, "param_groups": []}])
def test_another_optimizers_state_does_not_matter_to_sampling(tmp_path, capsys, optimizer):
    folder = write(tmp_path / "run", {**published()[0], "optimizer": optimizer})
    sampling = flags(resume=folder, sample=True, labels="1", num_sampling_steps=1, num_per_class=1, device="cpu")
    assert main_jit.main(sampling) == 0
    assert main_jit.main(arguments(output_dir=folder, epochs=9)) == 2
    assert "optimizer" in capsys.readouterr().err


def test_training_resumes_neither_from_half_an_optimizer_nor_from_emas_that_are_not_finite(tmp_path, capsys):
    state = training()
    content = content_of(*state)
    content["optimizer"]["state"].pop(0)
    save(tmp_path, content)
    with pytest.raises(UserError, match="lacks the state of some parameters"):
        load_train_state(load(tmp_path), *state)
    content = content_of(*state)
    content["model_ema2"] = {**content["model_ema2"], "net.final_layer.linear.bias": torch.full((192,), float("nan"))}
    save(tmp_path, content)
    with pytest.raises(UserError, match=r"net\.final_layer\.linear\.bias holds NaN"):
        load_train_state(load(tmp_path), *state)
