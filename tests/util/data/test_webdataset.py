"""Shards: items are those of the same files in an image folder; samples are those that WebDataset's library sees.

The shards are written and read again by that library, which the code under test does not use.
"""

import io
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import read_log, state_differences, train
from tests.test_resume import Killed, kill_at
from tests.util.data.image_files import BAD, SIZE, encoded, make_folder, noise_image, save_modes
from tools import prepare_data
from util.data import webdataset
from util.data.bad_images import BadImageLog
from util.data.blocks import list_files
from util.data.cache import CachedImages
from util.data.datasets import build_dataset
from util.data.images import BadImage, DataError, NoSplitError
from util.data.loader import ImageLoader

wds = pytest.importorskip("webdataset")


def write(images, pattern, order=None, count=5):
    """Write the files of an image folder as shards of `count` samples, with the library."""
    pattern.parent.mkdir(exist_ok=True)
    with wds.ShardWriter(str(pattern), maxcount=count, verbose=0) as writer:
        for i in range(len(images)) if order is None else order:
            name = os.path.basename(images.path(i))
            kind = {"webp": "webp", "jpg": "jpg"}.get(name.rpartition(".")[2], "png")  # others under a wrong name
            with open(images.path(i), "rb") as file:
                writer.write({"__key__": f"n{i:05d}_{i}", kind: file.read(), "cls": int(images.labels[i])})


def add(shard, files):
    """Write a shard of members: name -> content."""
    with tarfile.open(shard, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def open_shards(folder, split="train", **options):
    return build_dataset("webdataset", folder, SIZE, split, **options)


def assert_same_items(found, expected, numbers=None):
    numbers = range(len(expected)) if numbers is None else numbers
    assert len(found) == len(numbers)
    for i, n in enumerate(numbers):
        (x, y), (image, label) = found[i], expected[n]
        assert torch.equal(x, image) and x.is_contiguous() and y == label == found.labels[i] and type(y) is int


@pytest.fixture
def images(folder):
    return build_dataset("imagefolder", folder, SIZE)


@pytest.fixture
def shards(images, tmp_path):
    """Four shards, of 5, 5, 5 and 3 images."""
    write(images, tmp_path / "shards" / "imagenet1k-train-%06d.tar")
    return tmp_path / "shards"


def test_items_are_those_of_the_image_folder(tmp_path):
    """Of every mode, of JPEG and WebP, with alpha, in any order; also in another process."""
    save_modes(tmp_path / "images" / "a")
    make_folder(tmp_path / "images", {"b": 3}, size=(41, 97))
    for kind, name in (("JPEG", "x.jpg"), ("WEBP", "y.webp")):
        (tmp_path / "images" / "b" / name).write_bytes(encoded(noise_image(50, 40), kind))
    order = np.random.default_rng(0).permutation(14)
    write(build_dataset("imagefolder", tmp_path / "images", SIZE), tmp_path / "shards" / "%04d.tar", order)
    for channels in (3, 4):
        images = build_dataset("imagefolder", tmp_path / "images", SIZE, channels=channels)
        found = open_shards(tmp_path / "shards", channels=channels)
        assert_same_items(found, images, order)
        assert_same_items(pickle.loads(pickle.dumps(found)), images, order)  # as for processes that are spawned
    loader = ImageLoader(found, [[3, 1, 12], [0, 13]], 2, pin_memory=False)
    batches = [(x, y) for x, y in loader]
    loader.close()
    assert torch.equal(batches[0][0], torch.stack([found[i][0] for i in (3, 1, 12)]))
    assert batches[1][1].tolist() == found.labels[[0, 13]].tolist()


def test_samples_are_those_of_the_library(tmp_path):
    """Keys with folders and dots, members in any order, other kinds beside, hidden files, names of over 100 bytes."""
    png = {i: encoded(noise_image(9, 9, seed=i), "PNG") for i in range(5)}
    members = {
        "n01/x_1.PNG": png[0],
        "n01/x_1.cls": b"3\n",
        "n01/x_1.txt": b"a caption",
        "n02/x_1.json": b'{"label": 0, "width": 9}',  # the same name in another folder
        "n02/x_1.png": png[1],
        "a" * 150 + ".cls": b"1",
        "a" * 150 + ".png": png[2],
        "ü.seg.png": b"a mask",
        "ü.png": png[3],
        "ü.cls": b" 2",
        ".hidden": b"",
        "README": b"",
        "about.json": b'{"label": 99}',  # without an image
    }
    add(tmp_path / "0.tar", members)
    found = open_shards(tmp_path)
    theirs = [s for s in wds.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False) if "png" in s]
    assert len(theirs) == 4 and found.labels.tolist() == [3, 0, 1, 2] and found.class_names == list("0123")
    for i, sample in enumerate(theirs):
        image = Image.open(io.BytesIO(sample["png"]))
        assert found.path(i).lower() == f"{tmp_path}/0.tar/{sample['__key__']}.png"
        resized = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(found[i][0].permute(1, 2, 0), resized)


