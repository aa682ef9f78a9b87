"""Folders of Hugging Face's `datasets`: items are those of the same files in an image folder."""

import pickle
import sys

import numpy as np
import pytest
import torch

from tests.conftest import read_log, state_differences, train
from tests.util.data.image_files import SIZE, make_folder, save_modes
from tools import prepare_data
from util.data.datasets import build_dataset
from util.data.images import BadImage, DataError, NoSplitError
from util.data.loader import ImageLoader

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()
NAMES = ["a", "b", "c"]


def rows(images, **changes):
    """The files of an image folder as a Dataset."""
    columns = {"photo": [images.path(i) for i in range(len(images))], "kind": images.labels.tolist()}
    types = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=images.class_names)}
    columns, types = columns | {k: v for k, (v, _) in changes.items()}, types | {k: t for k, (_, t) in changes.items()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def open_rows(folder, split="train", **options):
    return build_dataset("huggingface", folder, SIZE, split, **options)


@pytest.fixture
def images(folder):
    return build_dataset("imagefolder", folder, SIZE)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_items_are_those_of_the_image_folder(tmp_path, channels):
    """Of every mode, in another order, in several files, in another process, and as grey."""
    save_modes(tmp_path / "images" / "a")
    make_folder(tmp_path / "images", {"b": 3}, size=(41, 97))
    images = build_dataset("imagefolder", tmp_path / "images", SIZE, channels=channels)
    order = np.random.default_rng(0).permutation(len(images))
    rows(images).select(order).save_to_disk(tmp_path / "rows", num_shards=3)
    found = open_rows(tmp_path / "rows", channels=channels)
    assert found.class_names == ["a", "b"] and found.labels.dtype == np.int64
    for copy in (found, pickle.loads(pickle.dumps(found))):
        for i, n in enumerate(order):
            (x, y), (image, label) = copy[i], images[n]
            assert torch.equal(x, image) and y == label and type(y) is int
    loader = ImageLoader(found, [[3, 1, 8], [0, 10]], 2, pin_memory=False)
    batches = [(x, y) for x, y in loader]
    loader.close()
    assert torch.equal(batches[0][0], torch.stack([found[i][0] for i in (3, 1, 8)]))
    assert batches[1][1].tolist() == found.labels[[0, 10]].tolist()


@pytest.mark.usefixtures("tiny")
def test_splits_a_run_and_a_cache(folder, images, tmp_path):
    held_out = rows(build_dataset("imagefolder", folder, SIZE, "val"))
    path = tmp_path / "rows"
    datasets.DatasetDict({"train": rows(images), "validation": held_out}).save_to_disk(path)
    assert len(open_rows(path, "val")) == 4 and open_rows(path, "val").path(1) == f"{path}, validation, row 1"
    with pytest.raises(NoSplitError, match="has no split test; it has train, validation"):
        open_rows(path, "test")
    (tmp_path / "some.txt").write_text("c\na\n")
    assert open_rows(path, labels_file=tmp_path / "some.txt").labels.tolist() == [0] * 6 + [1] * 5

    settings = {"class_num": 3, "batch_size": 6, "num_workers": 0, "val_split": "val"}
    first = train(tmp_path / "first", dataset="imagefolder", data_path=folder, **settings)
    second = train(tmp_path / "second", dataset="huggingface", data_path=path, **settings)
    assert state_differences(first, second) == [] and read_log(first) == read_log(second)

    words = f"cache --dataset huggingface --data_path {path} --img_size {SIZE} --out {tmp_path}/cache"
    assert prepare_data.main(words.split()) == 0
    cached = build_dataset("imagefolder", tmp_path / "cache", SIZE)
    assert cached.class_names == NAMES and all(torch.equal(cached[i][0], images[i][0]) for i in range(18))


def test_bad_images_are_named(images, tmp_path):
    content = {"photo": [b"x", b"", None], "kind": [0, 0, 0]}
    datasets.Dataset.from_dict(content, features=rows(images).features).save_to_disk(tmp_path / "rows")
    found = open_rows(tmp_path / "rows")
    for i, reason in enumerate(("no such format", "the file is empty", "the file is empty")):
        with pytest.raises(BadImage, match=rf"cannot read image .*rows, train, row {i}: .*{reason}"):
            found[i]


COLUMNS = {
    "two labels": (
        {"coarse": ([0] * 18, datasets.ClassLabel(names=["x"]))},
        r"2 columns of type ClassLabel \(kind, coa",
    ),
    "no label": ({"kind": ([0] * 18, datasets.Value("int64"))}, r"0 columns of type ClassLabel \(none\).*cast_column"),
    "no image": ({"photo": (["x"] * 18, datasets.Value("string"))}, r"0 columns of type Image \(none\)"),
    "empty labels": ({"kind": ([0] * 17 + [None], datasets.ClassLabel(names=NAMES))}, r"train, row 17 has no label"),
    "hidden labels": ({"kind": ([0] * 9 + [-1] * 9, datasets.ClassLabel(names=NAMES))}, r"train, row 9 has no label"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_that_are_refused(images, tmp_path, kind):
    changes, match = COLUMNS[kind]
    rows(images, **changes).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match=match) as error:
        open_rows(tmp_path / "rows")
    assert str(tmp_path / "rows") in str(error.value)


def test_what_is_no_such_folder(folder, images, tmp_path, monkeypatch):
    rows(images).save_to_disk(tmp_path / "rows")
    with pytest.raises(NoSplitError, match="has no split val; it has train"):
        open_rows(tmp_path / "rows", "val")
    (data,) = (tmp_path / "rows").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:2000])
    for path, match in ((tmp_path / "rows", "rows as a data set"), (folder, "neither"), ("nowhere", "not found")):
        with pytest.raises(DataError, match=f"cannot open .*{match}.*save_to_disk"):
            open_rows(path)
    with pytest.raises(DataError, match="no data path given"):
        open_rows(None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets: `pip install datasets`"):
        open_rows(tmp_path / "rows")
