"""Asked to stop: what is noted, what is said at the end, and that evaluations go on where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main_jit
import tests.toy_evaluation as toy
from tests.conftest import arguments, differences, flags, raw, train
from tests.launcher_stand_ins import basics, tiny_checkout
from util import preemption
from util.checkpoint import NAME
from util.data import Digits
from util.errors import UserError
from util.loader import GlobalBatchSampler, build_loader, end_workers
from util.preemption import EXIT_CODE, Preempted

ROOT = Path(main_jit.__file__).parent


@pytest.fixture
def listening(monkeypatch):
    monkeypatch.delenv("JIT_STATE_DIR", raising=False)
    preemption.listen()
    yield
    preemption.stop_listening()


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The folder that the launcher would make."""
    folder = tmp_path / "state"
    folder.mkdir()
    monkeypatch.setenv("JIT_STATE_DIR", str(folder))
    yield folder
    preemption.stop_listening()


# ---- without the launcher --------------------------------------------------------------------


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_noted_and_said_once(listening, number, capfd):
    assert preemption.requested() is None
    os.kill(os.getpid(), number)
    assert preemption.requested() == preemption.requested() == number.name
    assert capfd.readouterr().err.count(f"{number.name}: stops when this step") == 1


def test_ctrl_c_that_comes_twice_is_one(listening, capfd):
    """`timeout -s INT` sends it to a process and to its group."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    assert preemption.requested() == "SIGINT" and capfd.readouterr().err.count("SIGINT") == 1


def test_a_file_that_is_still_empty_is_not_read(state):
    preemption.listen()
    (state / "stop").touch()
    assert preemption.requested() is None
    (state / "stop").write_text("SIGINT\n")
    assert preemption.requested() == "SIGINT"


def test_ctrl_c_stops_at_once_when_asked_before(listening, monkeypatch):
    monkeypatch.setattr(preemption, "AGAIN", 0.0)
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.requested() == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler may repeat itself
        os.kill(os.getpid(), number)


def test_handlers_are_put_back(monkeypatch):
    monkeypatch.delenv("JIT_STATE_DIR", raising=False)
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    preemption.listen()
    preemption.listen()
    assert signal.getsignal(signal.SIGTERM) not in before
    preemption.stop_listening()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


# ---- with the launcher -----------------------------------------------------------------------


def test_the_file_alone_counts(state, capfd):
    preemption.listen()
    for number in preemption.SIGNALS[1:]:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert preemption.requested() is None
    (state / "stop").write_text("SIGTERM\n")
    assert preemption.requested() == "SIGTERM"
    assert capfd.readouterr().err.count("SIGTERM: stops when this step") == 1


STUCK = """
import ctypes, sys
from util import preemption
preemption.GRACE = 0.5
preemption.listen()
print("up", flush=True)
ctypes.CDLL(None).sleep(int(sys.argv[1]))
ctypes.CDLL(None).sleep(int(sys.argv[1]))  # a signal wakes the first
"""


@pytest.mark.parametrize(("known", "code"), [(False, 143), (True, 0)])
def test_a_term_that_the_launcher_does_not_know_of_ends_a_call_that_would_not(state, known, code):
    """torchrun sends it to those that are left when a process has failed, and kills them 30 s later."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    if known:
        (state / "stop").write_text("SIGTERM\n")
    process.terminate()
    assert process.wait(20) == code


