"""What several ranks do together in test_sharded.py; a module of its own, since each of them imports it."""

import os
import sys
from contextlib import nullcontext
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from util.checkpoint import files, sharded
from util.checkpoint.published import copy_into, whole
from util.checkpoint.writer import CheckpointWriter
from util.dist.context import DistContext
from util.errors import UserError

SOME = {
    "a": torch.arange(15.0).view(5, 3),  # rows that divide by neither 2 nor 3
    "b": torch.arange(7.0),
    "c": torch.arange(12.0).view(1, 12),  # one rank has it, the others nothing
    "d": torch.arange(8).view(4, 2).to(torch.bfloat16),
    "nan": torch.tensor([[float("nan"), 1.0], [2.0, 3.0], [4.0, 5.0]]),
}
WHOLE = {"buffer": torch.ones(3, 3)}  # the same on all ranks
RANKS = 3


def content(mesh, step):
    """The content of a checkpoint, of which each rank of `mesh` has its rows; sections differ by their number."""
    parts = {k: distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None) for k, v in SOME.items()}
    sections = {key: {k: v + i for k, v in (parts | WHOLE).items()} for i, key in enumerate(sharded.WEIGHTS)}
    state = {
        k: {"step": torch.tensor(3.0 + i), "exp_avg": v, "exp_avg_sq": v + 1} for i, (k, v) in enumerate(parts.items())
    }
    groups = [
        {"params": ["b", "a"], "betas": (0.9, 0.95), "lr": 0.1},
        {"params": ["c", "d", "nan"], "betas": (0.9, 0.95)},
    ]
    run, args = {"step": step}, sharded.Namespace(img_size=16)
    return {**sections, "optimizer": {"state": state, "param_groups": groups}, "epoch": 1, "args": args, "run": run}


def same(a, b):
    a, b = (t.full_tensor() if isinstance(t, DTensor) else t for t in (a, b))
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) and a.dtype == b.dtype


def check(path, mesh):
    """Compare all of a checkpoint with what was written: read by this rank's rows, and whole."""
    loaded = sharded.load(path)
    for i, key in enumerate(sharded.WEIGHTS):
        targets = {k: torch.zeros_like(v) for k, v in content(mesh, 0)[key].items()}
        copy_into(targets, loaded[key])
        for name, value in (SOME | WHOLE).items():
            assert same(targets[name], value + i), (path, key, name)
            assert same(whole(loaded[key])[name], value + i), (path, key, name)
    optimizer = loaded["optimizer"]
    assert [g["params"] for g in optimizer["param_groups"]] == [[0, 1], [2, 3, 4]]
    assert optimizer["param_groups"][0] == {"params": [0, 1], "betas": (0.9, 0.95), "lr": 0.1}
    assert [float(optimizer["step"][slot]) for slot in range(5)] == [4.0, 3.0, 5.0, 6.0, 7.0]
    for slot, name in enumerate(["b", "a", "c", "d", "nan"]):
        assert same(whole(optimizer["exp_avg"])[slot], SOME[name])
        assert same(whole(optimizer["exp_avg_sq"])[slot], SOME[name] + 1)


def work(rank, folder, ports):
    """Write as 1, 2 and 3 ranks, and read it all as 2 and 3; then one rank's disk fails."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", ports[0], RANKS), rank=rank, world_size=RANKS)
    groups = {n: dist.new_group(list(range(n)), backend="gloo") for n in (1, 2, 3)}
    meshes = {n: DeviceMesh.from_group(group, "cpu") for n, group in groups.items() if rank < n}
    for n, mesh in meshes.items():
        sharded.write(folder / f"{n}.dcp", content(mesh, 4), groups[n])
    dist.barrier()
    for n, mesh in meshes.items():
        for path in folder.glob("[123].dcp") if n > 1 else ():
            check(path, mesh)
    dist.barrier()
    write_together(rank, folder / "run", meshes[RANKS])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def write_together(rank, folder, mesh):
    if rank == 0:
        folder.mkdir()
    writer = CheckpointWriter(folder, 2, None, 0, DistContext(rank, RANKS), sharded=True)
    writer.save(content(mesh, 1), 1)
    writer.wait()
    full, read_only = OSError(28, "No space left on device"), OSError(30, "Read-only file system")
    with patch.object(HuggingFaceStorageWriter, "write_data", Mock(side_effect=full)) if rank == 1 else nullcontext():
        writer.save(content(mesh, 2), 2)
        with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
            writer.wait()
    assert files.recorded_step(folder / files.NAME_SHARDED) == 1
    with patch.object(files, "put_in_place", Mock(side_effect=read_only)):
        writer.save(content(mesh, 3), 3)
        with pytest.raises(UserError, match="Read-only file system"):
            writer.wait()
    writer.save(content(mesh, 4), 4, keep_as_epoch=0)
    writer.close()
    writer.wait()
    assert [written.step for written in writer.finished()] == [1, 4]
    check(folder / files.NAME_SHARDED, mesh)
