"""Image caches: the same items as the folder's, whatever interrupts the writing; damage is found; runs are the same.

Shards are made small enough here that a few images fill several.
"""

import errno
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data
import prepare_ref
from tests.conftest import listing, read_log, state_differences, train
from tests.test_bad_images import BAD
from tests.test_data import make_folder, noise_image, save_modes
from tests.test_reference import Colours
from util import cache_writer, data, files, loader
from util.bad_images import FEW, Replaced
from util.cache_writer import verify, write_cache
from util.data import BadImage, DataError, ImageFolderImages, build_dataset, read_crop
from util.image_cache import CachedImages
from util.loader import GlobalBatchSampler, Waiting, build_loader

SIZE = 16
PER_SHARD = 5
COUNTS = {"a": 6, "b": 7, "c": 5}  # shards of 5, 5, 5 and 3 images
ROOT = Path(prepare_data.__file__).parent


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_writer, "SHARD_BYTES", PER_SHARD * 3 * SIZE**2 + 1)
    monkeypatch.setattr(cache_writer, "BATCH", 2)


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "images" / "train", COUNTS, size=(21, 18))
    make_folder(tmp_path / "images" / "val", {"a": 1, "b": 2, "c": 1})
    return tmp_path / "images"


@pytest.fixture
def cache(folder, tmp_path):
    write_cache(folder, SIZE, tmp_path / "cache", 0)
    return tmp_path / "cache"


def index_of(part):
    return json.loads((part / "cache.json").read_text())


def assert_same_items(cached, images):
    assert isinstance(cached, CachedImages) and isinstance(images, ImageFolderImages)
    for name in ("name", "in_memory", "flip", "img_size", "class_names", "num_classes"):
        assert getattr(cached, name) == getattr(images, name), name
    assert cached.labels.dtype == images.labels.dtype and np.array_equal(cached.labels, images.labels)
    assert len(cached) == len(images) > 0
    for i in range(len(images)):
        (x, y), (expected, label) = cached[i], images[i]
        assert torch.equal(x, expected) and x.dtype == expected.dtype and x.is_contiguous(), images.path(i)
        assert y == label and type(y) is int and cached.path(i) == images.path(i)


# What a cache gives.


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
    write_cache(tmp_path, SIZE, out, 2)
    for path in (out, str(out), out / "train"):
        assert_same_items(build_dataset("imagefolder", path, SIZE), ImageFolderImages(tmp_path, SIZE))
        assert_same_items(build_dataset("imagefolder", path, SIZE, "val"), ImageFolderImages(tmp_path, SIZE, "val"))
    images = ImageFolderImages(tmp_path, SIZE)
    raw = np.concatenate([np.fromfile(p, dtype=np.uint8) for p in sorted((out / "train").glob("*.bin"))])
    crops = [read_crop(images.path(i), SIZE).transpose(2, 0, 1) for i in range(len(images))]
    assert np.array_equal(raw.reshape(-1, 3, SIZE, SIZE), crops)


def test_the_index_says_what_is_there(cache, folder):
    index = index_of(cache / "train")
    assert (index["version"], index["img_size"], index["num_images"], index["images_per_shard"]) == (1, SIZE, 18, 5)
    assert index["class_names"] == ["a", "b", "c"] and index["source"] == str(folder / "train")
    assert {"date", "command", "commit", "versions", "decoder"} <= index["made"].keys()
    assert [(cache / "train" / name).stat().st_size for name in index["shards"]] == [n * 768 for n in (5, 5, 5, 3)]
    for name, shard in index["shards"].items():
        assert shard == {"sha256": hashlib.sha256((cache / "train" / name).read_bytes()).hexdigest(), "bad": {}}
    assert sorted(p.name for p in (cache / "train").iterdir()) == sorted([*index["shards"], "cache.json", "files.json"])


