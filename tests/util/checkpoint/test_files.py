"""Which checkpoints a run's folder holds, that they are intact, and what failures at any moment leave of them."""

import os
import resource
import zipfile
from unittest.mock import Mock

import pytest
import torch

from tests.util.checkpoint.helpers import DISK_FULL
from util.checkpoint import files
from util.checkpoint.files import NAME, NEXT, candidates, keep, prune, recover, save, verify
from util.errors import UserError

STEP_1, STEP_2 = (f"checkpoint-step{step:09d}.pth" for step in (1, 2))


def content(step):
    return {"weights": torch.full((1000,), float(step)), "run": {"step": step}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def step_of(path):
    return torch.load(path, weights_only=True)["run"]["step"]


def steps_of(folder):
    return [step_of(path) for path in candidates(folder)]


def save_steps(folder, *steps):
    for step in steps:
        save(folder, content(step), previous_step=step - 1 or None)
    return folder / NAME


def test_earlier_ones_are_kept_and_the_newest_comes_first(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    keep(tmp_path / NAME, epoch=0)
    assert steps_of(tmp_path) == [3, 2, 1, 3]
    assert names(tmp_path) == ["checkpoint-epoch0001.pth", NAME, STEP_1, STEP_2]
    assert (tmp_path / NAME).stat().st_ino == (tmp_path / "checkpoint-epoch0001.pth").stat().st_ino  # no second copy
    prune(tmp_path, keep_last=2)
    assert steps_of(tmp_path) == [3, 2, 3]
    prune(tmp_path, keep_last=1)
    assert names(tmp_path) == ["checkpoint-epoch0001.pth", NAME]


def test_every_changed_byte_of_content_is_noticed(tmp_path):
    path = save_steps(tmp_path, 1)
    intact = path.read_bytes()
    verify(path)
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda entry: entry.file_size)
    begin = record.header_offset + 200
    for at in range(begin, begin + record.file_size - 200, 397):
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
        with pytest.raises(UserError, match="damaged"):
            verify(path)
    for length in (0, 1, 100, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(UserError, match="truncated"):
            verify(path)


def torn(what, file, real=torch.save):
    """Write what the disk does not give back."""
    real(what, file)
    file.file.seek(700)
    file.file.write(b"\xff" * 64)


FAILURES = {  # -> what is replaced by what, message
    "torch.save": ((torch, "save", Mock(side_effect=RuntimeError("unexpected pos 64"))), "unexpected pos 64"),
    "torn": ((torch, "save", torn), "truncated"),
    "rename": ((os, "replace", Mock(side_effect=DISK_FULL)), "No space left on device"),
    "the system": (None, "File too large"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_save_says_why_and_leaves_the_one_before(tmp_path, monkeypatch, failure):
    path, (patch, message) = save_steps(tmp_path, 1), FAILURES[failure]
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    if patch:
        monkeypatch.setattr(*patch)
    else:  # no stand-in: the write itself fails, in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(UserError, match=message) as refusal:
            save(tmp_path, content(2), previous_step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(refusal.value)
    assert names(tmp_path) == [NAME] and path.read_bytes() == before


def test_a_save_is_on_the_disk_before_it_replaces(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda f: (events.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(os, "rename", lambda *a: (events.append("rename"), rename(*a))[1])
    save(tmp_path, content(2), previous_step=1)
    assert events[0] == "fsync" and events[-3:] == ["rename", "rename", "fsync"]


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_between_the_renames_nothing_is_lost(tmp_path, monkeypatch, renames):
    save_steps(tmp_path, 1)
    done, real = [], os.rename

    def rename(*args):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(real(*args))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", rename)
        save(tmp_path, content(2), previous_step=1)
    assert steps_of(tmp_path) == [2, 1] and candidates(tmp_path)[0].name == NEXT
    recover(tmp_path, last_step=2)
    assert names(tmp_path) == [NAME, STEP_1] and steps_of(tmp_path) == [2, 1]


def test_what_killed_runs_leave_is_removed_and_nothing_else(tmp_path):
    save_steps(tmp_path, 1, 2)
    before = names(tmp_path)
    (tmp_path / f".{NEXT}.123.tmp").write_text("half a file")
    (tmp_path / NEXT).write_text("damaged, so that the run resumes from another one")
    (tmp_path / files.NEXT_SHARDED).mkdir()
    (tmp_path / files.NEXT_SHARDED / "shard").write_text("without its settings")
    recover(tmp_path, last_step=2)
    assert names(tmp_path) == before and steps_of(tmp_path) == [2, 1]


@pytest.mark.parametrize("hard_links", [True, False])
def test_one_that_is_kept_again_after_a_restart_stays_and_leaves_nothing_else(tmp_path, monkeypatch, hard_links):
    """The second name may be one of the same file, between which a rename does nothing, or an unfinished copy."""
    if not hard_links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(95, "Operation not supported")))
    save_steps(tmp_path, 1)
    kept = tmp_path / "checkpoint-epoch0001.pth"
    keep(tmp_path / NAME, epoch=0)
    keep(tmp_path / NAME, epoch=0)
    assert names(tmp_path) == [kept.name, NAME] and steps_of(tmp_path) == [1, 1]
    kept.unlink()
    kept.write_text("half a copy")
    recover(tmp_path, last_step=1)
    keep(tmp_path / NAME, epoch=0)
    save_steps(tmp_path, 2)
    prune(tmp_path, keep_last=1)
    assert names(tmp_path) == [kept.name, NAME] and steps_of(tmp_path) == [2, 1]
