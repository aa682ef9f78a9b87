"""What takes the place of a bad image, and how the log learns of it."""

import errno
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from tests.util.data.image_files import BAD, SIZE, make_folder
from util.data import bad_images, crop
from util.data.bad_images import BadImageLog, Replacement, same_class
from util.data.datasets import BadImage, DataError, ImageFolderImages, Images
from util.data.loader import GlobalBatchSampler, build_loader
from util.dist.context import DistContext

COUNTS = {"a": 6, "b": 7, "c": 5}
HOLES = {"a/2": "empty", "a/3": "text", "a/5": "truncated jpeg", "c/4": "bomb", "c/0": "floats"}
REPLACED_BY = {"a/2": "a/4", "a/3": "a/4", "a/5": "a/0", "c/4": "c/1", "c/0": "c/1"}  # the next one, read off by eye


@pytest.fixture
def folder(tmp_path):
    """18 images of noise, 5 of them bad."""
    make_folder(tmp_path / "train", COUNTS, size=(SIZE, SIZE))
    for name, kind in HOLES.items():
        (tmp_path / "train" / f"{name}.png").write_bytes(BAD[kind][0])
    return tmp_path / "train"


def open_skipping(folder):
    images = ImageFolderImages(folder, SIZE)
    images.bad_image_log = BadImageLog(images)
    return images


def name_of(file):
    return f"{Path(file).parent.name}/{Path(file).stem}"


def replaced(images):
    return {name_of(r.file): name_of(r.replaced_by) for r in images.bad_image_log.met.values()}


def expected(images, i):
    """The pixels of image i, or of the image in its place."""
    name = name_of(images.path(i))
    with Image.open(images.folder / f"{REPLACED_BY.get(name, name)}.png") as image:
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def test_order_of_candidates_against_a_walk_around_the_class():
    labels = np.random.default_rng(0).integers(0, 4, 60)  # in no order, as in a part of a data set
    images = Images(SIZE, list("abcd"), labels)
    for i in range(60):
        walk = [(i + k) % 60 for k in range(1, 60)]
        assert list(same_class(images, i)) == [j for j in walk if labels[j] == labels[i]]


@pytest.mark.parametrize("workers, ranks, start_step", [(0, 1, 0), (2, 1, 1), (0, 2, 1), (2, 2, 0)])
def test_replacements_do_not_depend_on_workers_ranks_or_the_start(folder, workers, ranks, start_step):
    met = {}
    for rank in range(ranks):
        images = open_skipping(folder)
        sampler = GlobalBatchSampler(len(images), 6 // ranks, rank, ranks, 1, seed=1)
        loader = build_loader(images, sampler, workers, False)
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


def test_only_batches_that_were_handed_out_are_noted(folder):
    """Not those that the workers have read ahead."""
    images = open_skipping(folder)
    batches = iter(build_loader(images, [[i] for i in range(18)], 2, False))
    for _ in range(3):
        next(batches)
    assert replaced(images) == {"a/2": "a/4"}


def test_without_the_flag_the_first_bad_image_is_an_error(folder):
    with pytest.raises(BadImage, match=r"a/2\.png: the file is empty"):
        list(build_loader(ImageFolderImages(folder, SIZE), [[0, 1], [2, 4]], 0, False))
    with pytest.raises(BadImage, match=r"a/2\.png"):  # nor does the data set itself ever give another image
        open_skipping(folder)[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_readable_images_is_named(folder, workers):
    for file in (folder / "b").iterdir():
        file.write_bytes(b"")
    loader = build_loader(open_skipping(folder), [[0], [7]], workers, False)
    with pytest.raises(DataError, match=r"no image of class b can be read: .*b/1\.png: the file is empty"):
        list(loader)


def failing(path, code, where):
    """`open` that fails for a path, at once or when the file is read."""

    class Failing(BytesIO):
        def fileno(self):
            return os.open(os.devnull, os.O_RDONLY)

        def read(self, *size):
            raise OSError(code, os.strerror(code))

    def fake(name, *mode):
        if name != path:
            return open(name, *mode)
        if where == "open":
            raise OSError(code, os.strerror(code), name)
        return Failing()

    return fake


@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOENT])
def test_errors_of_the_file_system_are_never_skipped(folder, monkeypatch, code, where):
    images = open_skipping(folder)
    for i, at in ((1, [1]), (4, [2])):  # the image itself, and the one in the place of a bad one
        monkeypatch.setattr(crop, "open", failing(images.path(i), code, where), raising=False)
        with pytest.raises(DataError, match="cannot read the file") as error:
            list(build_loader(images, [at], 0, False))
        assert images.path(i) in str(error.value) and os.strerror(code) in str(error.value)
        assert not isinstance(error.value, BadImage)


# The log.


class Log:
    """In the place of a RunLog."""

    def __init__(self):
        self.events, self.texts = [], []

    def log(self, event, step, values):
        self.events.append((event, step, values["file"], values["reason"], values["replaced_by"]))

    def info(self, text):
        self.texts.append(text)


def log_of(total):
    return BadImageLog(Images(SIZE, ["a"], np.zeros(total, dtype=np.int64)))


def replacements(*names):
    return [Replacement(f"/d/{name}.png", "why", f"/d/{name}-other.png") for name in names]


def test_each_replaced_image_is_reported_once():
    log, bad = Log(), log_of(10_000)
    bad.report(DistContext(), log, 1)
    assert log.events == log.texts == []
    bad.add(replacements("b", "a", "b"))
    bad.report(DistContext(), log, 2)
    bad.add(replacements("a", *"cdefgh"))
    bad.report(DistContext(), log, 3)
    bad.report(DistContext(), log, 4)
    assert [event[:3] for event in log.events] == [
        ("bad_image", 2 if name in "ab" else 3, f"/d/{name}.png") for name in "abcdefgh"
    ]
    assert log.events[0][3:] == ("why", "/d/a-other.png")
    assert len(log.texts) == 2 and "2 bad images (2 so far)" in log.texts[0] and "6 bad images (8 so" in log.texts[1]
    assert "/d/a.png: why" in log.texts[0]


@pytest.mark.parametrize("total, most", [(10_000, 100), (100, bad_images.MAX_COUNT), (12, bad_images.MAX_COUNT)])
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
    assert [event[2] for event in log.events] == [f"/d/{name}.png" for name in "abcd"]
    if rank == 1:
        bad.add(replacements("a", *range(bad_images.MAX_COUNT)))
    with pytest.raises(DataError, match="54 of 200") as error:  # a, b, c, d and MAX_COUNT more, on both ranks
        bad.report(ctx, log, 6)
    assert error.value.on_all_ranks and len(log.events) == 4 + bad_images.MAX_COUNT
    dist.destroy_process_group()


def test_two_ranks_report_what_either_has_met(tmp_path):
    mp.start_processes(_report_of_one_rank, (tmp_path,), nprocs=2, start_method="fork")
