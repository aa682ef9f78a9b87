"""Bad images in a run of weeks: what takes their place, and how the run's log learns of it.

    ImageFolderImages -> Replacing, in the worker -> ImageLoader, which fills -> Replaced -> report -> log.jsonl

Only where --on_bad_image skip asks for it (`Images.replaced`). What takes the place of an image depends on the files
alone: not on workers, processes, or where a run started.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from util.data import BadImage, DataError, Images
from util.distributed import World
from util.logger import RunLog

ON_BAD_IMAGE = ("error", "skip")
MOST = 0.01  # of the images of a data set may be replaced: with more, it is the data set that is bad ...
FEW = 50  # ... but so many may be, in one of any size
SHOWN = 5  # of them are said in the terminal, in a run


@dataclass(frozen=True)
class Replacement:
    """One bad image: its file, why it is bad, and the file that takes its place."""

    file: str
    reason: str
    replaced_by: str


def same_class(images: Images, i: int) -> Iterator[int]:
    """The other images with the label of image i: those after it in the order of the data set, then from its start."""
    same = np.flatnonzero(images.labels == images.labels[i])
    yield from np.roll(same, -1 - int(np.searchsorted(same, i)))[:-1].tolist()


class Replacing(Dataset):
    """`images` with the next readable image of its class in the place of a bad one.

    Item i is (image uint8 (3, H, W), label int, its Replacement or None).

    Raises:
        DataError: a class without a readable image; a file that the file system does not give (never replaced).
    """

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, Replacement | None]:
        try:
            return *self.images[i], None
        except BadImage as error:
            reason = error.reason
        for j in same_class(self.images, i):
            try:
                x, y = self.images[j]
            except BadImage:
                continue
            return x, y, Replacement(self.images.path(i), reason, self.images.path(j))
        name = self.images.class_names[self.images.labels[i]]
        raise DataError(
            f"none of the {int((self.images.labels == self.images.labels[i]).sum())} images of class {name} can be "
            f"read; {self.images.path(i)}: {reason}. Nothing of that class can take its place: put whole files there."
        )


def collate(items: list[tuple[Tensor, int, Replacement | None]]) -> tuple[Tensor, Tensor, list[Replacement]]:
    """Images (B, 3, H, W), labels (B,) int64, and what was replaced among them."""
    x, y = default_collate([(image, label) for image, label, _ in items])
    return x, y, [replacement for *_, replacement in items if replacement]


@dataclass
class Replaced:
    """The bad images that a run has met since its start, by file.

    total: images in the data set. here: met by this process. everywhere: met by any, as of
    the last report.
    """

    total: int
    here: dict[str, Replacement] = field(default_factory=dict)
    everywhere: dict[str, Replacement] = field(default_factory=dict)

    def add(self, met: Iterable[Replacement]) -> None:
        self.here.update((replacement.file, replacement) for replacement in met)


def report(replaced: Replaced | None, world: World, log: RunLog, step: int) -> None:
    """Write one line `bad_image` to the log for each image replaced since the last report, on any process.

    All processes call it, after the same step. Called before each checkpoint is saved and at the end, it leaves no
    replaced image out of the log, however often the run is interrupted. Without --on_bad_image skip it does nothing.

    Raises:
        DataError: on all of them, when more than MOST of the images, and more than FEW, have been bad since the start.
            An epoch reads an image once, so this is exact: the count is that of the bad images up to this step.
    """
    if replaced is None:
        return
    met = [r for file, r in replaced.here.items() if file not in replaced.everywhere]
    lists = [met]
    if world.size > 1:
        lists = [[] for _ in range(world.size)]
        dist.all_gather_object(lists, met)
    new = {r.file: r for part in lists for r in part}
    shown = max(0, SHOWN - len(replaced.everywhere))
    for i, file in enumerate(sorted(new)):
        log.record("bad_image", step, asdict(new[file]))
        if i < shown:
            log.say(f"bad image {file}: {new[file].reason}; {new[file].replaced_by} takes its place")
    replaced.everywhere |= new
    count = len(replaced.everywhere)
    if len(new) > shown:
        log.say(
            f"{len(new) - shown} more bad images, {count} since the start: the events bad_image in the log name them"
        )
    if count > max(FEW, MOST * replaced.total):
        error = DataError(
            f"{count} of {replaced.total} images are bad so far, more than {MOST:.0%}, the first of them "
            f"{min(replaced.everywhere)}: the copy of the data set seems to be broken. The log names them; make it "
            "whole, and go on from the last checkpoint."
        )
        error.everywhere = True
        raise error
