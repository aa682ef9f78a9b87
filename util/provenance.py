"""What a number needs beside it: date, command, commit, versions, hardware."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "torch-fidelity",
    "wandb",
    "pillow",
    "safetensors",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Python, the packages that decide numbers, and the operating system."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def commit() -> str:
    """The commit when the process first asked, with "+changes" where tracked files differ; "unknown" outside git."""
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(REPOSITORY), *what], capture_output=True, text=True, check=True).stdout
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+changes" if changes.strip() else "")


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, Any]:
    """What a number needs beside it: date, command, commit, versions, hardware."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(device),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, path)
