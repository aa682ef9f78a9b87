"""run_jit_multinode.sh: what is set in the environment, and nothing else, becomes one command.

Every test runs a copy of the script beside an empty main_jit.py, in an environment of PATH and HOME plus what the test
sets. Nearly all use DRY_RUN=1; the few that start something start a stand-in that records its arguments. nvidia-smi,
scontrol and srun are stand-ins as well. What the command does: tests/util/dist/test_launch.py, tests/cluster.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher_stand_ins import SCRIPT, STEP, TWO_NODES, Launcher, program

VALUES = [
    *("MODEL", "IMG_SIZE", "NOISE_SCALE", "PRED_PARAM", "BATCH_SIZE", "BLR", "EPOCHS", "WARMUP_EPOCHS", "GEN_BSZ"),
    *("NUM_IMAGES", "CFG", "INTERVAL_MIN", "INTERVAL_MAX", "DATASET", "GLOBAL_BATCH", "OUTPUT_DIR", "RESUME"),
    *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_NAME", "WANDB_NUM_VIS", "WANDB_MODE"),
]  # each becomes the flag of its name
DATA = ["DATA_PATH", "DATA_ROOT", "IMAGENET_ROOT"]  # --data_path
SWITCHES = {  # variable and value -> flags
    ("ONLINE_EVAL", "1"): ["--online_eval"],
    ("ONLINE_EVAL", "0"): ["--no-online_eval"],
    ("EVALUATE_GEN", "1"): ["--evaluate_gen"],
    ("EVALUATE_GEN", "0"): [],
    ("ENABLE_WANDB", "1"): [],
    ("ENABLE_WANDB", "0"): ["--wandb_mode", "disabled"],
}
OWN = """NUM_GPUS NNODES WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT AUTO_SRUN REQUEUE MAX_RESTARTS LOCAL_ADDR
    CONDA_ENV_PATH PYTHON JIT_DIR DRY_RUN OMP_NUM_THREADS NCCL_* WANDB_API_KEY"""  # never a flag of main_jit.py


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


# ---- settings --------------------------------------------------------------------------------


def test_nothing_set_passes_nothing(launcher):
    """No hyperparameter default lives in the launcher: the dataset alone is needed, and alone is passed."""
    words = launcher.torchrun()
    start = ["python3", "-P", "-m", "util.dist.launch", "--nproc_per_node=1"]
    assert words == [*start, "--standalone", "--local_addr=127.0.0.1"]
    assert launcher.settings(DATASET="digits") == ["--dataset", "digits"]


def test_values_become_flags(launcher):
    values = {name: f"{name} with a space" for name in VALUES}
    settings = launcher.settings(**values)
    expected = {f"--{name.lower()}": value for name, value in values.items()}
    assert dict(zip(settings[::2], settings[1::2], strict=True)) == expected and len(settings) == 2 * len(VALUES)


def test_empty_is_unset(launcher):
    empty = dict.fromkeys([*VALUES, *DATA, *(name for name, _ in SWITCHES)], "")
    own = dict.fromkeys(["NUM_GPUS", "NNODES", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHON"], "")
    assert launcher.command("--dataset", "digits", **empty, **own) == launcher.command("--dataset", "digits")


def test_first_data_path_wins(launcher):
    three = dict(zip(DATA, "abc", strict=True))
    for value in "abc":
        assert launcher.settings(**three) == ["--data_path", value]
        del three[next(iter(three))]


@pytest.mark.parametrize(("variable", "value"), SWITCHES)
def test_switch(launcher, variable, value):
    assert launcher.settings(DATA_PATH="d", **{variable: value}) == ["--data_path", "d", *SWITCHES[variable, value]]


def test_wandb_switched_off_overrides_mode(launcher):
    settings = launcher.settings(DATASET="digits", ENABLE_WANDB="0", WANDB_MODE="online")
    assert settings == ["--dataset", "digits", "--wandb_mode", "disabled"]


def test_flags_are_appended_unchanged(launcher):
    flags = ["--model", "other", "--note=two  words", "", "it's", '"$HOME" * \\', "line\nbreak"]
    done = launcher.run(*flags, DRY_RUN="1", DATASET="digits", MODEL="m")
    pasted = subprocess.run(["bash", "-c", f"printf '%s\\0' {done.stdout}"], capture_output=True, text=True, check=True)
    assert pasted.stdout.split("\0")[-12:-1] == ["--model", "m", "--dataset", "digits", *flags]


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["ONLINE_EVAL", "EVALUATE_GEN", "ENABLE_WANDB", "AUTO_SRUN", "REQUEUE", "DRY_RUN"])
def test_switch_takes_only_0_and_1(launcher, variable):
    value = {"ONLINE_EVAL": "2", "REQUEUE": "01"}.get(variable, "true")
    assert variable in launcher.error(DATASET="digits", **{variable: value})


@pytest.mark.parametrize("flags", [["--dataset", "cifar10"], ["--dataset=cifar10"]])
def test_imagenet_root_is_for_image_folders_alone(launcher, flags):
    assert launcher.settings(*flags, IMAGENET_ROOT="i") == flags
    assert launcher.settings(DATASET="cifar10", IMAGENET_ROOT="i") == ["--dataset", "cifar10"]
    assert launcher.settings("--dataset=imagefolder", DATASET="cifar10", IMAGENET_ROOT="i")[:2] == ["--data_path", "i"]
    assert launcher.settings(*flags, DATA_PATH="d") == ["--data_path", "d", *flags]


def test_requeue_needs_a_job(launcher):
    assert "REQUEUE" in launcher.error(DATASET="digits", REQUEUE="1")


# ---- processes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "count"),
    [("4,5,7", 3), ("GPU-3f2a, MIG-77", 2), ("", 1), ("-1", 1), ("0,-1,1", 1), ("NoDevFiles", 1)],
)
def test_processes_from_cuda_visible_devices(launcher, devices, count):
    launcher.fake("nvidia-smi", "printf 'GPU %s: a card\\n' 0 1 2 3 4 5")  # all six, which the variable overrules
    assert f"--nproc_per_node={count}" in launcher.torchrun(CUDA_VISIBLE_DEVICES=devices)


def test_processes_from_nvidia_smi(launcher):
    launcher.fake("nvidia-smi", "[[ $1 == -L ]] && printf 'GPU %s: a card\\n  MIG 1g Device 0: (UUID)\\n' 0 1 2")
    assert "--nproc_per_node=3" in launcher.torchrun()
    assert "--nproc_per_node=2" in launcher.torchrun(NUM_GPUS="2")
    message = launcher.error(DATASET="digits", NUM_GPUS="4")
    assert "NUM_GPUS is 4" in message and "3 CUDA" in message


def test_processes_without_gpu(launcher):
    assert "--nproc_per_node=2" in launcher.torchrun(NUM_GPUS="2")
    assert "--nproc_per_node=2" in launcher.torchrun(NUM_GPUS="2", CUDA_VISIBLE_DEVICES="")


def test_more_processes_than_visible(launcher):
    message = launcher.error(DATASET="digits", NUM_GPUS="8", CUDA_VISIBLE_DEVICES="0,1")
    assert "NUM_GPUS is 8" in message and "2 CUDA" in message


@pytest.mark.parametrize("variable", ["NUM_GPUS", "NNODES", "WORLD_SIZE"])
def test_counts_are_positive_integers(launcher, variable):
    for value in {"NUM_GPUS": ["0", "1.5"], "NNODES": ["-1", "two"], "WORLD_SIZE": ["08"]}[variable]:
        message = launcher.error(DATASET="digits", **{variable: value})
        assert variable in message and f"'{value}'" in message


# ---- nodes -----------------------------------------------------------------------------------


def test_single_node_with_a_port(launcher):
    words = launcher.torchrun(MASTER_PORT="1234")
    assert words[5:] == ["--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=1234"]


@pytest.mark.parametrize("nodes", [{"NNODES": "3"}, {"WORLD_SIZE": "3"}, {"NNODES": "3", "WORLD_SIZE": "3"}])
def test_nodes_by_hand(launcher, nodes):
    words = launcher.torchrun(NODE_RANK="2", MASTER_ADDR="head", **nodes)
    assert words[5:] == ["--nnodes=3", "--node_rank=2", "--master_addr=head", "--master_port=29500"]


def test_master_address_without_slurm(launcher):
    launcher.fake("hostname", "echo this-host")
    assert "--master_addr=this-host" in launcher.torchrun(NNODES="2")
    assert "MASTER_ADDR" in launcher.error(DATASET="digits", NNODES="2", NODE_RANK="1")


def test_nnodes_and_world_size_disagree(launcher):
    message = launcher.error(DATASET="digits", NNODES="2", WORLD_SIZE="16")
    assert "NNODES is 2" in message and "WORLD_SIZE is 16" in message


@pytest.mark.parametrize("nodes", [{"NODE_RANK": "1"}, {"NNODES": "2", "NODE_RANK": "2"}, {"NODE_RANK": "-1"}])
def test_node_rank_out_of_range(launcher, nodes):
    assert "NODE_RANK" in launcher.error(DATASET="digits", MASTER_ADDR="head", **nodes)


def test_restarts(launcher):
    """torchrun restarts with its c10d rendezvous; --standalone is one, and says so itself."""
    assert launcher.torchrun(MAX_RESTARTS="3")[5:] == ["--standalone", "--local_addr=127.0.0.1", "--max_restarts=3"]
    two = {"NNODES": "2", "MASTER_ADDR": "head", "MAX_RESTARTS": "0"}
    common = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=head:29500"]
    first = launcher.torchrun(**two)[5:]
    assert first == [*common, "--rdzv_id=jit", "--rdzv_conf=is_host=1", "--max_restarts=0"]
    second = launcher.torchrun(**two, NODE_RANK="1", LOCAL_ADDR="10.0.0.2", SLURM_JOB_ID="7")[5:]
    assert second[2:] == [
        common[2],
        "--rdzv_id=7",
        "--rdzv_conf=is_host=0",
        "--local_addr=10.0.0.2",
        "--max_restarts=0",
    ]
    for value in ("-1", "two", "01"):
        assert f"MAX_RESTARTS is '{value}'" in launcher.error(DATASET="digits", MAX_RESTARTS=value)


# ---- SLURM -----------------------------------------------------------------------------------


def srun_words(launcher, *flags):
    """The command that fans out over two nodes."""
    step = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--export=ALL", "--kill-on-bad-exit=0", "--wait=60"]
    return ["env", "-u", "NODE_RANK", "JIT_SRUN_JOB=77", "srun", *step, "bash", str(launcher.script), *flags]


@pytest.mark.parametrize(
    "where",
    [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "batch"},
     {"JIT_SRUN_JOB": "76"}],
    ids=["batch", "batch step number", "interactive step number", "step name", "guard of another job"],
)  # fmt: skip
def test_fans_out_from_the_batch_script(launcher, where):
    words = launcher.command("--note", "two words", DATASET="digits", **TWO_NODES, **where)
    assert words == srun_words(launcher, "--note", "two words")


def test_fan_out_checks_first(launcher):
    """One message from the batch script rather than one from each node; the nodes' GPUs are not counted there."""
    assert "ENABLE_WANDB" in launcher.error(ENABLE_WANDB="yes", **TWO_NODES)
    words = launcher.command(DATASET="digits", NUM_GPUS="8", CUDA_VISIBLE_DEVICES="0", NODE_RANK="0", **TWO_NODES)
    assert words == srun_words(launcher)