@pytest.mark.parametrize(
    ("train_name", "val_name"),
    [
        ("imagenet1k-train-%04d.tar", "imagenet1k-validation-%04d.tar"),
        ("train/%d.tar", "val/%d.tar"),
        ("x_%02d.tar", "val_%02d.tar"),
        ("train-%05d-of-00004.tar", "validation-%05d-of-00001.tar"),
    ],
)
def test_splits_are_told_by_name(folder, images, tmp_path, train_name, val_name):
    held_out = build_dataset("imagefolder", folder, SIZE, "val")
    for split, name in ((images, train_name), (held_out, val_name)):
        (tmp_path / "shards" / name).parent.mkdir(parents=True, exist_ok=True)
        write(split, tmp_path / "shards" / name)
    (tmp_path / "shards" / "._x.tar").write_bytes(b"of a Mac")
    assert_same_items(open_shards(tmp_path / "shards"), images)
    assert_same_items(open_shards(tmp_path / "shards", "val"), held_out)
    with pytest.raises(NoSplitError, match="no shards of the split test"):
        open_shards(tmp_path / "shards", "test")


def test_classes_have_names_and_can_be_chosen(shards, images, tmp_path):
    (shards / "classes.txt").write_text("ant\nbee\ncow\ndog\n")
    (tmp_path / "some.txt").write_text("cow\nant\n")
    assert open_shards(shards).class_names == ["ant", "bee", "cow", "dog"]
    part = open_shards(shards, labels_file=tmp_path / "some.txt")
    expected = [i for i, label in enumerate(images.labels) if label != 1]
    assert part.class_names == ["ant", "cow"] and part.labels.tolist() == [0] * 6 + [1] * 5
    assert all(torch.equal(part[i][0], images[n][0]) for i, n in enumerate(expected))
    assert part.path(6).endswith("imagenet1k-train-000002.tar/n00013_13.png")


