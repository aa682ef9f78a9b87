"""Image caches: the same items as the folder's, whatever interrupts the writing; damage is found.

Blocks are made small enough here that a few images fill several.
"""

import errno
import os
import resource
import shutil

import numpy as np
import pytest
import torch

from tests.util.data.image_files import BAD, SIZE, make_folder, noise_image, save_modes
from util import io
from util.data import cache as cache_file
from util.data import datasets
from util.data.bad_images import MAX_COUNT, BadImageLog
from util.data.cache import CachedImages, Index, damaged_blocks, write_cache
from util.data.crop import read_crop
from util.data.datasets import BadImage, DataError, ImageFolderImages, build_dataset
from util.data.loader import GlobalBatchSampler, build_loader

COUNTS = {"a": 6, "b": 7, "c": 5}  # blocks of 5, 5, 5 and 3 images
IMAGE = 3 * SIZE**2  # bytes


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache_file, "BLOCK_BYTES", 5 * IMAGE + 1)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images" / "train", COUNTS, size=(21, 18)).parent


@pytest.fixture
def cache(folder, tmp_path):
    write(folder, tmp_path / "cache")
    return tmp_path / "cache"


def write(folder, out, **options):
    return write_cache(ImageFolderImages(folder, SIZE), out / "train", **options)


def assert_same_items(cached, images):
    assert isinstance(cached, CachedImages) and isinstance(images, ImageFolderImages)
    for name in ("in_memory", "img_size", "class_names", "num_classes"):
        assert getattr(cached, name) == getattr(images, name), name
    assert cached.labels.dtype == images.labels.dtype and np.array_equal(cached.labels, images.labels)
    assert len(cached) == len(images) > 0
    for i in range(len(images)):
        (x, y), (expected, label) = cached[i], images[i]
        assert torch.equal(x, expected) and x.dtype == expected.dtype and x.is_contiguous(), images.path(i)
        assert y == label and type(y) is int and cached.path(i) == images.path(i)


def test_items_are_those_of_the_folder(tmp_path):
    """Of every mode, odd sizes, names that are not UTF-8, folders in class folders, two splits."""
    make_folder(tmp_path / "train", {"b": 2}, size=(97, 41))
    save_modes(tmp_path / "train" / "a")
    (tmp_path / "train" / "b" / "more").mkdir()
    for name, size in {"more/tall.jpg": (9, 200), "one.png": (1, 1), os.fsdecode(b"\xff\xe4.png"): (16, 16)}.items():
        noise_image(*size).save(tmp_path / "train" / "b" / name)
    (tmp_path / "test").mkdir()
    shutil.copytree(tmp_path / "train" / "b", tmp_path / "test" / "b")
    make_folder(tmp_path / "test", {"a": 3}, size=(50, 50))
    out = tmp_path / "cache"
    for split in ("train", "val"):
        write_cache(ImageFolderImages(tmp_path, SIZE, split), out / split, num_threads=2)
    for path in (out, str(out), out / "train"):
        assert_same_items(build_dataset("imagefolder", path, SIZE), ImageFolderImages(tmp_path, SIZE))
        assert_same_items(build_dataset("imagefolder", path, SIZE, "val"), ImageFolderImages(tmp_path, SIZE, "val"))
    images = ImageFolderImages(tmp_path, SIZE)
    crops = [read_crop(images.path(i), SIZE).transpose(2, 0, 1) for i in range(len(images))]
    assert np.array_equal(np.load(out / "train" / "images.npy"), crops)  # any program can read it
    cached = build_dataset("imagefolder", out, SIZE)
    cached[3][0].zero_()  # an item is no view
    assert torch.equal(cached[3][0], images[3][0]) and torch.equal(cached[-1][0], cached[len(images) - 1][0])
    with pytest.raises(IndexError):
        cached[len(images)]


def test_batches_are_those_of_the_folder(cache, folder):
    batches = []
    for path, number in ((folder, 0), (cache, 2)):
        sampler = GlobalBatchSampler(18, 4, 0, 1, 1, seed=5)
        sampler.set_epoch(1)
        batches.append(list(build_loader(build_dataset("imagefolder", path, SIZE), sampler, number, False)))
    assert len(batches[0]) == len(batches[1]) == 4
    for (x, y), (x_cached, y_cached) in zip(*batches, strict=True):
        assert torch.equal(x, x_cached) and torch.equal(y, y_cached)


