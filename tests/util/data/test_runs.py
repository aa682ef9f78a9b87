"""Training runs on image folders and caches of them, with and without bad images."""

from pathlib import Path

import pytest

from tests.conftest import read_log, state_differences, train
from tests.util.data.image_files import HOLES, SIZE, damage, make_folder
from util.data.cache import write_cache
from util.data.datasets import ImageFolderImages

COUNTS = {"a": 6, "b": 7, "c": 5}
SETTINGS = {"dataset": "imagefolder", "class_num": 3, "batch_size": 6, "num_workers": 0}

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "images" / "train", COUNTS, size=(21, 18))
    make_folder(tmp_path / "images" / "val", {"a": 1, "b": 2, "c": 1})
    return tmp_path / "images"


def make_cache(folder, out, skip_bad=False):
    for split in ("train", "val"):
        write_cache(ImageFolderImages(folder, SIZE, split), out / split, 1, skip_bad)
    return out


@pytest.mark.parametrize("val_split, steps", [(0.2, 4), ("val", 6)])
def test_a_run_on_a_cache_is_the_folders_run_to_the_bit(folder, tmp_path, val_split, steps):
    cache, settings = make_cache(folder, tmp_path / "cache"), {**SETTINGS, "val_split": val_split}
    first = train(tmp_path / "folder", data_path=folder, **settings)
    second = train(tmp_path / "cached", data_path=cache, **{**settings, "num_workers": 1})
    assert state_differences(first, second) == []
    for event, lines in (("train", steps), ("val", 2)):
        ours, theirs = ([{**line, "seconds": 0} for line in read_log(run, event)] for run in (first, second))
        assert ours == theirs and len(ours) == lines
    train(first, data_path=cache, epochs=3, **settings)  # a run may change over


def test_a_run_with_bad_images_on_a_folder_and_on_its_cache(folder, tmp_path, capsys):
    """It is the run on a folder in which copies take the place of the bad images, and its log names them."""
    training = damage(folder / "train")
    settings = {**SETTINGS, "val_split": 0.2}
    run = train(tmp_path / "run", data_path=folder, on_bad_image="skip", **settings)
    found = read_log(run, "bad_image")
    assert 0 < len(found) <= len(HOLES)
    cache = make_cache(folder, tmp_path / "cache", skip_bad=True)
    cached = train(tmp_path / "cached", data_path=cache, on_bad_image="skip", **settings)
    assert state_differences(run, cached) == []
    for event in ("train", "bad_image"):
        assert read_log(run, event) == read_log(cached, event)
    for path, bad in ((folder, ""), (cache, f"{training}/a/2.png: the file is empty")):  # known before training
        train(tmp_path / "refused", code=2, data_path=path, **settings)
        text = capsys.readouterr().err
        assert f"cannot read image {bad}" in text and "--on_bad_image skip" in text

    for line in found:
        Path(line["file"]).write_bytes(Path(line["replaced_by"]).read_bytes())
    again = train(tmp_path / "again", data_path=folder, **settings)
    assert read_log(run) == read_log(again) and len(read_log(run)) == 4