def test_exit_codes_for_torchrun_and_for_the_launcher(state, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    for code, alike, told in [(0, True, 0), (75, True, 0), (2, True, 0), (2, False, 2), (1, False, 1)]:
        assert preemption.end_process(code, alike) == told
        assert (state / "exit-3").read_text() == f"{code}\n"
    preemption.listen()
    assert not (state / "exit-3").exists()  # it was another process's
    monkeypatch.delenv("JIT_STATE_DIR")
    assert preemption.end_process(75, alike=True) == 75


def raising(error):
    def run(argv):
        raise error

    return run


ENDS = {  # error -> (code alone, code for torchrun under the launcher with one process, with two)
    Preempted("stopped"): (75, 0, 0),
    UserError("wrong"): (2, 0, 2),
    RuntimeError("unforeseen"): (1, 1, 1),
    KeyboardInterrupt(): (130, 130, 130),
}


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_main_tells_both(state, monkeypatch, error):
    monkeypatch.setattr(main_jit, "run", raising(error))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    codes = []
    for processes in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        codes.append(main_jit.main([]))
        assert (state / "exit-0").read_text() == f"{ENDS[error][0]}\n"
    monkeypatch.delenv("JIT_STATE_DIR")
    assert (main_jit.main([]), *codes) == ENDS[error]


def test_an_error_of_all_is_no_failure_and_said_by_one(state, monkeypatch, capsys):
    error = UserError("wrong everywhere")
    error.everywhere = True
    monkeypatch.setattr(main_jit, "run", raising(error))
    for rank in (0, 1):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "x", "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        assert main_jit.main([]) == 0
        assert (state / f"exit-{rank}").read_text() == "2\n"
    assert capsys.readouterr().err.count("wrong everywhere") == 1


# ---- processes that load images --------------------------------------------------------------


def test_loading_processes_survive_what_the_whole_job_is_sent_and_end_with_the_main_process():
    loader = build_loader(Digits(16), GlobalBatchSampler(1797, 4, 0, 1, 1, 0), 2, False)
    batches = iter(loader)
    for _ in range(2):  # one of each: both have begun
        next(batches)
    workers = [worker.pid for worker in loader._iterator._workers]
    for number in preemption.SIGNALS:  # from another process than their parent
        subprocess.run(["kill", f"-{number.name[3:]}", *map(str, workers)], check=True)
    assert len(list(batches)) == 1797 // 4 - 2
    processes = loader._iterator._workers
    start = time.monotonic()
    end_workers()  # what the end of the interpreter calls
    assert [worker.exitcode for worker in processes] == [0, 0] and time.monotonic() - start < 5


# ---- evaluations and samples -----------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1])
def test_an_evaluation_stops_on_all_processes_and_goes_on(tmp_path, asked):
    """One of two processes is asked when it has written a block. Rank 1 has no other one, and waits for rank 0."""
    toy.checkpoint(tmp_path / "run")
    settings = json.dumps({"asked": asked, "batch_size": 8, "batch_seconds": 0.2})
    done = toy.finish(toy.start("tests.toy_evaluation", [tmp_path / "run", settings], 2))
    assert all(code == 1 and "Preempted: stopped; the features so far" in err for code, _, err in done), done
    (folder,) = (tmp_path / "run" / "eval").glob("*.features")
    assert len(list(folder.glob("block-*.npz"))) == 2  # of 3
    report, _ = toy.run(tmp_path / "run")
    toy.checkpoint(tmp_path / "whole")
    assert report["metrics"] == toy.run(tmp_path / "whole")[0]["metrics"] and report["images_made"] == toy.N - 128


def test_sampling_stops_between_two_batches(trained, tmp_path, tiny, monkeypatch, capsys):
    batches = []
    monkeypatch.setattr(preemption, "requested", lambda: batches.append(0) or ("SIGTERM" if len(batches) > 2 else None))
    argv = flags(resume=trained, sample=True, labels="0-9", gen_bsz=2, device="cpu", output_dir=tmp_path)
    assert main_jit.main(argv) == EXIT_CODE
    assert "stopped before all images were there" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- the launcher, torchrun, two processes ---------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Twelve steps without an interruption."""
    return train(tmp_path_factory.mktemp("whole") / "run", epochs=6)


def test_training_stops_when_the_launcher_is_asked_and_goes_on(tmp_path, whole):
    script = tiny_checkout(tmp_path / "checkout")
    command = ["bash", str(script), *arguments(epochs=6, batch_size=8, output_dir=tmp_path / "run")]
    env = basics(NUM_GPUS="2", SECONDS_PER_STEP="0.3", GLOO_SOCKET_IFNAME="lo")
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, env=env, stderr=said, stdout=said, start_new_session=True)
        log = tmp_path / "run" / "log.jsonl"
        end = time.monotonic() + 60
        while time.monotonic() < end and not (log.exists() and '"train"' in log.read_text()):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)  # torchrun as well, as a scheduler would
        code = process.wait(30)
    text = (tmp_path / "said").read_text()
    assert code == EXIT_CODE and "stopped by SIGTERM after step" in text, text
    assert "Traceback" not in text and "ChildFailedError" not in text, text
    step = raw(tmp_path / "run")["run"]["step"]
    assert 0 < step < 12
    subprocess.run(command, env=env | {"SECONDS_PER_STEP": "0"}, check=True, capture_output=True, timeout=60)
    one, two = raw(whole), raw(tmp_path / "run")
    assert two["run"]["step"] == 12 and (tmp_path / "run" / NAME).exists()
    for name, value in one["model"].items():  # of one process: sums are rounded differently
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=2e-5, msg=name)
    assert differences(one["epoch"], two["epoch"]) == []
