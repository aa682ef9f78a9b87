"""A checkpoint as a folder that many processes write and read together (torch.distributed.checkpoint, "DCP").

    checkpoint-last.dcp/
        shard-00001-model-00001-of-00005.safetensors    the first process's rows of the weights,
        ...                                             of both averages (2, 3) and of AdamW's moments (4, 5)
        checkpoint.json                                 all that is no tensor; SHA-256 of itself and of the files above

Any number of processes reads what another number has written, and one alone merges it (util/merge.py). Nothing in it
is a pickle: DCP's own format has one, so it is told to write safetensors.

A run that goes on puts another folder in the place of this one at any time. So what reads it names the settings of the
one that was verified, which hold every checksum, and is refused where they are no longer there.

What is in it is named in util/sharded_content.py; here it is tensors with names, and settings ready for JSON.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from util.errors import UserError

SETTINGS = "checkpoint.json"
# Sections of the tensors' names; each but the last has a file of its own on every process.
WEIGHTS = ("model", "model_ema1", "model_ema2")
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"  # of AdamW, one number for each parameter, in the order of its groups
READERS = 8  # files that are read at a time where they are verified


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Write a checkpoint to `path`, flush it to the disk and verify it. What was there is removed first.

    All processes of `group`, a gloo group that nothing else uses meanwhile, call it; None: one process alone.

    Args:
        tensors: in host memory; sharded ones as DTensors on the group's mesh.

    Raises:
        UserError: on all processes, where one cannot write or reads back something else.
    """
    rank = 0 if group is None else dist.get_rank(group)
    files = _HashedFiles()
    sections = {section: i for i, section in enumerate((*WEIGHTS, *MOMENTS), start=1)}
    writer = HuggingFaceStorageWriter(
        str(path), {name: sections.get(name.partition(".")[0], 1) for name in tensors}, save_distributed=True
    )
    writer.fs = files
    problem, sums = None, {}
    try:
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # DCP makes it anew before any process writes
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
        for name, digest in files.digests.items():
            _drop_from_cache(path / name)
            sums[name] = {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)}
            if sums[name]["sha256"] != digest:
                raise OSError(f"{name} is not what was written to it")
    except (Exception, CheckpointException) as error:  # of many kinds; all processes must get to the next line
        problem = _reason(_cause(error))
    everything = [(problem, sums)]
    if group is not None:
        everything = [None] * dist.get_world_size(group)
        dist.all_gather_object(everything, (problem, sums), group=group)
    if problem := next((problem for problem, _ in everything if problem), None):
        raise UserError(f"the checkpoint cannot be written to {path}: {problem}")
    outcome: list[str | None] = [None]
    if rank == 0:
        about = {**about, "files": {name: entry for _, sums in everything for name, entry in sorted(sums.items())}}
        try:
            _write_flushed(path / SETTINGS, json.dumps({**about, "sha256": _digest(about)}, indent=1))
            flush_folder(path)
        except OSError as error:
            outcome = [str(error)]
    if group is not None:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise UserError(f"the checkpoint cannot be written to {path}: {outcome[0]}")


def settings(path: Path) -> dict[str, Any]:
    """All that is no tensor. A folder is whole if this file is there: it is written last.

    Raises:
        UserError: it is not there, or it is something else.
    """
    try:
        about = json.loads((path / SETTINGS).read_text())
        if about.pop("sha256") != _digest(about):
            raise ValueError("its checksum is another one")
        if not isinstance(about["args"], dict) or not isinstance(about["epoch"], int):
            raise ValueError("args must be a dict and epoch a number")
        _ = about["weights"], about["optimizer"], about["run"], {entry["sha256"] for entry in about["files"].values()}
        return about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole checkpoint: {SETTINGS} cannot be read: {error}") from error


def verify(path: Path) -> dict[str, Any]:
    """Read all files and compare them with their checksums. Returns the settings, which say what was verified.

    Raises:
        UserError: the folder is not what was written, or cannot be read.
    """
    about = settings(path)
    files = about["files"]
    with _unchanged(path, about):
        there = {file.name for file in path.glob("*.safetensors")}
        if there != set(files):
            raise UserError(f"{path} is damaged: {sorted(there ^ set(files))[0]} is missing, or too much")
        try:
            with ThreadPoolExecutor(READERS) as pool:
                sums = dict(zip(files, pool.map(lambda name: _sha256(path / name), files), strict=True))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if damaged := [name for name in files if sums[name] != files[name]["sha256"]]:
            raise UserError(f"{path} is damaged: the checksum of {damaged[0]} is another one")
    return about


def read(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Fill `tensors`, by name, with those of a checkpoint. Of a DTensor this process's rows are read, by it alone.

    Args:
        about: the settings of the checkpoint that was verified.

    Raises:
        UserError: another checkpoint in its place, a tensor that is not there or has another shape, a disk's error.
    """
    with _unchanged(path, about):
        try:
            with _quiet():
                dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
        except (Exception, CheckpointException) as error:
            cause = _cause(error)
            what = "cannot be read" if isinstance(cause, OSError) else "does not fit the network"
            raise UserError(f"{path} {what}: {_reason(cause)}") from error


@contextmanager
def _unchanged(path: Path, about: dict[str, Any]) -> Iterator[None]:
    """Refuse what is done within, and its errors, where the folder at `path` is no longer the one of `about`."""
    try:
        yield
    finally:
        try:
            now = settings(path)
        except UserError:
            now = None
        if now != about:
            raise UserError(
                f"{path} was replaced while it was read: a run goes on in that folder. Try again, or name a checkpoint "
                "that stays with --checkpoint"
            )


def _cause(error: BaseException) -> BaseException:
    """What is inside of DCP's own error, which is no Exception: what went wrong on the first process that failed."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def empty_like(path: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of the shapes and types in a checkpoint, on the meta device.

    Raises:
        UserError: files that cannot be read, another checkpoint in its place.
    """
    with _unchanged(path, about):
        try:
            found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        except Exception as error:  # whatever a damaged or foreign file raises, it is refused
            raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error
    return {name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in found.items()}


class _HashedFiles(FileSystem):
    """Files, with the SHA-256 of what is written to each (name -> hexadecimal)."""

    def __init__(self):
        super().__init__()
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            digest, write = hashlib.sha256(), stream.write

            class Hashed:
                def __getattr__(self, name: str):
                    return getattr(stream, name)

                def write(self, data) -> int:
                    digest.update(data)
                    return write(data)

            yield Hashed()
            self.digests[Path(path).name] = digest.hexdigest()


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_from_cache(path: Path) -> None:
    """So that the disk is read, not the cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that a single process reads or writes, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
