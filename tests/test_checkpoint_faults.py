"""Checkpoints that are replaced while they are read, runs killed at bad moments, disks that fail one process."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from tests.conftest import listing, read_log, run_on, train
from tests.test_parallel import FSDP, _trainer
from util import checkpoint, checkpoint_folder, merge, sharded_checkpoint
from util.checkpoint_folder import NAME, NAME_SHARDED, NEXT, candidates, find, recorded_step, save
from util.errors import UserError
from util.sharded_checkpoint import SETTINGS
from util.sharded_state import ShardedCheckpointWriter

pytestmark = pytest.mark.usefixtures("tiny")

STEP_2, STEP_4 = (f"checkpoint-step{step:09d}.dcp" for step in (2, 4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in shards with the checkpoints of steps 2 and 4. Read it, do not write to it."""
    return train(tmp_path_factory.mktemp("finished") / "run", save_last_freq=1, **FSDP)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def go_back(run) -> None:
    """Another checkpoint in the place of the newest, as a run that goes on puts one there."""
    shutil.rmtree(run / NAME_SHARDED)
    os.rename(run / STEP_2, run / NAME_SHARDED)


def fail(error: Exception):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


# --- replaced while it is read ----------------------------------------------------------------------------------------


def test_weights_of_two_checkpoints_are_never_mixed(run):
    saved = checkpoint.load(run)
    saved.weights["model"]
    go_back(run)
    for read in (lambda: saved.weights["model_ema1"], lambda: saved.optimizer["state"]):
        with pytest.raises(UserError, match="was replaced while it was read"):
            read()
    shutil.rmtree(run / NAME_SHARDED)
    with pytest.raises(UserError, match="was replaced while it was read"):  # and not "does not fit"
        saved.weights["model_ema1"]


@pytest.mark.parametrize("at", [0, 1, 4])
def test_merging_what_is_replaced_meanwhile_is_refused(run, monkeypatch, capsys, at):
    """While the section of this number is read: all of its tensors are those of the new one."""
    calls, real = [], sharded_checkpoint.dcp.load

    def load(*args, **kwargs):
        if len(calls) == at:
            go_back(run)
        calls.append(real(*args, **kwargs))

    monkeypatch.setattr(sharded_checkpoint.dcp, "load", load)
    assert merge.main([str(run)]) == 2
    assert "was replaced while it was read" in capsys.readouterr().err and len(calls) == at + 1
    assert not (run / "merged").exists()


def test_a_checkpoint_replaced_while_it_is_verified_is_not_called_damaged(run, monkeypatch):
    real = sharded_checkpoint._sha256
    monkeypatch.setattr(
        sharded_checkpoint, "_sha256", lambda path: ((run / STEP_2).exists() and go_back(run)) or real(path)
    )
    with pytest.raises(UserError, match="was replaced while it was read"):
        sharded_checkpoint.verify(run / NAME_SHARDED)


# --- the newest, and those with names of their own --------------------------------------------------------------------


def test_older_file_does_not_hide_newer_shards(run, tmp_path):
    """A file that was merged at step 4 lies beside what the run has written at step 6."""
    train(run, epochs=3)
    merge.run([str(run), "--checkpoint", STEP_4, "--out", str(tmp_path)])
    shutil.copy(tmp_path / f"{Path(STEP_4).stem}.pth", run / NAME)
    assert find(run) == run / NAME_SHARDED and candidates(run)[1] == run / NAME
    train(run, epochs=4, keep_last=4)
    assert [line["step"] for line in read_log(run)] == list(range(8))
    assert [p.name for p in candidates(run)[:2]] == [NAME_SHARDED, "checkpoint-step000000006.dcp"]
    assert recorded_step(run / "checkpoint-step000000004.pth") == 4


def test_named_checkpoint_needs_no_newest_beside_it(run):
    for path in list(run.glob("checkpoint-step*")):
        shutil.rmtree(path)
    os.rename(run / NAME_SHARDED, run / "best.dcp")
    assert checkpoint.load(run, "best.dcp").run["step"] == 4
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load(run, "other.dcp")


# --- killed -----------------------------------------------------------------------------------------------------------


