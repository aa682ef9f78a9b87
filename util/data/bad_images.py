"""Bad images in a run of weeks: which image takes the place of a bad one, and how the run's log learns of it.

Only with --on_bad_image skip, which sets `Images.bad_image_log`. The replacement depends on the files alone: not on
the number of workers or ranks, nor on the step at which a run started. A replacement is what the log shows of it:
{"file": of the bad image, "reason": why it is bad, "replaced_by": file of the other image}.
"""

from contextlib import suppress

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from util.data.images import BadImage, DataError, Images
from util.dist.context import DistContext, all_gather
from util.log import RunLog

MAX_FRACTION = 0.01  # of the images of a data set may be bad: with more, the copy of the data set is broken ...
MAX_COUNT = 50  # ... but that many may be bad in one of any size


class Replacing(Dataset):
    """`images`, with the next readable image of the same class in the place of a bad one.

    Item i is (image uint8 (3, H, W), label int, its replacement or None). DataError for a class without any.
    """

    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, i: int) -> tuple[Tensor, int, dict | None]:
        images = self.images
        try:
            return *images[i], None
        except BadImage as error:
            reason = error.reason
        same_class = np.flatnonzero(images.labels == images.labels[i])
        for j in np.roll(same_class, -np.searchsorted(same_class, i))[1:].tolist():
            with suppress(BadImage):
                return *images[j], {"file": images.path(i), "reason": reason, "replaced_by": images.path(j)}
        name = images.class_names[images.labels[i]]
        raise DataError(f"no image of class {name} can be read: {images.path(i)}: {reason}. Restore the files.")


def collate(items: list[tuple[Tensor, int, dict | None]]) -> tuple[Tensor, Tensor, list[dict]]:
    """Return images (B, 3, H, W), labels (B,) int64, and the replacements among them."""
    x, y = default_collate([(image, label) for image, label, _ in items])
    return x, y, [replacement for *_, replacement in items if replacement]


def check_bad_count(count: int, total: int, example: str) -> None:
    """Raise DataError, on all ranks, if so many of `total` images are bad that the data set must be broken."""
    if count > max(MAX_COUNT, MAX_FRACTION * total):
        error = DataError(
            f"{count} of {total} images are bad so far, more than {MAX_FRACTION:.0%}, for example {example}: the copy "
            "of the data set seems to be broken. Repair it and start the same command again."
        )
        error.on_all_ranks = True
        raise error


class BadImageLog:
    """The bad images that a run has met since its start, each of which is logged once."""

    def __init__(self, images: Images):
        self.total = len(images)
        self.new: dict[str, dict] = {}  # replacements by file, met on this rank since the last report
        self.reported: set[str] = set()  # files of all ranks

    def add(self, replacements: list[dict]) -> None:
        self.new.update((r["file"], r) for r in replacements if r["file"] not in self.reported)

    def report(self, ctx: DistContext, log: RunLog, step: int) -> None:
        """Log an event `bad_image` for each image that any rank has replaced since the last report.

        All ranks call it after the same step: before each checkpoint and at the end, so that the log misses no image
        however often the run is interrupted. DataError on all ranks when too many images are bad (`check_bad_count`).
        """
        new = {file: replacement for part in all_gather(self.new, ctx) for file, replacement in part.items()}
        for file in sorted(new):
            log.log("bad_image", step, new[file])
        self.reported |= new.keys()
        self.new = {}
        if new:
            first = new[min(new)]
            log.info(
                f"replaced {len(new)} bad images ({len(self.reported)} so far), "
                f"for example {first['file']}: {first['reason']}"
            )
        check_bad_count(len(self.reported), self.total, min(self.reported, default=""))
