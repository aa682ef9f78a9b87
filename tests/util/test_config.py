"""Flags and configuration: names and defaults, what a checkpoint locks, what is refused, and the names of runs."""

import dataclasses
import shlex
import typing

import pytest

import main_jit
from tests.conftest import TINY, arguments, config_of, listing, read_log
from util import config as configuration
from util.config import (
    SNR_FLOOR,
    all_flags,
    check,
    config_class,
    parse_args,
    parse_labels,
    resolve,
    run_name,
    split_global_batch,
)
from util.errors import UserError
from util.flags import LOCKED, LOCKED_FOR_TRAINING, OVERRIDABLE, PER_CALL
from util.io import REPOSITORY
from util.optim import peak_lr

DEFAULTS = {name: field.default for name, field in all_flags().items()}

# What people's scripts pass, with the defaults on ImageNet. Written by hand, not taken from the code.
INTERFACE = """
    --model JiT-B/16 --img_size 256 --class_num 1000 --attn_dropout 0 --proj_dropout 0 --dataset imagefolder
    --epochs 600 --warmup_epochs 5 --batch_size 128 --blr 5e-5 --min_lr 0 --lr_schedule constant --weight_decay 0
    --ema_decay1 0.9999 --ema_decay2 0.9996 --label_drop_prob 0.1 --seed 0 --start_epoch 0
    --P_mean -0.8 --P_std 0.8 --noise_scale 1 --t_eps 0.05 --pred_param x
    --sampling_method heun --num_sampling_steps 50 --cfg 2.9 --interval_min 0.1 --interval_max 1 --gen_bsz 128
    --online_eval --num_images 50000 --eval_freq 40 --metrics fid,is --save_last_freq 5 --log_freq 100
    --dist_timeout 30 --wandb_project jit --wandb_mode offline --wandb_num_vis 16
    --dct_fixed_scale 1 --sf_c_min 0.05 --sf_c_max 1 --sf_kappa 30
"""
WITHOUT_DEFAULT = """
    --lr 1e-4 --data_path d --output_dir o --resume r --device cpu --wandb_entity e --wandb_run_name n
    --global_batch 1024 --window_size 16 --evaluate_gen --disable_dct_patchify --disable_dct_scale_schedule
"""
LOCKS = {  # also by hand: a lock that changes decides which commands still work with old checkpoints
    LOCKED: """model img_size class_num channels labels_file disable_dct_patchify input_operator window_size
        disable_dct_scale_schedule dct_fixed_scale sf_c_min sf_c_max sf_kappa spectral_residual
        spectral_residual_scale pred_param noise_scale t_eps P_mean P_std sf_schedule sf_alpha sf_snr_floor
        sf_budget hybrid_x_weight_mode hybrid_x_weight_power hybrid_x_weight_min hybrid_x_weight_max
        resolution_schedule resolution_delta resolution_levels""".split(),
    LOCKED_FOR_TRAINING: """attn_dropout proj_dropout dataset flip warmup_epochs warmup_steps
        global_batch lr blr min_lr lr_schedule weight_decay beta1 beta2 grad_clip ema_decay1 ema_decay2
        label_drop_prob seed val_split t_sampler t_uniform_mix spectral_variant spectral_delta""".split(),
    OVERRIDABLE: """data_path epochs batch_size sampling_method num_sampling_steps cfg interval_min interval_max
        online_eval eval_freq metrics num_images gen_bsz save_last_freq on_bad_image save_every_steps
        save_every_minutes keep_last keep_every_epochs skip_nonfinite parallel activation_checkpointing log_freq
        precision attn_fp32 compile val_images val_freq val_rings sampling_grid sample_t_eps spectrum_file vae
        vae_tiled""".split(),
    PER_CALL: """wandb_project wandb_entity wandb_run_name wandb_mode wandb_num_vis evaluate_gen sample labels
        dry_run num_per_class num_workers accum_iter start_epoch init_from init_weights ema fid_stats
        inception_weights dinov2_weights clip_weights weights_dir protocol tensorboard save_images keep_features
        sweep_cfg sweep_ema sweep_interval sweep_images output_dir
        output_root resume checkpoint device dist_timeout""".split(),
}
CHOSEN = {"model": "JiT-L/16", "dataset": "cifar10", "val_split": "0.1", "interval_min": 0.2, "device": "cuda"}
CHOSEN["labels_file"] = str(REPOSITORY / "recipes" / "imagenet100.txt")
SPECTRAL = {"t_sampler": "spectral_global"}  # without which the variant and delta are about samples alone