# Interrupted.


def decoded(monkeypatch):
    """The files that are decoded from now on."""
    read = []
    monkeypatch.setattr(datasets, "read_crop", lambda path, size: read.append(path) or read_crop(path, size))
    return read


def test_it_continues_wherever_it_was_interrupted(cache, folder, monkeypatch):
    """Interrupted before each rename of a JSON file: the list of files, the index, and the index after each block."""
    whole = (cache / "train" / "images.npy").read_bytes()
    for n in range(6):
        shutil.rmtree(cache)
        renames = []

        def replace(*names, n=n, renames=renames):
            if len(renames) == n:
                raise KeyboardInterrupt
            renames.append(os.rename(*names))

        with monkeypatch.context() as patch:
            patch.setattr(io.os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                write(folder, cache)
        if n > 1:  # there is an index
            with pytest.raises(DataError, match=f"not finished, {6 - n} blocks are missing: run the same"):
                build_dataset("imagefolder", cache, SIZE)
        with monkeypatch.context() as patch:
            read = decoded(patch)
            write(folder, cache)
            assert len(read) == 18 - 5 * max(0, n - 2) and (cache / "train" / "images.npy").read_bytes() == whole
            write(folder, cache)
            assert len(read) == 18 - 5 * max(0, n - 2)  # nothing of a finished cache is decoded again


@pytest.mark.parametrize("change", ["size", "files", "decoder", "foreign", "no cache"])
def test_another_cache_in_the_same_folder_is_refused(cache, folder, monkeypatch, change):
    size, match, before = SIZE, change, (cache / "train" / "images.npy").read_bytes()
    if change == "size":
        size, match = 8, "'img_size': 16.*expected.*'img_size': 8"
    elif change == "files":
        noise_image(20, 20).save(folder / "train" / "a" / "new.png")
        match = "files_hash"
    elif change == "decoder":
        monkeypatch.setattr(cache_file.features, "version", lambda name: "0")
    elif change == "foreign":
        (cache / "train" / "cache.json").write_text('{"version": 9}')
        match = "version 9, expected 2"
    else:
        (cache / "train" / "cache.json").rename(cache / "train" / "notes.txt")
        match = r"holds notes\.txt"
    with pytest.raises(DataError, match=match):
        write_cache(ImageFolderImages(folder, size), cache / "train")
    assert (cache / "train" / "images.npy").read_bytes() == before
    with pytest.raises(DataError, match="no part of an image cache"):  # nor is the image folder written to
        write(folder, folder)


def test_too_small_a_disk_is_refused_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 5 * IMAGE))
    read = decoded(monkeypatch)
    with pytest.raises(DataError, match=r"too small: it needs \S+ GB more"):
        write(folder, tmp_path / "cache")
    assert read == []


# Damage.


def edit_index(part, **changes):
    io.write_json(part / "cache.json", {**io.read_json(part / "cache.json"), **changes})


