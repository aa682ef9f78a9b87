"""Sharded checkpoints: any number of ranks, damage, hostile files, replaced while read, the folder of a run."""

import json
import pickle
import shutil
import threading
from unittest.mock import Mock

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from tests.conftest import ONE, Payload, differences, run_on
from tests.util.checkpoint import ranks
from tests.util.checkpoint.helpers import KEYS, build, content_of, published, steps, training, write
from util.checkpoint import files, sharded
from util.checkpoint.files import NAME, NAME_SHARDED, NEXT_SHARDED, candidates, find, recorded_step, recover
from util.checkpoint.published import load, load_weights, whole
from util.checkpoint.sharded import SETTINGS
from util.checkpoint.train_state import load_train_state
from util.checkpoint.writer import CheckpointWriter
from util.dist.context import process_group
from util.dist.parallel import build_sharded, init_sharded, local_shard
from util.errors import UserError
from util.io import json_hash, sha256_file
from util.optim import EMA, build_optimizer

STEP_2, STEP_4 = (f"checkpoint-step{step:09d}.dcp" for step in (2, 4))


def test_any_number_of_ranks_reads_what_another_wrote_and_one_that_fails_is_an_error_on_all(tmp_path):
    run_on(ranks.RANKS, ranks.work, tmp_path, calls=1)
    assert len(list((tmp_path / "3.dcp").glob("*.safetensors"))) == 15
    assert [path.name for path in candidates(tmp_path / "run")] == [
        *(NAME_SHARDED, "checkpoint-step000000001.dcp", "checkpoint-epoch0001.dcp")
    ]


@pytest.fixture(scope="module")
def group(tiny):
    with process_group(ONE, single_process=True):
        yield


def shards(seed=0):
    """A sharded denoiser, its optimizer and EMAs."""
    denoiser = build_sharded(lambda: build(seed), ONE)
    init_sharded(denoiser, lambda: build(seed), ONE)
    return denoiser, build_optimizer(denoiser, 0.1, (0.9, 0.95)), (EMA(denoiser, 0.9), EMA(denoiser, 0.5))


def writer(folder, keep_last=2, last_step=None, parallel="fsdp"):
    return CheckpointWriter(folder, keep_last, last_step, last_step or 0, ONE, sharded=parallel == "fsdp")