def test_fan_out_node_count(launcher):
    four = {**TWO_NODES, "SLURM_NNODES": "4", "DATASET": "digits"}
    assert launcher.command(NNODES="2", **four) == srun_words(launcher)
    assert launcher.command(NNODES="1", **four)[2] == "python3"
    message = launcher.error(NNODES="5", **four)
    assert "5 nodes" in message and "has 4" in message
    other_name = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
    assert launcher.command(DATASET="digits", **other_name) == srun_words(launcher)


@pytest.mark.parametrize(
    "where",
    [{"SLURM_STEP_ID": "0"}, {"SLURM_STEP_ID": "3"}, {"JIT_SRUN_JOB": "77"}, {"AUTO_SRUN": "0"}],
    ids=["step 0", "step 3", "guard", "switched off"],
)
def test_does_not_fan_out(launcher, where):
    launcher.fake("scontrol", '[[ "$*" == "show hostnames node[3-4]" ]] && printf "node3\\nnode4\\n"')
    words = launcher.torchrun(**{**TWO_NODES, "SLURM_NODEID": "1", **where})
    assert words[5:] == ["--nnodes=2", "--node_rank=1", "--master_addr=node3", "--master_port=29500"]


def test_step_with_fewer_nodes_than_the_job(launcher):
    launcher.fake("scontrol", '[[ "$*" == "show hostnames node[4-5]" ]] && printf "node4\\nnode5\\n"')
    four = {**STEP, "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[3-6]", "SLURM_STEP_NODELIST": "node[4-5]"}
    assert launcher.torchrun(**four)[5:8] == ["--nnodes=2", "--node_rank=0", "--master_addr=node4"]


