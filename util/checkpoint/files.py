"""The checkpoint files in a run's folder, written so that an intact one is always there.

    checkpoint-last.pth            the newest; checkpoint-next.pth until the one before has made room for it
    checkpoint-step000012345.pth   earlier ones; --keep_last counts them and the newest
    checkpoint-epoch0040.pth       kept for good, every --keep_every_epochs epochs

A file is a zip archive with a CRC-32 of each record: the checksum of ours and of published ones. Sharded runs write
folders of the same names that end in .dcp (sharded.py).
"""

import argparse
import os
import shutil
import zipfile
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch

from util.checkpoint import sharded
from util.errors import UserError
from util.io import file_state, replacing, sync_folder

NAME, NAME_SHARDED = "checkpoint-last.pth", "checkpoint-last.dcp"
NEXT, NEXT_SHARDED = "checkpoint-next.pth", "checkpoint-next.dcp"
NEWEST = (NEXT, NEXT_SHARDED, NAME, NAME_SHARDED)
STEP, EPOCH = "checkpoint-step{:09d}", "checkpoint-epoch{:04d}"


def find(folder: str | os.PathLike) -> Path | None:
    """Return the newest checkpoint in a folder, or None. A file in the place of the folder is a UserError."""
    folder = Path(folder)
    if folder.is_file() or folder.suffix in (".pth", ".dcp"):
        if folder.suffix not in (".pth", ".dcp", ".safetensors"):
            raise UserError(f"{folder} is a file; name the folder of a run.")
        raise UserError(
            f"{folder} is a checkpoint; name its folder instead, {folder.parent}, and, to evaluate or sample one that "
            f"is not the newest, --checkpoint {folder.name}."
        )
    return next(iter(candidates(folder)), None)


def candidates(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the newest first."""
    newest = [folder / name for name in NEWEST if _is_complete(folder / name)]
    if len(newest) > 1:
        newest.sort(key=lambda path: recorded_step(path) or 0, reverse=True)
    steps, epochs = (sorted(folder.glob(f"checkpoint-{kind}*"), reverse=True) for kind in ("step", "epoch"))
    return newest + [path for path in steps + epochs if _is_complete(path)]


def _is_complete(path: Path) -> bool:
    return (path / sharded.SETTINGS).is_file() if path.suffix == ".dcp" else path.suffix == ".pth" and path.is_file()


def recorded_step(path: Path) -> int | None:
    """Return the step that a checkpoint was written at, without reading tensors; None if it does not say."""
    try:
        if path.suffix == ".dcp":
            return sharded.settings(path)["run"].get("step")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="meta", weights_only=True, mmap=True)["run"]["step"]
    except Exception:  # of many kinds: it is damaged or foreign, which loading it reports
        return None


def verify(path: Path) -> None:
    """Compare a file with its checksums; UserError if they differ. torch's old format, a bare pickle, has none."""
    _verify(path, file_state(path))


@lru_cache(16)  # settings and weights of a checkpoint are asked for one after the other
def _verify(path: Path, state: Hashable) -> None:
    with open(path, "rb") as file:
        if file.read(1) == b"\x80":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("its records are compressed, which torch.save never does")  # they may be any size
            damaged = archive.testzip()
    except Exception as error:  # of many kinds, and each means the same
        raise UserError(f"{path} is truncated or not a checkpoint: {error}") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of its record {damaged} differs.")


class _Noting:
    """A file that keeps the error of a write, which torch's writer of zip files replaces by one of its own."""

    def __init__(self, file: BinaryIO):
        self.file, self.flush, self.error = file, file.flush, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def write(file: BinaryIO, content: dict[str, Any]) -> None:
    """Write `content` to an open file, flush it to disk and verify it."""
    noting = _Noting(file)
    try:
        torch.save(content, noting)
    except RuntimeError as error:
        raise noting.error or error from None
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read it back from the disk, not from the cache
    verify(Path(file.name))


def save(folder: Path, content: dict[str, Any], previous_step: int | None = None) -> Path:
    """Write `content` as the newest checkpoint. If that fails, a UserError says why, and the one before it remains."""
    try:
        with replacing(folder / NEXT) as file:
            write(file, content)
        return put_in_place(folder / NEXT, previous_step)
    except (OSError, RuntimeError, UserError) as error:
        room = f" ({shutil.disk_usage(folder).free / 1e9:.3g} GB are free there)" if folder.is_dir() else ""
        raise UserError(f"The checkpoint cannot be written to {folder / NAME}: {error}{room}") from error


def put_in_place(path: Path, previous_step: int | None = None) -> Path:
    """Rename an intact checkpoint-next.* to checkpoint-last.*, and the one there after the step that it records.

    If it records none, `previous_step` is its step. If `previous_step` is None, it is damaged, and removed.
    """
    for old in (path.with_name(NAME), path.with_name(NAME_SHARDED)):
        if previous_step is None:
            _remove(old)
        elif old.exists():
            earlier = old.with_name(f"{STEP.format(recorded_step(old) or previous_step)}{old.suffix}")
            _remove(earlier)
            os.rename(old, earlier)
    newest = path.with_name(f"checkpoint-last{path.suffix}")
    os.rename(path, newest)
    sync_folder(path.parent)
    return newest


def prune(folder: Path, keep_last: int, first_step: int | None = None) -> None:
    """Leave `keep_last` - 1 earlier checkpoints. Those after `first_step`, before which the run went back, go first."""
    earlier = sorted(folder.glob("checkpoint-step*.*"), key=lambda path: path.stem, reverse=True)
    abandoned = [path for path in earlier if first_step is not None and path.stem > STEP.format(first_step)]
    valid = [path for path in earlier if path not in abandoned]
    for path in abandoned + valid[keep_last - 1 :]:
        _remove(path)


def recover(folder: Path, last_step: int | None) -> None:
    """Finish or remove what a killed run left; `last_step` is of the newest checkpoint if the run resumes from it."""
    for path in (folder / NEXT, folder / NEXT_SHARDED, *folder.glob(".checkpoint-*.tmp")):
        if last_step is not None and _is_complete(path) and recorded_step(path) == last_step:
            put_in_place(path, last_step)
        else:
            _remove(path)


def keep(path: Path, epoch: int) -> None:
    """Give a checkpoint a second name, under which it stays for good, as the one after `epoch` (counted from 0).

    The name is free before it is given: a rename between two names of one file would do nothing (rename(2)).
    """
    name = path.with_name(f"{EPOCH.format(epoch + 1)}{path.suffix}")
    try:
        _remove(name)
        if path.is_dir():
            shutil.copytree(path, name, copy_function=_link)
        else:
            _link(path, name)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"The checkpoint cannot be kept as {name}: {error}") from error


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