def another(name):
    """A value that a flag accepts and that is not its default."""
    field, default = all_flags()[name], DEFAULTS[name]
    hint = next(typing.get_type_hints(g)[name] for g in configuration.groups() if name in typing.get_type_hints(g))
    if name in CHOSEN:
        return CHOSEN[name]
    if field.metadata["choices"]:
        return next(choice for choice in reversed(tuple(field.metadata["choices"])) if choice != default)
    if hint in (bool, bool | None):
        return not (default is None or default)
    if hint in (str, str | None):
        return "x"
    return 32 if hint in (int, int | None) else 0.25


VALUES = {lock: {name: another(name) for name in names} for lock, names in LOCKS.items()}
LOCKED_VALUES, TRAINING_VALUES = VALUES[LOCKED], VALUES[LOCKED_FOR_TRAINING]


def fresh(world_size=1, **given):
    return split_global_batch(resolve(given), world_size)


def saved(**changes):
    """`args` of the checkpoint of a run with the defaults."""
    return {**fresh().as_dict(), **changes}


# --- names and defaults ---------------------------------------------------------------------------------------------


def test_flags_and_defaults():
    given, config = parse_args(shlex.split(INTERFACE)), fresh()
    assert given == {name: getattr(config, name) for name in given}
    for name in parse_args(shlex.split(WITHOUT_DEFAULT)):
        assert DEFAULTS[name] in (None, False)


def test_nothing_given_is_empty_and_names_are_not_abbreviated():
    assert parse_args([]) == {}
    for argv in (["--epoch", "3"], ["--no_such_flag"], ["--epochs", "three"], ["--pred_param", "e"]):
        with pytest.raises(UserError, match=argv[0]):
            parse_args(argv)


def test_locks():
    for lock, names in LOCKS.items():
        assert {name for name, field in all_flags().items() if field.metadata["lock"] == lock} == set(names)
        assert all(DEFAULTS[name] != another(name) for name in names)


def test_no_two_groups_declare_the_same_flag():
    fields = [field.name for group in configuration.groups() for field in dataclasses.fields(group)]
    assert len(fields) == len(set(fields)) == len(dataclasses.fields(config_class()))


@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
def test_defaults_of_the_data_set(dataset):
    config = fresh(dataset=dataset)
    assert (config.img_size, config.class_num) == (32, 10)
    assert config.flip == (dataset == "cifar10")  # a mirrored digit is another sign
    assert config.metrics == ("class_agreement" if dataset == "digits" else "fid,is")
    config = fresh(dataset=dataset, img_size=16, class_num=3, flip=dataset == "digits", metrics="is")
    assert (config.img_size, config.class_num, config.flip, config.metrics) == (16, 3, dataset == "digits", "is")


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main_jit.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name}" in out for name in all_flags())
    assert "JiT-B/16" in out and "5e-05" in out
    assert "kid_clip, fd_effnet, fid_antialias, class_agreement, is" in " ".join(out.split())  # all of the registry


# --- a checkpoint and the flags -------------------------------------------------------------------------------------


def contradictions(given, checkpoint, training):
    with pytest.raises(UserError) as error:
        resolve(given, checkpoint, training=training)
    return str(error.value)


def test_given_before_checkpoint_before_default():
    args = resolve({"cfg": 1.5}, saved(cfg=2.0, num_sampling_steps=10), training=False)
    assert (args.cfg, args.num_sampling_steps, args.gen_bsz) == (1.5, 10, 128)
    assert resolve({}, {"model": "JiT-L/16"}, training=False).cfg == 2.9  # a published file without the setting


@pytest.mark.parametrize("training", [False, True])
def test_every_contradiction_is_named(training):
    bound = {**LOCKED_VALUES, **(TRAINING_VALUES if training else {})}
    message = contradictions({**bound, **VALUES[OVERRIDABLE]}, saved(**SPECTRAL), training)
    for name, value in bound.items():
        assert f"--{name} {value} (the checkpoint has {saved(**SPECTRAL)[name]})" in message
    assert not any(f"--{name} " in message for name in VALUES[OVERRIDABLE])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("lock", "name"), [(lock, name) for lock, names in LOCKS.items() for name in names])
def test_what_a_checkpoint_binds(lock, name, training):
    value, there = VALUES[lock][name], saved(**{name: VALUES[lock][name]})
    if lock == LOCKED or (lock == LOCKED_FOR_TRAINING and training):
        assert f"--{name} {value}" in contradictions({name: value}, saved(**SPECTRAL), training)
        assert getattr(resolve({name: value}, there, training), name) == value
    else:
        assert getattr(resolve({name: value}, saved(), training), name) == value
    inherited = DEFAULTS[name] if lock == PER_CALL else value
    assert getattr(resolve({}, there, training), name) == inherited


