"""The checkpoint files in a run's folder: written so that one that is whole is always there.

    checkpoint-last.pth            the newest
    checkpoint-step000012345.pth   before it, the newest first; --keep_last counts them and the one above
    checkpoint-epoch0040.pth       kept for good, every --keep_every_epochs epochs
    checkpoint-last.tmp            being written

A file is a zip archive and holds a CRC-32 of each of its records: that is the checksum of ours and of published ones.
"""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from util.errors import UserError

NAME = "checkpoint-last.pth"
_STEP, _EPOCH = "checkpoint-step{:09d}.pth", "checkpoint-epoch{:04d}.pth"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = [sorted(folder.glob(f"checkpoint-{kind}*.pth"), reverse=True) for kind in ("step", "epoch")]
    last = folder / NAME
    return [last] * last.is_file() + found[0] + found[1]


def find(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in `folder`, or None. A file in the place of the folder is an error."""
    folder = Path(folder)
    if folder.is_file() or folder.suffix == ".pth":
        raise UserError(
            f"{folder} is a file name: name the folder that holds it instead, {folder.parent}, and, if it is not the "
            f"newest, --checkpoint {folder.name} (to evaluate or sample)"
        )
    return next(iter(candidates(folder)), None)


def verify(path: Path) -> None:
    """Read a whole file and compare it with its checksums. torch's old format, which is no zip archive, has none.

    Raises:
        UserError: the file is not what was written.
    """
    with open(path, "rb") as file:
        if file.read(1) == b"\x80":  # a pickle, with which torch's old format starts
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of many kinds, and each means the same
        raise UserError(f"{path} is truncated or not a checkpoint: {error}") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of its record {damaged} is another one")


def save(folder: str | os.PathLike, content: dict[str, Any], previous_step: int | None = None) -> Path:
    """Write `content` aside, flush it to the disk, verify it, and put it in the place of the newest checkpoint.

    Args:
        previous_step: keep the checkpoint whose place it takes, which is of that step; None: it is not kept.

    Raises:
        UserError: it cannot be written. The previous checkpoint is then still in its place.
    """
    path = Path(folder) / NAME
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
        verify(aside)
        if previous_step is not None and path.exists():
            _link(path, path.with_name(_STEP.format(previous_step)))
        os.replace(aside, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError, UserError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"the checkpoint cannot be written to {path}: {error}") from error
    return path


def keep(folder: Path, epoch: int) -> Path:
    """Keep the newest checkpoint for good, as the one after `epoch` (counted from 0).

    Raises:
        UserError: it cannot be written.
    """
    path = folder / _EPOCH.format(epoch + 1)
    try:
        _link(folder / NAME, path)
        _flush_folder(folder)
    except OSError as error:
        raise UserError(f"the checkpoint cannot be kept as {path}: {error}") from error
    return path


def prune(folder: Path, keep_last: int, step: int) -> None:
    """Leave `keep_last` - 1 checkpoints before the newest, which is of `step`."""
    earlier = sorted(folder.glob("checkpoint-step*.pth"), reverse=True)
    past = [path for path in earlier if path.name < _STEP.format(step)]
    for path in set(earlier) - set(past[: keep_last - 1]):
        path.unlink(missing_ok=True)


def _link(path: Path, name: Path) -> None:
    """A second name for a file, or a copy of it where the file system has no hard links."""
    aside = name.with_suffix(".link")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:
        shutil.copyfile(path, aside)
    os.replace(aside, name)


def _flush_folder(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
