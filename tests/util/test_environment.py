"""The environment as flags: each flag is a variable, and nothing else in the environment is touched."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import main_jit
from tests.conftest import arguments, listing, train
from tools import launch
from util.config import all_flags, parse_args
from util.environment import OWN, flags_from
from util.errors import UserError

VARIABLES = """MODEL=JiT-L/16 IMG_SIZE=512 NOISE_SCALE=2.0 PRED_PARAM=v BATCH_SIZE=64 BLR=1e-4 LR=1e-3 EPOCHS=200 SEED=3
    WARMUP_EPOCHS=3 GEN_BSZ=32 NUM_IMAGES=10000 CFG=2.5 INTERVAL_MIN=0.2 INTERVAL_MAX=0.9 DATASET=imagefolder
    GLOBAL_BATCH=512 OUTPUT_DIR=/out RESUME=/resume WANDB_PROJECT=p WANDB_ENTITY=e WANDB_RUN_NAME=n WANDB_MODE=online
    WANDB_NUM_VIS=8 NUM_WORKERS=2 EVAL_FREQ=7 P_MEAN=0.1 OUTPUT_ROOT=/runs"""


def test_each_variable_is_the_flag_of_its_name():
    variables = dict(word.split("=") for word in VARIABLES.split())
    given = parse_args(flags_from(variables, []))
    expected = [word for name, value in variables.items() for word in (f"--{name.lower()}", value)]
    expected[expected.index("--p_mean")] = "--P_mean"
    assert given == parse_args(expected)


def test_every_flag_has_a_variable_and_none_is_the_launchers():
    names = {name.upper() for name in all_flags()} - {"DRY_RUN"}  # the launcher's checks, the flag times steps
    assert len(names) == len(all_flags()) - 1 and not names & set(OWN)


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, []),
        ({"MODEL": "", "ONLINE_EVAL": "", "DATA_PATH": ""}, []),
        ({"ONLINE_EVAL": "1"}, ["--online_eval"]),
        ({"ONLINE_EVAL": "0"}, ["--no-online_eval"]),
        ({"EVALUATE_GEN": "1"}, ["--evaluate_gen"]),
        ({"EVALUATE_GEN": "0"}, []),
        ({"ENABLE_WANDB": "0"}, ["--wandb_mode", "disabled"]),
        ({"WANDB_MODE": "online", "ENABLE_WANDB": "1"}, ["--wandb_mode", "online"]),
        ({"MODEL": "a b"}, ["--model", "a b"]),
        ({"DATA_PATH": "a", "DATA_ROOT": "b", "IMAGENET_ROOT": "c"}, ["--data_path", "a"]),
        ({"DATA_ROOT": "b", "IMAGENET_ROOT": "c"}, ["--data_path", "b"]),
        ({"IMAGENET_ROOT": "c"}, ["--data_path", "c"]),
        ({"P_MEAN": "-1e-1", "WANDB_RUN_NAME": "-x"}, ["--wandb_run_name=-x", "--P_mean=-1e-1"]),
        ({"IMAGENET_ROOT": "c", "DATASET": "cifar10"}, ["--dataset", "cifar10"]),
    ],
)
def test_switches_and_paths(variables, flags):
    assert flags_from(variables, []) == flags


@pytest.mark.parametrize("argv", [["--dataset", "cifar10"], ["--dataset=cifar10"]])
def test_imagenet_root_is_for_image_folders_alone(argv):
    assert flags_from({"IMAGENET_ROOT": "i"}, argv) == []
    assert flags_from({"DATA_PATH": "d"}, argv) == ["--data_path", "d"]
    assert "--data_path" in flags_from({"IMAGENET_ROOT": "i", "DATASET": "cifar10"}, ["--dataset=imagefolder"])


MISSPELT = """NUM_GPU:NUM_GPUS BATCHSIZE:BATCH_SIZE EPOCH:EPOCHS IMAGE_SIZE:IMG_SIZE OUTPUT_DIRR:OUTPUT_DIR
    VAL_FREQS:VAL_FREQ RESUME_FROM:RESUME GLOBAL_BATCH_SIZE:GLOBAL_BATCH GLOBALBATCH:GLOBAL_BATCH
    OutputDir:OUTPUT_DIR NUM_EPOCHS:EPOCHS"""


@pytest.mark.parametrize("pair", MISSPELT.split())
def test_a_misspelt_variable_is_refused(pair):
    name, meant = pair.split(":")
    with pytest.raises(UserError, match=rf"{name} is set.*Did you mean {meant}\?"):
        flags_from({name: "1"}, [])


def test_nothing_else_is_touched():
    """What shells, SLURM, CUDA and Python set, and what is set here."""
    others = """HOME PATH SHELL SHLVL TERM USER LOGNAME LANG LC_ALL PWD OLDPWD EDITOR DISPLAY HOSTNAME TMPDIR LINES
        SLURM_JOB_ID SLURM_NNODES SLURM_NTASKS CUDA_VISIBLE_DEVICES CUDA_HOME NCCL_DEBUG OMP_NUM_THREADS PYTHONPATH
        WANDB_API_KEY WANDB_DIR VIRTUAL_ENV CONDA_PREFIX HF_HOME TORCH_HOME XDG_RUNTIME_DIR JIT_SRUN_JOB COLUMNS
        SSH_CLIENT MAIL MODULEPATH LD_LIBRARY_PATH TZ PS1 IFS MASTER_ADDR JIT_STATE_DIR GROUP_RANK
        GLOBAL_RANK NUM_CPUS LOCAL_DIR COMPILER SAMPLES PATCH_SIZE SIMPLE MASTER_HOST NODES DATASETS PYTHON3""".split()
    names = [*others, *(name for name in os.environ if name not in {n.upper() for n in all_flags()} | set(OWN))]
    assert flags_from(dict.fromkeys(names, "x"), []) == []


@pytest.mark.parametrize("value", ["2", "yes", "-1", "01"])
def test_a_switch_is_0_or_1(value):
    for name in ("ONLINE_EVAL", "ENABLE_WANDB", "DISABLE_DCT_PATCHIFY"):
        with pytest.raises(UserError, match=f"{name} is '{value}'; it must be 0 or 1"):
            flags_from({name: value}, [])


def test_flags_of_the_release_that_mean_nothing_here(capsys):
    argv = shlex.split("--pin_mem --no_pin_mem --dist_on_itp --world_size 8 --local_rank 0 --dist_url env:// --cfg 2")
    assert parse_args(argv) == {"cfg": 2.0}
    assert capsys.readouterr().err.count("without effect here") == 1
    assert parse_args(["--cfg", "2"]) == {"cfg": 2.0} and capsys.readouterr().err == ""


# --- DRY_RUN=1 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dry_run(monkeypatch, capsys, here, tiny):
    """dry_run(flags, ...) -> exit code, what was printed; nothing may be written."""
    monkeypatch.setattr(launch, "block_signals", lambda: None)
    monkeypatch.setenv("DRY_RUN", "1")

    def call(*words, ranks=1, torchrun=()):
        before = listing(here)
        code = launch.main([f"--nproc_per_node={ranks}", *torchrun, "x/main_jit.py", *map(str, words)])
        assert listing(here) == before
        return code, capsys.readouterr()

    return call


def test_dry_run_prints_the_command(dry_run, monkeypatch):
    monkeypatch.setenv("SEED", "5")
    code, said = dry_run(*arguments(wandb_run_name="two words"))
    words = shlex.split(said.out)
    assert code == 0 and said.err == ""
    assert words[:5] == [sys.executable, "-P", "-m", "tools.launch", "--nproc_per_node=1"]
    assert words[5:8] == ["x/main_jit.py", "--seed", "5"] and "two words" in words


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model", "JiT-X/16"], "--model JiT-X/16 is unknown"),
        (["--epochs", "-3"], "--epochs -3"),
        (["--nonsense", "3"], "--nonsense"),
        (["--dataset", "imagefolder", "--class_num", "2", "--data_path", "/nope"], "/nope"),
        (["--global_batch", "24"], "--global_batch 24"),
        (["--resume", "missing"], "missing"),
        (["--sample"], "--sample needs a trained model"),
        (["--evaluate_gen", "--sample"], "mutually exclusive"),
        (["--sweep_cfg", "1"], "--evaluate_gen"),
    ],
)
def test_dry_run_refuses_what_a_start_refuses(dry_run, words, part):
    code, said = dry_run(*arguments(), *words)
    assert code == 2 and part in said.err and said.out == "", said


def test_dry_run_knows_the_number_of_ranks_and_checkpoints(dry_run, tmp_path):
    assert dry_run(*arguments(global_batch=32), ranks=2, torchrun=["--nnodes=2"])[0] == 2  # 64 at least
    assert dry_run(*arguments(global_batch=32), ranks=2)[0] == 0
    folder = train(tmp_path / "run", epochs=1)
    assert dry_run(*arguments(output_dir=folder, lr=0.5))[0] == 2
    assert dry_run("--evaluate_gen", "--resume", folder, "--num_images", "15")[0] == 2
    assert dry_run("--evaluate_gen", "--resume", folder, "--num_images", "20")[0] == 0


def test_dry_run_looks_for_what_metrics_need(dry_run, tmp_path, monkeypatch):
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / "missing.pth"))
    online = [word for word in arguments(metrics="fid", num_images=20) if word != "--no-online_eval"]
    code, said = dry_run(*online)
    assert code == 2 and "missing.pth (--inception_weights) cannot be read" in said.err and "ONLINE_EVAL=0" in said.err
    assert dry_run(*online, "--no-online_eval")[0] == 0
    folder = train(tmp_path / "run", epochs=1)
    code, said = dry_run("--evaluate_gen", "--resume", folder, "--num_images", "20", "--metrics", "fid")
    assert code == 2 and "missing.pth" in said.err


def test_a_variable_that_is_wrong_ends_the_launcher_with_a_sentence():
    env = {**os.environ, "NUM_GPU": "1"}
    command = [sys.executable, "-m", "tools.launch", "--nproc_per_node=1", "main_jit.py"]
    done = subprocess.run(command, env=env, cwd=Path(main_jit.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Did you mean NUM_GPUS?" in done.stderr