def flip_a_bit(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated pixels": (lambda c: os.truncate(c / "images.npy", 3000), r"images\.npy is missing, damaged"),
    "missing pixels": (lambda c: os.remove(c / "images.npy"), r"images\.npy is missing, damaged"),
    "other pixels": (lambda c: np.save(c / "images.npy", np.zeros(3)), r"damaged or not uint8 \(18, 3, 16, 16\)"),
    "missing list": (lambda c: os.remove(c / "files.json"), r"files\.json is missing or damaged"),
    "altered list": (lambda c: flip_a_bit(c / "files.json", 20), r"files\.json is missing or damaged"),
    "half an index": (lambda c: os.truncate(c / "cache.json", 90), "damaged or has another layout"),
    "former layout": (lambda c: edit_index(c, version=1), "version 1, expected 2.*make it again .*cache`"),
    "another cache.json": (lambda c: (c / "cache.json").write_text("[1]"), "damaged or has another layout"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_when_a_cache_is_opened(cache, kind):
    damage, match = DAMAGE[kind]
    damage(cache / "train")
    with pytest.raises(DataError, match=match) as error:
        build_dataset("imagefolder", cache, SIZE)
    assert str(cache / "train") in str(error.value)


@pytest.mark.parametrize("kind", ["truncated pixels", "missing pixels", "other pixels", "missing list", "altered list"])
def test_the_command_that_a_message_names_repairs_the_cache(cache, folder, kind):
    DAMAGE[kind][0](cache / "train")
    write(folder, cache)
    assert_same_items(build_dataset("imagefolder", cache, SIZE), ImageFolderImages(folder, SIZE))


def test_a_cache_refuses_another_size_and_a_split_that_it_lacks(cache):
    with pytest.raises(DataError, match=r"holds images of 16 pixels, not of 32"):
        build_dataset("imagefolder", cache, 32)
    with pytest.raises(DataError, match="has no val images"):
        build_dataset("imagefolder", cache, SIZE, "val")


def test_a_flipped_bit_is_found_and_its_block_made_again(cache, folder, monkeypatch):
    path = cache / "train" / "images.npy"
    whole, index = path.read_bytes(), Index.load(cache / "train")
    assert damaged_blocks(cache / "train", index) == []
    flip_a_bit(path, len(whole) - 8 * IMAGE)  # in image 10, the first of block 2
    assert len(build_dataset("imagefolder", cache, SIZE)) == 18  # opening reads no pixels
    assert damaged_blocks(cache / "train", index) == [2]
    read = decoded(monkeypatch)
    write(folder, cache)
    assert path.read_bytes() == whole and len(read) == 5


def test_a_file_that_fails_while_it_is_in_use(cache, monkeypatch):
    cached = build_dataset("imagefolder", cache, SIZE)
    path = cache / "train" / "images.npy"
    os.truncate(path, path.stat().st_size - 12 * IMAGE)
    assert cached[5][0].shape == (3, SIZE, SIZE)
    with pytest.raises(DataError, match=r"images\.npy ends within image 6"):
        cached[6]

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    cached.bad_image_log = BadImageLog(cached)
    with pytest.raises(DataError, match=r"images\.npy: Input/output error") as error:
        list(build_loader(cached, [[0]], 0, False))
    assert not isinstance(error.value, BadImage)


def test_a_write_that_fails_leaves_a_cache_that_can_be_continued(folder, tmp_path):
    """Files may not be larger than three images."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * IMAGE, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write(folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(folder, tmp_path / "cache")
    assert_same_items(build_dataset("imagefolder", tmp_path / "cache", SIZE), ImageFolderImages(folder, SIZE))


# Bad images.

HOLES = {"a/2": "empty", "a/3": "text", "b/6": "truncated jpeg"}  # in the first block, and in the third


def test_a_bad_image_is_named_and_has_no_pixels(folder, tmp_path, monkeypatch):
    whole = {name: (folder / "train" / f"{name}.png").read_bytes() for name in HOLES}
    for name, kind in HOLES.items():
        (folder / "train" / f"{name}.png").write_bytes(BAD[kind][0])
    with pytest.raises(BadImage, match=f"cannot read image {folder}/train/a/2.png: the file is empty"):
        write(folder, tmp_path / "cache")
    assert len(write(folder, tmp_path / "cache", skip_bad=True).bad) == 3
    images, cached = ImageFolderImages(folder, SIZE), build_dataset("imagefolder", tmp_path / "cache", SIZE)
    assert {images.path(i) for i in cached.bad} == {f"{folder}/train/{name}.png" for name in HOLES}
    for i in range(18):
        if i not in cached.bad:
            assert torch.equal(cached[i][0], images[i][0])
            continue
        with pytest.raises(BadImage) as ours:
            cached[i]
        with pytest.raises(BadImage) as theirs:
            images[i]
        assert ours.value.reason == theirs.value.reason and images.path(i) in str(ours.value)

    for name, content in whole.items():
        (folder / "train" / f"{name}.png").write_bytes(content)
    read = decoded(monkeypatch)
    assert write(folder, tmp_path / "cache").bad == {} and len(read) == 10
    assert_same_items(build_dataset("imagefolder", tmp_path / "cache", SIZE), ImageFolderImages(folder, SIZE))


def test_a_broken_copy_of_a_data_set_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(MAX_COUNT + 10):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"55 of 60 images .*1%"):  # after the block with the 51st
        write(tmp_path, tmp_path.with_name("cache-of-bad"), skip_bad=True)
