"""The base classes of all data sets, and the errors that data can raise.

Shapes: an image is uint8 (3, H, W) in 0..255 (red, green, blue), H = W = img_size; its label is an int in
0..num_classes-1. N images in a data set.
"""

import os
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from util.errors import UserError


class DataError(UserError):
    """The data that the user named cannot be used.

    A DataLoader raises a worker's error again with the worker's traceback as its argument; only the message is kept.
    """

    def __init__(self, message: str):
        kind = type(self)
        super().__init__(message.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


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


class Images(Dataset):
    """A map-style data set: item i is (image uint8 (3, H, W), label int), always the same for the same i.

    A loader replaces bad images where `bad_image_log` is set, and notes them there; else a bad image is an error.
    """

    name, in_memory = "", False  # build_dataset takes them from DATASETS
    max_workers = 12  # more loader processes gain nothing
    bad_image_log = None  # or a BadImageLog

    def __init__(self, img_size: int, class_names: list[str], labels: np.ndarray):
        if img_size < 1:
            raise DataError(f"img_size is {img_size}; expected a positive number of pixels.")
        self.img_size, self.class_names, self.labels = img_size, list(class_names), labels  # labels (N,) int64
        self.num_classes = len(self.class_names)
        self.notes: list[str] = []  # warnings for whoever trains on them
        self.bad: dict[int, str] = {}  # images that are known to be bad before they are read, and why

    def __len__(self) -> int:
        return len(self.labels)


class FileImages(Images):
    """Images of files: `files` below `folder`, one for each label."""

    def __init__(self, img_size: int, class_names: list[str], labels: np.ndarray, folder: str | Path, files: list[str]):
        super().__init__(img_size, class_names, labels)
        self.folder = folder
        # One array of bytes, not a list of strings: workers that only read it do not copy its pages.
        self._files = np.array([os.fsencode(file) for file in files])

    def path(self, i: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._files[i]))
