"""Requests to stop without the launcher, and what the launcher's folder says to a worker."""

import os
import signal

import pytest

from util.dist import preemption
from util.dist.context import DistContext
from util.dist.preemption import StepVotes, listening


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("JIT_STATE_DIR", raising=False)
    with listening():
        yield


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The launcher's folder."""
    folder = tmp_path / "state"
    folder.mkdir()
    monkeypatch.setenv("JIT_STATE_DIR", str(folder))
    return folder


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_noted_and_announced_once(alone, number, capfd):
    assert preemption.requested() is None
    os.kill(os.getpid(), number)
    assert preemption.requested() == preemption.requested() == number.name
    assert capfd.readouterr().err.count(f"Received {number.name}: finishing this step") == 1


def test_a_second_ctrl_c_stops_at_once_unless_it_is_one_of_a_burst(alone, monkeypatch, capfd):
    """`timeout -s INT` sends it to a process and to its group."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    assert preemption.requested() == "SIGINT" and capfd.readouterr().err.count("SIGINT") == 1
    monkeypatch.setattr(preemption, "BURST", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler may repeat itself
        os.kill(os.getpid(), number)


def test_handlers_are_restored(monkeypatch):
    monkeypatch.delenv("JIT_STATE_DIR", raising=False)
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with pytest.raises(ValueError), listening():
        assert signal.getsignal(signal.SIGTERM) not in before
        raise ValueError
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_under_the_launcher_the_file_alone_counts(state, capfd):
    handlers = [signal.getsignal(number) for number in preemption.SIGNALS]
    with listening():
        assert [signal.getsignal(number) for number in preemption.SIGNALS] == handlers
        assert preemption.requested() is None
        (state / "stop").touch()  # the launcher is about to write it
        assert preemption.requested() is None
        (state / "stop").write_text("SIGTERM\n")
        assert preemption.requested() == "SIGTERM"
    assert capfd.readouterr().err.count("Received SIGTERM: finishing this step") == 1
    (state / "stop").unlink()
    preemption.finish(1)
    with listening():
        assert preemption.requested() is None and not list(state.iterdir())  # the code was another process's


def test_a_single_rank_decides_at_once():
    votes = StepVotes(DistContext(), ("stop", "save"))
    assert votes.lag == 0 and votes({"stop": False, "save": True}) == {"save"}
    assert votes({"stop": False, "save": False}) == set()