def test_an_item_is_no_view_and_numbers_are_those_of_a_sequence(cache):
    cached = build_dataset("imagefolder", cache, SIZE)
    before = cached[3][0].clone()
    cached[3][0].zero_()
    assert torch.equal(cached[3][0], before) and torch.equal(cached[-1][0], cached[17][0])
    with pytest.raises(IndexError):
        cached[18]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(cache, folder, workers):
    batches = []
    for path, number in ((folder, 0), (cache, workers)):
        sampler = GlobalBatchSampler(18, 4, 0, 1, 1, seed=5)
        batches.append([])
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches[-1] += build_loader(build_dataset("imagefolder", path, SIZE), sampler, number, False)
    assert len(batches[0]) == len(batches[1]) == 8
    for (x, y), (x_cached, y_cached) in zip(*batches, strict=True):
        assert torch.equal(x, x_cached) and torch.equal(y, y_cached)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("val_split, steps", [(0.2, 4), ("val", 6)])
def test_a_run_is_the_same_to_the_bit(cache, folder, tmp_path, val_split, steps):
    settings = {"dataset": "imagefolder", "class_num": 3, "batch_size": 6, "val_split": val_split}
    first = train(tmp_path / "folder", data_path=folder, num_workers=0, **settings)
    second = train(tmp_path / "cached", data_path=cache, num_workers=1, **settings)
    assert state_differences(first, second) == []
    for event, lines in (("train", steps), ("val", 2)):
        ours, theirs = ([{**line, "seconds": 0} for line in read_log(run, event)] for run in (first, second))
        assert ours == theirs and len(ours) == lines
    assert train(first, data_path=cache, num_workers=0, epochs=3, **settings)  # a run may change over


def test_reference_statistics_are_the_same(cache, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_ref, "InceptionV3", Colours)
    monkeypatch.setattr(prepare_ref, "ensure_inception_weights", lambda path: None)
    for path, out in ((folder, "folder.npz"), (cache, "cache.npz")):
        words = ["--dataset", "imagefolder", "--data_path", str(path), "--img_size", str(SIZE), "--device", "cpu"]
        assert prepare_ref.main([*words, "--num_workers", "0", "--out", str(tmp_path / out)]) == 0
    with np.load(tmp_path / "folder.npz") as first, np.load(tmp_path / "cache.npz") as second:
        assert set(first) == set(second) and {"mu", "sigma", "features"} <= set(first)
        for name in set(first) - {"meta"}:
            assert np.array_equal(first[name], second[name]), name


# Interrupted.


def shards_of(cache):
    return {name: value for name, value in listing(cache).items() if name.endswith(("bin", "files.json"))}


def decoded(monkeypatch):
    """The files that are decoded from now on."""
    read = []
    monkeypatch.setattr(data, "read_crop", lambda path, size: read.append(path) or read_crop(path, size))
    return read


def test_it_goes_on_wherever_it_was_interrupted(cache, folder, tmp_path, monkeypatch):
    """Ended before the n-th file gets its name, for all n: the two lists, the index, and each shard in turn."""
    whole = shards_of(cache)
    for n in itertools.count():
        shutil.rmtree(cache)
        calls = itertools.count()

        def replace(*names, calls=calls, n=n):
            if next(calls) == n:
                raise KeyboardInterrupt
            os.rename(*names)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", replace)
            try:
                write_cache(folder, SIZE, cache, 0)
                break
            except KeyboardInterrupt:
                pass
        made = set(cache.rglob("*.bin"))
        noted = {i.parent / name for i in cache.rglob("cache.json") for name in index_of(i.parent)["shards"]}
        assert noted <= made and len(made - noted) <= 1
        if n < 10 and (cache / "train" / "cache.json").exists():  # 10 names: files, index, and 4 shards with the index
            with pytest.raises(DataError, match=r"not whole: .*shard-0000\d\.bin has not been written yet"):
                build_dataset("imagefolder", cache, SIZE)
        with monkeypatch.context() as patch:
            read = decoded(patch)
            write_cache(folder, SIZE, cache, 0)
        assert shards_of(cache) == whole
        assert len(read) == 22 - sum(path.stat().st_size // 768 for path in noted) and len(verify(cache)) == 2
    assert n == 14  # four names more for val, which has one shard


KILLED = """
import sys, time
from util import cache_writer, data
cache_writer.SHARD_BYTES, cache_writer.BATCH = 5 * 768, 2
read = data.read_crop
data.read_crop = lambda path, size: time.sleep(0.1) or read(path, size)
cache_writer.write_cache(sys.argv[1], 16, cache_writer.Path(sys.argv[2]), 2)
"""


def test_it_goes_on_after_a_kill(cache, folder, monkeypatch):
    whole = shards_of(cache)
    shutil.rmtree(cache)
    process = subprocess.Popen([sys.executable, "-c", KILLED, folder, cache], cwd=ROOT)
    end = time.monotonic() + 120
    while not (cache / "train" / "shard-00001.bin").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cache / "val").exists() and not (cache / "train" / "shard-00003.bin").exists()
    with pytest.raises(DataError, match=r"has not been written yet.*prepare_data\.py cache"):
        build_dataset("imagefolder", cache, SIZE)
    read = decoded(monkeypatch)
    write_cache(folder, SIZE, cache, 0)
    assert shards_of(cache) == whole and not list(cache.rglob("*.tmp")) and len(read) <= 17


