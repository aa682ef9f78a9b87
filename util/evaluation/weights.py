"""Files of network weights: where they are, where they are fetched from, and whether they are the published ones.

Each is looked for in this order: its flag (--inception_weights), its variable (INCEPTION_WEIGHTS), the folder
--weights_dir (WEIGHTS_DIR) under its published name, the torch hub cache under the same name. What is in neither folder
is downloaded, once: into --weights_dir if it is set, else into the cache. Whatever a file holds, nothing in it is
executed unless it is the published one.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError
from util.io import sha256_file

FOLDER = "weights_dir"
NOT_PUBLISHED = "not the published file"


@dataclass(frozen=True)
class WeightsFile:
    """A published file and its address."""

    network: str  # names the flag and the variable
    name: str
    url: str
    sha256: str
    megabytes: int
    publisher: str

    @property
    def flag(self) -> str:
        return f"{self.network}_weights"

    def origin(self, sha256: str) -> str:
        """Return what a report says of a file with this SHA-256."""
        return f"published by {self.publisher}" if self.is_published(sha256) else NOT_PUBLISHED

    def is_published(self, sha256: str) -> bool:
        return sha256 == self.sha256

    def find(self, settings: Mapping[str, Any]) -> tuple[Path, str]:
        """Find, or download once, the file, and return (path, sha256). Call it on one rank of a node before the others.

        A file whose path is given may be another one; in the folders only the published one is accepted.

        Args:
            settings: paths by the name of their flag; None and what is missing is not given.

        Raises:
            UserError: a file that is missing, unreadable or damaged.
        """
        flag, variable = settings.get(self.flag), os.environ.get(self.flag.upper())
        folder = settings.get(FOLDER) or os.environ.get(FOLDER.upper())
        folders = [Path(folder).expanduser()] if folder else []
        folders.append(hub_folder())
        if not (flag or variable):
            return self.fetch(next((f for f in folders if (f / self.name).exists()), folders[0]))
        path = Path(flag or variable).expanduser()
        try:
            return path, sha256_file(path)
        except OSError as error:
            source = f"--{self.flag}" if flag else self.flag.upper()
            what = f"The {self.network} weights {path} ({source}) cannot be read: {error}"
            instead = f"Without {source} it is looked for in {folders[0]}, and downloaded if it is not there"
            raise UserError(f"{what}. Name a copy of {self.url}. {instead}.") from error

    def fetch(self, folder: Path, progress: bool = False) -> tuple[Path, str]:
        """Download the file into a folder unless it is there, and return (path, sha256). Raises UserError."""
        path, timeout = folder / self.name, socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds; by default an unanswered download never ends
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.sha256, progress=progress)
        except (OSError, RuntimeError, HTTPException) as error:
            where = "" if folder == hub_folder() else f" --{FOLDER} {folder}"
            raise UserError(
                f"The {self.network} weights ({self.megabytes} MB) are not in {folder}, and cannot be downloaded: "
                f"{error}. Put {self.url} there (where there is a network, `python -m tools.fetch_weights "
                f"{self.network}{where}` does), or name a copy with --{self.flag} or {self.flag.upper()}."
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        try:
            sha256 = sha256_file(path)
        except OSError as error:
            raise UserError(f"The {self.network} weights {path} cannot be read: {error}.") from error
        if not self.is_published(sha256):
            raise UserError(
                f"{path} is damaged, or another file of that name (its sha256 is {sha256}). Delete it to download it "
                f"again; --{self.flag} names weights of your own."
            )
        return path, sha256


def hub_folder() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


WEIGHTS = {
    file.network: file
    for file in (
        WeightsFile(
            "inception",
            "weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            # as its users report; torch-fidelity names the first 8 digits
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            96,
            "torch-fidelity",
        ),
        WeightsFile(
            "dinov2",
            "dinov2_vitl14_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
            "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",  # as its users report; Meta names none
            1218,
            "Meta",
        ),
        WeightsFile(
            "clip",
            "ViT-L-14-336px.pt",
            "https://openaipublic.azureedge.net/clip/models/"
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
            934,
            "OpenAI",
        ),
    )
}
FLAGS = (*(file.flag for file in WEIGHTS.values()), FOLDER)


def weights_settings(settings: Any) -> dict[str, Any]:
    """Return what `WeightsFile.find` takes, from a configuration or parsed flags."""
    return {flag: getattr(settings, flag) for flag in FLAGS}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a state dict without executing anything that the file holds. Raises UserError if that is impossible."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        raise UserError(
            f"{path} is refused: torch.load cannot read it with weights_only=True ({type(error).__name__})."
        ) from error
