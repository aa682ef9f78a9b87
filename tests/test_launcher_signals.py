"""run_jit_multinode.sh while something runs: signals, exit codes, requeues. torchrun, srun and scontrol are stand-ins.

The real ones: tests/test_preemption.py (torchrun), tests/cluster (SLURM, several hosts).
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launcher_stand_ins import STEP, TWO_NODES, Launcher, children, program, state_and_parent

WAITS = """
printf %s "$JIT_STATE_DIR" > "{folder}/state"; echo "$PET_SIGNALS_TO_HANDLE" > "{folder}/handles"; touch "{folder}/up"
for i in {{1..200}}; do if [[ -s $JIT_STATE_DIR/stop ]]; then break; fi; sleep 0.05; done
cp "$JIT_STATE_DIR/stop" "{folder}/stop"; sleep {rest}
echo 75 > "$JIT_STATE_DIR/exit-0"
"""
ENDS = 'for code in {recorded}; do echo $code > "$JIT_STATE_DIR/exit-$((n++))"; done; exit {code}'
SRUN = """
import pathlib, signal, sys, time
got = pathlib.Path({folder!r}) / "srun"
def note(number, frame):
    with got.open("a") as file:
        file.write(signal.Signals(number).name + "\\n")
    if number == signal.SIGUSR1:
        sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)  # srun does not care for what it was told to ignore either
(pathlib.Path({folder!r}) / "up").touch()
time.sleep(20)
"""


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


def _in_the_foreground() -> None:
    """A shell starts what runs in its background, these tests perhaps, with signals ignored, and bash keeps to that."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Started:
    """The launcher with a stand-in that has left its mark."""

    def __init__(self, launcher, folder, **variables):
        env = {"PATH": f"{launcher.bin}:{os.environ['PATH']}", "HOME": "/", "DATASET": "digits", **variables}
        command = ["bash", str(launcher.script)]
        self.said = folder / "said"
        with self.said.open("w") as said:  # not a pipe, which what it leaves behind would hold open
            self.process = subprocess.Popen(
                command, env=env, cwd=folder, stderr=said, start_new_session=True, preexec_fn=_in_the_foreground
            )
        end = time.monotonic() + 20
        while not (folder / "up").exists():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)
        time.sleep(0.1)

    def end(self):
        return self.process.wait(timeout=30), self.said.read_text()


def waiting(launcher, folder, rest=0, **variables):
    python = program(folder / "python", WAITS.format(folder=folder, rest=rest))
    return Started(launcher, folder, PYTHON=str(python), **variables)


def wait_until_gone(pid: int, seconds: float = 5) -> None:
    """Whoever is its parent now may take a moment to ask for its status."""
    end = time.monotonic() + seconds
    while state_and_parent(pid)[0] not in "XZ":
        assert time.monotonic() < end, f"{pid} still runs"
        time.sleep(0.05)


# ---- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["launcher", "everybody"])
def test_a_signal_becomes_the_stop_file(launcher, tmp_path, name, send):
    """And torchrun, which would end its workers, does not take note of it."""
    started = waiting(launcher, tmp_path)
    send(started.process.pid, getattr(signal, name))
    code, message = started.end()
    assert code == 75, message
    assert (tmp_path / "stop").read_text() == f"{name}\n"
    assert not os.path.exists((tmp_path / "state").read_text())
    assert (tmp_path / "handles").read_text() == "SIGUSR2\n"


def test_state_folder_is_private_and_not_that_of_another(launcher, tmp_path):
    (tmp_path / "other").mkdir()
    started = waiting(launcher, tmp_path, JIT_STATE_DIR=str(tmp_path / "other"))
    folder = (tmp_path / "state").read_text()
    assert folder != str(tmp_path / "other") and os.stat(folder).st_mode & 0o777 == 0o700
    started.process.terminate()
    assert started.end()[0] == 75


