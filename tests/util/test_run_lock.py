"""A run's folder belongs to one run at a time, and a lock dies with its process."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

import engine_jit
import main_jit
from tests.conftest import arguments, listing, raw, train
from util import run_lock
from util.errors import UserError
from util.run_lock import RunLock


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.5)


def test_the_second_is_told_who_holds_it_and_since_when(tmp_path):
    with RunLock(tmp_path / "a/b"):
        with (
            pytest.raises(UserError, match=rf"in use by process {os.getpid()} on \S+, since 20..-"),
            RunLock(tmp_path / "a/b"),
        ):
            pass
        with RunLock(tmp_path / "c"):  # another folder is free
            pass
    assert listing(tmp_path) == {str(tmp_path / "a"): "folder"}  # nothing is left of a run that wrote nothing
    with RunLock(tmp_path / "a/b"):  # free again
        pass


def test_it_waits_for_one_that_is_about_to_end(tmp_path):
    first = RunLock(tmp_path).__enter__()
    (tmp_path / "file").touch()
    threading.Timer(0.2, first.__exit__).start()
    with RunLock(tmp_path) as lock:
        assert lock.path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def hold(folder):
    with RunLock(folder):
        time.sleep(60)


def test_a_killed_process_holds_nothing(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / run_lock.NAME).exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with RunLock(tmp_path):
        pass


def test_only_one_of_many_gets_it(tmp_path):
    """Each holder removes the file that the others wait for."""
    inside, most = [], []

    def work():
        for _ in range(20):
            try:
                with RunLock(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) > 4


@pytest.mark.usefixtures("tiny")
def test_a_second_run_in_the_folder_of_a_run_is_refused(tmp_path, monkeypatch, capsys):
    """Also with the same settings; what the first one writes stays as it is, and it trains to its end."""
    folder, step, before = tmp_path / "run", engine_jit.Trainer.train_step, {}

    def second(self, batches, number):
        if number == 1 and not before:
            before.update(listing(folder))
            for changes in ({}, {"seed": 1}):
                assert main_jit.main(arguments(output_dir=folder, **changes)) == 2
                assert "in use by process" in capsys.readouterr().err
            assert listing(folder) == before
            assert main_jit.main(arguments(output_dir=folder, dry_run=True)) == 0  # which writes nothing
        return step(self, batches, number)

    monkeypatch.setattr(engine_jit.Trainer, "train_step", second)
    train(folder)
    assert before and not (folder / run_lock.NAME).exists()


@pytest.mark.usefixtures("tiny")
def test_a_run_goes_on_from_what_another_wrote_just_before_it_got_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    enter = RunLock.__enter__

    def enter_late(self):
        monkeypatch.setattr(RunLock, "__enter__", enter)
        train(folder, epochs=1)  # while this one has read that there is no checkpoint
        return enter(self)

    monkeypatch.setattr(RunLock, "__enter__", enter_late)
    train(folder, epochs=2)
    assert raw(folder)["run"]["step"] == 4
    assert (folder / "config-from-step000000002.json").exists()


def test_a_disk_that_is_full_is_a_sentence(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_lock.json, "dumps", fail)
    with pytest.raises(UserError, match="No space left on device"), RunLock(tmp_path):
        pass
