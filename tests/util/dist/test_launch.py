"""util/dist/launch.py with the real torchrun, and workers that wait or fail; scontrol is a stand-in.

The launcher is forked from this process, which spares importing torch; most workers only write what a real one writes.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed.run  # noqa: F401 (before the fork)

from tests.launcher_stand_ins import ROOT, children, program
from util.dist import launch
from util.dist.launch import launch as run_launcher
from util.dist.preemption import EXIT_CODE, Preempted
from util.dist.worker import run_main
from util.errors import UserError

LIGHT = """
import os, signal, sys, time
from pathlib import Path
rank, folder, state = os.environ["RANK"], Path(sys.argv[1]), Path(os.environ["JIT_STATE_DIR"])
def end(code):
    (state / f"exit-{rank}").write_text(f"{code}")
    sys.exit(0)
"""
WAIT = """
(folder / f"up-{rank}").write_text("")
while not (state / "stop").exists() or not (reason := (state / "stop").read_text()):
    time.sleep(0.02)
time.sleep(float((sys.argv + ["0"])[2]))
(folder / f"saved-{rank}").write_text(reason)
end(75)
"""
REAL = """
import os, sys, time
from pathlib import Path
from util.dist import preemption, worker
from util.errors import UserError
def run(argv):
    rank, folder = os.environ["RANK"], Path(argv[0])
    (folder / f"up-{rank}").write_text("")
    while not preemption.requested():
        BODY
    (folder / f"saved-{rank}").write_text(preemption.requested())
    raise preemption.Preempted("saved")