def test_a_launcher_that_passes_all_defaults_again_does_not_contradict_a_checkpoint():
    given = parse_args(shlex.split(INTERFACE))
    args = resolve(given, saved())
    assert {name: getattr(args, name) for name in given} == given


def test_settings_of_foreign_checkpoints_are_ignored_where_unknown():
    args = resolve({}, {"dist_url": "env://", "gpu": 3, "model": "JiT-L/16"}, training=False)
    assert args.model == "JiT-L/16" and not hasattr(args, "dist_url") and not hasattr(args, "gpu")


def test_a_published_run_keeps_its_global_batch():
    """Loading a published file gives its global batch: batch size times number of processes."""
    theirs = {"batch_size": 128, "global_batch": 1024, "lr": 2e-4}
    config = split_global_batch(resolve({"batch_size": 64}, theirs), 2)
    assert (config.global_batch, config.accum_iter, config.lr) == (1024, 8, 2e-4)


def test_whole_and_decimal_numbers_name_one_run():
    given = parse_args(["--warmup_epochs", "5"])
    assert run_name(fresh(**given)) == run_name(fresh())


def test_only_some_settings_are_taken():
    args = resolve({}, saved(model="JiT-L/16", cfg=1.0, noise_scale=2.0), training=False, only=("model",))
    assert (args.model, args.cfg, args.noise_scale) == ("JiT-L/16", 2.9, 1.0)
    resolve({"noise_scale": 3.0}, saved(), training=False, only=("model",))
    with pytest.raises(UserError, match="--model JiT-B/32"):
        resolve({"model": "JiT-B/32"}, saved(), training=False, only=("model",))


def test_checkpoint_of_an_unknown_data_set():
    with pytest.raises(UserError, match="dataset"):
        resolve({}, saved(dataset="imagenet22k"), training=False)


# --- labels, global batch, names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (None, list(range(10))),
        ("0,1,2", [0, 1, 2]),
        ("3-6", [3, 4, 5, 6]),
        ("7, 2-3,7", [7, 2, 3, 7]),
        ("0-99", list(range(100))),
    ],
)
def test_labels(text, labels):
    assert parse_labels(text, 100) == labels


def test_labels_of_few_classes():
    assert parse_labels(None, 3) == [0, 1, 2] and parse_labels("2", 3) == [2]


@pytest.mark.parametrize("text", "10 0,10 5-12 -1 a 1,,2 1;2 5-3 0,9-7 1--2,3 1.0 0x1".split())
def test_labels_that_are_refused(text):
    with pytest.raises(UserError) as error:
        parse_labels(text, 10)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("given", "processes", "global_batch", "accum_iter"),
    [
        ({"batch_size": 128}, 1, 128, 1),
        ({"batch_size": 128}, 8, 1024, 1),
        ({"batch_size": 32, "accum_iter": 4}, 2, 256, 4),
        ({"batch_size": 32, "global_batch": 256}, 2, 256, 4),
        ({"batch_size": 32, "global_batch": 256}, 8, 256, 1),
        ({"batch_size": 32, "global_batch": 256, "accum_iter": 4}, 2, 256, 4),
    ],
)
def test_global_batch(given, processes, global_batch, accum_iter):
    args = fresh(processes, **given)
    assert (args.global_batch, args.accum_iter) == (global_batch, accum_iter)
    assert peak_lr(args) == pytest.approx(5e-5 * global_batch / 256)
    assert peak_lr(dataclasses.replace(args, lr=0.7)) == 0.7


@pytest.mark.parametrize(
    ("given", "processes"),
    [
        ({"batch_size": 32, "global_batch": 100}, 1),
        ({"batch_size": 32, "global_batch": 16}, 1),
        ({"batch_size": 32, "global_batch": 256}, 3),
        ({"batch_size": 32, "global_batch": 256, "accum_iter": 3}, 2),
    ],
)
def test_global_batch_that_cannot_be(given, processes):
    with pytest.raises(UserError) as error:
        fresh(processes, **given)
    for part in (given["global_batch"], 32, f"{processes} ranks"):
        assert str(part) in str(error.value)


def test_a_resumed_run_keeps_its_global_batch():
    args = split_global_batch(resolve({"batch_size": 32}, saved(global_batch=128)), 2)
    assert (args.batch_size, args.global_batch, args.accum_iter) == (32, 128, 2)


