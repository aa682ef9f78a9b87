"""The launcher in a folder of its own, beside a main_jit.py that is empty or trains TINY; used by several modules."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run_jit_multinode.sh"
TWO_NODES = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NODEID": "0"}
SAY = r"""printf '%s\0' "$0" "$@" """  # the body of a program that prints how it was called
STEP = {**TWO_NODES, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}


def program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


class Launcher:
    def __init__(self, folder):
        self.root = folder / "my checkout"  # the space is meant: quoting must survive it
        self.root.mkdir()
        self.script = Path(shutil.copy(SCRIPT, self.root))
        self.main = self.root / "main_jit.py"
        self.main.touch()
        self.bin = folder / "bin"
        self.fake("nvidia-smi", "exit 9")  # no driver, whatever this machine has
        for name in ("python3", "srun"):
            self.fake(name, SAY)

    def fake(self, name, body):
        return program(self.bin / name, body)

    def run(self, *flags, cwd=None, script=None, **variables):
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/"), **variables}
        command = ["bash", str(script or self.script), *flags]
        return subprocess.run(command, env=env, cwd=cwd or self.root, capture_output=True, text=True, timeout=30)

    def command(self, *flags, **kwargs):
        """The words of the command that it becomes, from the interpreter or srun on."""
        done = self.run(*flags, **kwargs)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\0")[:-1]

    def torchrun(self, *flags, **kwargs):
        """What precedes main_jit.py in it."""
        words = self.command(*flags, **kwargs)
        assert words[1:4] == ["-P", "-m", "tools.launch"]
        return words[: words.index(str(self.main))]

    def error(self, *flags, **variables):
        """The message with which it refuses; nothing starts."""
        done = self.run(*flags, **variables)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert done.stdout == ""
        return done.stderr


def children(pid: int) -> list[int]:
    """The direct children of a process that are not zombies."""

    def state_and_parent(path: Path) -> list[str]:
        try:
            return path.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            return ["X", "0"]

    parents = {int(path.name): state_and_parent(path) for path in Path("/proc").glob("[0-9]*")}
    return sorted(child for child, (state, parent) in parents.items() if parent == str(pid) and state not in "XZ")


TINY_MAIN = """
import os, runpy, sys, time
sys.path[0] = {root!r}
import pytest
from tests.conftest import register
from util.optim import EMA
register(pytest.MonkeyPatch())
update, pause = EMA.update, float(os.environ.get("SECONDS_PER_STEP", 0)) / 2
EMA.update = lambda self, *args: (time.sleep(pause), update(self, *args))[1]  # twice a step
runpy.run_path({main!r}, run_name="__main__")
"""


def tiny_checkout(folder: Path) -> Path:
    """A folder with the launcher and a main_jit.py that knows TINY and FEW digits, as slow as the environment says."""
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    (folder / "main_jit.py").write_text(TINY_MAIN.format(root=str(ROOT), main=str(ROOT / "main_jit.py")))
    return folder / SCRIPT.name


def basics(**variables: str) -> dict[str, str]:
    """An environment with what every program needs; tools.launch is found in this checkout."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ENABLE_WANDB": "0"}
    return env | variables
