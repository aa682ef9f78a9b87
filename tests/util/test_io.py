"""Files are complete or absent; digests do not depend on the order of keys."""

import hashlib
import json
import subprocess

import pytest

from util import io


def test_replacing_leaves_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), io.replacing(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with io.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "x.json"
    assert io.read_json(path) is None
    io.write_json(path, {"a": [1, 2.5, None]})
    assert io.read_json(path) == {"a": [1, 2.5, None]}
    path.write_text('{"a": [1, 2')
    assert io.read_json(path) is None


def test_digests(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert io.sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()
    assert io.json_hash({"a": 1, "b": [2]}) == io.json_hash(json.loads('{"b": [2], "a": 1}')) != io.json_hash({"a": 2})


def test_file_that_never_appears(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "SHARED_FILE_SECONDS", 0.0)
    assert not io.wait_for_file(tmp_path / "x")
    (tmp_path / "x").touch()
    assert io.wait_for_file(tmp_path / "x")


def test_commit_ignores_results_that_are_being_written(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True)

    monkeypatch.setattr(io, "REPOSITORY", tmp_path)
    git("init", "-q")
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    code, results = tmp_path / "code.py", tmp_path / "experiments" / "results" / "a.jsonl"
    code.touch(), results.touch()
    git("add", "-A")
    git("commit", "-qm", "x")
    commit = io.commit.__wrapped__  # which is not cached
    clean = commit()
    assert len(clean) == 40
    results.write_text("line\n")
    assert commit() == clean
    code.write_text("x = 1\n")
    assert commit() == f"{clean}+changes"
