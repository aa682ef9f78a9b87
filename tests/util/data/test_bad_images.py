"""What takes the place of a bad image, and how the log learns of it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from tests.util.data.image_files import SIZE, damage, make_folder
from util.data import bad_images
from util.data.bad_images import BadImageLog, Replacing
from util.data.datasets import DataError, ImageFolderImages, Images
from util.data.images import BadImage
from util.data.loader import GlobalBatchSampler, ImageLoader
from util.dist.context import DistContext

REPLACED_BY = {"a/2": "a/4", "a/3": "a/4", "a/5": "a/0", "c/4": "c/1", "c/0": "c/1"}  # the next one, read off by eye


@pytest.fixture
def folder(tmp_path):
    """18 images of noise, 5 of them bad."""
    return damage(make_folder(tmp_path / "train", {"a": 6, "b": 7, "c": 5}, size=(SIZE, SIZE)))


def open_skipping(folder):
    images = ImageFolderImages(folder, SIZE)
    images.bad_image_log = BadImageLog(images)
    return images


def name_of(file):
    return f"{Path(file).parent.name}/{Path(file).stem}"


def replaced(images):
    return {name_of(r["file"]): name_of(r["replaced_by"]) for r in images.bad_image_log.new.values()}


def expected(images, i):
    """The pixels of image i, or of the image in its place."""
    name = name_of(images.path(i))
    with Image.open(images.folder / f"{REPLACED_BY.get(name, name)}.png") as image:
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class HalfBad(Images):
    """60 images whose classes are in no order, as in a part of a data set; item i is the number i."""

    def __init__(self):
        rng = np.random.default_rng(0)
        super().__init__(1, list("abcd"), rng.integers(0, 4, 60))
        self.is_bad = rng.random(60) < 0.5

    def path(self, i):
        return str(i)

    def __getitem__(self, i):
        if self.is_bad[i]:
            raise BadImage.at(self.path(i), "why", "")
        return i, int(self.labels[i])


def test_the_replacement_is_the_next_good_image_of_the_class_around_the_end():
    images = HalfBad()
    for i in range(60):
        walk = [(i + k) % 60 for k in range(60)]
        good = next(j for j in walk if images.labels[j] == images.labels[i] and not images.is_bad[j])
        replacement = {"file": str(i), "reason": "why", "replaced_by": str(good)} if images.is_bad[i] else None
        assert Replacing(images)[i] == (good, images.labels[i], replacement)


@pytest.mark.parametrize("workers, ranks, start_step", [(0, 1, 0), (2, 1, 1), (0, 2, 1), (2, 2, 0)])
def test_replacements_do_not_depend_on_workers_ranks_or_the_start(folder, workers, ranks, start_step):
    met = {}
    for rank in range(ranks):
        images = open_skipping(folder)
        sampler = GlobalBatchSampler(len(images), 6 // ranks, rank, ranks, 1, seed=1)
        loader = ImageLoader(images, sampler, workers, False)
        sampler.set_epoch(3, start_step)
        wanted = [i for batch in sampler for i in batch]
        x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert len(x) == (18 - 6 * start_step) // ranks
        assert torch.equal(x, torch.stack([expected(images, i) for i in wanted]))
        assert torch.equal(y, torch.from_numpy(images.labels[wanted]))
        bad = {name_of(images.path(i)) for i in wanted} & set(REPLACED_BY)
        assert replaced(images) == {name: REPLACED_BY[name] for name in bad}
        met |= replaced(images)
    assert met == REPLACED_BY or (start_step and met.items() <= REPLACED_BY.items())


def test_batches_that_workers_have_read_ahead_are_not_noted(folder):
    images = open_skipping(folder)
    batches = iter(ImageLoader(images, [[i] for i in range(18)], 2, False))
    for _ in range(3):
        next(batches)
    assert replaced(images) == {"a/2": "a/4"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_readable_images_is_named(folder, workers):
    for file in (folder / "b").iterdir():
        file.write_bytes(b"")
    loader = ImageLoader(open_skipping(folder), [[0], [7]], workers, False)
    with pytest.raises(DataError, match=r"no image of class b can be read: .*b/1\.png: the file is empty"):
        list(loader)


@pytest.mark.parametrize("file, error", [("/proc/self/mem", "Input/output error"), ("/nowhere", "No such file")])
def test_errors_of_the_file_system_are_never_skipped(folder, file, error):
    images = open_skipping(folder)
    for i, wanted in ((1, 1), (4, 2)):  # the image itself, and the one in the place of a bad one
        os.remove(images.path(i))
        os.symlink(file, images.path(i))  # a file whose reading fails, and one that cannot be opened
        with pytest.raises(DataError, match=f"cannot read the file {images.path(i)}: {error}") as raised:
            list(ImageLoader(images, [[wanted]], 0, False))
        assert not isinstance(raised.value, BadImage)


# The log.


class Log:
    """In the place of a RunLog."""

    def __init__(self):
        self.events, self.texts = [], []

    def log(self, event, step, values):
        self.events.append((event, step, values))

    def info(self, text):
        self.texts.append(text)


def log_of(total):
    return BadImageLog(Images(SIZE, ["a"], np.zeros(total, dtype=np.int64)))


def replacements(*names):
    return [{"file": f"/d/{name}.png", "reason": "why", "replaced_by": f"/d/{name}-other.png"} for name in names]


def test_each_replaced_image_is_reported_once():
    log, bad = Log(), log_of(10_000)
    bad.report(DistContext(), log, 1)
    assert log.events == log.texts == []
    bad.add(replacements("b", "a", "b"))
    bad.report(DistContext(), log, 2)
    bad.add(replacements("a", *"cdefgh"))
    bad.report(DistContext(), log, 3)
    bad.report(DistContext(), log, 4)
    steps = dict.fromkeys("ab", 2) | dict.fromkeys("cdefgh", 3)
    assert log.events == [("bad_image", step, *replacements(name)) for name, step in steps.items()]
    first, second = log.texts
    assert "2 bad images (2 so far), for example /d/a.png: why" in first and "6 bad images (8 so far)" in second


@pytest.mark.parametrize("total, most", [(10_000, 100), (100, bad_images.MAX_COUNT)])
def test_a_broken_copy_of_a_data_set_is_an_error(total, most):
    log, bad = Log(), log_of(total)
    bad.add(replacements(*range(most)))
    bad.report(DistContext(), log, 1)
    bad.add(replacements("one more"))
    with pytest.raises(DataError, match=f"{most + 1} of {total} images .*1%") as error:
        bad.report(DistContext(), log, 2)
    assert error.value.on_all_ranks and len(log.events) == most + 1


def _report_of_one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ctx, log, bad = DistContext(rank, 2), Log(), log_of(200)
    bad.add(replacements(*("cab", "bd")[rank]))
    bad.report(ctx, log, 5)
    assert log.events == [("bad_image", 5, *replacements(name)) for name in "abcd"]
    if rank == 1:
        bad.add(replacements("a", *range(bad_images.MAX_COUNT)))
    with pytest.raises(DataError, match="54 of 200") as error:  # a, b, c, d and MAX_COUNT more, on both ranks
        bad.report(ctx, log, 6)
    assert error.value.on_all_ranks and len(log.events) == 4 + bad_images.MAX_COUNT
    dist.destroy_process_group()


def test_two_ranks_report_what_either_has_met(tmp_path):
    mp.start_processes(_report_of_one_rank, (tmp_path,), nprocs=2, start_method="fork")
