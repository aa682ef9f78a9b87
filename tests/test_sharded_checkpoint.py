"""Checkpoints in shards: any number of processes, one file and back, damage, hostile files, interrupted writing."""

import argparse
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import main_jit
from tests.conftest import Payload, differences, flags, listing, raw, read_log, run_on, state_differences, train
from tests.test_checkpoint import plain_adamw, published, write
from util import checkpoint, checkpoint_folder, merge, sharded_checkpoint, sharded_content, sharded_state
from util.checkpoint_folder import NAME, NAME_SHARDED, NEXT
from util.errors import UserError
from util.export import export, load_denoiser
from util.sharded_checkpoint import SETTINGS

pytestmark = pytest.mark.usefixtures("tiny")

FSDP = {"parallel": "fsdp"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in shards of two epochs, with a checkpoint after each. Read it, do not write to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return train(folder, save_last_freq=1, keep_every_epochs=1, **FSDP)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def files(path):
    return sorted(path.glob("*.safetensors"))


def flip_a_bit(path, where: float = 0.9) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


# --- tensors of any shape over any number of processes ---------------------------------------------------------------

SOME = {
    "model.a": torch.arange(15.0).view(5, 3),  # rows that no number of processes but 1 and 5 divides
    "model.b": torch.arange(7.0),
    "model.c": torch.arange(12.0).view(1, 12),  # one process has it, the others nothing
    "model.d": torch.arange(8).view(4, 2).to(torch.bfloat16),
    "exp_avg.a": -torch.arange(15.0).view(5, 3),
    "model.whole": torch.ones(3, 3),
    "step": torch.tensor([3.0, 4.0]),
}
ABOUT = {"epoch": 1, "args": {}, "run": {}, "weights": ["a", "b", "c", "d", "whole"], "optimizer": None}


def _write_and_read(rank: int, folder, ports: list[int]) -> None:
    """Write as many processes, and read what fewer and more of them wrote."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    ranks = int((folder / "ranks").read_text())
    store = dist.TCPStore("127.0.0.1", ports[0], ranks, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = dist.new_group(backend="gloo")
    mesh = DeviceMesh.from_group(group, "cpu")
    tensors = {
        name: value
        if name in ("model.whole", "step")
        else distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
        for name, value in SOME.items()
    }
    sharded_checkpoint.write(folder / f"{ranks}.dcp", tensors, ABOUT, group)
    for path in folder.glob("*.dcp"):
        empty = {name: torch.zeros_like(value) for name, value in tensors.items()}
        sharded_checkpoint.read(path, empty, sharded_checkpoint.verify(path))
        for name, value in empty.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            assert torch.equal(whole, SOME[name]), (path, name)
    dist.destroy_process_group()


def test_any_number_of_processes_reads_what_another_wrote(tmp_path):
    sharded_checkpoint.write(tmp_path / "alone.dcp", SOME, ABOUT, None)
    for ranks in (2, 3):
        (tmp_path / "ranks").write_text(str(ranks))
        run_on(ranks, _write_and_read, tmp_path, calls=1)
    for path in tmp_path.glob("*.dcp"):
        merged = sharded_content.merged(path, sharded_checkpoint.verify(path))["model"]
        assert differences(merged, {n: SOME[f"model.{n}"] for n in ABOUT["weights"]}) == []
    assert len(files(tmp_path / "3.dcp")) == 6


# --- one file and back -----------------------------------------------------------------------------------------------


def test_merged_file_is_the_published_form(run):
    assert merge.run([str(run)]) == str(run / "merged" / NAME)
    content = raw(run / "merged")
    assert set(content) == {"model", "model_ema1", "model_ema2", "optimizer", "epoch", "args", "run"}
    assert type(content["args"]) is argparse.Namespace and content["args"].parallel == "fsdp"
    denoiser = published()[1]
    assert list(content["model"]) == list(content["model_ema1"]) == list(denoiser.state_dict())
    plain_adamw(denoiser).load_state_dict(content["optimizer"])  # torch's own, as published code has it
    assert content["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)


def test_both_directions_are_exact(run, tmp_path):
    merged = run / "merged"
    merge.run([str(run)])
    assert merge.run([str(merged), "--split"]) == str(merged / "split" / NAME_SHARDED)
    merge.run([str(merged / "split"), "--out", str(tmp_path / "again")])
    assert differences(vars(raw(merged)["args"]), vars(raw(tmp_path / "again")["args"])) == []
    assert differences(*({k: v for k, v in raw(f).items() if k != "args"} for f in (merged, tmp_path / "again"))) == []


@pytest.mark.parametrize("linear", [False, True])
def test_published_checkpoint_becomes_shards_that_train(tmp_path, linear):
    folder = tmp_path / "published"
    folder.mkdir()
    write(folder, published(linear=linear)[0])
    merge.run([str(folder), "--split", "--out", str(tmp_path / "shards")])
    expected, saved = published()[0], checkpoint.load(tmp_path / "shards")
    assert differences(dict(saved.weights["model_ema2"]), expected["model_ema2"]) == []
    assert differences(saved.optimizer["state"], expected["optimizer"]["state"]) == []
    assert saved.args["disable_dct_patchify"] is (not linear) and saved.epoch == 3
    logs = []
    for where, start in (("a", folder), ("b", tmp_path / "shards")):
        changes = {"resume": start, "epochs": 5, "dataset": "digits", "global_batch": 16}
        logs.append(read_log(train(tmp_path / where, **FSDP, **changes)))
    assert logs[0] == logs[1] and len(logs[0]) == 2


def test_merging_refuses(run, capsys):
    assert merge.main([str(run), "--split"]) == 2 and "not there" in capsys.readouterr().err
    merge.run([str(run)])
    before = listing(run)
    assert merge.main([str(run)]) == 2 and "there already" in capsys.readouterr().err
    split = [str(run / "merged"), "--split", "--out", str(run)]
    assert merge.main(split) == 2 and "there already" in capsys.readouterr().err
    assert listing(run) == before
    (run / "merged" / NAME).unlink()
    flip_a_bit(files(run / NAME_SHARDED)[0])
    assert merge.main([str(run)]) == 2 and "checksum" in capsys.readouterr().err
    assert listing(run / "merged") == {}


# --- what else reads them --------------------------------------------------------------------------------------------


def test_sampling_and_export_read_shards(run, tmp_path):
    for kind in ("shards", "file"):
        if kind == "file":
            run = Path(merge.run([str(run)])).parent
        out = tmp_path / kind
        argv = flags(resume=run, sample=True, labels="0-2", num_per_class=1, output_dir=out, device="cpu", cfg=1.5)
        assert main_jit.main(argv) == 0
        export(run, tmp_path / f"{kind}.safetensors")
    images = [sorted((tmp_path / kind).rglob("0*.png")) for kind in ("shards", "file")]
    assert len(images[0]) == 3 and [p.read_bytes() for p in images[0]] == [p.read_bytes() for p in images[1]]
    states = [dict(load_denoiser(tmp_path / f"{kind}.safetensors")[0].state_dict()) for kind in ("shards", "file")]
    assert differences(*states) == []


def test_new_run_starts_from_the_weights_of_shards(run, tmp_path):
    """In shards, and in one copy, which reads what is merged."""
    logs = []
    for parallel in ("fsdp", "ddp"):
        logs.append(read_log(train(tmp_path / parallel, init_from=run, init_weights="ema2", parallel=parallel)))
    assert logs[0] == logs[1] and logs[0][0]["step"] == 0
    assert logs[0][0]["loss"] != read_log(run)[0]["loss"]


def test_weights_are_read_where_they_are_asked_for(run, monkeypatch):
    asked, real = [], sharded_content.read
    monkeypatch.setattr(
        sharded_content, "read", lambda path, t, about: asked.append(next(iter(t))) or real(path, t, about)
    )
    saved = checkpoint.load(run)
    assert asked == []
    saved.weights["model_ema1"]
    assert len(asked) == 1 and asked[0].startswith("model_ema1.")


# --- the folder of a run ---------------------------------------------------------------------------------------------


def test_previous_and_kept_checkpoints(finished):
    names = sorted(p.name for p in finished.glob("checkpoint*"))
    assert names == [
        "checkpoint-epoch0001.dcp",
        "checkpoint-epoch0002.dcp",
        NAME_SHARDED,
        "checkpoint-step000000002.dcp",
    ]
    assert [p.name for p in checkpoint_folder.candidates(finished)] == [
        *(NAME_SHARDED, "checkpoint-step000000002.dcp", "checkpoint-epoch0002.dcp", "checkpoint-epoch0001.dcp")
    ]
    last, kept = (files(finished / name)[0].stat() for name in (NAME_SHARDED, "checkpoint-epoch0002.dcp"))
    assert last.st_ino == kept.st_ino  # no second copy
    for name, epoch in (("checkpoint-epoch0001.dcp", 0), ("checkpoint-step000000002.dcp", 0), (NAME_SHARDED, 1)):
        assert checkpoint.load(finished, name).epoch == epoch
    assert all(line["bytes"] > 20 * 96_000 for line in read_log(finished, "save"))


def test_the_other_kind_is_put_aside(run):
    """A run in shards goes on with copies, and back; there is always one newest, and one before it."""
    train(run, epochs=3, parallel="ddp")
    assert not (run / NAME_SHARDED).exists() and (run / "checkpoint-step000000004.dcp").is_dir()
    assert [p.name for p in checkpoint_folder.candidates(run)][:2] == [NAME, "checkpoint-step000000004.dcp"]
    train(run, epochs=4, parallel="fsdp")
    assert [p.name for p in checkpoint_folder.candidates(run)][:2] == [NAME_SHARDED, "checkpoint-step000000006.pth"]
    assert len(list(run.glob("checkpoint-step*"))) == 1
    assert [line["step"] for line in read_log(run)] == list(range(8))


@pytest.mark.parametrize(
    "damage", ["bit", "header", "cut", "missing", "number", "settings", "no settings", "empty settings"]
)
def test_damaged_newest_is_passed_over(run, damage, capsys):
    newest = run / NAME_SHARDED
    file = files(newest)[2]
    if damage in ("bit", "header"):
        flip_a_bit(file, 0.9 if damage == "bit" else 0.001)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "number":
        text = (newest / SETTINGS).read_text()
        assert text.count('"step": 4') == 1
        (newest / SETTINGS).write_text(text.replace('"step": 4', '"step": 5'))
    elif damage == "no settings":
        (newest / SETTINGS).unlink()
    else:
        (newest / SETTINGS).write_text("" if damage == "empty settings" else json.dumps({"epoch": 1}))
    saved = checkpoint.load(run)
    assert saved.path.name == "checkpoint-step000000002.dcp" and saved.run["step"] == 2
    assert damage == "no settings" or (str(newest) in saved.notes[0] and "step 2 instead" in saved.notes[0])
    train(run, epochs=3)
    assert [line["step"] for line in read_log(run)] == list(range(6))
    sharded_checkpoint.verify(run / NAME_SHARDED)


def test_nothing_whole_is_refused(run):
    for path in run.glob("*.dcp"):
        flip_a_bit(files(path)[0])
    with pytest.raises(UserError, match=f"{NAME_SHARDED} is damaged: the checksum of shard-00001-model-00001"):
        checkpoint.load(run)


def test_nothing_in_a_folder_is_executed(run, tmp_path):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Payload(marker))
    newest = run / NAME_SHARDED
    (newest / ".metadata").write_bytes(bomb)  # DCP's own format would unpickle it
    (newest / "__0_0.distcp").write_bytes(bomb)
    assert checkpoint.load(run).path == newest
    dict(checkpoint.load(run).weights["model"])
    for name in (SETTINGS, files(newest)[0].name, "shard-00009-model-00001-of-00005.safetensors"):
        copy = shutil.copytree(newest, tmp_path / name / NAME_SHARDED)
        (copy / name).write_bytes(bomb)
        with pytest.raises(UserError):
            checkpoint.load(copy.parent)
        if name != SETTINGS:  # one whose checksums are right
            about = json.loads((copy / SETTINGS).read_text())
            about["files"][name] = {"bytes": len(bomb), "sha256": sharded_checkpoint._sha256(copy / name)}
            del about["sha256"]
            (copy / SETTINGS).write_text(json.dumps({**about, "sha256": sharded_checkpoint._digest(about)}))
            with pytest.raises(UserError, match="cannot be read"):
                checkpoint.load(copy.parent)
    assert not marker.exists()


def test_interrupted_writing(run, monkeypatch):
    """Killed while it is written, between the two renamings, and while the one before it is removed."""
    train(run, epochs=3)
    last = checkpoint.load(run)
    shutil.copytree(last.path, run / NEXT)
    (run / NEXT / SETTINGS).unlink()  # it is written last
    assert checkpoint.load(run).path.name == NAME_SHARDED
    shutil.rmtree(run / NEXT)
    (run / NAME_SHARDED).rename(run / NEXT)
    assert checkpoint.find(run) == run / NEXT and checkpoint.load(run).run["step"] == 6
    train(run, epochs=4)
    assert [line["step"] for line in read_log(run)] == list(range(8)) and not (run / NEXT).exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(run, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = listing(run / NAME_SHARDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_checkpoint.dcp, "save", full)
        train(run, code=2, epochs=3)
    assert "cannot be written" in capsys.readouterr().err and listing(run / NAME_SHARDED) == before
    with pytest.MonkeyPatch.context() as patch:
        real = sharded_checkpoint._sha256
        patch.setattr(sharded_checkpoint, "_sha256", lambda path: "0" if path.parent.name == NEXT else real(path))
        train(run, code=2, epochs=3)
    assert "is not what was written" in capsys.readouterr().err and listing(run / NAME_SHARDED) == before


def test_written_checkpoint_is_of_the_step_it_was_asked_for_at(tmp_path, monkeypatch):
    """Training goes on while the thread writes; what it writes is the copy."""
    import threading

    step, real = threading.Event(), sharded_checkpoint.write
    monkeypatch.setattr(sharded_checkpoint, "write", lambda *args: step.wait(20) and real(*args))
    writer = sharded_state.ShardedCheckpointWriter
    monkeypatch.setattr(writer, "wait", lambda self, wait=writer.wait: step.set() or wait(self))
    delayed = train(tmp_path / "delayed", epochs=3, save_last_freq=2, keep_last=3, **FSDP)
    whole = train(tmp_path / "whole", epochs=2, **FSDP)
    for folder, name in ((delayed, "checkpoint-step000000004.dcp"), (whole, NAME_SHARDED)):
        merge.run([str(folder), "--checkpoint", name])
    (delayed / "merged" / "checkpoint-step000000004.pth").rename(delayed / "merged" / NAME)
    assert state_differences(delayed / "merged", whole / "merged") == []
