"""The base classes of all data sets, and the errors that data can raise.

Shapes: an image is uint8 (3, H, W) in 0..255 (red, green, blue), or (4, H, W) with alpha, H = W = img_size; its label
is an int in 0..num_classes-1. N images in a data set, B in a batch.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from denoiser import RandomNumbers, random_flip
from spectral_ops.spectrum import GREY
from util.errors import UserError


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, C) -> (C, H, W), contiguous, not sharing memory with the argument."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 (B, C, H, W) in 0..255 to float32 in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float expects uint8 images, not {images.dtype}")
    return images.to(torch.float32) / 127.5 - 1


def quantise(x: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8 on their device: (x + 1) / 2 * 255, rounded."""
    return ((x + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


class DataError(UserError):
    """The data that the user named cannot be used.

    A DataLoader raises a worker's error again with the worker's traceback as its argument; only the message is kept.
    """

    def __init__(self, message: str):
        kind = type(self)
        super().__init__(message.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


def read_class_names(path: str | os.PathLike) -> list[str]:
    """Return the names of classes in a file, one on each line; what follows a # is a comment. Raises DataError."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file of classes {path} cannot be read: {error}.") from None
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    if not names or len(set(names)) < len(names):
        raise DataError(f"the file of classes {path} must hold names of classes, each once, one on a line.")
    return names


def describe_labels(labels: np.ndarray) -> str:
    """Return a phrase that differs where data sets differ in number or classes of their images, in this order."""
    digest = hashlib.sha256(np.ascontiguousarray(labels, dtype=np.int64).tobytes()).hexdigest()
    return f"{len(labels)} images with labels {digest[:12]}"


class NoSplitError(DataError):
    """An image folder has no validation images."""


class BadImage(DataError):
    """The content of one file is not a usable image. `reason` says why, without the name of the file."""

    reason = ""

    @classmethod
    def at(cls, path: str, reason: str, advice: str) -> "BadImage":
        error = cls(f"cannot read image {path}: {reason}. {advice} (training may skip it: --on_bad_image skip).")
        error.reason = reason
        return error


def data_folder(data_path: str | os.PathLike | None, what: str) -> Path:
    """Return the absolute path of the folder that the user named. DataError where none was: it should be `what`."""
    if not data_path:
        raise DataError(f"no data path given. Set --data_path (or the variable DATA_PATH) to {what}.")
    return Path(data_path).expanduser().absolute()


class Images(Dataset):
    """A map-style data set: item i is (image uint8 (3, H, W), label int), always the same for the same i.

    A loader replaces bad images where `bad_image_log` is set, and notes them there; else a bad image is an error.
    """

    name, in_memory = "", False  # build_dataset takes them from DATASETS
    channels, has_alpha = 3, False  # build_dataset sets the channels; RGBA needs files with alpha
    part = ""  # names the classes that were chosen of all
    source = ""  # where images come from that are not in class folders: tells caches of them apart
    max_workers = 12  # more loader processes gain nothing
    bad_image_log = None  # or a BadImageLog

    def __init__(self, img_size: int, class_names: list[str], labels: np.ndarray):
        if img_size < 1:
            raise DataError(f"img_size is {img_size}; expected a positive number of pixels.")
        self.img_size, self.class_names, self.labels = img_size, list(class_names), labels  # labels (N,) int64
        self.num_classes = len(self.class_names)
        self.notes: list[str] = []  # warnings for whoever trains on them
        if empty := sorted(set(range(self.num_classes)) - set(np.unique(labels).tolist())):
            self.notes.append(
                f"{len(empty)} of the {self.num_classes} classes have no image, such as {self.class_names[empty[0]]}: "
                "labels count from 0"
            )
        self.bad: dict[int, str] = {}  # images that are known to be bad before they are read, and why

    def __len__(self) -> int:
        return len(self.labels)

    def prepare(self, batch: Tensor, rng: RandomNumbers | None = None, flip: bool = False) -> Tensor:
        """Return what the network learns from a batch of items, on its device: float32 (B, C, H, W).

        Pixels uint8 become x / 127.5 - 1; grey is made from red, green and blue (ITU-R BT.601). With `flip` a random
        half is mirrored. Nothing is random without `rng`, which has the numbers of the images.
        """
        x = to_float(batch)
        if self.channels == 1:
            x = torch.einsum("bchw,c->bhw", x, x.new_tensor(GREY))[:, None]
        return random_flip(x, rng) if flip and rng is not None else x


class Subset(Images):
    """The images `numbers` (M,) of another data set, with everything else as it is there.

    With `classes`, a part of its class names in their order, labels are numbered anew.
    """

    def __init__(self, whole: Images, numbers: np.ndarray, classes: list[str] | None = None):
        classes = whole.class_names if classes is None else classes
        renumbered = np.array([classes.index(name) if name in classes else -1 for name in whole.class_names])
        super().__init__(whole.img_size, classes, renumbered[whole.labels[numbers]])
        self.name, self.in_memory, self.max_workers = whole.name, whole.in_memory, whole.max_workers
        self.bad_image_log, self.channels, self.prepare = whole.bad_image_log, whole.channels, whole.prepare
        self.notes, self.part, self.whole, self.numbers = whole.notes, whole.part, whole, numbers
        self.source = whole.source
        if hasattr(whole, "folder"):  # images of files
            self.folder = whole.folder
        if whole.bad:
            self.bad = {i: whole.bad[n] for i, n in enumerate(numbers.tolist()) if n in whole.bad}

    def path(self, i: int) -> str:
        return self.whole.path(int(self.numbers[i]))

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.whole[int(self.numbers[i])][0], int(self.labels[i])


class FileImages(Images):
    """Images of files: `files` below `folder`, one for each label."""

    def __init__(self, img_size: int, class_names: list[str], labels: np.ndarray, folder: str | Path, files: list[str]):
        super().__init__(img_size, class_names, labels)
        self.folder = folder
        # One array of bytes, not a list of strings: workers that only read it do not copy its pages.
        self._files = np.array([os.fsencode(file) for file in files])

    def path(self, i: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._files[i]))
