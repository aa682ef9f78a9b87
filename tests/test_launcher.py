"""run_jit_multinode.sh: nodes, interpreter and number of processes become one command.

Every test runs a copy of the script beside an empty main_jit.py, in an environment of PATH and HOME plus what the test
sets; python3 and srun are programs that print how they were called. The environment as flags:
tests/util/test_environment.py. What the command does: tests/util/dist/test_launch.py, tests/cluster.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher_stand_ins import SAY, SCRIPT, STEP, TWO_NODES, Launcher, program
from util.config import parse_args
from util.environment import flags_from

OWN = """DATA_PATH DATA_ROOT IMAGENET_ROOT ENABLE_WANDB NUM_GPUS NNODES WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT
    AUTO_SRUN REQUEUE MAX_RESTARTS LOCAL_ADDR CONDA_ENV_PATH PYTHON JIT_DIR DRY_RUN OMP_NUM_THREADS NCCL_* WANDB_API_KEY
    OUTPUT_ROOT"""


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


def test_nothing_set_passes_nothing(launcher):
    words = launcher.command()
    assert words[:5] == [str(launcher.bin / "python3"), "-P", "-m", "tools.launch", "--nproc_per_node=1"]
    assert words[5:] == ["--standalone", "--local_addr=127.0.0.1", str(launcher.main)]
    empty = ["NUM_GPUS", "NNODES", "WORLD_SIZE", "NODE_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHON", "DRY_RUN"]
    assert launcher.command(**dict.fromkeys(empty, "")) == words


def test_flags_are_passed_unchanged(launcher):
    flags = ["--model", "other", "--note=two  words", "", "it's", '"$HOME" * \\', "line\nbreak"]
    assert launcher.command(*flags)[-len(flags) :] == flags


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        *(({name: value}, [f"{name} is '{value}'", "0 or 1"]) for name, value in
          [("AUTO_SRUN", "-1"), ("REQUEUE", "01"), ("DRY_RUN", "true")]),
        ({"REQUEUE": "1"}, ["REQUEUE", "sbatch"]),
        *(({"MAX_RESTARTS": value}, [f"MAX_RESTARTS is '{value}'"]) for value in ["-1", "x"]),
        *(({"NUM_GPUS": value}, ["NUM_GPUS", f"'{value}'"]) for value in ["0", "1.5"]),
        *(({"NNODES": value}, ["NNODES", f"'{value}'"]) for value in ["-1", "two"]),
        *(({"MASTER_PORT": value}, ["MASTER_PORT"]) for value in ["abc", "99999", "0"]),
        *(({name: "a[$(touch ../ran)]", "SLURM_JOB_ID": "7", "NNODES": "2", "MASTER_ADDR": "x"}, ["integer"])
          for name in ["SLURM_NNODES", "NODE_RANK", "RANK", "SLURM_NODEID", "MASTER_PORT", "NUM_GPUS", "MAX_RESTARTS"]),
        ({"NNODES": "2", "WORLD_SIZE": "16"}, ["NNODES is 2", "WORLD_SIZE is 16"]),
        ({"NUM_GPUS": "8", "CUDA_VISIBLE_DEVICES": "0,1"}, ["NUM_GPUS is 8", "2 CUDA"]),
        *(({"NODE_RANK": rank, "NNODES": "2", "MASTER_ADDR": "head"}, ["NODE_RANK"]) for rank in ["2", "-1"]),
        ({"NNODES": "2", "NODE_RANK": "1"}, ["MASTER_ADDR"]),
        ({"NODE_RANK": "1"}, ["NODE_RANK is 1", "1 node(s)"]),
        ({**TWO_NODES, "REQUEUE": "yes"}, ["REQUEUE"]),  # by the batch script, not by each node
        ({**TWO_NODES, "NNODES": "5"}, ["5 nodes", "has 2"]),
        ({**STEP, "SLURM_LOCALID": "1"}, ["--ntasks-per-node=1"]),
        ({"CONDA_ENV_PATH": "/no/env"}, ["CONDA_ENV_PATH is '/no/env'"]),
        ({"PYTHON": "no-such-python"}, ["no-such-python"]),
    ],
)  # fmt: skip
def test_refusal(launcher, variables, words):
    message = launcher.error(**variables)
    assert all(word in message for word in words), message
    assert not list(launcher.root.parent.glob("**/ran"))  # bash did not evaluate it


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
    message = launcher.error(NUM_GPUS="4")
    assert "NUM_GPUS is 4" in message and "3 CUDA" in message


@pytest.mark.parametrize("nodes", [{"NNODES": "3"}, {"WORLD_SIZE": "3"}, {"NNODES": "3", "WORLD_SIZE": "3"}])
def test_nodes_by_hand(launcher, nodes):
    words = launcher.torchrun(NODE_RANK="2", MASTER_ADDR="head", **nodes)
    assert words[5:] == ["--nnodes=3", "--node_rank=2", "--master_addr=head", "--master_port=29500"]
    words = launcher.torchrun(MASTER_PORT="1234")
    assert words[5:] == ["--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1", "--master_port=1234"]


def test_master_address_without_slurm(launcher):
    launcher.fake("hostname", "echo this-host")
    assert "--master_addr=this-host" in launcher.torchrun(NNODES="2")


def test_restarts(launcher):
    """torchrun restarts with its c10d rendezvous; --standalone is one, and says so itself."""
    assert launcher.torchrun(MAX_RESTARTS="3")[5:] == ["--standalone", "--local_addr=127.0.0.1", "--max_restarts=3"]
    two = {"NNODES": "2", "MASTER_ADDR": "head", "MAX_RESTARTS": "0"}
    common = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=head:29500"]
    first = launcher.torchrun(**two)[5:]
    assert first == [*common, "--rdzv_id=jit", "--rdzv_conf=is_host=1", "--max_restarts=0"]
    second = launcher.torchrun(**two, NODE_RANK="1", LOCAL_ADDR="10.0.0.2", SLURM_JOB_ID="7")[5:]
    rest = ["--rdzv_id=7", "--rdzv_conf=is_host=0", "--local_addr=10.0.0.2", "--max_restarts=0"]
    assert second == [*common, *rest]


def srun_words(launcher, *flags):
    """The command that fans out over two nodes."""
    step = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--export=ALL", "--kill-on-bad-exit=0", "--wait=60"]
    return [str(launcher.bin / "srun"), *step, "bash", str(launcher.script), *flags]


@pytest.mark.parametrize(
    "where",
    [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "batch"},
     {"JIT_SRUN_JOB": "76"}],
    ids=["batch", "batch step number", "interactive step number", "step name", "guard of another job"],
)  # fmt: skip
def test_fans_out_from_the_batch_script(launcher, where):
    words = launcher.command("--note", "two words", **TWO_NODES, **where)
    assert words == srun_words(launcher, "--note", "two words")


def test_fan_out_node_count(launcher):
    four = {**TWO_NODES, "SLURM_NNODES": "4", "DATASET": "digits"}
    many = {"NNODES": "2", "NUM_GPUS": "8", "CUDA_VISIBLE_DEVICES": "0"}  # the nodes' GPUs are not counted here
    assert launcher.command(NODE_RANK="0", **many, **four) == srun_words(launcher)
    assert launcher.command(NNODES="1", **four)[3] == "tools.launch"
    assert "--standalone" in launcher.torchrun(SLURM_JOB_ID="77", SLURM_NNODES="1", SLURM_JOB_NODELIST="node3")
    other_name = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
    assert launcher.command(**other_name) == srun_words(launcher)


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


def test_step_with_address_given_or_a_failing_scontrol(launcher):
    assert "--master_addr=ib0-head" in launcher.torchrun(**STEP, MASTER_ADDR="ib0-head")
    launcher.fake("scontrol", "exit 1")
    assert "MASTER_ADDR" in launcher.error(**STEP)


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
    assert (tmp_path / "srun").read_text() == " ".join(srun_words(launcher, "--seed", "1")[1:]) + "\n"
    started = (tmp_path / "torchrun").read_text().splitlines()
    assert [re.search("--node_rank=(.)", line)[1] for line in started] == ["0", "1"]
    assert all(line.endswith("main_jit.py --seed 1") for line in started)


def test_works_from_another_folder(launcher, tmp_path):
    """The script is found from anywhere, and ./data still means the caller's."""
    python = program(tmp_path / "python", f'pwd > "{tmp_path}/cwd"; echo "$@" >> "{tmp_path}/argv"')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link.sh").symlink_to(launcher.script)
    for script in ["../my checkout/run_jit_multinode.sh", tmp_path / "link.sh"]:
        done = launcher.run("--data_path", "./data", script=script, cwd=elsewhere, PYTHON=str(python))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "cwd").read_text().strip() == str(elsewhere.resolve())
        last = (tmp_path / "argv").read_text().splitlines()[-1]
        assert last.endswith(f"{launcher.main.resolve()} --data_path ./data")


