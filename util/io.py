"""Files that are either complete or absent, their digests, and the provenance that is written beside a result."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from util.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
FID_STATS = REPOSITORY / "fid_stats"  # found relative to the code, whatever the working directory
SHARED_FILE_SECONDS = 60.0  # a network file system may show a file that late
MAX_EXPANSION = 20  # of a file that is unpacked
RESULTS = ":(exclude,top,glob)*/results/**"  # they change while they are made
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "torch-fidelity", "wandb", "pillow", "safetensors")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends, flushed to disk; it is removed on an error.

    The temporary name contains host and process, so two processes never write to the same one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder and those above it, where they are missing; UserError if that fails or nothing can be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"The folder {path} cannot be written: {error}.") from error


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, content: Any) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; None if it is missing or unreadable."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def check_zip(path: str | os.PathLike) -> None:
    """Raise a ValueError for a zip file (.npz) that hides members, or unpacks to far more than numbers compress to."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        members = archive.infolist()
        file.seek(archive.start_dir)
        if file.read().count(b"PK\1\2") != len(members):
            raise ValueError("its list of members is damaged")
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_EXPANSION * os.path.getsize(path) + 2**20:
        raise ValueError(f"it would unpack to {unpacked} bytes")


def file_state(path: str | os.PathLike) -> tuple[int, int, int]:
    """Return numbers that change with a file's content."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def sha256_file(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(content: Any, digits: int = 10) -> str:
    """The first hexadecimal digits of the SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:digits]


def wait_for_file(path: Path) -> bool:
    """Wait until a file that another process wrote is visible here; False after SHARED_FILE_SECONDS."""
    deadline = time.monotonic() + SHARED_FILE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def versions() -> dict[str, str]:
    """Versions of Python, the operating system and the packages that decide numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def commit() -> str:
    """The git commit of the code, "+changes" if tracked files but results differ; "unknown" outside a checkout."""
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(REPOSITORY), *what], capture_output=True, text=True, check=True).stdout
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", ":/", RESULTS])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+changes" if changes.strip() else "")


def hardware(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, command, commit, versions and hardware, to stand beside a number."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(device),
    }