def test_shards_are_scanned_once(shards, images, tmp_path, monkeypatch, capsys):
    """Also where their folder cannot be written; the command scans them again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scanned, scan, replacing = [], webdataset._scan, webdataset.replacing

    def refuse(path):
        if path.parent == shards:
            raise PermissionError(path)
        return replacing(path)

    monkeypatch.setattr(webdataset, "_scan", lambda shard: scanned.append(shard.name) or scan(shard))
    monkeypatch.setattr(webdataset, "replacing", refuse)
    for _ in range(2):
        assert_same_items(open_shards(shards), images)
    assert len(scanned) == 4 and len(list((tmp_path / "cache").rglob("train.index.npz"))) == 1
    assert len(list(shards.iterdir())) == 4
    monkeypatch.setattr(webdataset, "replacing", replacing)
    assert prepare_data.main(["index", "--data_path", str(shards)]) == 0 and len(scanned) == 8
    assert capsys.readouterr().out == f"{shards}, train: 18 images of 3 classes\n"
    assert_same_items(open_shards(shards), images)
    assert len(scanned) == 8 and (shards / "train.index.npz").is_file()


def without(shards, k):
    (shards / f"imagenet1k-train-{k:06d}.tar").unlink()


def cut(shards, size):
    os.truncate(shards / "imagenet1k-train-000001.tar", size)


def spoil(shards, where):
    with open(shards / "imagenet1k-train-000001.tar", "r+b") as file:
        file.seek(where)
        file.write(b"x" * 512)


def members(**files):
    png = encoded(noise_image(9, 9), "PNG")
    named = {name.replace("_", "."): png if content is None else content for name, content in files.items()}
    return lambda shards: add(shards / "imagenet1k-train-000002.tar", named)


def compress(shards):
    whole = (shards / "imagenet1k-train-000001.tar").read_bytes()
    with tarfile.open(shards / "imagenet1k-train-000001.tar", "w:gz") as tar:
        info = tarfile.TarInfo("x.png")
        info.size = len(whole)
        tar.addfile(info, io.BytesIO(whole))


def append(shards, name, content):
    with tarfile.open(shards / "imagenet1k-train-000002.tar", "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


FAULTS = {
    "gap": (lambda f: without(f, 1), r"train-000000\.tar to imagenet1k-train-000003\.tar, but not .*-000001\.tar"),
    "half an image": (lambda f: cut(f, 4000), r"shard .*-000001\.tar: unexpected end of data"),
    "half a header": (lambda f: cut(f, 3 * 512 + 100), r"-000001\.tar: unexpected end of data"),
    "no end": (lambda f: cut(f, 10 * 512), r"-000001\.tar: unexpected end of data"),
    "damaged header": (lambda f: spoil(f, 0), r"-000001\.tar: "),
    "another header": (lambda f: spoil(f, 10 * 512), r"-000001\.tar: "),
    "empty": (lambda f: cut(f, 0), r"-000001\.tar: empty file"),
    "compressed": (compress, r"-000001\.tar: .* not compressed"),
    "no label": (members(x_png=None), r"-000002\.tar/x\.png has no label"),
    "text": (members(x_png=None, x_cls=b"cat"), r"x\.png has no label: expected the number"),
    "negative": (members(x_png=None, x_cls=b"-1"), r"x\.png has no label: expected the number of a class, from 0"),
    "half": (members(x_png=None, x_json=b'{"label": 1.5}'), r"x\.png has no label"),
    "other json": (members(x_png=None, x_json=b'["label"]'), r"x\.png has no label"),
    "no image": (members(x_cls=b"1"), r"-000002\.tar/x\.cls is the label of no image"),
    "twice": (
        lambda f: shutil.copy(f / "imagenet1k-train-000002.tar", f / "x") and append(f, "n00012_12.cls", b"0"),
        r"-000002\.tar has n00012_12\.cls twice",
    ),
    "two images": (members(x_png=None, x_webp=None, x_cls=b"1"), r"two images with one key: x\.png, x\.webp"),
    "dot in the key": (members(a_b_png=None, a_b_cls=b"1"), r"-000002\.tar has a\.b\.cls: a key ends at the first dot"),
    "no text": (lambda f: (f / "classes.txt").write_bytes(b"\xff"), r"classes\.txt cannot be read"),
    "out of range": (
        lambda f: (f / "classes.txt").write_text("a\nb\n"),
        r"-000002\.tar/n00013_13\.png has the label 2; expected 0 to 1, the lines of .*classes\.txt",
    ),
    "same name": (
        lambda f: (f / "classes.txt").write_text("a\nb\na\n"),
        r"classes\.txt must hold names of classes, each once",
    ),
    "no shards": (lambda f: [path.unlink() for path in f.glob("*.tar")], r"holds no shards of the split train"),
    "no samples": (lambda f: [add(path, {"x.txt": b""}) for path in f.glob("*.tar")], "hold no images"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_shards_that_are_refused(shards, kind):
    harm, match = FAULTS[kind]
    harm(shards)
    with pytest.raises(DataError, match=match) as error:
        open_shards(shards)
    assert str(shards) in str(error.value)


def test_labels_of_validation_images_are_those_of_training(shards, images, tmp_path):
    with pytest.raises(DataError, match=r"no data path given.*DATA_PATH"):
        open_shards(None)
    add(shards / "val-0.tar", {"x.png": encoded(noise_image(9, 9), "PNG"), "x.cls": b"3"})
    with pytest.raises(DataError, match=r"val-0\.tar/x\.png has the label 3; expected 0 to 2"):
        open_shards(shards, "val")


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (lambda f: without(f, 3), "000003"),
        (lambda f: shutil.copy(f / "imagenet1k-train-000000.tar", f / "imagenet1k-train-000004.tar"), "000004"),
        (lambda f: os.utime(f / "imagenet1k-train-000002.tar", (1, 1)), "000002"),
    ],
)
def test_shards_that_are_not_those_of_the_index(shards, harm, name):
    open_shards(shards)
    harm(shards)
    with pytest.raises(DataError, match=rf"-{name}\.tar is missing, new or changed since .*train\.index\.npz") as error:
        open_shards(shards)
    words = str(error.value).partition("python -m tools.prepare_data ")[2].partition("`")[0].split()
    assert prepare_data.main(words) == 0  # the advice helps
    open_shards(shards)


def test_a_damaged_index_and_a_shard_that_is_cut_while_it_is_in_use(shards):
    found = open_shards(shards)
    index = (shards / "train.index.npz").read_bytes()
    (shards / "train.index.npz").write_bytes(index[:500])
    with pytest.raises(DataError, match=r"cannot read the index .*train\.index\.npz: .*Remove it"):
        open_shards(shards)
    cut(shards, 4000)
    with pytest.raises(DataError, match=r"the shard of .*000001\.tar/n00009_9\.png ends within it"):
        found[9]
    without(shards, 2)
    with pytest.raises(DataError, match=r"cannot read the file .*000002\.tar: No such file"):
        found[10]


def test_a_bad_image_is_named_and_replaced(tmp_path):
    png = encoded(noise_image(9, 9), "PNG")
    files = {"x.png": BAD["truncated jpeg"][0], "x.cls": b"0", "y.png": png, "y.cls": b"0", "z.png": b"", "z.cls": b"0"}
    add(tmp_path / "0.tar", files)
    images = open_shards(tmp_path)
    for i, reason in ((0, "truncated"), (2, "the file is empty")):
        with pytest.raises(BadImage, match=rf"cannot read image {tmp_path}/0\.tar/.\.png: .*{reason}"):
            images[i]
    images.bad_image_log = BadImageLog(images)
    ((x, y),) = ImageLoader(images, [[0, 1, 2]], 0, pin_memory=False)
    assert torch.equal(x, images[1][0].expand(3, -1, -1, -1)) and y.tolist() == [0, 0, 0]
    assert images.bad_image_log.new[f"{tmp_path}/0.tar/x.png"]["replaced_by"] == f"{tmp_path}/0.tar/y.png"


def test_a_cache_of_shards(folder, images, tmp_path):
    """Whose order is not that of the classes; it is used as one of an image folder."""
    order = np.random.default_rng(1).permutation(18)
    write(images, tmp_path / "shards" / "train-%d.tar", order)
    write(build_dataset("imagefolder", folder, SIZE, "val"), tmp_path / "shards" / "val-%d.tar")
    words = f"cache --dataset webdataset --data_path {tmp_path}/shards --img_size {SIZE} --out {tmp_path}/cache"
    assert prepare_data.main(words.split()) == prepare_data.main(["verify", f"{tmp_path}/cache"]) == 0
    cached = build_dataset("imagefolder", tmp_path / "cache", SIZE)
    assert isinstance(cached, CachedImages) and cached.class_names == ["0", "1", "2"]
    assert_same_items(cached, images, order)
    by_class = [np.flatnonzero(images.labels[order] == k).tolist() for k in range(3)]
    assert list(list_files(cached).values()) == by_class  # as latents of the cache are listed
    assert len(build_dataset("imagefolder", tmp_path / "cache", SIZE, "val")) == 4


def test_a_cache_is_not_continued_from_other_shards(images, tmp_path, capsys):
    """Though their labels are the same."""
    write(images, tmp_path / "a" / "train-%d.tar")
    write(images, tmp_path / "b" / "train-%d.tar", [5, 4, 3, 2, 1, 0, *range(6, 18)])
    for name, code in (("a", 0), ("b", 2), ("a", 0)):
        words = f"cache --dataset webdataset --data_path {tmp_path}/{name} --img_size {SIZE} --out {tmp_path}/cache"
        assert prepare_data.main(words.split()) == code
    assert "was made from other images" in capsys.readouterr().err


def test_labels_that_count_from_1_are_noted(images, tmp_path):
    write(images, tmp_path / "shards" / "train-%d.tar")
    assert open_shards(tmp_path / "shards").notes == []
    add(tmp_path / "shards" / "train-9.tar", {"x.png": encoded(noise_image(9, 9), "PNG"), "x.cls": b"4"})
    for path in (tmp_path / "shards").glob("train-[0-4].tar"):
        path.unlink()
    (tmp_path / "shards" / "train.index.npz").unlink()
    (note,) = open_shards(tmp_path / "shards").notes
    assert note == "4 of the 5 classes have no image, such as 0: labels count from 0"


def test_numbers_that_are_dates_have_no_gaps(images, tmp_path):
    for i, date in enumerate((20240101, 20240301, 20991231)):
        write(images, tmp_path / "shards" / f"part{i}-%d.tar", [i])
        (tmp_path / "shards" / f"part{i}-0.tar").rename(tmp_path / "shards" / f"part-{date}.tar")
    assert len(open_shards(tmp_path / "shards")) == 3


def test_an_index_that_can_be_written_nowhere(shards, images, monkeypatch, capsys):
    """Training scans at each start, and the command that should write it says so."""

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(webdataset, "replacing", refuse)
    assert_same_items(open_shards(shards), images)
    assert prepare_data.main(["index", "--data_path", str(shards)]) == 2
    assert "can be written neither to" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_run_is_the_image_folders_run_to_the_bit(folder, shards, images, tmp_path):
    """Also one that stops in the middle of an epoch and resumes, with other workers."""
    write(build_dataset("imagefolder", folder, SIZE, "val"), shards / "imagenet1k-val-%06d.tar")
    settings = {"class_num": 3, "batch_size": 6, "num_workers": 0, "val_split": "val"}
    first = train(tmp_path / "folder", dataset="imagefolder", data_path=folder, **settings)
    second = train(tmp_path / "shards-run", dataset="webdataset", data_path=shards, **settings)
    assert state_differences(first, second) == [] and read_log(first) == read_log(second)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 4)  # the second one of three of the second epoch
        train(tmp_path / "killed", dataset="webdataset", data_path=shards, save_every_steps=1, **settings)
    settings["num_workers"] = 2
    train(tmp_path / "killed", dataset="webdataset", data_path=shards, **settings)
    assert state_differences(first, tmp_path / "killed") == [] and read_log(tmp_path / "killed") == read_log(first)