def test_one_step_per_node_by_hand(launcher):
    """`srun --nodes=1` once per node, each with its NODE_RANK: the nodes are the job's, not the step's."""
    launcher.fake("scontrol", '[[ "$*" == "show hostnames node[3-4]" ]] && printf "node3\\nnode4\\n"')
    words = launcher.torchrun(**{**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "node4"}, NODE_RANK="1")
    assert words[5:8] == ["--nnodes=2", "--node_rank=1", "--master_addr=node3"]


def test_step_with_address_given(launcher):
    assert "--master_addr=ib0-head" in launcher.torchrun(**STEP, MASTER_ADDR="ib0-head")


def test_failing_scontrol(launcher):
    launcher.fake("scontrol", "exit 1")
    assert "MASTER_ADDR" in launcher.error(DATASET="digits", **STEP)


def test_step_with_several_launchers_per_node(launcher):
    assert "--ntasks-per-node=1" in launcher.error(DATASET="digits", **{**STEP, "SLURM_LOCALID": "1"})


def test_single_node_allocation_does_not_fan_out(launcher):
    assert "--standalone" in launcher.torchrun(SLURM_JOB_ID="77", SLURM_NNODES="1", SLURM_JOB_NODELIST="node3")


def test_srun_runs_the_script_once_per_node(launcher, tmp_path):
    """From the spool copy that sbatch makes, through srun, to torchrun on each of two nodes."""
    launcher.fake("scontrol", 'printf "node3\\nnode4\\n"')
    launcher.fake(
        "srun",
        f'echo "$@" >> "{tmp_path}/srun"; while [[ $1 == --* ]]; do shift; done\n'
        'for node in 0 1; do SLURM_STEP_ID=0 SLURM_NODEID=$node "$@" || exit; done',
    )
    python = program(tmp_path / "python", f'echo "$@" >> "{tmp_path}/torchrun"')
    spool = Path(shutil.copy(SCRIPT, tmp_path / "slurm_script"))
    variables = {**TWO_NODES, "DATASET": "digits", "PYTHON": str(python), "SLURM_SUBMIT_DIR": str(launcher.root)}
    done = launcher.run("--seed", "1", script=spool, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "srun").read_text() == " ".join(srun_words(launcher, "--seed", "1")[5:]) + "\n"
    started = (tmp_path / "torchrun").read_text().splitlines()
    assert [re.search("--node_rank=(.)", line)[1] for line in started] == ["0", "1"]
    assert all(line.endswith("main_jit.py --dataset digits --seed 1") for line in started)