@pytest.fixture(scope="module")
def finished(group, tmp_path_factory):
    """The folder of a sharded run with the checkpoints of steps 2 and 4. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("finished")
    saving, (denoiser, optimizer, emas) = writer(folder), shards()
    for step in (1, 2, 3, 4):
        steps(denoiser, optimizer, 1, step)
        for ema in emas:
            ema.update()
        if step % 2 == 0:
            saving.save(content_of(denoiser, optimizer, emas, step), step, keep_as_epoch=step // 2 - 1)
    saving.close()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def shard_files(path):
    return sorted(path.glob("*.safetensors"))


def go_back(run):
    """Let another checkpoint take the place of the newest, as when a run continues in that folder."""
    shutil.rmtree(run / NAME_SHARDED)
    (run / STEP_2).rename(run / NAME_SHARDED)


def comparable(content):
    """All that training changes, unsharded; the optimizer's state in the order of its slots."""
    states = [*(content[key] for key in KEYS), *content["optimizer"]["state"].values()]
    return [
        {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
        for state in states
    ]


# --- a run with shards, without, and from published files -------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [("fsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")])
def test_a_run_continues_to_the_bit_with_shards_and_without(group, tmp_path, one, other):
    saving, state = writer(tmp_path, parallel=one), shards() if one == "fsdp" else training()
    steps(*state[:2], 2)
    saving.save(content_of(*state), 70)
    saving.close()
    resumed = shards(seed=1) if other == "fsdp" else training()
    load_train_state(load(tmp_path), *resumed)
    for denoiser, optimizer, emas in (state, resumed):
        steps(denoiser, optimizer, 1, seed=5)
        emas[0].update()
    assert differences(comparable(content_of(*state)), comparable(content_of(*resumed))) == []


@pytest.mark.parametrize("linear", [False, True])
def test_a_published_checkpoint_starts_a_sharded_run(group, tmp_path, linear):
    (expected, denoiser, _), state = published(), shards(seed=1)
    load_train_state(load(write(tmp_path, published(linear)[0])), *state)
    for key in KEYS:  # the buffer is the network's
        expected[key]["net.pos_embed"] = denoiser.net.pos_embed
    assert differences(comparable(content_of(*state)), comparable(expected)) == []


def test_what_is_written_is_the_copy(group, tmp_path, monkeypatch):
    going, real = threading.Event(), sharded.write
    monkeypatch.setattr(sharded, "write", lambda *args: going.wait(20) and real(*args))
    saving, state = writer(tmp_path), shards()
    steps(*state[:2], 1)
    saving.save(content_of(*state), 70)
    expected = {name: local_shard(value).clone() for name, value in state[0].state_dict().items()}
    steps(*state[:2], 1)
    going.set()
    saving.close()
    assert differences(whole(load(tmp_path).weights["model"]), expected) == []


def test_a_misfit_is_told_from_a_disk_that_fails(run, monkeypatch):
    checkpoint = load(run)
    with pytest.raises(UserError, match=r"does not fit the network: .* is missing"):
        load_weights(build(model="JiT-Demo/8"), checkpoint.weights["model"], checkpoint.path)
    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(UserError, match=r"cannot be read: .*Input/output error"):
        load_weights(build(), checkpoint.weights["model"], checkpoint.path)


# --- damage -----------------------------------------------------------------------------------------------------------


DAMAGE = {  # -> a function of the bytes of a shard and of the settings
    "bit": lambda shard, about: (shard[:-9] + bytes([shard[-9] ^ 1]) + shard[-8:], about),
    "cut": lambda shard, about: (shard[:-1], about),
    "missing": lambda shard, about: (None, about),
    "number": lambda shard, about: (shard, about.replace(b'"step": 4', b'"step": 5')),
    "settings": lambda shard, about: (shard, b'{"epoch": 1}'),
    "empty settings": lambda shard, about: (shard, b""),
    "no settings": lambda shard, about: (shard, None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_passed_over(run, damage):
    newest = run / NAME_SHARDED
    damaged = [shard_files(newest)[2], newest / SETTINGS]
    intact = [path.read_bytes() for path in damaged]
    contents = DAMAGE[damage](*intact)
    assert list(contents) != intact
    for path, content in zip(damaged, contents, strict=True):
        path.unlink() if content is None else path.write_bytes(content)
    checkpoint = load(run)
    assert checkpoint.path.name == STEP_2 and checkpoint.run["step"] == 2
    assert damage == "no settings" or (str(newest) in checkpoint.notes[0] and "step 2 instead" in checkpoint.notes[0])


def test_nothing_in_a_folder_is_executed(run, tmp_path):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Payload(marker))
    newest = run / NAME_SHARDED
    (newest / ".metadata").write_bytes(bomb)  # DCP's own format would unpickle it
    (newest / "__0_0.distcp").write_bytes(bomb)
    checkpoint = load(run)
    assert checkpoint.path == newest and whole(checkpoint.weights["model"])
    for name in (SETTINGS, shard_files(newest)[0].name, "shard-00009-model-00001-of-00005.safetensors"):
        copy = shutil.copytree(newest, tmp_path / name / NAME_SHARDED)
        (copy / name).write_bytes(bomb)
        with pytest.raises(UserError):
            load(copy.parent)
        if name != SETTINGS:  # one whose checksums are right
            about = json.loads((copy / SETTINGS).read_text())
            about["files"][name] = {"bytes": len(bomb), "sha256": sha256_file(copy / name)}
            del about["sha256"]
            (copy / SETTINGS).write_text(json.dumps({**about, "sha256": json_hash(about, 64)}))
            with pytest.raises(UserError, match="cannot be read"):
                load(copy.parent)
    assert not marker.exists()


# --- replaced while it is read ----------------------------------------------------------------------------------------


def test_weights_of_two_checkpoints_are_never_mixed(run):
    checkpoint = load(run)
    whole(checkpoint.weights["model"])
    go_back(run)
    for state in (checkpoint.weights["model_ema1"], checkpoint.optimizer["exp_avg"]):
        with pytest.raises(UserError, match="was replaced while it was read"):
            whole(state)
    shutil.rmtree(run / NAME_SHARDED)
    with pytest.raises(UserError, match="was replaced while it was read"):  # and not "cannot be read"
        whole(checkpoint.weights["model"])


def test_one_that_is_replaced_while_it_is_verified_is_not_called_damaged(run, monkeypatch):
    def hash_of_another(path):
        if (run / STEP_2).exists():
            go_back(run)
        return sha256_file(path)

    monkeypatch.setattr(sharded, "sha256_file", hash_of_another)
    with pytest.raises(UserError, match="was replaced while it was read"):
        sharded.load(run / NAME_SHARDED)


# --- the folder of a run ----------------------------------------------------------------------------------------------


def test_earlier_and_kept_checkpoints(finished):
    names = [NAME_SHARDED, STEP_2, "checkpoint-epoch0002.dcp", "checkpoint-epoch0001.dcp"]
    assert [path.name for path in candidates(finished)] == names
    last, kept = (shard_files(finished / name)[0].stat() for name in (NAME_SHARDED, "checkpoint-epoch0002.dcp"))
    assert last.st_ino == kept.st_ino  # no second copy
    assert [load(finished, name).run["step"] for name in names] == [4, 2, 4, 2]


def test_the_other_kind_is_set_aside(group, run):
    """A run continues without shards, and with them again: there is always one newest, and one before it."""
    saving, state = writer(run, last_step=4, parallel="ddp"), training()
    saving.save(content_of(*state, step=6), 6)
    saving.close()
    assert [path.name for path in candidates(run)][:2] == [NAME, STEP_4] and not (run / NAME_SHARDED).exists()
    saving, state = writer(run, last_step=6), shards()
    steps(*state[:2], 1)
    saving.save(content_of(*state, step=8), 8)
    saving.close()
    assert [path.name for path in candidates(run)][:2] == [NAME_SHARDED, "checkpoint-step000000006.pth"]
    assert len(list(run.glob("checkpoint-step*"))) == 1


def test_an_older_file_does_not_hide_newer_shards(run):
    torch.save({"run": {"step": 2}}, run / NAME)
    assert find(run) == run / NAME_SHARDED and [recorded_step(path) for path in candidates(run)[:3]] == [4, 2, 2]


def test_killed_while_it_was_written_or_between_the_renames(run):
    shutil.copytree(run / NAME_SHARDED, run / NEXT_SHARDED)
    (run / NEXT_SHARDED / SETTINGS).unlink()  # it is written last
    assert find(run) == run / NAME_SHARDED
    files.recover(run, last_step=4)
    assert not (run / NEXT_SHARDED).exists()
    (run / NAME_SHARDED).rename(run / NEXT_SHARDED)
    (run / STEP_2).rename(run / NAME_SHARDED)
    assert find(run) == run / NEXT_SHARDED and load(run).run["step"] == 4
    recover(run, last_step=4)
    assert [path.name for path in candidates(run)[:2]] == [NAME_SHARDED, STEP_2]
    assert [recorded_step(path) for path in candidates(run)[:2]] == [4, 2]
