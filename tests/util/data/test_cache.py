"""Image caches: the same items as the folder's, whatever interrupts the writing; damage is found.

Blocks are made small enough here that a few images fill several.
"""

import errno
import gc
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch

from tests.util.data.image_files import SIZE, damage, interrupted_at_rename, make_folder, noise_image, save_modes
from util.data import blocks, datasets
from util.data import cache as cache_file
from util.data.bad_images import MAX_COUNT
from util.data.cache import CACHE, CachedImages, write_cache
from util.data.crop import read_crop
from util.data.datasets import DataError, ImageFolderImages, build_dataset
from util.data.images import BadImage

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


def open_cache(path, split="train"):
    return build_dataset("imagefolder", path, SIZE, split)


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
        for split in ("train", "val"):
            assert_same_items(open_cache(path, split), ImageFolderImages(tmp_path, SIZE, split))
    images = ImageFolderImages(tmp_path, SIZE)
    crops = [read_crop(images.path(i), SIZE).transpose(2, 0, 1) for i in range(len(images))]
    assert np.array_equal(np.load(out / "train" / "images.npy"), crops)  # any program can read it
    open_cache(out)[3][0].zero_()  # an item is no view
    assert torch.equal(open_cache(out)[3][0], images[3][0])


@pytest.mark.filterwarnings("error")
def test_its_file_is_closed_with_the_data_set(cache):
    before = os.listdir("/proc/self/fd")
    images = open_cache(cache)
    images[0], images[1]
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del images
    gc.collect()  # of a file that nobody closed, Python warns here
    assert os.listdir("/proc/self/fd") == before


def test_caches_of_this_format_are_opened_in_later_versions(tmp_path):
    """Written here without the code that is tested."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, SIZE, SIZE), dtype=np.uint8)
    files = {"a": ["0.png", "1.png"], "b": ["more/x.png"]}
    index = {
        "img_size": SIZE,
        "num_images": 3,
        "decoder": {"pil": "1"},
        "source": "/data/train",
        "made": {},
        "version": 2,
    }
    index["files_hash"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:10]
    index["block_size"], index["bad"] = 2, {"1": "truncated"}
    index["sha256"] = {
        str(k): hashlib.sha256(part.tobytes()).hexdigest() for k, part in enumerate((pixels[:2], pixels[2:]))
    }
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "images.npy", pixels)
    (tmp_path / "train" / "files.json").write_text(json.dumps(files))
    (tmp_path / "train" / "cache.json").write_text(json.dumps(index))
    cached = open_cache(tmp_path)
    assert CACHE.damaged_blocks(tmp_path / "train", index) == [] and cached.bad == {1: "truncated"}
    assert cached.class_names == ["a", "b"] and cached.path(2) == "/data/train/b/more/x.png"
    assert [(x.numpy().tolist(), y) for x, y in (cached[0], cached[2])] == [
        (pixels[0].tolist(), 0),
        (pixels[2].tolist(), 1),
    ]


# Interrupted.


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded."""
    read = []
    monkeypatch.setattr(datasets, "read_crop", lambda path, *rest: read.append(path) or read_crop(path, *rest))
    return read


def test_it_continues_wherever_it_was_interrupted(cache, folder, monkeypatch, decoded):
    """Interrupted before each rename of a JSON file: the list of files, the index, and the index after each block."""
    whole = (cache / "train" / "images.npy").read_bytes()
    for n in range(6):
        shutil.rmtree(cache)
        with interrupted_at_rename(monkeypatch, n):
            write(folder, cache)
        if n > 1:  # there is an index
            with pytest.raises(DataError, match=f"not finished, {6 - n} blocks are missing: run the same"):
                open_cache(cache)
        decoded.clear()
        write(folder, cache)
        assert len(decoded) == 18 - 5 * max(0, n - 2) and (cache / "train" / "images.npy").read_bytes() == whole
    decoded.clear()
    write(folder, cache)
    assert decoded == []  # nothing of a finished cache is decoded again


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("size", "img_size 16, expected 8"),
        ("files", "files_hash"),
        ("decoder", "decoder"),
        ("foreign", "version 9, expected 2"),
        ("no cache", r"holds images\.npy and no image cache"),
    ],
)
def test_another_cache_in_the_same_folder_is_refused(cache, folder, monkeypatch, change, match):
    before = (cache / "train" / "images.npy").read_bytes()
    if change == "files":
        noise_image(20, 20).save(folder / "train" / "a" / "new.png")
    elif change == "decoder":
        monkeypatch.setattr(cache_file.features, "version", lambda name: "0")
    elif change == "foreign":
        (cache / "train" / "cache.json").write_text('{"version": 9}')
    elif change == "no cache":
        (cache / "train" / "cache.json").unlink()
    with pytest.raises(DataError, match=match):
        write_cache(ImageFolderImages(folder, 8 if change == "size" else SIZE), cache / "train")
    assert (cache / "train" / "images.npy").read_bytes() == before


