"""The order in which images are read, the loader that reads them, and the time that training waits for it.

The order of an epoch is a function of (seed, epoch), and the global batch of a step does not depend on how many ranks
and microbatches share it.

Shapes: B images of a microbatch; a batch is (B, 3, H, W) uint8 with labels (B,) int64.
"""

import itertools
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from util.data.bad_images import BadImageLog, Replacing, collate
from util.data.datasets import build_dataset
from util.data.images import DataError, Images
from util.dist.preemption import SIGNALS


def positions(rank: int, world_size: int, microbatch: int, batch_size: int) -> range:
    """Return the positions in the global batch of the `batch_size` images of a microbatch on a rank."""
    first = (microbatch * world_size + rank) * batch_size
    return range(first, first + batch_size)


class GlobalBatchSampler(Sampler[list[int]]):
    """Lists of batch_size image indices for one rank, such that the global batches depend on (seed, epoch) alone.

    Step s of an epoch is perm[s*G : (s+1)*G] with G = batch_size * world_size * accum_iter and perm the permutation
    of (seed, epoch); the images after the last whole global batch are dropped. Within a step, this rank takes
    `positions(rank, world_size, m, batch_size)` for m = 0..accum_iter-1, one list each.
    DataError when the images do not fill one global batch.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int, accum_iter: int, seed: int):
        self.num_images, self.batch_size, self.accum_iter, self.seed = num_images, batch_size, accum_iter, seed
        self.rank, self.world_size = rank, world_size
        self.global_batch = batch_size * world_size * accum_iter
        self.steps_per_epoch = num_images // self.global_batch
        if num_images < self.global_batch:
            raise DataError(
                f"the dataset has {num_images} images, fewer than one global batch of {self.global_batch} "
                f"= {batch_size} per rank x {world_size} ranks x {accum_iter} accumulated. "
                "Lower --batch_size (BATCH_SIZE) or --global_batch (GLOBAL_BATCH), or use more images."
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch, and the step in it at which the next iteration starts (0..steps_per_epoch)."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start_step) * self.accum_iter

    def permutation(self) -> np.ndarray:
        """Return the order of this epoch's images, (num_images,) int64."""
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch]))
        return np.random.Generator(bits).permutation(self.num_images)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.permutation()
        for step in range(self.start_step, self.steps_per_epoch):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            for microbatch in range(self.accum_iter):
                yield batch[positions(self.rank, self.world_size, microbatch, self.batch_size)].tolist()


def open_images(config: Any) -> Images:
    """Open the training images of a configuration; with --on_bad_image skip, loaders replace bad ones.

    Raises:
        DataError: data that cannot be read, or that has another number of classes.
    """
    what = {"channels": config.channels, "labels_file": config.labels_file}
    images = build_dataset(config.dataset, config.data_path, config.img_size, **what)
    if images.num_classes != config.class_num:
        raise DataError(
            f"{config.data_path or config.dataset} has {images.num_classes} classes and --class_num is "
            f"{config.class_num}; --class_num {images.num_classes} starts a new run on it."
        )
    if config.latents and images.vae["sha256"] != config.latents["vae"]["sha256"]:
        raise DataError(
            f"the latents {config.data_path} were made with the VAE {images.vae['name']}, and this network was trained "
            f"on those of another one, {config.latents['vae']['name']}."
        )
    if config.latents and config.flip and images.views == 1:
        raise DataError(f"the latents {config.data_path} have no mirrored images: train with --no-flip (FLIP=0).")
    if config.on_bad_image == "skip" and not images.in_memory:
        images.bad_image_log = BadImageLog(images)
    elif images.bad:
        images[min(images.bad)]  # raises BadImage now rather than in the middle of training
    return images


def default_workers(images: Images) -> int:
    """Worker processes per rank: 0 for images in memory, else this rank's share of the cores, 1..max_workers."""
    if images.in_memory:
        return 0
    share = len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(images.max_workers, share))


def _init_worker(worker_id: int) -> None:
    """Use one thread, and leave signals that ask to stop to the parent, which ends its workers when it is done."""
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


#: of torch's errors for workers that lack shared memory, of which containers have 64 MB by default
NO_SHARED_MEMORY = ("Bus error", "out of shared memory", "unable to write to file </torch_")


class ImageLoader(DataLoader):
    """Batches of images (B, 3, H, W) uint8 and labels (B,) int64, in the order of `sampler`: lists of indices.

    num_workers None: `default_workers`. Workers end with the loader: after an error, at `close`, when it is collected
    and at exit. Where `images.bad_image_log` is set, bad images are replaced, and noted there when their batch is
    handed out. Call the sampler's set_epoch before each iteration.
    """

    def __init__(self, images: Images, sampler: Iterable[list[int]], num_workers: int | None, pin_memory: bool):
        self.bad_image_log, self._end_workers = images.bad_image_log, None
        self.img_size = images.img_size
        replaces = self.bad_image_log is not None
        workers = default_workers(images) if num_workers is None else num_workers
        super().__init__(
            Replacing(images) if replaces else images,
            collate_fn=collate if replaces else None,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            generator=torch.Generator().manual_seed(0),  # else an iteration would advance torch's global random state
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            batches = super().__iter__()
            if self.num_workers > 0 and self._end_workers is None:
                self._end_workers = weakref.finalize(self, batches._shutdown_workers)
                for worker in batches._workers:
                    # torch and multiprocessing end workers by SIGTERM, which these ignore, and wait without a limit.
                    worker._popen.terminate = worker._popen.kill
            for x, y, *replacements in batches:
                if replacements:
                    self.bad_image_log.add(replacements[0])
                yield x, y
        except Exception as error:
            self.close()
            if any(text in str(error) for text in NO_SHARED_MEMORY):
                raise self._shared_memory_error() from error
            raise

    def _shared_memory_error(self) -> DataError:
        batch = max(len(index) for index in itertools.islice(self.batch_sampler, 1))
        needed = self.num_workers * self.prefetch_factor * batch * 3 * self.img_size**2
        free = shutil.disk_usage("/dev/shm").free
        return DataError(
            f"loader processes hand over batches in shared memory. {free / 1e6:.0f} MB of /dev/shm are free and "
            f"{self.num_workers} workers need about {needed / 1e6:.0f} MB. Start the container with --shm-size, or use "
            "fewer workers: --num_workers 0 needs none."
        )

    def close(self) -> None:
        """End the workers now; iterating again starts new ones."""
        if self._end_workers is not None:
            self._end_workers()
        self._end_workers = self._iterator = None


class DataTimer:
    """Takes batches from a loader and measures the share of the time that the host waits for it.

    Where the host runs ahead of a device, the device may still be busy meanwhile: the share is an upper bound of the
    time that the device lacks data.
    """

    def __init__(self, loader: Iterable):
        self.batches, self.waited, self.start = iter(loader), 0.0, time.perf_counter()

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.waited += time.perf_counter() - start

    def share(self) -> float:
        """Return the waiting share, 0..1, of the time since the last call, at first since the start."""
        share = self.waited / (time.perf_counter() - self.start)
        self.waited, self.start = 0.0, time.perf_counter()
        return share
