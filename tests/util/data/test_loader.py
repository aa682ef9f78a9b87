"""The order of an epoch, the loader and its workers. Shapes: batches (B, 3, H, W) uint8, labels (B,) int64."""

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.util.data.image_files import make_folder
from util.data import loader
from util.data.datasets import DataError, Digits, ImageFolderImages, build_dataset
from util.data.loader import DataTimer, GlobalBatchSampler, ImageLoader

ROOT = Path(loader.__file__).parents[2]


def global_batches(num_images, batch_size, world_size, accum_iter, seed=3, epoch=0, start_step=0):
    """(steps, global batch) indices in the order of the positions that `positions` gives."""
    lists = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(num_images, batch_size, rank, world_size, accum_iter, seed)
        sampler.set_epoch(epoch, start_step)
        lists.append(list(sampler))
        assert len(lists[-1]) == len(sampler)
    steps = len(lists[0]) // accum_iter
    out = np.full((steps, batch_size * world_size * accum_iter), -1)
    for rank in range(world_size):
        for k, indices in enumerate(lists[rank]):
            step, microbatch = divmod(k, accum_iter)
            out[step, list(loader.positions(rank, world_size, microbatch, batch_size))] = indices
    assert (out >= 0).all()
    return out


@pytest.mark.parametrize("seed, epoch", [(3, 0), (3, 1), (4, 0)])
def test_the_order_of_an_epoch_is_that_of_all_runs_so_far(seed, epoch):
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    assert global_batches(60, 12, 1, 1, seed, epoch).ravel().tolist() == rng.permutation(60).tolist()


