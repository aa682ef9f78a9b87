"""What prepare_data.py says to wrong input: one sentence with what was wrong, what was expected and what to do."""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

import prepare_data
from tests.conftest import listing
from tests.test_data import make_folder
from util.cache_writer import _size, write_cache

SIZE = 8


@pytest.fixture
def folder(tmp_path):
    """A data set, a cache of it, and what is neither."""
    for split in ("train", "val"):
        make_folder(tmp_path / "images" / split, {"a": 2, "b": 2})
    write_cache(tmp_path / "images", SIZE, tmp_path / "cache", 0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.fixture
def said(folder, monkeypatch, capsys):
    """The sentence that a command is refused with."""
    monkeypatch.chdir(folder)

    def run(*words):
        capsys.readouterr()
        assert prepare_data.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("prepare_data.py: error: ") and err.count("\n") == 1, err
        return err

    return run


CACHE = ("cache", "--data_path", "images", "--img_size", str(SIZE), "--num_workers", "0")
REFUSED = {
    "unknown flag": (("verify", "--deep", "cache"), ["unknown arguments: --deep", "prepare_data.py verify [-h] cache"]),
    "flag of another task": (("measure", "--out", "x"), ["--out x", "[--batch_size BATCH_SIZE]"]),
    "unknown task": (("check", "cache"), ["'check'", "{cache,verify,measure}"]),
    "no task": ((), ["required: task", "{cache,verify,measure}"]),
    "nothing to verify": (("verify",), ["required: cache", "prepare_data.py verify [-h] cache"]),
    "no number": ((*CACHE, "--out", "x", "--img_size", "big"), ["--img_size: invalid int value: 'big'"]),
    "no pixels": ((*CACHE, "--out", "x", "--img_size", "0"), ["--img_size 0 must be at least 1"]),
    "negative workers": (("measure", "--num_workers", "-1"), ["--num_workers -1 must be at least 0"]),
    "no batch": (("measure", "--batch_size", "0"), ["--batch_size 0 must be at least 1"]),
    "large batch": (
        ("measure", "--data_path", "images", "--img_size", str(SIZE)),
        ["--batch_size 128 must be at most 4, the number of images"],
    ),
    "out is empty": ((*CACHE, "--out", ""), ["--out: it is empty and must name a folder"]),
    "out is a file": (
        (*CACHE, "--out", "file"),
        ["cannot be written to", "Not a directory", "another folder in --out"],
    ),
    "cache of a cache": (
        ("cache", "--data_path", "cache", "--out", "x"),
        ["--data_path cache is an image cache already", "image files"],
    ),
    "verify nothing": (("verify", ""), ["it is empty and must name a folder"]),
    "verify nowhere": (("verify", "nowhere"), ["nowhere does not exist", "--out"]),
    "verify a file": (("verify", "file"), ["file is no folder", "--out"]),
    "verify an empty folder": (("verify", "empty"), ["empty holds no image cache", "Expected cache.json", "--out"]),
    "verify images": (("verify", "images"), ["images holds no image cache", "Expected cache.json"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(folder, said, case):
    words, parts = REFUSED[case]
    before, sentence = listing(folder), said(*words)
    assert [part for part in parts if part not in sentence] == [] and listing(folder) == before, sentence


def test_splits_that_do_not_fit_are_refused_before_the_work(folder, said):
    shutil.rmtree(folder / "images" / "val" / "b")
    assert "labels would differ" in said(*CACHE, "--out", "new") and not (folder / "new").exists()


DAMAGE = {
    "no list": (lambda part: os.remove(part / "files.json"), "files.json of the image cache is missing. Copy it again"),
    "another list": (lambda part: (part / "files.json").write_text("{}"), "remove files.json and start"),
    "no index": (lambda part: (part / "cache.json").write_text("{"), "remove .*train and make the cache again"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_finds_what_is_beside_the_shards_and_its_advice_helps(folder, said, kind):
    part, (damage, advice) = folder / "cache" / "train", DAMAGE[kind]
    whole = (part / "files.json").read_bytes()
    damage(part)
    assert re.search(advice, said("verify", "cache"))
    if kind == "another list":
        os.remove(part / "files.json")
    elif kind == "no index":
        shutil.rmtree(part)
    assert prepare_data.main([*CACHE, "--out", "cache"]) == prepare_data.main(["verify", "cache"]) == 0
    assert (part / "files.json").read_bytes() == whole


def test_what_the_file_system_refuses(folder, said, monkeypatch):
    """A folder that cannot be looked into, an index, a shard. (Permissions themselves would not stop root.)"""

    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    sentence = "cannot be read: Permission denied"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        for words in (("verify", "cache"), ("measure", "--data_path", "cache"), (*CACHE, "--out", "x")):
            assert sentence in (error := said(*words)) and "permissions" in error
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert f"cache.json {sentence}" in (error := said("verify", "cache")) and "permissions" in error
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, name: refuse(f) if "train" in f.name else real(f, name))
    assert f"shard-00000.bin {sentence} (check" in said("verify", "cache")


def test_measure_says_what_it_measured(monkeypatch, capsys):
    """Also where it chose the size and the workers itself."""
    monkeypatch.setattr(prepare_data, "SECONDS", 0.01)
    assert prepare_data.main(["measure", "--dataset", "digits"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["img_size"], line["num_workers"], line["batch_size"], line["num_images"]) == (32, 0, 128, 1797)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 bytes"), (768, "768 bytes"), (999, "999 bytes"), (1000, "1 kB"), (221_184, "221 kB")),
        *((999_499, "999 kB"), (999_500, "1 MB"), (13_824_000, "13.8 MB"), (252_000_000_000, "252 GB")),
        *((999_500_000, "1 GB"), (7_300_000_000_000, "7.3 TB")),
    ],
)
def test_sizes_are_readable(count, text):
    assert _size(count) == text