def test_a_whole_cache_is_recognised(cache, folder, monkeypatch):
    before, read = listing(cache), decoded(monkeypatch)
    lines = write_cache(folder, SIZE, cache)
    assert read == [] and listing(cache) == before and all("complete already" in line for line in lines)


@pytest.mark.parametrize("change", ["size", "files", "decoder", "foreign"])
def test_another_cache_in_the_same_folder_is_refused(cache, folder, monkeypatch, change):
    os.remove(cache / "train" / "shard-00002.bin")
    size, match = SIZE, {"size": "16 pixels, not of 8", "files": "other files.*19 now", "decoder": "decoder"}
    if change == "size":
        size = 8
    elif change == "files":
        noise_image(20, 20).save(folder / "train" / "a" / "new.png")
    elif change == "decoder":
        monkeypatch.setattr(cache_writer, "decoder", lambda: {"pil": "0"})
    else:
        (cache / "train" / "notes.txt").write_text("mine")
    before = listing(cache)
    with pytest.raises(DataError, match=match.get(change, r"notes\.txt")):
        write_cache(folder, size, cache, 0)
    assert listing(cache) == before


def test_the_image_folder_is_not_written_to(folder):
    before = listing(folder)
    with pytest.raises(DataError, match="no part of an image cache"):
        write_cache(folder, SIZE, folder, 0)
    assert listing(folder) == before


def test_too_small_a_disk_is_refused_before_the_work(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 13_000))
    read = decoded(monkeypatch)
    with pytest.raises(DataError, match=r"13\.8 kB more and 13 kB are free"):
        write_cache(folder, SIZE, tmp_path / "cache", 0)
    assert read == [] and "18 images of 16 pixels take 13.8 kB in 4 shards" in capsys.readouterr().out


def test_a_write_that_fails_is_a_sentence(folder, tmp_path, capsys):
    """Files may not be larger than three images, so the first shard cannot be written."""
    cache = tmp_path / "cache"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 768, limits[1]))
    words = ["cache", "--data_path", str(folder), "--img_size", str(SIZE), "--out", str(cache), "--num_workers", "0"]
    try:
        assert prepare_data.main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert f"cannot be written to {cache / 'train'}: {os.strerror(errno.EFBIG)}" in said and said.count("\n") == 1
    assert not list(cache.rglob("*.tmp"))
    assert prepare_data.main(words) == 0
    assert_same_items(build_dataset("imagefolder", cache, SIZE), ImageFolderImages(folder, SIZE))


# Damage.


def edit_index(cache, **changes):
    path = cache / "train" / "cache.json"
    path.write_text(json.dumps({**index_of(cache / "train"), **changes}))


