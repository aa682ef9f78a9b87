"""The checkpoint files in a run's folder: written so that one that is whole is always there.

    checkpoint-last.pth            the newest
    checkpoint-step000012345.pth   before it, the newest first; --keep_last counts them and the one above
    checkpoint-epoch0040.pth       kept for good, every --keep_every_epochs epochs
    checkpoint-last.tmp            being written; *.link, checkpoint-old.*: being copied, being removed

A file is a zip archive and holds a CRC-32 of each of its records: that is the checksum of ours and of published ones.
Runs in shards write folders of the same names that end in .dcp (util/sharded_checkpoint.py), checkpoint-next.dcp first.
"""

import argparse
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from util import sharded_checkpoint
from util.errors import UserError
from util.sharded_checkpoint import SETTINGS, flush_folder

NAME, NAME_SHARDED = "checkpoint-last.pth", "checkpoint-last.dcp"
NEXT = "checkpoint-next.dcp"
_STEP, _EPOCH = "checkpoint-step{:09d}", "checkpoint-epoch{:04d}"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first; folders where all has been written."""
    found = _by_step(list(filter(_is_checkpoint, (folder / NEXT, folder / NAME, folder / NAME_SHARDED))))
    for kind in ("step", "epoch"):
        found += filter(_is_checkpoint, sorted(folder.glob(f"checkpoint-{kind}*"), reverse=True))
    return found


def _is_checkpoint(path: Path) -> bool:
    return (path / SETTINGS).is_file() if path.suffix == ".dcp" else path.suffix == ".pth" and path.is_file()


def _by_step(paths: list[Path]) -> list[Path]:
    """The highest step first; as they are where one does not say its step."""
    steps = {path: recorded_step(path) for path in paths} if len(paths) > 1 else {}
    return paths if None in steps.values() else sorted(paths, key=lambda path: steps.get(path, 0), reverse=True)


def recorded_step(path: Path) -> int | None:
    """The step that a checkpoint says it is of; None: it says none, or cannot be read. Tensors are not read."""
    try:
        if path.suffix == ".dcp":
            return sharded_checkpoint.settings(path)["run"].get("step")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="meta", weights_only=True, mmap=True)["run"]["step"]
    except Exception:  # of many kinds; who loads it says which
        return None


def find(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in `folder`, or None. A file in the place of the folder is an error."""
    folder = Path(folder)
    if folder.is_file() or folder.suffix in (".pth", ".dcp"):
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
    if path.suffix == ".dcp":
        sharded_checkpoint.verify(path)
        return
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


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file, flush it to the disk and verify it.

    Raises:
        OSError, RuntimeError, UserError: it cannot be written, or holds something else.
    """
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
    verify(path)


def save(folder: str | os.PathLike, content: dict[str, Any], previous_step: int | None = None) -> Path:
    """Write `content` aside, flush it to the disk, verify it, and put it in the place of the newest checkpoint.

    Args:
        previous_step: keep the checkpoint whose place it takes, which is of that step; None: it is not kept.

    Raises:
        UserError: it cannot be written. There is a whole checkpoint still, in its place.
    """
    path = Path(folder) / NAME
    aside = path.with_suffix(".tmp")
    try:
        write(aside, content)
        if previous_step is not None and path.exists():
            _link(path, path.with_name(f"{_STEP.format(previous_step)}.pth"))
        os.replace(aside, path)
        flush_folder(path.parent)
        _retire(path.with_name(NAME_SHARDED), previous_step)
    except (OSError, RuntimeError, UserError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"the checkpoint cannot be written to {path}: {error}") from error
    return path


def put_in_place(folder: Path, previous_step: int | None = None) -> Path:
    """Make NEXT, a folder that is written and verified, the newest checkpoint. Arguments and errors as in `save`.

    Two folders cannot change places at once: between the two renamings NEXT counts as the newest (`candidates`).
    """
    path = folder / NAME_SHARDED
    try:
        flush_folder(folder)  # only what is there for good may take the place of another
        _retire(path, previous_step)
        _retire(folder / NAME, previous_step)
        os.rename(folder / NEXT, path)
        flush_folder(folder)
    except OSError as error:
        raise UserError(f"the checkpoint cannot be put in the place of {path}: {error}") from error
    return path


def _retire(path: Path, step: int | None) -> None:
    """Rename a checkpoint, if it is there, to the one of the step it says, or else of `step`; None: remove it."""
    if not path.exists():
        return
    if step is not None:
        recorded = recorded_step(path)
        step = step if recorded is None else recorded
    aside = path.with_name(f"{_STEP.format(step)}{path.suffix}" if step is not None else f"checkpoint-old{path.suffix}")
    _remove(aside)
    os.rename(path, aside)
    if step is None:
        _remove(aside)


def recover(folder: Path, keep_last: int, last_step: int | None) -> None:
    """Finish what a writer that was killed has left in the folder of a run, before another one writes there.

    Args:
        last_step: the step of the newest checkpoint, which is whole and from which the run goes on; None: none is.

    Raises:
        UserError: the folder cannot be written.
    """
    next_is_whole = _is_checkpoint(folder / NEXT)
    unfinished = [(folder / NAME).with_suffix(".tmp")] + [folder / NEXT] * (not next_is_whole)
    try:
        for path in (*unfinished, *folder.glob("checkpoint-*.link"), *folder.glob("checkpoint-old.*")):
            _remove(path)
    except OSError as error:
        raise UserError(f"{path}, left by a run that was killed, cannot be removed: {error}") from error
    if next_is_whole and last_step is not None and recorded_step(folder / NEXT) == last_step:
        put_in_place(folder, last_step if keep_last > 1 else None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep(folder: Path, epoch: int, newest: str = NAME) -> Path:
    """Keep the newest checkpoint for good, as the one after `epoch` (counted from 0).

    Raises:
        UserError: it cannot be written.
    """
    path = folder / newest
    name = path.with_name(f"{_EPOCH.format(epoch + 1)}{path.suffix}")
    try:
        if path.is_dir():
            aside = name.with_suffix(".link")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for file in path.iterdir():
                _link(file, aside / file.name)
            _remove(name)
            os.rename(aside, name)
        else:
            _link(path, name)
        flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"the checkpoint cannot be kept as {name}: {error}") from error
    return name


def prune(folder: Path, keep_last: int, first_step: int | None = None) -> None:
    """Leave `keep_last` - 1 checkpoints before the newest.

    Args:
        first_step: first remove those of later steps: of a course that was left to go on from `first_step`.

    Raises:
        OSError: one cannot be removed.
    """
    earlier = sorted(folder.glob("checkpoint-step*.*"), key=lambda path: path.stem, reverse=True)
    left = [path for path in earlier if first_step is not None and path.stem > _STEP.format(first_step)]
    kept = [path for path in earlier if path not in left]
    for path in left + kept[keep_last - 1 :]:
        _remove(path)


def _link(path: Path, name: Path) -> None:
    """A second name for a file, or a copy of it where the file system has no hard links."""
    aside = name.with_suffix(".link")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:
        shutil.copyfile(path, aside)
    os.replace(aside, name)
