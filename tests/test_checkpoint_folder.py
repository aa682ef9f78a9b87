"""Which files a run's folder holds, that they are whole, and that writing them does not stop training."""

import os
import resource
import threading
import time
import zipfile

import pytest
import torch

from tests.conftest import differences, raw, read_log, state_differences, train
from util import checkpoint, checkpoint_folder
from util.checkpoint_folder import NAME, candidates, keep, prune, save, verify
from util.checkpoint_writer import CheckpointWriter, HostCopy
from util.errors import UserError


def content(step=0):
    return {"weights": torch.full((1000,), float(step)), "step": step}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_previous_one_is_kept_and_the_newest_comes_first(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, content(step), previous_step=step - 1 or None)
    keep(tmp_path, epoch=0)
    assert [step_of(path) for path in candidates(tmp_path)] == [3, 2, 1, 3]
    assert names(tmp_path) == [
        "checkpoint-epoch0001.pth", NAME, "checkpoint-step000000001.pth", "checkpoint-step000000002.pth"
    ]  # fmt: skip
    prune(tmp_path, keep_last=2)
    assert [step_of(path) for path in candidates(tmp_path)] == [3, 2, 3]
    prune(tmp_path, keep_last=1)
    assert names(tmp_path) == ["checkpoint-epoch0001.pth", NAME]


def test_going_back_to_an_earlier_one_takes_the_later_ones_out_of_the_way(tmp_path):
    for step in range(1, 5):
        save(tmp_path, content(step), previous_step=step - 1 or None)
    os.replace(tmp_path / "checkpoint-step000000002.pth", tmp_path / NAME)
    writer = CheckpointWriter(tmp_path, keep_last=2, last_step=2, first_step=2)
    for step in (20, 21):
        writer.save(content(step), step)
        writer.wait()
        assert [step_of(path) for path in candidates(tmp_path)] == [step, 2 if step == 20 else 20]
    writer.close()


def test_an_old_one_that_cannot_be_removed_stops_nothing(tmp_path, monkeypatch, capsys):
    def busy(*args, **kwargs):
        raise OSError(39, "Directory not empty")

    writer = CheckpointWriter(tmp_path, keep_last=1, last_step=None)
    for step in (1, 2):
        save(tmp_path, content(step), previous_step=step - 1 or None)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "_remove", busy)
        writer.save(content(3), 3)
        writer.wait()
    assert "an old checkpoint could not be removed" in capsys.readouterr().err
    assert [w.step for w in writer.finished()] == [3] and step_of(tmp_path / NAME) == 3
    writer.close()


def test_an_error_that_nobody_waited_for_is_said(tmp_path, monkeypatch, capsys):
    writer = CheckpointWriter(tmp_path / "missing", keep_last=1, last_step=None)
    writer.save(content(1), 1)
    writer.close()
    assert "warning: the checkpoint cannot be written" in capsys.readouterr().err


def test_every_changed_byte_of_content_is_noticed(tmp_path):
    path = save(tmp_path, content())
    whole = path.read_bytes()
    verify(path)
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda entry: entry.file_size)
    begin = record.header_offset + 200
    for at in range(begin, begin + record.file_size - 200, 397):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="damaged"):
            verify(path)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated"):
            verify(path)


def test_a_file_that_the_disk_does_not_give_back_is_not_put_in_place(tmp_path, monkeypatch):
    save(tmp_path, content(1))
    real = torch.save

    def torn(what, file):
        real(what, file)
        file.seek(700)
        file.write(b"\xff" * 64)

    monkeypatch.setattr(checkpoint_folder.torch, "save", torn)
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path, content(2), previous_step=1)
    assert names(tmp_path) == [NAME] and step_of(tmp_path / NAME) == 1


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save(tmp_path, content(step), previous_step=step - 1 or None)
    assert [step_of(path) for path in candidates(tmp_path)] == [2, 1]


# --- the writer -----------------------------------------------------------------------------------------------------


def test_training_goes_on_and_changes_its_tensors_while_they_are_written(tmp_path, monkeypatch):
    going, real = threading.Event(), checkpoint_folder.save

    def slow(*args):
        going.wait(20)
        return real(*args)

    monkeypatch.setattr(checkpoint_folder, "save", slow)
    writer = CheckpointWriter(tmp_path, keep_last=2, last_step=None)
    what = content(1)
    start = time.perf_counter()
    writer.save(what, 1)
    assert time.perf_counter() - start < 10 and writer.finished() == []
    what["weights"].fill_(7)
    assert names(tmp_path) == []
    going.set()
    writer.wait()
    (written,) = writer.finished()
    assert (written.step, written.path) == (1, tmp_path / NAME) and written.seconds >= written.blocked
    assert torch.load(tmp_path / NAME)["weights"].unique().tolist() == [1]
    writer.close()


def test_errors_surface_once_and_the_last_good_one_stays(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep_last=2, last_step=None)
    writer.save(content(1), 1)
    writer.wait()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder.torch, "save", full)
        writer.save(content(2), 2)
        seen = []
        with pytest.raises(UserError, match="No space left"):
            while True:
                seen += writer.finished()
    assert [w.step for w in seen] in ([1], []) and [w.step for w in seen + writer.finished()] == [1]
    assert names(tmp_path) == [NAME] and step_of(tmp_path / NAME) == 1
    writer.save(content(3), 3)
    writer.wait()
    assert [step_of(path) for path in candidates(tmp_path)] == [3, 1]
    writer.close()


