"""Checkpoints: the published form in both layouts, refusals, and writing that never loses the previous one."""

import argparse
import copy
import os
import pathlib
import pickle
from types import SimpleNamespace

import pytest
import torch

import main_jit
from engine_jit import Training, build_optimizer
from tests.conftest import TINY, Payload, differences, raw
from util import checkpoint, config
from util.build import DenoiserConfig
from util.checkpoint import NAME, PROJ1, load, load_optimizer, load_weights
from util.ema import EMA
from util.errors import UserError
from util.training_loop import checkpoint_content
from util.window import Window

pytestmark = pytest.mark.usefixtures("tiny")


def settings(**changes):
    given = {"model": TINY, "dataset": "digits", "img_size": 16, **changes}
    args = config.resolve(given, None, training=True)
    config.split_global_batch(args, 1)
    return args


def build():
    torch.manual_seed(0)
    return DenoiserConfig.from_args(settings()).build()


def steps(denoiser, optimizer, count, seed=0):
    """Optimizer steps with given random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(count):
        for parameter in denoiser.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def plain_adamw(denoiser, weight_decay=0.1, **kwargs):
    """AdamW as published runs have it: two groups, all vectors and biases first; no code of the project."""
    vectors = [p for n, p in denoiser.named_parameters() if p.dim() == 1 or n.endswith(".bias")]
    rest = [p for n, p in denoiser.named_parameters() if not (p.dim() == 1 or n.endswith(".bias"))]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": rest, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **kwargs)


def published(linear=False, said=None, fused=False, seed=0):
    """Content of a checkpoint as the published training code writes it, after two steps of AdamW, and its parts."""
    denoiser = build()
    optimizer = plain_adamw(denoiser, fused=fused, foreach=False)
    steps(denoiser, optimizer, 2, seed)
    args = argparse.Namespace(model=TINY, img_size=16, class_num=10, lr=1e-3, epochs=600, dist_url="env://")
    if said is not None:
        args.disable_dct_patchify = said
    states = {
        name: {k: v.clone() + 0.01 * i for k, v in denoiser.state_dict().items()} for i, name in enumerate(WEIGHTS)
    }
    content = {**states, "optimizer": copy.deepcopy(optimizer.state_dict()), "epoch": 3, "args": args}
    if linear:
        for state in states.values():
            state[PROJ1] = state[PROJ1].flatten(1)
        index = sum(p.dim() == 1 or n.endswith(".bias") for n, p in denoiser.named_parameters())
        names = [n for n, p in denoiser.named_parameters() if not (p.dim() == 1 or n.endswith(".bias"))]
        slot = content["optimizer"]["state"][index + names.index(PROJ1)]
        for name in ("exp_avg", "exp_avg_sq"):
            slot[name] = slot[name].flatten(1)
    return content, denoiser, optimizer


WEIGHTS = ("model", "model_ema1", "model_ema2")


def write(folder, content):
    torch.save(content, folder / NAME)
    return folder


# --- round trip -----------------------------------------------------------------------------------------------------


def save(training, step, args):
    return checkpoint.save(args.output_dir, checkpoint_content(training, step, 10, args))


@pytest.fixture
def run(tmp_path):
    """A training state after three steps, whose two averages differ, and its checkpoint in tmp_path."""
    denoiser = build()
    optimizer, emas = build_optimizer(denoiser, 0.1), (EMA(denoiser, 0.9), EMA(denoiser, 0.5))
    for i in range(3):
        steps(denoiser, optimizer, 1, seed=i)
        for ema in emas:
            ema.update(denoiser)
    training = Training(denoiser, denoiser, optimizer, emas, Window(torch.device("cpu")))
    args = settings(lr=1e-3, weight_decay=0.1, output_dir=str(tmp_path))
    save(training, 70, args)
    return training, args, tmp_path


def test_file_has_the_published_form(run):
    training, args, folder = run
    content = raw(folder)
    assert set(content) == {*WEIGHTS, "optimizer", "epoch", "args", "run"}
    names = list(training.denoiser.net.state_dict())
    assert "pos_embed" in names and not any("dct" in n or "radius" in n for n in names)
    for name in WEIGHTS:
        assert list(content[name]) == [f"net.{n}" for n in names]
    assert content["model"][PROJ1].dim() == 4
    assert type(content["args"]) is argparse.Namespace and content["args"] == args
    assert content["epoch"] == 6 and content["run"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    for name, parameter in training.denoiser.named_parameters():
        assert torch.equal(content["model"][name], parameter)
        assert torch.equal(content["model_ema1"][name], training.emas[0].averages[name])
        assert torch.equal(content["model_ema2"][name], training.emas[1].averages[name])
        assert not torch.equal(content["model_ema1"][name], content["model_ema2"][name])
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(folder / NAME, weights_only=True)["epoch"] == 6


def test_round_trip(run):
    training, args, folder = run
    before = set(torch.serialization.get_safe_globals())
    saved = load(folder)
    assert set(torch.serialization.get_safe_globals()) == before  # nothing stays allowed
    assert (saved.path, saved.epoch, saved.args) == (folder / NAME, 6, vars(args))
    assert saved.run == raw(folder)["run"]
    fresh = DenoiserConfig.from_args(settings()).build()
    optimizer = build_optimizer(fresh, 0.1)
    load_weights(fresh, saved.weights["model"], saved.path)
    load_optimizer(optimizer, saved.optimizer, saved.path)
    assert not differences(dict(fresh.state_dict()), dict(training.denoiser.state_dict()))
    assert not differences(optimizer.state_dict(), training.optimizer.state_dict())
    assert all(g["fused"] for g in optimizer.param_groups)
    for i in (0, 1):
        average = EMA(fresh, 0.9)
        average.copy_from(saved.weights[f"model_ema{i + 1}"])
        assert not differences(average.averages, training.emas[i].averages)
    steps(training.denoiser, training.optimizer, 2, seed=9)
    steps(fresh, optimizer, 2, seed=9)
    assert not differences(dict(fresh.state_dict()), dict(training.denoiser.state_dict()))
    assert all(float(slot["step"]) == 5 for slot in optimizer.state_dict()["state"].values())


def test_loading_does_not_change_the_file(run):
    """Weights in memory may be a view of the file: stepping on them must not reach it."""
    _, _, folder = run
    before = (folder / NAME).read_bytes()
    saved = load(folder)
    fresh = build()
    optimizer = build_optimizer(fresh, 0.1)
    load_weights(fresh, saved.weights["model"], saved.path)
    load_optimizer(optimizer, saved.optimizer, saved.path)
    steps(fresh, optimizer, 1)
    assert (folder / NAME).read_bytes() == before


def test_optimizer_groups_are_in_the_published_order():
    denoiser = build()
    groups = build_optimizer(denoiser, 0.3).param_groups
    name = {id(p): n for n, p in denoiser.named_parameters()}
    no_decay, decay = ([name[id(p)] for p in group["params"]] for group in groups)
    order = list(name.values())
    assert no_decay == [n for n in order if n.endswith(".bias") or "norm" in n]
    assert decay == [n for n in order if n not in no_decay]
    assert "net.in_context_posemb" in decay and "net.y_embedder.embedding_table.weight" in decay
    assert [g["weight_decay"] for g in groups] == [0.0, 0.3]
    assert all(g["betas"] == (0.9, 0.95) for g in groups)


# --- published files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_published_checkpoint_continues_as_it_would_have(tmp_path, linear, fused):
    """Two more steps from the file and two more without it give the same weights."""
    content, denoiser, optimizer = published(linear, fused=fused)
    saved = load(write(tmp_path, content))
    assert saved.run == {} and saved.epoch == 3 and saved.args["lr"] == 1e-3
    expected = {k: v.clone() for k, v in denoiser.state_dict().items()}
    for i, name in enumerate(WEIGHTS):
        assert not differences({k: v + 0.01 * i for k, v in expected.items()}, saved.weights[name])
    fresh = DenoiserConfig.from_args(settings()).build()
    ours = build_optimizer(fresh, 0.0)
    load_weights(fresh, saved.weights["model"], saved.path)
    load_optimizer(ours, saved.optimizer, saved.path)
    assert [g["weight_decay"] for g in ours.param_groups] == [0.0, 0.1]  # what it is, is the checkpoint's
    assert all(g["fused"] for g in ours.param_groups)  # how it is executed is ours
    steps(denoiser, optimizer, 2, seed=5)
    steps(fresh, ours, 2, seed=5)
    for (name, a), b in zip(fresh.named_parameters(), denoiser.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("said", [None, False, True])
def test_spectral_forcing_is_inferred(tmp_path, linear, said):
    """What the settings say wins over the layout; without it linear means on. The message names the source."""
    saved = load(write(tmp_path, published(linear, said)[0]))
    assert saved.args["disable_dct_patchify"] == (said if said is not None else not linear)
    if said is not None:
        assert "settings say" in saved.sf_source
    else:
        assert ("linear" in saved.sf_source, "convolution" in saved.sf_source) == (linear, not linear)
    assert saved.weights["model_ema2"][PROJ1].shape == (8, 3, 8, 8)


def test_published_checkpoint_can_be_sampled_and_says_what_it_is(tmp_path, capsys):
    write(tmp_path, published(linear=True)[0])
    argv = ["--sample", "--resume", tmp_path, "--labels", "3", "--num_per_class", "1", "--num_sampling_steps", "1"]
    assert main_jit.main([str(a) for a in [*argv, "--device", "cpu"]]) == 0
    out = capsys.readouterr().out
    assert "Spectral Forcing on" in out and "linear" in out and "epoch 4" in out and "ema1" in out


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(folder, *parts):
    with pytest.raises(UserError) as error:
        load(folder)
    for part in parts:
        assert part in str(error.value)
    return str(error.value)


def test_no_checkpoint(tmp_path):
    refused(tmp_path, str(tmp_path), f"there is no {NAME} in it")
    refused(tmp_path / "missing", str(tmp_path / "missing"), "no such folder")
    assert checkpoint.find(tmp_path) is None and checkpoint.find(tmp_path / "missing") is None


def test_a_file_is_not_a_folder(tmp_path):
    write(tmp_path, published()[0])
    refused(tmp_path / NAME, "folder", str(tmp_path))
    refused(tmp_path / "missing.pth", "folder", str(tmp_path))


def test_truncated_files(tmp_path):
    whole = write(tmp_path, published()[0]) / NAME
    content = whole.read_bytes()
    for part in (0.0, 1e-4, 0.1, 0.5, 0.9, 0.999):
        whole.write_bytes(content[: int(part * len(content))])
        refused(tmp_path, "truncated")
    whole.write_bytes(content[:-1])
    refused(tmp_path, "truncated")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html>\n",
        b"PK\x03\x04 no zip",
        b"\x80\x04",
        b"\x00" * 100,
        pickle.dumps([1, 2]),
        b"these are no weights\n",  # IndexError in the unpickler
        b"Get the weights elsewhere\n",  # struct.error
    ],
)
def test_other_files(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    refused(tmp_path, NAME)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"state_dict": {}}, {}, None])
def test_foreign_torch_files(tmp_path, content):
    refused(write(tmp_path, content), "not a JiT checkpoint", "lacks")


@pytest.mark.parametrize("name", [*WEIGHTS, "epoch", "args"])
def test_missing_keys_are_named(tmp_path, name):
    content, _, _ = published()
    del content[name]
    assert refused(write(tmp_path, content), "lacks").count(name) >= 1


@pytest.mark.parametrize(
    "change",
    [
        {"args": {"model": "x"}},
        {"epoch": "3"},
        {"model": [1]},
        {"model_ema1": {"net.weight": torch.zeros(1)}},
        {"model_ema2": {"net.weight": 1}},
    ],
)
def test_keys_that_hold_something_else(tmp_path, change):
    refused(write(tmp_path, {**published()[0], **change}), "not a JiT checkpoint")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_is_executed(tmp_path):
    marker = tmp_path / "executed"
    content, _, _ = published()
    for bad in (Payload(marker), {**content, "extra": Payload(marker)}):
        refused(write(tmp_path, bad), "plain settings")
    content["args"].hidden = Payload(marker)
    refused(write(tmp_path, content), "plain settings")
    torch.save(content, tmp_path / NAME, _use_new_zipfile_serialization=False)
    refused(tmp_path, "plain settings")
    (tmp_path / NAME).write_bytes(pickle.dumps(Payload(marker)))
    refused(tmp_path, "plain settings")
    assert not marker.exists()


@pytest.mark.parametrize("value", [pathlib.PurePosixPath("/x"), SimpleNamespace(a=1), os.getcwd], ids=repr)
def test_namespace_is_the_only_type_that_is_allowed(tmp_path, value):
    content, _, _ = published()
    content["args"].other = value
    refused(write(tmp_path, content), "plain settings")


def test_weights_that_do_not_fit_change_nothing():
    denoiser = build()
    good = {k: v.clone() for k, v in denoiser.state_dict().items()}
    path = pathlib.Path("x.pth")
    name = "net.blocks.2.attn.qkv.weight"
    wrong = {
        f"{name} is missing": {k: v + 1 for k, v in good.items() if k != name},
        "net.pos_embed is missing": {k: v + 1 for k, v in good.items() if k != "net.pos_embed"},
        "net.surplus is unknown": {**{k: v + 1 for k, v in good.items()}, "net.surplus": torch.zeros(1)},
        f"{name} is [7]": {**{k: v + 1 for k, v in good.items()}, name: torch.zeros(7)},
        "net.in_context_posemb is missing": {k.removeprefix("net."): v for k, v in good.items()},
    }
    for message, state in wrong.items():
        with pytest.raises(UserError) as error:
            load_weights(denoiser, state, path)
        assert message in str(error.value) and "x.pth" in str(error.value)
        assert not differences(dict(denoiser.state_dict()), good)


def test_optimizer_that_does_not_fit():
    content, denoiser, _ = published()
    ours, state = build_optimizer(denoiser, 0.0), content["optimizer"]
    path = pathlib.Path("x.pth")
    cut = {**state, "param_groups": [{**state["param_groups"][0], "params": [0]}, state["param_groups"][1]]}
    with pytest.raises(UserError, match=r"x\.pth: its optimizer has groups of \[1, "):
        load_optimizer(ours, cut, path)
    slot = state["state"][0]
    for shape in ((3,), (len(slot["exp_avg"]) + 1,)):
        bad = {**state, "state": {**state["state"], 0: {**slot, "exp_avg": torch.zeros(shape)}}}
        with pytest.raises(UserError, match=rf"x\.pth: the optimizer's exp_avg is \[{shape[0]}\]"):
            load_optimizer(ours, bad, path)
    assert not ours.state


# --- writing --------------------------------------------------------------------------------------------------------


def fail_in_save(monkeypatch, error):
    def save(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", save)


def fail_in_replace(monkeypatch, error):
    def replace(*args):
        raise error

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("place", [fail_in_save, fail_in_replace])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_failed_save_leaves_the_previous_checkpoint(run, monkeypatch, place, error):
    training, args, folder = run
    before = (folder / NAME).read_bytes()
    place(monkeypatch, error)
    with pytest.raises(UserError) as refusal:
        save(training, 80, args)
    assert str(folder / NAME) in str(refusal.value) and str(error) in str(refusal.value)
    assert [p.name for p in folder.iterdir()] == [NAME]
    assert (folder / NAME).read_bytes() == before


@pytest.mark.parametrize("place", [fail_in_save, fail_in_replace])
def test_killed_save_leaves_the_previous_checkpoint(run, monkeypatch, place):
    """An exception that nobody handles stands for a process that ends there."""
    training, args, folder = run
    before = (folder / NAME).read_bytes()
    with monkeypatch.context() as patch:
        place(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            save(training, 80, args)
    assert (folder / NAME).read_bytes() == before and load(folder).epoch == 6
    save(training, 80, args)  # what was left does not disturb
    assert [p.name for p in folder.iterdir()] == [NAME] and load(folder).epoch == 7


def test_save_is_on_the_disk_before_it_replaces(run, monkeypatch):
    training, args, _ = run
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a))[1])
    save(training, 80, args)
    assert events[:2] == ["fsync", "replace"]


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path / "missing", {})