def flip_a_bit(path, where=1000):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated shard": (lambda c: os.truncate(c / "train/shard-00001.bin", 3000), "3000 bytes instead of 3840"),
    "longer shard": (lambda c: os.truncate(c / "train/shard-00003.bin", 3840), "3840 bytes instead of 2304"),
    "missing shard": (lambda c: os.remove(c / "train/shard-00003.bin"), r"shard-00003\.bin is missing"),
    "missing list": (lambda c: os.remove(c / "train/files.json"), r"files\.json of the image cache is missing"),
    "altered list": (lambda c: flip_a_bit(c / "train/files.json", 20), r"files\.json is not the one"),
    "half an index": (lambda c: os.truncate(c / "train/cache.json", 90), "index of the image cache.*cannot be read"),
    "another version": (lambda c: edit_index(c, version=2), "its version is 2, expected 1"),
    "another cache.json": (lambda c: (c / "train/cache.json").write_text("[1]"), "no index of an image cache"),
    "contradiction": (lambda c: edit_index(c, class_names=["a", "b"]), "contradict each other"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_when_a_cache_is_opened(cache, kind):
    damage, match = DAMAGE[kind]
    damage(cache)
    with pytest.raises(DataError, match=match) as error:
        build_dataset("imagefolder", cache, SIZE)
    assert str(cache / "train") in str(error.value)
    assert len(build_dataset("imagefolder", cache, SIZE, "val")) == 4


def test_what_a_cache_does_not_have_is_refused(cache):
    with pytest.raises(DataError, match=r"holds images of 16 pixels and --img_size is 32.*cache --img_size 32"):
        build_dataset("imagefolder", cache, 32)
    with pytest.raises(DataError, match="has no test images"):
        build_dataset("imagefolder", cache, SIZE, "test")
    shutil.rmtree(cache / "val")
    with pytest.raises(DataError, match="has no val images"):
        build_dataset("imagefolder", cache, SIZE, "val")


def test_a_bit_is_found_by_verify_and_its_shard_made_again(cache, folder, capsys):
    whole, path = listing(cache), cache / "train" / "shard-00001.bin"
    assert prepare_data.main(["verify", str(cache)]) == prepare_data.main(["verify", str(cache / "train")]) == 0
    flip_a_bit(path)
    assert len(build_dataset("imagefolder", cache, SIZE)) == 18  # opening reads no pixels
    capsys.readouterr()
    assert prepare_data.main(["verify", str(cache)]) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged" in said and said.count(".bin") == 1
    path.unlink()
    others = {p: p.stat().st_ino for p in cache.rglob("*.bin")}
    write_cache(folder, SIZE, cache, 0)
    assert shards_of(cache).items() <= whole.items() and all(p.stat().st_ino == i for p, i in others.items())
    assert prepare_data.main(["verify", str(cache)]) == 0


def test_a_file_that_fails_while_it_is_in_use(cache, monkeypatch):
    cached = build_dataset("imagefolder", cache, SIZE)
    os.truncate(cache / "train" / "shard-00001.bin", 768)
    assert cached[5][0].shape == (3, SIZE, SIZE)
    with pytest.raises(DataError, match=r"shard-00001\.bin ends within image 6"):
        cached[6]

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    cached.replaced = Replaced(18)
    with pytest.raises(DataError, match=r"shard-00000\.bin: Input/output error") as error:
        list(build_loader(cached, [[0]], 0, False))
    assert not isinstance(error.value, BadImage)


# Bad images.

HOLES = {"a/2": "empty", "a/3": "text", "b/6": "truncated jpeg"}  # in the first shard, and in the third


@pytest.fixture
def holed(folder):
    for name, kind in HOLES.items():
        (folder / "train" / f"{name}.png").write_bytes(BAD[kind][0])
    return folder


def test_a_bad_image_is_named_and_nothing_stands_for_it(holed, tmp_path, capsys):
    words = ["cache", "--data_path", str(holed), "--img_size", str(SIZE), "--out", str(tmp_path / "cache")]
    assert prepare_data.main([*words, "--num_workers", "1"]) == 2
    assert f"cannot read image {holed}/train/a/2.png: the file is empty" in capsys.readouterr().err
    assert prepare_data.main([*words, "--num_workers", "1", "--on_bad_image", "skip"]) == 0
    assert "3 of them cannot be read" in capsys.readouterr().out
    images, cached = ImageFolderImages(holed, SIZE), build_dataset("imagefolder", tmp_path / "cache", SIZE)
    assert {images.path(i) for i in cached.bad} == {f"{holed}/train/{name}.png" for name in HOLES}
    for i in range(18):
        if i not in cached.bad:
            assert torch.equal(cached[i][0], images[i][0])
            continue
        with pytest.raises(BadImage) as ours:
            cached[i]
        with pytest.raises(BadImage) as theirs:
            images[i]
        assert ours.value.reason == theirs.value.reason and images.path(i) in str(ours.value)

    whole = make_folder(tmp_path / "whole", COUNTS, size=(21, 18))  # the same images, and none is bad
    for name in HOLES:
        shutil.copy(whole / f"{name}.png", holed / "train" / f"{name}.png")
    untouched = (tmp_path / "cache" / "train" / "shard-00001.bin").stat().st_ino
    assert prepare_data.main([*words, "--num_workers", "0"]) == 0
    assert (tmp_path / "cache" / "train" / "shard-00001.bin").stat().st_ino == untouched
    assert_same_items(build_dataset("imagefolder", tmp_path / "cache", SIZE), ImageFolderImages(holed, SIZE))


@pytest.mark.usefixtures("tiny")
def test_a_run_with_bad_images_is_the_folders_run(holed, tmp_path, capsys):
    """The same images take the place of bad ones, the log names the same files; without the flag it does not start."""
    cache = tmp_path / "cache"
    write_cache(holed, SIZE, cache, 0, "skip")
    settings = {"dataset": "imagefolder", "class_num": 3, "batch_size": 6, "num_workers": 0, "val_split": 0.2}
    first = train(tmp_path / "folder", data_path=holed, on_bad_image="skip", **settings)
    second = train(tmp_path / "cached", data_path=cache, on_bad_image="skip", **settings)
    assert state_differences(first, second) == [] and len(read_log(first, "bad_image")) > 0
    for event in ("train", "bad_image"):
        assert read_log(first, event) == read_log(second, event)
    capsys.readouterr()
    train(tmp_path / "refused", code=2, data_path=cache, **settings)
    said = capsys.readouterr().err
    assert f"{holed}/train/a/2.png: the file is empty" in said and "--on_bad_image skip" in said
    assert not (tmp_path / "refused").exists()


def test_a_broken_copy_of_a_data_set_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(FEW + 10):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"55 of 60 images below .*1%"):  # after the shard with the 51st
        write_cache(tmp_path, SIZE, tmp_path.with_name("cache-of-bad"), 0, "skip")


