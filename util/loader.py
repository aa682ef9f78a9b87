"""The order in which images are read, the loader that reads them, and how long training waits for it.

The order of an epoch is a function of (seed, epoch), and a step's global batch does not depend on how many processes
and accumulated passes share it.

Shapes: B images of a micro-batch; a batch is (B, 3, H, W) uint8 with labels (B,) int64.
"""

import atexit
import os
import signal
import time
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from util import preemption
from util.bad_images import Replacing, collate
from util.data import DataError, Images


def positions(rank: int, world_size: int, micro: int, batch_size: int) -> range:
    """Positions in the global batch of the images of micro-batch `micro` on process `rank`: batch_size of them."""
    first = (micro * world_size + rank) * batch_size
    return range(first, first + batch_size)


class GlobalBatchSampler(Sampler[list[int]]):
    """Lists of batch_size image indices for one process, such that the global batches depend on (seed, epoch) alone.

    Step s of an epoch is perm[s*G : (s+1)*G] with G = batch_size * world_size * accum_iter and perm the permutation
    of (seed, epoch) (`permutation`); what remains of the epoch after the last whole global batch is dropped. Within a
    step, this process takes `positions(rank, world_size, m, batch_size)` for m = 0..accum_iter-1, one list each.
    DataError when the images do not fill one global batch.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int, accum_iter: int, seed: int):
        if min(batch_size, world_size, accum_iter) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"bad {batch_size=}, {rank=}, {world_size=}, {accum_iter=}")
        self.num_images, self.batch_size, self.rank, self.world_size = num_images, batch_size, rank, world_size
        self.accum_iter, self.seed = accum_iter, seed
        self.global_batch = batch_size * world_size * accum_iter
        if num_images < self.global_batch:
            raise DataError(
                f"the dataset has {num_images} images, fewer than one global batch of {self.global_batch} "
                f"= {batch_size} per process x {world_size} processes x {accum_iter} accumulated. "
                "Lower --batch_size (BATCH_SIZE) or --global_batch (GLOBAL_BATCH), or use more images."
            )
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch, and the step in it at which the next iteration starts (0..steps_per_epoch)."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} is not in 0..{self.steps_per_epoch}")
        self.epoch, self.start_step = epoch, start_step

    def permutation(self) -> np.ndarray:
        """(num_images,) int64: the order of this epoch."""
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch]))
        return np.random.Generator(bits).permutation(self.num_images)

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.accum_iter

    def __iter__(self) -> Iterator[list[int]]:
        order = self.permutation()
        for step in range(self.start_step, self.steps_per_epoch):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            for micro in range(self.accum_iter):
                mine = positions(self.rank, self.world_size, micro, self.batch_size)
                yield batch[mine.start : mine.stop].tolist()


def default_workers(images: Images) -> int:
    """Worker processes for one training process: 0 for data in memory, else its share of the cores, 1..most_workers."""
    if images.in_memory:
        return 0
    share = len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(images.most_workers, share))


def _init_worker(worker_id: int) -> None:
    """One thread per worker; signals that ask to stop are left to the main process, which ends its workers."""
    torch.set_num_threads(1)
    for number in preemption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_loaders: "weakref.WeakSet[ImageLoader]" = weakref.WeakSet()


@atexit.register
def end_workers() -> None:
    """End the workers of all loaders. multiprocessing, whose turn comes later, would do it by SIGTERM, and wait."""
    for loader in _loaders:
        loader.end_workers()


class ImageLoader(DataLoader):
    """A DataLoader over images that notes in `replaced` the bad ones for which it gave others (None: it gives none).

    It ends its workers at once when one of them fails, and starts new ones if iterated over again. They end with it,
    whatever becomes of it. The garbage collector alone, which finds it in a cycle when an exception has been raised
    through it, may close their queues before torch 2.11 has told them: they would wait for ever, and this process for
    them.
    """

    def __init__(self, images: Images, **options):
        self.replaced = images.replaced
        self._end: weakref.finalize | None = None
        _loaders.add(self)
        if self.replaced is None:
            super().__init__(images, **options)
        else:
            super().__init__(Replacing(images), collate_fn=collate, **options)

    def __iter__(self) -> Iterator:
        return self._guarded(super().__iter__())

    def _guarded(self, batches: Iterator) -> Iterator:
        try:
            for x, y, *replacements in batches:
                for replacement in replacements:
                    self.replaced.add(replacement)
                yield x, y
        except Exception:
            self.end_workers()
            raise

    def _get_iterator(self) -> Iterator:
        batches = super()._get_iterator()
        if self.num_workers > 0:
            self._end = weakref.finalize(self, _end, batches, os.getpid())  # keeps it from the collector until then
            self._end.atexit = False
        return batches

    def end_workers(self) -> None:
        """Tell them to end, and kill one that does not; where there are none nothing happens."""
        self._iterator = None
        if self._end is not None:
            self._end()


def _end(batches: Iterator, process: int) -> None:
    if os.getpid() == process:  # else in a worker, which has copies of all that was there
        batches._shutdown_workers()  # torch has no public name for it
        for worker in batches._workers:
            worker.kill()


def build_loader(
    dataset: Images, sampler: Sampler[list[int]], num_workers: int | None, pin_memory: bool
) -> ImageLoader:
    """Loader of (images (B, 3, H, W) uint8, labels (B,) int64) in the sampler's order.

    num_workers None: `default_workers`. Call the sampler's set_epoch before each iteration over the loader. The loader
    has its own generator, so that iterating over it leaves torch's global random state alone.
    """
    workers = default_workers(dataset) if num_workers is None else num_workers
    return ImageLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator().manual_seed(0),
    )


class Waiting:
    """The batches of a loader, and the share of the time that is spent waiting for them.

    That is the host's time. Where it runs ahead of a device, the device may still be busy meanwhile: the share is an
    upper bound of the time that the device is idle for want of data.
    """

    def __init__(self, loader: DataLoader):
        self.batches = iter(loader)
        self._restart()

    def _restart(self) -> None:
        self.waited, self.start = 0.0, time.perf_counter()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.waited += time.perf_counter() - start

    def share(self) -> float:
        """Of the time since the last call (at first since the start), the part that went into waiting; 0..1."""
        share = self.waited / (time.perf_counter() - self.start)
        self._restart()
        return share
