"""Writing checkpoints does not stop training, copies what it writes, and reports errors once."""

import threading
import time
from unittest.mock import Mock

import pytest
import torch

from tests.conftest import ONE, differences
from tests.util.checkpoint.helpers import DISK_FULL
from tests.util.checkpoint.test_files import content, names, save_steps, step_of, steps_of
from util.checkpoint import files
from util.checkpoint.files import NAME
from util.checkpoint.writer import CheckpointWriter, HostCopy
from util.dist.context import DistContext
from util.errors import UserError

CPU = torch.device("cpu")


def make(folder, keep_last=2, last_step=None, first_step=0, ctx=ONE):
    return CheckpointWriter(folder, keep_last, last_step, first_step, ctx)


def test_going_back_to_an_earlier_one_removes_the_later_ones(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    (tmp_path / "checkpoint-step000000002.pth").replace(tmp_path / NAME)
    writer = make(tmp_path, last_step=2, first_step=2)
    for step in (20, 21):
        writer.save(content(step), step)
        writer.wait()
        assert steps_of(tmp_path) == [step, 2 if step == 20 else 20]
    writer.close()


def test_an_old_one_that_cannot_be_removed_stops_nothing(tmp_path, monkeypatch, capsys):
    writer = make(tmp_path, keep_last=1, last_step=2)
    save_steps(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(files, "prune", Mock(side_effect=OSError(39, "Directory not empty")))
        writer.save(content(3), 3)
        writer.wait()
    assert "an old checkpoint could not be removed" in capsys.readouterr().err
    assert [written.step for written in writer.finished()] == [3] and step_of(tmp_path / NAME) == 3
    writer.close()


def test_rank_0_alone_writes_replicas(tmp_path):
    writer = make(tmp_path, ctx=DistContext(rank=1, world_size=2))
    writer.save(content(1), 1)
    writer.wait()
    assert writer.finished() == [] and names(tmp_path) == []
    writer.close()


def test_training_goes_on_and_changes_its_tensors_while_they_are_written(tmp_path, monkeypatch):
    going, real = threading.Event(), files.save

    def slow(*args):
        going.wait(20)
        return real(*args)

    monkeypatch.setattr(files, "save", slow)
    writer, what = make(tmp_path), content(1)
    start = time.perf_counter()
    writer.save(what, 1)
    assert time.perf_counter() - start < 10 and writer.finished() == []
    what["weights"].fill_(7)
    assert names(tmp_path) == []
    going.set()
    writer.wait()
    (written,) = writer.finished()
    assert (written.step, written.path) == (1, tmp_path / NAME) and written.seconds >= written.blocked
    assert written.num_bytes == (tmp_path / NAME).stat().st_size
    assert torch.load(tmp_path / NAME, weights_only=True)["weights"].unique().tolist() == [1]
    writer.close()


def test_errors_surface_once_and_the_last_good_one_stays(tmp_path, monkeypatch):
    writer = make(tmp_path)
    writer.save(content(1), 1)
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", Mock(side_effect=DISK_FULL))
        writer.save(content(2), 2)
        seen = []
        with pytest.raises(UserError, match="No space left"):
            while True:
                seen += writer.finished()
    assert [w.step for w in seen] in ([1], []) and [w.step for w in seen + writer.finished()] == [1]
    assert names(tmp_path) == [NAME] and steps_of(tmp_path) == [1]
    writer.save(content(3), 3)
    writer.wait()
    assert steps_of(tmp_path) == [3, 1]
    writer.close()


def test_an_error_that_nobody_waited_for_is_printed(tmp_path, capsys):
    writer = make(tmp_path / "missing")
    writer.save(content(1), 1)
    writer.close()
    assert "warning: The checkpoint cannot be written" in capsys.readouterr().err


def test_host_copy_keeps_its_memory_and_copies_all_tensors():
    copy, weight = HostCopy(CPU), torch.arange(4.0)
    nested = {"a": weight, "b": {"part": weight[:2], 3: torch.tensor(3), "groups": [{"lr": 0.1}], "none": None}}
    first = copy(nested)
    assert differences(first, nested) == []
    place = first["a"].data_ptr()
    assert place != weight.data_ptr()
    weight += 1
    second = copy(nested)
    assert second["a"].data_ptr() == place and second["a"].tolist() == [1, 2, 3, 4]
    assert second["b"]["part"].tolist() == [1, 2]


def test_the_thread_is_on_the_device_of_training(monkeypatch, tmp_path):
    """A thread starts with device 0, and DCP opens a context on whatever device it is on."""
    calls, thread = [], threading.current_thread
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((thread().name, device)))
    monkeypatch.setattr(HostCopy, "__call__", lambda self, content: content)
    device = torch.device("cuda", 3)
    writer = make(tmp_path, ctx=DistContext(device=device))
    for step in (1, 2):
        writer.save(content(step), step)
    writer.close()
    assert [(name.split("_")[0], device) for name, device in calls] == [("checkpoint", device)]


def test_a_run_on_a_cpu_leaves_the_gpu_of_its_machine_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("that opens a context on it"))
    assert HostCopy(CPU)({"x": torch.ones(2)})["x"].tolist() == [1, 1]