def test_host_copy_keeps_its_memory_and_copies_everything():
    copy = HostCopy()
    shared = torch.arange(4.0)
    nested = {"a": shared, "b": [shared[:2], (torch.tensor(3), "text", 1.5, None)]}
    first = copy(nested)
    assert differences(first, nested) == []
    place = first["a"].data_ptr()
    assert place != shared.data_ptr()
    shared += 1
    second = copy(nested)
    assert second["a"].data_ptr() == place and second["a"].tolist() == [1, 2, 3, 4]
    assert copy({"a": torch.zeros(5)})["a"].shape == (5,)  # another shape has other memory


def test_thread_of_the_writer_is_on_the_device_of_training(monkeypatch, tmp_path):
    """A thread begins with device 0, and torch's writer of shards opens a context on whatever device it is on."""
    calls, thread = [], threading.current_thread
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((thread().name, device)))
    writer = CheckpointWriter(tmp_path, keep_last=1, last_step=None)
    for step in (1, 2):
        writer.save(content(step), step)
    writer.close()
    assert [(name.split("_")[0], device) for name, device in calls] == [("checkpoint", 3)]


def test_a_run_on_a_cpu_leaves_the_gpu_of_its_machine_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("that opens a context on it"))
    assert HostCopy()({"x": torch.ones(2)})["x"].tolist() == [1, 1]


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "gone", "foreign"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, trained, capsys, damage):
    folder = train(tmp_path, save_last_freq=1)
    path = folder / NAME
    whole = path.read_bytes()
    assert names(folder)[:2] == [NAME, "checkpoint-step000000002.pth"]
    if damage == "gone":
        path.unlink()
    elif damage == "foreign":
        torch.save({"a": 1}, path)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
        path.write_bytes({"torn": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    capsys.readouterr()
    train(folder, save_last_freq=1)
    said = capsys.readouterr()
    if damage != "gone":
        assert "warning:" in said.err and "using checkpoint-step000000002.pth of step 2 instead" in said.err
    assert state_differences(trained, folder) == [] and read_log(folder) == read_log(trained)
    # What was damaged is not kept as an earlier one.
    assert [raw_step(p) for p in candidates(folder)] == [4, 2]


def raw_step(path):
    return checkpoint._read(path).run["step"]


@pytest.mark.usefixtures("tiny")
def test_all_damaged_is_an_error_about_the_newest(tmp_path, capsys):
    folder = train(tmp_path, save_last_freq=1)
    for path in candidates(folder):
        path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    train(folder, code=2)
    assert f"{folder / NAME} is truncated" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_kept_epochs_stay_and_can_be_sampled(tmp_path, capsys):
    import main_jit
    from tests.conftest import flags

    folder = train(tmp_path, epochs=6, keep_every_epochs=2, keep_last=1)
    kept = [f"checkpoint-epoch000{i}.pth" for i in (2, 4, 6)]
    assert [p.name for p in reversed(candidates(folder))] == [*kept, NAME]
    assert [raw_step(folder / name) for name in kept] == [4, 8, 12]
    capsys.readouterr()
    words = ["--sample", *flags(resume=folder, labels="0", num_per_class=1, num_sampling_steps=2, device="cpu")]
    assert main_jit.main([*words, "--checkpoint", kept[0]]) == 0
    assert "epoch 2, ema1" in capsys.readouterr().out
    assert main_jit.main([*words, "--checkpoint", "checkpoint-epoch0003.pth"]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint" in error and kept[1] in error
    train(folder, code=2, checkpoint=kept[0], epochs=8)
    assert "--checkpoint chooses what to evaluate or sample" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_full_disk_stops_training_and_leaves_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    folder = train(tmp_path, epochs=1)
    before = raw(folder)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_folder.torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        train(folder, code=2, epochs=4, save_last_freq=1)
    error = capsys.readouterr().err
    assert f"the checkpoint cannot be written to {folder / NAME}" in error and "No space left" in error
    assert "Traceback" not in error
    assert differences(before, raw(folder)) == [] and names(folder)[0] == NAME


def test_the_system_refuses_to_write_more(tmp_path):
    """Not a stand-in: the write itself fails, in the middle of the file."""
    save(tmp_path, content(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            save(tmp_path, content(2), previous_step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == [NAME] and step_of(tmp_path / NAME) == 1


@pytest.mark.usefixtures("tiny")
def test_an_epoch_that_an_interruption_left_unkept_is_kept_by_the_next_start(tmp_path, monkeypatch):
    settings = {"epochs": 4, "keep_every_epochs": 2, "save_last_freq": 2}

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "keep", killed)
        train(tmp_path, code=130, **settings)
    assert "checkpoint-epoch0002.pth" not in names(tmp_path) and raw(tmp_path)["epoch"] == 1
    train(tmp_path, **settings)
    assert raw_step(tmp_path / "checkpoint-epoch0002.pth") == 4 and raw_step(tmp_path / "checkpoint-epoch0004.pth") == 8