sys.exit(worker.run_main(run, sys.argv[1:]))
"""


def in_the_foreground() -> None:
    """A shell starts what runs in its background, these tests perhaps, with some signals ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Job:
    """The launcher with workers that run `main`."""

    def __init__(self, folder: Path, main: str, *flags: str, ranks=2, torchrun=("--standalone",), **variables):
        self.folder, self.said = folder, folder / "said"
        (folder / "main_jit.py").write_text(main)
        words = [f"--nproc_per_node={ranks}", *torchrun, "--local_addr=127.0.0.1"]
        words += [str(folder / "main_jit.py"), str(folder), *flags]
        variables = {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT), **variables}
        self.process = multiprocessing.get_context("fork").Process(target=self._launch, args=(words, variables))
        self.process.start()
        self.pid = self.process.pid

    def _launch(self, words: list[str], variables: dict[str, str]) -> None:
        os.setsid()
        in_the_foreground()
        os.environ.update(variables)
        launch.tempfile.tempdir = None  # TMPDIR is read again
        os.dup2(os.open(self.said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w")  # not pytest's
        os._exit(run_launcher(words))

    def said_so_far(self) -> str:
        return self.said.read_text() if self.said.exists() else ""

    def wait_until(self, happened) -> None:
        end = time.monotonic() + 120
        while not happened():
            assert time.monotonic() < end and self.process.is_alive(), self.said_so_far()
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        self.process.join(120)
        return self.process.exitcode, self.said.read_text()


def waiting(folder: Path, *flags: str, ranks: int = 2, main: str = LIGHT + WAIT, **settings) -> Job:
    """A job whose workers wait until they are asked to stop."""
    job = Job(folder, main, *flags, ranks=ranks, **settings)
    job.wait_until(lambda: all((folder / f"up-{rank}").exists() for rank in range(ranks)))
    return job


def wait_until_gone(pid: int, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end, f"{pid} still runs"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "send"), [("SIGTERM", os.kill), ("SIGINT", os.killpg), ("SIGHUP", os.kill), ("SIGUSR1", os.killpg)]
)
def test_a_signal_to_the_launcher_reaches_the_workers_as_a_file(tmp_path, name, send):
    job = waiting(tmp_path, "0.5")
    send(job.pid, getattr(signal, name))
    time.sleep(0.1)
    os.kill(job.pid, signal.SIGTERM)  # a scheduler may repeat itself
    code, said = job.end()
    assert code == EXIT_CODE, said
    assert all((tmp_path / f"saved-{rank}").read_text() == f"{name}\n" for rank in (0, 1))
    assert "Traceback" not in said and "ChildFailed" not in said and not list(tmp_path.glob("jit-*"))


def test_a_scheduler_may_signal_all_processes_even_while_they_start(tmp_path):
    """Real workers are blocked from the signal until they have saved, and rank 0 says it once."""
    job = Job(tmp_path, REAL.replace("BODY", "time.sleep(0.02)"))
    job.wait_until(lambda: len(children(job.pid)) == 2)
    for name in ("SIGTERM", "SIGUSR1"):
        for pid in children(job.pid):
            os.kill(pid, getattr(signal, name))
    os.kill(job.pid, signal.SIGTERM)
    code, said = job.end()
    assert code == EXIT_CODE and (tmp_path / "saved-1").read_text() == "SIGTERM", said
    assert said.count("Received SIGTERM: finishing this step") == 1 and said.count("saved") == 1


@pytest.mark.parametrize(("times", "milliseconds"), [(2, 0), (20, 5)])
def test_a_burst_of_ctrl_c_is_one(tmp_path, times, milliseconds):
    """`timeout -s INT` sends it to its child and to the group."""
    job = waiting(tmp_path, ranks=1)
    for _ in range(times):
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(milliseconds / 1000)
    code, said = job.end()
    assert code == EXIT_CODE and "stopping at once" not in said


@pytest.mark.parametrize(("node", "name"), [(0, "SIGTERM"), (1, "SIGINT"), (1, "SIGUSR1")])
def test_a_node_that_waits_for_others_says_so_and_stops_when_asked(tmp_path, monkeypatch, node, name):
    monkeypatch.setattr(launch, "FIRST_WORD", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes=3", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    job = Job(tmp_path, LIGHT + WAIT, torchrun=where)
    expected = "node 1, 2 of 3 to join" if node == 0 else "node 0, which does not answer"
    job.wait_until(lambda: f"waiting for {expected}" in job.said_so_far())
    asked = time.monotonic()
    os.kill(job.pid, getattr(signal, name))
    code, said = job.end()
    assert code == EXIT_CODE and f"{name} before the start" in said and time.monotonic() - asked < 5
    assert "Traceback" not in said and not list(tmp_path.glob("jit-*"))


@pytest.mark.parametrize("names", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGQUIT",)])
def test_a_second_ctrl_c_ends_everything_at_once(tmp_path, names):
    job = waiting(tmp_path, "60")
    workers, began = children(job.pid), time.monotonic()
    for name in names:
        os.kill(job.pid, getattr(signal, name))
        time.sleep(0.5)
    code, said = job.end()
    assert code == 130 and "stopping at once" in said and time.monotonic() - began < 15
    for pid in workers:
        wait_until_gone(pid)
    assert not list(tmp_path.glob("saved-*")) and not list(tmp_path.glob("jit-*"))


def test_workers_do_not_outlive_a_launcher_that_is_killed(tmp_path):
    job = waiting(tmp_path, ranks=1, main=REAL.replace("BODY", "time.sleep(0.02)"))
    (worker,) = children(job.pid)
    job.process.kill()
    wait_until_gone(worker)


@pytest.mark.parametrize(
    ("main", "ranks", "expected"),
    [
        ("", 1, 0),
        ("end(0)", 2, 0),
        ("end(75 if rank == '0' else 0)", 2, 75),
        ("end(2 if rank == '0' else 75)", 2, 2),
        ("if rank == '1': sys.exit(5)\nend(75)", 2, 1),
        ("(state / 'exit-0').write_text('2'); sys.exit(2)", 1, 2),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, 1),
    ],
)
def test_a_failure_outweighs_a_preemption_and_a_reason_torchruns_1(tmp_path, main, ranks, expected):
    code, said = Job(tmp_path, LIGHT + main, ranks=ranks).end()
    assert code == expected, said


@pytest.mark.slow  # imports torch in many processes
@pytest.mark.parametrize(
    ("body", "expected", "times"),
    [
        ("raise UserError('no such thing')", 2, 1),
        ("e = UserError('no such thing'); e.on_all_ranks = True; raise e", 2, 1),
        ("raise ValueError('no such thing') if rank == '1' else preemption.Preempted", 1, 3),  # source, error, sentence
    ],
)
def test_a_refusal_is_said_once(tmp_path, body, expected, times):
    code, said = Job(tmp_path, REAL.replace("BODY", body)).end()
    said, _, summary = said.partition("FAILED")  # of torchrun, for which workers that all stop alike have succeeded
    assert code == expected and said.count("no such thing") == times, said
    assert ("no such thing" in summary.partition("Root Cause")[2]) == ("on_all_ranks" not in body)


def test_failed_workers_are_started_again(tmp_path):
    """MAX_RESTARTS."""
    once = "if not (folder / 'again').exists(): (folder / 'again').touch(); sys.exit(3)"
    job = waiting(tmp_path, ranks=1, main=LIGHT + once + WAIT, torchrun=("--standalone", "--max_restarts=1"))
    os.kill(job.pid, signal.SIGTERM)
    assert job.end()[0] == EXIT_CODE


@pytest.mark.parametrize(
    ("state", "body", "requeue", "calls"),
    [
        ("RUNNING", "end(75)", "1", ["requeue 77"]),
        *((state, "end(75)", "1", []) for state in ("CANCELLED", "PREEMPTED")),
        ("RUNNING", "end(75)", "0", []),
        *(("RUNNING", body, "1", []) for body in ("end(0)", "end(2)")),
    ],
)
def test_requeue(tmp_path, state, body, requeue, calls):
    show = f'echo "JobId=77 JobState={state} Reason="'
    scontrol = f'case $1 in requeue) echo "$*" >> "{tmp_path}/requeued" ;; show) {show} ;; esac'
    program(tmp_path / "bin/scontrol", scontrol)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    _, said = Job(tmp_path, LIGHT + body, ranks=1, PATH=path, SLURM_JOB_ID="77", REQUEUE=requeue).end()
    requeued = tmp_path / "requeued"
    assert (requeued.read_text().splitlines() if requeued.exists() else []) == calls
    assert ("job 77 is requeued" in said) == bool(calls)
    assert ("is not requeued" in said) == (state != "RUNNING")


ENDS = {  # error, or line -> exit code alone, exit code for torchrun under the launcher with one rank, with two
    "done": (0, 0, 0),
    Preempted("stopped"): (75, 0, 0),
    UserError("wrong"): (2, 0, 2),
    RuntimeError("unforeseen"): (1, 1, 1),
    KeyboardInterrupt(): (130, 130, 130),
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_run_main_tells_its_parent_and_the_launcher(tmp_path, monkeypatch, capsys, end):
    for name, value in {"RANK": "0", "LOCAL_RANK": "3", "MASTER_ADDR": "x", "JIT_STATE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run, codes = Mock(side_effect=[end] * 3), []  # returns or raises it
    for ranks in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        codes.append(run_main(run, []))
        assert (tmp_path / "exit-3").read_text() == f"{ENDS[end][0]}\n"
    monkeypatch.delenv("JIT_STATE_DIR")
    assert (run_main(run, []), *codes) == ENDS[end]
    assert ("Traceback" in capsys.readouterr().err) == isinstance(end, RuntimeError)


def test_an_error_that_all_ranks_have_is_printed_by_rank_0(monkeypatch, capsys):
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    error = UserError("wrong everywhere")
    error.on_all_ranks = True
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "x", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        assert run_main(Mock(side_effect=error), []) == 2
    assert capsys.readouterr().err == "main_jit.py: error: wrong everywhere\n"
    assert run_main(lambda argv: argv[0], ["done"]) == 0
    assert capsys.readouterr().out == ""  # this is rank 1