def test_main_is_looked_for(launcher, tmp_path):
    copy = shutil.copy(SCRIPT, tmp_path / "slurm_script")
    assert launcher.command(script=copy, JIT_DIR=str(launcher.root))[-1] == str(launcher.main)
    done = launcher.run(script=copy, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "main_jit.py" in done.stderr and "JIT_DIR" in done.stderr
    (tmp_path / "main_jit.py").touch()  # a stray variable does not lead away from the script's own folder
    assert launcher.command(JIT_DIR=str(tmp_path))[-1] == str(launcher.main)


def test_interpreter_order(launcher, tmp_path):
    env = {name: str(tmp_path / name) for name in ["CONDA_ENV_PATH", "VIRTUAL_ENV", "CONDA_PREFIX"]}
    for folder in [*map(Path, env.values()), launcher.root / ".venv"]:
        program(folder / "bin" / "python", SAY)
    env["PYTHON"] = str(program(tmp_path / "own", SAY))
    env["CONDA_DEFAULT_ENV"] = "research"
    for name in ["CONDA_ENV_PATH", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"]:
        expected = env[name] if name == "PYTHON" else f"{env[name]}/bin/python"
        assert launcher.torchrun(**env)[0] == expected
        # conda's base environment counts for nothing: the checkout's own environment is meant
        if name == "CONDA_PREFIX":
            assert launcher.torchrun(**{**env, "CONDA_DEFAULT_ENV": "base"})[0].endswith("/.venv/bin/python")
        del env[name]
    assert launcher.torchrun(**env)[0] == str(launcher.root / ".venv/bin/python")
    program(tmp_path / "env/bin/python", 'echo "$PATH"')  # an environment's programs come first
    done = launcher.run(DATASET="digits", CONDA_ENV_PATH=str(tmp_path / "env"))
    assert done.stdout.startswith(f"{tmp_path}/env/bin:")


def test_exit_code_and_arguments(launcher, tmp_path):
    python = program(tmp_path / "python", f'printf "%s\\0" "$@" > "{tmp_path}/argv"; echo "$PYTHONPATH"; exit 7')
    done = launcher.run("--note", "a  b", PYTHON=str(python))
    assert done.returncode == 7 and done.stdout == f"{launcher.root}\n"
    argv = (tmp_path / "argv").read_text().split("\0")[:-1]
    assert argv[:3] == ["-P", "-m", "tools.launch"] and argv[-3:] == [str(launcher.main), "--note", "a  b"]


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_signal_before_anything_has_started(launcher, tmp_path, name):
    """While bash looks for GPUs: asked to stop, nothing was lost."""
    script = "$(awk '/PPid/ {print $2}' /proc/$PPID/status)"  # the parent of the shell that reads the output
    launcher.fake("nvidia-smi", f"kill -{name} {script}; sleep 0.2")
    done = launcher.run(PYTHON=str(program(tmp_path / "python", f'touch "{tmp_path}/started"')))
    assert done.returncode == 75 and not (tmp_path / "started").exists()


def test_dry_run_of_several_nodes_prints_the_command(launcher):
    done = launcher.run("--note", "two  words", DRY_RUN="1", **TWO_NODES)
    assert shlex.split(done.stdout)[-3:] == [str(launcher.script), "--note", "two  words"]


def test_environment_passes_through_and_nothing_is_printed(launcher, tmp_path):
    names = ["WANDB_API_KEY", "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME"]
    for name in ("python3", "srun"):
        launcher.fake(name, f'env > "{tmp_path}/env"')
    for variables in ({}, TWO_NODES):
        done = launcher.run(**dict.fromkeys(names, "s3cret"), **variables)
        assert done.returncode == 0 and done.stdout + done.stderr == ""
        assert all(f"{name}=s3cret" in (tmp_path / "env").read_text().splitlines() for name in names)
    launcher.run()
    assert not re.search("^(OMP_|NCCL_|GLOO_)", (tmp_path / "env").read_text(), re.MULTILINE)  # never forced


def test_help_names_every_variable_and_its_examples_are_valid(launcher):
    text = launcher.run("--help").stdout
    assert text == launcher.run("-h", cwd="/").stdout and "python main_jit.py --help" in text
    assert all(name in text for name in OWN.split())
    examples = [line.strip() for line in text.splitlines() if line.startswith("  DAT")]
    assert len(examples) == 3
    for example in examples[:2]:  # those that run on one machine
        variables, flags = example.split(" bash run_jit_multinode.sh")
        parse_args([*flags_from(dict(word.split("=", 1) for word in variables.split()), []), *flags.split()])


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (requirements-dev.txt)")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(SCRIPT, os.X_OK)