# Speed.


def test_measure_prints_a_json_line(cache, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "SECONDS", 0.05)
    words = ["measure", "--data_path", str(cache), "--img_size", str(SIZE), "--batch_size", "4", "--num_workers", "0"]
    assert prepare_data.main(words) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["class"] == "CachedImages" and line["images_per_s"] > 0 and line["num_images"] == 18


def test_default_workers_of_a_cache(cache, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loader.default_workers(build_dataset("imagefolder", cache, SIZE)) == CachedImages.most_workers < 12


def test_the_share_of_time_spent_waiting(monkeypatch):
    clock = itertools.count()  # seconds: a call of the clock takes one
    monkeypatch.setattr(loader.time, "perf_counter", lambda: float(next(clock)))
    waiting = Waiting(["x", "y"])  # 0
    assert next(waiting) == "x" and next(waiting) == "y"  # 1 2, 3 4
    assert waiting.share() == 2 / 5  # 5, and 6 is the new start
    with pytest.raises(StopIteration):
        next(waiting)  # 7 8
    assert waiting.share() == 1 / 3  # 9


def test_command_line_errors(cache, folder, monkeypatch, capsys):
    words = ["cache", "--data_path", str(folder), "--img_size", str(SIZE), "--out", str(cache)]
    assert prepare_data.main([*words, "--num_workers", "-1"]) == 2 and "at least 0" in capsys.readouterr().err
    assert prepare_data.main(["verify", str(folder)]) == 2 and "holds no image cache" in capsys.readouterr().err

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "write_cache", interrupt)
    assert prepare_data.main(words) == 130 and "the same command goes on" in capsys.readouterr().err