@pytest.mark.parametrize("names", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGQUIT",)])
def test_stopping_at_once(launcher, tmp_path, names):
    started = waiting(launcher, tmp_path, rest=20)
    began = time.monotonic()
    for name in names:
        os.kill(started.process.pid, getattr(signal, name))
        time.sleep(0.5)
    code, message = started.end()
    assert code == 130 and "at once" in message and time.monotonic() - began < 5


@pytest.mark.parametrize(("times", "milliseconds"), [(2, 0), (2, 0.05), (2, 1), (2, 3), (20, 0), (20, 0.05), (20, 0.5)])
def test_ctrl_c_that_comes_more_than_once_is_one(launcher, tmp_path, times, milliseconds):
    """`timeout -s INT` sends it to its child and to the group; nothing is killed in the middle, nothing left behind.

    bash's `wait`, ended by one signal while another arrives, has lost the status of its child and hung: of twenty
    signals every other time.
    """
    started = waiting(launcher, tmp_path)
    for _ in range(times):
        os.killpg(started.process.pid, signal.SIGINT)
        time.sleep(milliseconds / 1000)
    code, message = started.end()
    assert code == 75 and "at once" not in message
    assert (tmp_path / "stop").read_text() == "SIGINT\n"


def test_shell_that_waits_is_killed(launcher, tmp_path):
    """By the system, for want of memory: what it has waited for does not go on unseen."""
    started = waiting(launcher, tmp_path)
    (shell,) = children(started.process.pid)
    (python,) = children(shell)
    os.kill(shell, signal.SIGKILL)
    code, message = started.end()
    assert code == 1 and "was killed" in message
    wait_until_gone(python)


def test_several_requests_are_one(launcher, tmp_path):
    """A scheduler may send one signal to the job and then another; only Ctrl-C is impatient."""
    started = waiting(launcher, tmp_path, rest=1)
    for name in ("SIGINT", "SIGUSR1", "SIGTERM", "SIGTERM"):
        os.kill(started.process.pid, getattr(signal, name))
        time.sleep(0.1)
    assert started.end()[0] == 75


# ---- exit codes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "recorded", "expected"),
    [
        (0, "", 0), (0, "0 0", 0), (0, "75 75", 75), (0, "75 0", 75), (0, "2 2", 2), (0, "2 75", 2),
        (1, "", 1), (1, "75", 1), (1, "2 1", 2), (1, "0 75 1", 1), (1, "75 2", 2), (1, "130 1", 130), (137, "75", 137),
    ],
)  # fmt: skip
def test_exit_code(launcher, tmp_path, code, recorded, expected):
    """A failure outweighs a preemption, and what explains it outweighs torchrun's 1."""
    python = program(tmp_path / "python", ENDS.format(recorded=recorded, code=code))
    assert launcher.run(DATASET="digits", PYTHON=str(python)).returncode == expected


# ---- SLURM -----------------------------------------------------------------------------------


def test_srun_is_asked_with_the_signal_that_it_forwards(launcher, tmp_path):
    launcher.fake("srun", f"exec {sys.executable} {tmp_path}/srun.py")
    (tmp_path / "srun.py").write_text(SRUN.format(folder=str(tmp_path)))
    started = Started(launcher, tmp_path, **TWO_NODES)
    started.process.terminate()
    assert started.end()[0] == 75
    assert (tmp_path / "srun").read_text() == "SIGUSR1\n"


def job(launcher, tmp_path, state="RUNNING", code=75, **variables):
    """A job whose work ends with `code`. Returns exit code, message and the calls of `scontrol requeue`."""
    python = program(tmp_path / "python", ENDS.format(recorded=code, code=0))
    launcher.fake("srun", f"exit {code}")
    show = f'echo "JobId=77 JobState={state} Reason="'
    launcher.fake("scontrol", f'case $1 in requeue) echo "$*" >> "{tmp_path}/requeued" ;; show) {show} ;; esac')
    done = launcher.run(DATASET="digits", PYTHON=str(python), MASTER_ADDR="head", **{"REQUEUE": "1", **variables})
    requeued = tmp_path / "requeued"
    return done.returncode, done.stderr, requeued.read_text().splitlines() if requeued.exists() else []


@pytest.mark.parametrize("where", [TWO_NODES, {"SLURM_JOB_ID": "77"}, STEP], ids=["several nodes", "one", "own srun"])
def test_requeue(launcher, tmp_path, where):
    code, message, calls = job(launcher, tmp_path, **where)
    assert (code, calls) == (75, ["requeue 77"]) and "job 77 is requeued" in message


@pytest.mark.parametrize(
    "variables",
    [{**STEP, "SLURM_NODEID": "1"}, {**STEP, "JIT_SRUN_JOB": "77"}, {**TWO_NODES, "state": "CANCELLED"},
     {**TWO_NODES, "state": "PREEMPTED"}, {**TWO_NODES, "code": 0}, {**TWO_NODES, "code": 1},
     {**TWO_NODES, "code": 2}, {**TWO_NODES, "REQUEUE": "0"}],
    ids=["node 1", "node 0 below the batch script", "cancelled", "SLURM does it", "done", "failed", "refused", "off"],
)  # fmt: skip
def test_no_requeue(launcher, tmp_path, variables):
    assert job(launcher, tmp_path, **variables)[2] == []


def test_requeue_needs_a_job(launcher):
    assert "REQUEUE" in launcher.error(DATASET="digits", REQUEUE="1")