def test_shards_stay_until_the_file_is_in_their_place(tmp_path, monkeypatch):
    (tmp_path / NAME_SHARDED).mkdir()
    monkeypatch.setattr(os, "replace", fail(OSError(5, "Input/output error")))
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path, {"step": 1})
    assert (tmp_path / NAME_SHARDED).is_dir()


def test_killed_between_the_renamings_then_the_disk_is_full(run, capsys):
    shutil.rmtree(run / STEP_2)
    os.rename(run / NAME_SHARDED, run / NEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_checkpoint._HashedFiles, "create_stream", fail(OSError(28, "No space left on device")))
        train(run, code=2, epochs=3, keep_last=1)
    assert "cannot be written" in (said := capsys.readouterr().err) and "No space left on device" in said
    assert checkpoint.load(run).run["step"] == 4 and find(run) == run / NAME_SHARDED


def test_killed_before_the_first_renaming_keeps_the_one_before(run):
    os.rename(run / NAME_SHARDED, run / NEXT)
    os.rename(run / STEP_2, run / NAME_SHARDED)
    assert find(run) == run / NEXT
    checkpoint_folder.recover(run, keep_last=2, last_step=4)
    assert [p.name for p in candidates(run)] == [NAME_SHARDED, STEP_2]
    assert [recorded_step(p) for p in candidates(run)] == [4, 2]


def test_what_killed_runs_leave_is_removed_and_nothing_else(run):
    before = listing(run)
    (run / "checkpoint-last.tmp").write_text("half a file")
    for name in ("checkpoint-epoch0001.link", "checkpoint-old.dcp", NEXT):
        (run / name).mkdir()
        (run / name / "shard").write_text("half")
    shutil.copy(run / NAME_SHARDED / SETTINGS, run / "checkpoint-old.dcp")
    checkpoint_folder.recover(run, keep_last=2, last_step=4)
    assert listing(run) == before


def test_splitting_touches_no_other_checkpoint(run, tmp_path):
    merge.run([str(run), "--out", str(tmp_path)])
    os.rename(run / NAME_SHARDED, run / NEXT)
    before = listing(run / NEXT)
    merge.run([str(tmp_path), "--split", "--out", str(run)])
    assert listing(run / NEXT) == before and sharded_checkpoint.verify(run / NAME_SHARDED)["run"]["step"] == 4


# --- one of two processes ---------------------------------------------------------------------------------------------


def _unreadable(rank: int, folder, ports: list[int]) -> None:
    """The second process cannot read its rows."""
    call = _trainer(rank, 2, folder, ports)
    if rank == 1:
        HuggingFaceStorageReader.read_data = fail(OSError(5, "Input/output error"))
    call("run", code=2, epochs=3, flip=False, global_batch=16, batch_size=8)
    os._exit(0)


def _unwritable(rank: int, folder, ports: list[int]) -> None:
    """The first process cannot arrange the folder, which it does alone."""
    call = _trainer(rank, 2, folder, ports)
    if rank == 0:
        ShardedCheckpointWriter._arrange = fail(OSError(30, "Read-only file system"))
    call("fresh", code=2, **FSDP)
    os._exit(0)


def test_disk_that_fails_one_process_at_the_start_ends_all(run, capfd):
    run_on(2, _unreadable, run.parent, calls=1)
    said = capfd.readouterr().err
    assert said.count(f"{run / NAME_SHARDED} cannot be read: [Errno 5] Input/output error") == 2
    assert "does not fit" not in said


def test_disk_that_fails_the_first_process_ends_all(tmp_path, capfd):
    run_on(2, _unwritable, tmp_path, calls=1)
    assert "cannot be put in order: [Errno 30] Read-only file system" in capfd.readouterr().err


def test_misfit_is_told_from_a_disk_that_fails(run, monkeypatch):
    path = run / NAME_SHARDED
    about = sharded_checkpoint.verify(path)
    with pytest.raises(UserError, match="does not fit the network: Missing key in checkpoint"):
        sharded_checkpoint.read(path, {"model.other": torch.zeros(1)}, about)
    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", fail(OSError(5, "Input/output error")))
    with pytest.raises(UserError, match=r"cannot be read: .*Input/output error"):
        sharded_checkpoint.read(path, {"model.net.in_context_posemb": torch.zeros(1, 2, 32)}, about)