# ---- finding things --------------------------------------------------------------------------


def test_works_from_another_folder(launcher, tmp_path):
    """The script is found from anywhere, and ./data still means the caller's."""
    python = program(tmp_path / "python", f'pwd > "{tmp_path}/cwd"; echo "$@" >> "{tmp_path}/argv"')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link.sh").symlink_to(launcher.script)
    for script in ["../my checkout/run_jit_multinode.sh", tmp_path / "link.sh"]:
        done = launcher.run(script=script, cwd=elsewhere, DATA_PATH="./data", PYTHON=str(python))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "cwd").read_text().strip() == str(elsewhere.resolve())
        last = (tmp_path / "argv").read_text().splitlines()[-1]
        assert last.endswith(f"{launcher.main.resolve()} --data_path ./data")


def test_main_is_looked_for(launcher, tmp_path):
    copy = shutil.copy(SCRIPT, tmp_path / "slurm_script")
    assert launcher.command(script=copy, DATASET="digits", JIT_DIR=str(launcher.root))[-3] == str(launcher.main)
    done = launcher.run(script=copy, DATASET="digits", DRY_RUN="1", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "main_jit.py" in done.stderr and "JIT_DIR" in done.stderr
    # A stray variable does not lead away from the script's own folder.
    (tmp_path / "main_jit.py").touch()
    assert launcher.command(DATASET="digits", JIT_DIR=str(tmp_path))[-3] == str(launcher.main)


def test_interpreter_order(launcher, tmp_path):
    env = {name: str(tmp_path / name) for name in ["CONDA_ENV_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"]}
    for folder in [*map(Path, env.values()), launcher.root / ".venv"]:
        program(folder / "bin" / "python", "")
    env["PYTHON"] = str(program(tmp_path / "own", ""))
    env["CONDA_DEFAULT_ENV"] = "research"
    for name in ["CONDA_ENV_PATH", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"]:
        expected = env[name] if name == "PYTHON" else f"{env[name]}/bin/python"
        assert launcher.torchrun(**env)[0] == expected
        # conda's base environment counts for nothing: the checkout's own environment is meant
        if name == "CONDA_PREFIX":
            assert launcher.torchrun(**{**env, "CONDA_DEFAULT_ENV": "base"})[0].endswith("/.venv/bin/python")
        del env[name]
    assert launcher.torchrun(**env)[0] == str(launcher.root / ".venv/bin/python")


def test_interpreter_missing(launcher, tmp_path):
    assert "CONDA_ENV_PATH" in launcher.error(DATASET="digits", CONDA_ENV_PATH=str(tmp_path))
    assert "no-such-python" in launcher.error(DATASET="digits", PYTHON="no-such-python")


def test_conda_env_comes_first_on_path(launcher, tmp_path):
    program(tmp_path / "env/bin/python", 'echo "$PATH"')
    done = launcher.run(DATASET="digits", CONDA_ENV_PATH=str(tmp_path / "env"))
    assert done.stdout.startswith(f"{tmp_path}/env/bin:")


# ---- running ---------------------------------------------------------------------------------


def test_exit_code_and_arguments(launcher, tmp_path):
    python = program(tmp_path / "python", f'printf "%s\\0" "$@" > "{tmp_path}/argv"; exit 7')
    done = launcher.run("--note", "a  b", DATASET="digits", PYTHON=str(python))
    assert done.returncode == 7
    argv = (tmp_path / "argv").read_text().split("\0")[:-1]
    assert argv[:3] == ["-P", "-m", "util.dist.launch"]
    assert argv[-5:] == [str(launcher.main), "--dataset", "digits", "--note", "a  b"]
    assert done.stderr.count("\n") == 1  # one line, with the command
    assert shlex.split(done.stderr)[-len(argv) :] == argv


def test_dry_run_starts_nothing(launcher, tmp_path):
    python = program(tmp_path / "python", f'touch "{tmp_path}/started"')
    launcher.fake("srun", f'touch "{tmp_path}/started"')
    launcher.command(DATASET="digits", PYTHON=str(python))
    launcher.command(DATASET="digits", PYTHON=str(python), **TWO_NODES)
    assert not (tmp_path / "started").exists()


def test_key_is_not_printed_and_environment_passes_through(launcher, tmp_path):
    names = ["WANDB_API_KEY", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME"]
    secret = dict.fromkeys(names, "s3cret")
    python = program(tmp_path / "python", f'env > "{tmp_path}/env"; echo "$@"')
    launcher.fake("srun", f'env > "{tmp_path}/srun_env"; echo "$@"')
    for variables in [{}, {"DRY_RUN": "1"}, TWO_NODES, {**TWO_NODES, "DRY_RUN": "1"}]:
        done = launcher.run(DATASET="digits", PYTHON=str(python), **secret, **variables)
        assert done.returncode == 0 and done.stdout
        assert "s3cret" not in done.stdout + done.stderr
    assert "s3cret" not in launcher.error(NUM_GPUS="0", **secret)
    for seen in ["env", "srun_env"]:
        assert all(f"{name}=s3cret" in (tmp_path / seen).read_text().splitlines() for name in names)
    launcher.run(DATASET="digits", PYTHON=str(python))
    unset = (tmp_path / "env").read_text()
    assert not re.search("^(OMP_|NCCL_|GLOO_)", unset, re.MULTILINE)  # passed through, never forced


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(launcher, flag):
    launcher.main.unlink()  # help needs nothing
    done = launcher.run(flag)
    assert done.returncode == 0 and done.stderr == ""
    for name in [*VALUES, *(name for name, _ in SWITCHES), *OWN.split()]:
        assert name in done.stdout
    assert "python main_jit.py --help" in done.stdout
    assert len(re.findall(r" run_jit_multinode\.sh( --.*)?$", done.stdout, re.MULTILINE)) >= 3  # the examples


def test_examples_in_help_are_valid(launcher):
    """The examples that run on one machine print a command."""
    examples = [line.strip() for line in launcher.run("--help").stdout.splitlines() if line.startswith("  DAT")]
    examples = [line.split(" bash run_jit_multinode.sh") for line in examples if " bash run_jit" in line]
    assert len(examples) == 2
    for variables, flags in examples:
        assert launcher.settings(*flags.split(), **dict(word.split("=", 1) for word in variables.split()))


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (requirements-dev.txt)")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_is_executable():
    assert os.access(SCRIPT, os.X_OK)