def test_runs_that_differ_have_names_that_differ():
    changes = [{}, *({n: v} for n, v in {**LOCKED_VALUES, **TRAINING_VALUES}.items() if n != "global_batch")]
    changes = [{**SPECTRAL, **c} if set(c) & {"spectral_variant", "spectral_delta"} else c for c in changes]
    changes += [{"batch_size": 64}, {"global_batch": 256}, {"accum_iter": 3}, {"init_from": "/a"}, {"init_from": "/b"}]
    changes += [{"init_from": "/a", "init_weights": "ema1"}, {"dataset": "digits"}, {"lr": 5e-5}]
    names = [run_name(fresh(**change)) for change in changes]
    assert len(set(names)) == len(names)
    assert all("/" not in name and " " not in name for name in names)
    assert run_name(fresh(2)) != run_name(fresh(1))  # twice the processes are twice the global batch
    assert run_name(fresh(2, batch_size=64)) == run_name(fresh(1))
    same = [{n: v} for n, v in VALUES[OVERRIDABLE].items() if n not in ("batch_size", "data_path")]
    assert {run_name(fresh(**change)) for change in same} == {names[0]}
    assert "imagefolder_JiT-B-16_256_sf_x" in names[0]
    assert "_base_" in run_name(fresh(disable_dct_patchify=True)) and "sf-w16" in run_name(fresh(window_size=16))


def test_added_flags_do_not_rename_runs():
    """The name of a run with the defaults of the first release's flags, as that release wrote it."""
    assert run_name(fresh()) == "imagefolder_JiT-B-16_256_sf_x_e7cb7b"


def test_runs_on_different_folders_of_images_have_different_names():
    assert run_name(fresh(data_path="/data/cats")) != run_name(fresh(data_path="/data/dogs"))


# --- refusals -------------------------------------------------------------------------------------------------------

