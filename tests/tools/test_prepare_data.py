"""The command line of prepare_data: it works from end to end, and wrong input is one sentence."""

import json
import os
import shutil

import pytest

from tests.util.data.image_files import make_folder
from tools import prepare_data
from util.data import cache

SIZE = 8
CACHE = ("cache", "--data_path", "images", "--img_size", str(SIZE), "--num_workers", "1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: a data set and a cache of it."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        make_folder(tmp_path / "images" / split, {"a": 2, "b": 2})
    assert prepare_data.main([*CACHE, "--out", "cache"]) == 0
    return tmp_path


def test_both_splits_are_written_and_verified(folder, capsys):
    assert sorted(p.name for p in (folder / "cache").iterdir()) == ["train", "val"]
    assert prepare_data.main([*CACHE, "--out", "cache"]) == 0
    assert prepare_data.main(["verify", "cache"]) == prepare_data.main(["verify", "cache/train"]) == 0
    out = capsys.readouterr().out
    assert out.count("all 4 images have their checksums") == 4 and "val: 4 images of 8 pixels" in out


def refused(capsys, *words):
    """The sentence that a command is refused with."""
    capsys.readouterr()
    assert prepare_data.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("prepare_data: error: ") and err.count("\n") == 1, err
    return err


def test_wrong_input_is_refused_in_a_sentence(folder, capsys):
    before = sorted(folder.rglob("*"))
    for words, part in (
        ((*CACHE, "--out", "x", "--img_size", "0"), "img_size is 0"),
        ((*CACHE, "--out", "images/train/a/0.png"), "Not a directory"),
        (("cache", "--data_path", "cache", "--out", "x"), "is an image cache already"),
        (("verify", "images"), "images holds no image cache"),
    ):
        assert part in refused(capsys, *words) and sorted(folder.rglob("*")) == before


def test_splits_with_other_classes_are_refused_before_the_work(folder, capsys):
    shutil.rmtree(folder / "images" / "val" / "b")
    assert "labels would differ" in refused(capsys, *CACHE, "--out", "new") and not (folder / "new").exists()


def test_verify_finds_damage_and_its_advice_helps(folder, capsys):
    train = folder / "cache" / "train"
    content = bytearray((train / "images.npy").read_bytes())
    content[-1] ^= 1
    (train / "images.npy").write_bytes(content)
    sentence = refused(capsys, "verify", "cache")
    assert f"{train}: 1 of 1 blocks" in sentence and cache.CACHE.again in sentence
    assert prepare_data.main([*CACHE, "--out", "cache"]) == prepare_data.main(["verify", "cache"]) == 0


def test_bad_images_need_the_flag(folder, capsys):
    (folder / "images" / "val" / "b" / "1.png").write_bytes(b"")
    assert "cannot read image" in refused(capsys, *CACHE, "--out", "new")
    assert prepare_data.main([*CACHE, "--out", "new", "--on_bad_image", "skip"]) == 0
    assert "val: 4 images of 8 pixels, 1 of them bad: training needs --on_bad_image skip" in capsys.readouterr().out


def test_errors_of_the_file_system_are_a_sentence(folder, capsys, monkeypatch):
    """Permissions themselves would not stop root."""

    def refuse(*args):
        raise PermissionError(13, "Permission denied", args[1])

    monkeypatch.setattr(os, "replace", refuse)
    assert "Permission denied" in refused(capsys, *CACHE, "--out", "new")


def test_measure_prints_a_json_line(folder, monkeypatch, capsys):
    """With the size and the workers that it chose itself."""
    monkeypatch.setattr(prepare_data, "SECONDS", 0.01)
    assert prepare_data.main(["measure", "--dataset", "digits"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["img_size"], line["num_workers"], line["batch_size"], line["num_images"]) == (32, 0, 128, 1797)
    words = ["--data_path", "cache", "--img_size", str(SIZE), "--batch_size", "4", "--num_workers", "0"]
    assert prepare_data.main(["measure", *words]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["class"] == "CachedImages" and line["images_per_s"] > 0 and line["num_images"] == 4