@pytest.mark.parametrize("world_size, accum_iter", [(2, 1), (1, 2), (2, 2), (4, 3)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(world_size, accum_iter):
    one = global_batches(100, 12, 1, 1, epoch=2)
    split = global_batches(100, 12 // (world_size * accum_iter), world_size, accum_iter, epoch=2)
    assert one.shape == (8, 12)  # 4 of the 100 are dropped
    np.testing.assert_array_equal(one, split)


def test_start_step_continues_the_epoch():
    np.testing.assert_array_equal(global_batches(50, 3, 2, 2, start_step=2), global_batches(50, 3, 2, 2)[2:])
    sampler = GlobalBatchSampler(50, 3, 0, 2, 2, 3)
    assert sampler.steps_per_epoch == 4 and len(sampler) == 8
    sampler.set_epoch(0, 4)
    assert len(sampler) == 0 and list(sampler) == []


def test_too_few_images_says_the_numbers():
    message = r"23 images.*24 = 4 .*3 .*2 .*--batch_size \(BATCH_SIZE\) or --global_batch \(GLOBAL_BATCH\)"
    with pytest.raises(DataError, match=message):
        GlobalBatchSampler(23, 4, 0, 3, 2, 0)
    assert GlobalBatchSampler(24, 4, 0, 3, 2, 0).steps_per_epoch == 1


def test_loader_order_does_not_depend_on_workers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    runs = []
    for workers in (0, 2):
        sampler = GlobalBatchSampler(1797, 100, 0, 1, 1, 0)
        batches = ImageLoader(Digits(8), sampler, workers, False)
        runs.append([])
        for epoch in range(2):
            sampler.set_epoch(epoch, 10)
            assert len(batches) == 7
            runs[-1] += list(batches)
    assert len(runs[0]) == len(runs[1]) == 14
    for (x0, y0), (x1, y1) in zip(*runs, strict=True):
        assert x0.shape == (100, 3, 8, 8) and x0.dtype == torch.uint8 and y0.dtype == torch.int64
        assert torch.equal(x0, x1) and torch.equal(y0, y1)
    assert torch.equal(torch.get_rng_state(), state)  # the global random state is left alone


@pytest.mark.parametrize("cores, local, expected", [(64, 8, 8), (4, 8, 1), (64, 1, 12), (2, 1, 2)])
def test_default_workers(monkeypatch, tmp_path, cores, local, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert loader.default_workers(ImageFolderImages(make_folder(tmp_path, {"a": 1}), 8)) == expected
    assert loader.default_workers(build_dataset("digits", None, 8)) == 0


def test_the_share_of_time_spent_waiting(monkeypatch):
    clock = itertools.count()  # seconds: a call of the clock takes one
    monkeypatch.setattr(loader.time, "perf_counter", lambda: float(next(clock)))
    timer = DataTimer(["x", "y"])  # 0
    assert next(timer) == "x" and next(timer) == "y"  # 1 2, 3 4
    assert timer.share() == 2 / 5  # 5, and 6 is the new start
    with pytest.raises(StopIteration):
        next(timer)  # 7 8
    assert timer.share() == 1 / 3  # 9


# Workers.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_an_error_that_ends_the_workers_and_the_loader_works_again(tmp_path, workers):
    images = ImageFolderImages(make_folder(tmp_path, {"a": 4}, size=(64, 64)), 16)
    batches = ImageLoader(images, GlobalBatchSampler(4, 1, 0, 1, 1, 0), workers, False)
    path = Path(images.path(2))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as e:
        list(batches)
    assert str(path) in str(e.value)
    assert str(e.value).startswith("cannot read image") and "Traceback" not in str(e.value)
    assert set(multiprocessing.active_children()) <= before  # none of the workers is left
    path.write_bytes(whole)
    assert len(list(batches)) == 4
    for _ in batches:
        break  # leaving early and coming back starts the epoch over
    assert len(list(batches)) == 4


class WithoutSharedMemory(Digits):
    """A data set whose workers fail as torch's do where /dev/shm is full."""

    def __getitem__(self, i):
        raise RuntimeError("unable to write to file </torch_12_34_5>: No space left on device (28)")


def test_workers_that_lack_shared_memory_are_explained():
    batches = ImageLoader(WithoutSharedMemory(8), [[0, 1], [2, 3]], num_workers=2, pin_memory=False)
    with pytest.raises(
        DataError, match=r"MB of /dev/shm are free and 2 workers need about .*--shm-size.*--num_workers 0"
    ):
        next(iter(batches))


def test_workers_end_with_a_loader_that_the_garbage_collector_finds():
    """As one is in the frames of an exception. torch came too late to end them: they stayed, and so did pytest."""
    before = set(multiprocessing.active_children())
    cycle = [ImageLoader(Digits(8), [[0], [1]], 2, False)]
    assert len(list(cycle[0])) == 2
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    cycle.append(cycle)
    del cycle
    start = time.monotonic()
    gc.collect()
    assert not any(worker.is_alive() for worker in workers) and time.monotonic() - start < 5


def test_workers_survive_what_the_whole_job_is_sent_and_end_when_the_loader_is_closed():
    loader_ = ImageLoader(Digits(16), GlobalBatchSampler(1797, 4, 0, 1, 1, 0), 2, False)
    before = set(multiprocessing.active_children())
    batches = iter(loader_)
    for _ in range(2):  # one of each: both have begun
        next(batches)
    workers = set(multiprocessing.active_children()) - before
    for name in ("TERM", "INT", "USR1"):  # from another process than their parent
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(batches)) == 1797 // 4 - 2
    start = time.monotonic()
    loader_.close()
    assert [worker.exitcode for worker in workers] == [0, 0] and time.monotonic() - start < 5


LEFT_OPEN = """
import multiprocessing
from util.data.datasets import Digits
from util.data.loader import ImageLoader
batches = iter(ImageLoader(Digits(8), [[0]] * 20, 2, False))
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


def test_workers_end_when_the_interpreter_exits():
    process = subprocess.Popen([sys.executable, "-c", LEFT_OPEN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = process.stdout.readline().split()
    assert len(pids) == 2 and process.wait(60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