def test_an_image_folder_is_not_written_to(folder):
    with pytest.raises(DataError, match=r"train holds [abc] and no image cache: name an empty folder"):
        write(folder, folder)


def test_too_small_a_disk_is_refused_before_the_work(folder, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(blocks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 5 * IMAGE))
    with pytest.raises(DataError, match=r"too small: it needs \S+ GB more"):
        write(folder, tmp_path / "cache")
    assert decoded == []


# Damage.


def flip_a_bit(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated pixels": (lambda c: os.truncate(c / "images.npy", 3000), r"images\.npy is missing, damaged"),
    "other pixels": (lambda c: np.save(c / "images.npy", np.zeros(3)), r"damaged or not uint8 \(18, 3, 16, 16\)"),
    "altered list": (lambda c: flip_a_bit(c / "files.json", 20), r"files\.json is missing or damaged"),
    "half an index": (lambda c: os.truncate(c / "cache.json", 90), "damaged or has another layout"),
    "former layout": (
        lambda c: (c / "cache.json").write_text('{"version": 1}'),
        "version 1, expected 2.*make it again",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_when_a_cache_is_opened(cache, folder, kind):
    harm, match = DAMAGE[kind]
    harm(cache / "train")
    with pytest.raises(DataError, match=match) as error:
        open_cache(cache)
    assert str(cache / "train") in str(error.value)
    if CACHE.again in str(error.value):  # then that helps
        write(folder, cache)
        assert_same_items(open_cache(cache), ImageFolderImages(folder, SIZE))


def test_a_cache_refuses_another_size_and_a_split_that_it_lacks(cache):
    with pytest.raises(DataError, match=r"holds images of 16 pixels, not of 32"):
        build_dataset("imagefolder", cache, 32)
    with pytest.raises(DataError, match="has no val images"):
        open_cache(cache, "val")


def test_a_flipped_bit_is_found_and_its_block_made_again(cache, folder, decoded):
    path = cache / "train" / "images.npy"
    whole, index = path.read_bytes(), CACHE.read_index(cache / "train")
    assert CACHE.damaged_blocks(cache / "train", index) == []
    flip_a_bit(path, len(whole) - 8 * IMAGE)  # in image 10, the first of block 2
    assert len(open_cache(cache)) == 18  # opening reads no pixels
    assert CACHE.damaged_blocks(cache / "train", index) == ["2"]
    decoded.clear()
    write(folder, cache)
    assert path.read_bytes() == whole and len(decoded) == 5


def test_a_file_that_fails_while_it_is_in_use(cache, monkeypatch):
    cached = open_cache(cache)
    path = cache / "train" / "images.npy"
    os.truncate(path, path.stat().st_size - 12 * IMAGE)
    assert cached[5][0].shape == (3, SIZE, SIZE)
    with pytest.raises(DataError, match=r"images\.npy ends within image 6"):
        cached[6]

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DataError, match=r"images\.npy: Input/output error") as error:
        cached[0]
    assert not isinstance(error.value, BadImage)


# Bad images.

HOLES = {"a/2": "empty", "a/3": "text", "b/6": "truncated jpeg"}  # in the first block, and in the third


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_bad_image_is_named_has_no_pixels_and_can_be_repaired(folder, tmp_path, decoded, skip_bad):
    shutil.copytree(folder / "train", tmp_path / "whole")
    damage(folder / "train", HOLES)
    with pytest.raises(BadImage, match=f"cannot read image {folder}/train/a/2.png: the file is empty"):
        write(folder, tmp_path / "cache")
    assert len(write(folder, tmp_path / "cache", skip_bad=True)["bad"]) == 3
    images, cached = ImageFolderImages(folder, SIZE), open_cache(tmp_path / "cache")
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

    shutil.copytree(tmp_path / "whole", folder / "train", dirs_exist_ok=True)
    decoded.clear()
    assert write(folder, tmp_path / "cache", skip_bad=skip_bad)["bad"] == {} and len(decoded) == 10
    assert_same_items(open_cache(tmp_path / "cache"), ImageFolderImages(folder, SIZE))


def test_a_broken_copy_of_a_data_set_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(MAX_COUNT + 10):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"55 of 60 images .*1%, for example .*/a/0\.png"):  # in the block of the 51st
        write(tmp_path, tmp_path.with_name("cache-of-bad"), skip_bad=True)