AT_LEAST_ONE = """epochs batch_size num_sampling_steps gen_bsz num_per_class wandb_num_vis num_images eval_freq
    save_last_freq log_freq val_images val_freq img_size class_num"""


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"model": "JiT-Q/3"}, ["--model JiT-Q/3", "JiT-B/16", "JiT-H/32"]),
        ({"img_size": 100}, ["--img_size 100", "16", "JiT-B/16"]),
        ({"window_size": 24}, ["--window_size 24", "256"]),
        ({"window_size": 1}, ["--window_size 1", "at least 2"]),
        ({"window_size": -16}, ["--window_size -16"]),
        *(({n: -1}, [f"--{n} -1", "at least 0"]) for n in "seed start_epoch warmup_epochs lr blr min_lr".split()),
        *(({n: float("nan")}, [f"--{n} nan"]) for n in "lr blr label_drop_prob ema_decay1".split()),
        *(({n: 0}, [f"--{n} 0", "at least 1"]) for n in AT_LEAST_ONE.split()),
        *(({n: 1.5}, [f"--{n} 1.5", "at most 1"]) for n in "attn_dropout proj_dropout ema_decay1 interval_max".split()),
        *(({n: -0.1}, [f"--{n} -0.1", "at least 0"]) for n in "label_drop_prob ema_decay2 interval_min".split()),
        ({"interval_min": 0.5, "interval_max": 0.4}, ["0.5", "0.4", "min <= max"]),
        *(({"dist_timeout": n}, [f"--dist_timeout {n}"]) for n in (0.0, -1.0, float("nan"), float("inf"))),
        ({"num_images": 50001}, ["50001", "1000 classes"]),
        *(({n: float("inf")}, [f"--{n} inf", "finite"]) for n in ("cfg", "lr", "sf_kappa", "P_mean")),
        *(({n: 0.0}, [f"--{n} 0.0", "above 0"]) for n in ("P_std", "noise_scale")),
        ({"cfg": float("nan")}, ["--cfg nan", "finite"]),
        ({"img_size": 400_000}, ["--img_size 400000", "GB for its position table"]),
        ({"lr_schedule": "linear"}, ["--lr_schedule linear", "constant, cosine"]),
        ({"sampling_method": "dpm"}, ["--sampling_method dpm", "heun, euler, ab2, sde"]),
        ({"precision": "fp16"}, ["--precision fp16", "bf16"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_check_refuses(given, parts):
    with pytest.raises(UserError) as error:
        check(resolve(given), evaluates=True)
    for part in parts:
        assert part in str(error.value)


def test_check_accepts_and_warns():
    assert check(fresh(), evaluates=True) == []
    assert check(fresh(num_images=50001), evaluates=False) == []
    assert check(fresh(window_size=16), evaluates=True) == []
    assert check(fresh(interval_min=0.0, interval_max=0.0), evaluates=True) == []
    off = check(fresh(disable_dct_patchify=True, window_size=24), evaluates=True)
    assert len(off) == 1 and "no effect without Spectral Forcing" in off[0]
    fixed = check(fresh(dct_fixed_scale=0.5), evaluates=True)
    assert len(fixed) == 1 and "--dct_fixed_scale 0.5 has no effect" in fixed[0]
    assert check(fresh(dct_fixed_scale=0.5, disable_dct_scale_schedule=True), evaluates=True) == []


DESCRIBED = [  # given, on so many processes -> what is listed, apart from --model, which always is
    ({"cfg": 1.5}, 1, ["cfg 1.5"]),
    ({"dataset": "digits"}, 1, ["dataset digits"]),
    (
        {"dataset": "digits", "img_size": 32, "flip": False, "metrics": "class_agreement", "accum_iter": 1},
        2,
        ["dataset digits"],
    ),
    ({"dataset": "digits", "img_size": 64, "flip": True}, 1, ["img_size 64", "dataset digits", "flip True"]),
    ({"flip": False, "metrics": "fid"}, 1, ["flip False", "metrics fid"]),
    ({"class_num": 10, "metrics": "is,fid"}, 1, ["class_num 10", "metrics is,fid"]),
    ({"batch_size": 64}, 4, ["batch_size 64"]),
    ({"global_batch": 1024}, 8, []),  # as 128 on 8 are
    ({"global_batch": 1024}, 4, ["global_batch 1024"]),
    ({"accum_iter": 2}, 4, ["global_batch 1024", "accum_iter 2"]),
    ({"num_workers": 3, "device": "cpu", "output_dir": "x"}, 1, ["num_workers 3", "output_dir x", "device cpu"]),
]


@pytest.mark.parametrize(("given", "processes", "listed"), DESCRIBED)
def test_describe_lists_what_differs_and_nothing_that_was_settled(given, processes, listed):
    given = {"model": "JiT-L/16", **given}
    args = fresh(processes, **given)
    settled = {"output_dir": given.get("output_dir", "output/a_name"), "start_epoch": 3}  # as util/resume.py does
    args = dataclasses.replace(args, **settled)
    lines = configuration.describe(args, given, processes).splitlines()
    found = [item for line in lines for item in line.split(": ")[1].split(", ")]
    assert sorted(found) == sorted(["model JiT-L/16", *listed])


@pytest.mark.usefixtures("tiny")
def test_a_run_that_goes_on_lists_what_its_checkpoint_has(tmp_path, capsys):
    """Its settings hold, and are listed, though nobody gives them again; with those that are given now."""
    listed = []
    for changes in ({"global_batch": 32, "grad_clip": 1.0, "epochs": 1}, {"grad_clip": None, "lr": None, "epochs": 2}):
        assert main_jit.main(arguments(output_dir=tmp_path, **changes)) == 0
        said = capsys.readouterr().out.partition("settings that differ from the defaults:\n")[2]
        listed.append([line for line in said.splitlines() if line.startswith("  ")])
    assert [line.replace("epochs 1,", "epochs 2,") for line in listed[0]] == listed[1]
    assert any("global_batch 32, lr 0.001" in line and "grad_clip 1.0" in line for line in listed[1])


# --- which checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_default_output_folder_is_found_again(here):
    """Without --output_dir the same command goes on with its own run, and another one starts its own."""
    for epochs in (1, 2):
        assert main_jit.main(arguments(epochs=epochs)) == 0
    (folder,) = (here / "output").iterdir()
    assert folder.name == run_name(config_of(folder))
    assert [line["step"] for line in read_log(folder)] == [0, 1, 2, 3]
    before = listing(folder)
    assert main_jit.main(arguments(epochs=1, seed=1)) == 0
    assert len(list((here / "output").iterdir())) == 2 and listing(folder) == before
    assert f"_{TINY.replace('/', '-')}_16_sf_x_" in folder.name


def test_the_default_floor_is_that_of_new_runs():
    """Earlier runs, and exports that leave it out, have the floor 1; without a use it is nothing."""
    assert resolve({"sf_schedule": "snr"}).sf_snr_floor == SNR_FLOOR
    assert resolve({"sf_schedule": "power", "sf_alpha": 2.0, "sf_snr_floor": 0.5}).sf_snr_floor == 0.5
    assert resolve({}, saved(sf_schedule="snr", sf_snr_floor=1.0), training=False).sf_snr_floor == 1.0
    old = resolve({"dataset": "digits"}, saved(sf_snr_floor=1.0), training=False)
    assert old.sf_snr_floor is None and check(old, evaluates=False) == []
    assert resolve({"sf_snr_floor": 1.0}).sf_snr_floor == 1.0  # is reported as without effect
