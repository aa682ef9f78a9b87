"""python -m tools.fetch_weights: what it fetches, where to, and what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools import fetch_weights
from util.evaluation.weights import WEIGHTS
from util.io import sha256_file


@pytest.fixture
def server(no_network, monkeypatch, tmp_path):
    """A network with all files, of a few bytes. Returns the addresses that were asked for."""
    (tmp_path / "content").write_bytes(b"weights")
    asked = []

    def download(url, path, hash_prefix, progress):
        asked.append(url)
        Path(path).write_bytes(b"weights")

    for name, file in WEIGHTS.items():
        monkeypatch.setitem(WEIGHTS, name, replace(file, sha256=sha256_file(tmp_path / "content")))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return asked


def test_all_into_the_cache_or_some_into_a_folder(server, tmp_path, capsys):
    assert fetch_weights.main([]) == 0
    assert server == [file.url for file in WEIGHTS.values()]
    cache = tmp_path / "hub" / "checkpoints"
    assert sorted(path.name for path in cache.iterdir()) == sorted(file.name for file in WEIGHTS.values())
    assert capsys.readouterr().out.count("published by") == len(WEIGHTS)
    assert fetch_weights.main([]) == 0 and len(server) == len(WEIGHTS)  # they are there
    assert fetch_weights.main(["clip", "--weights_dir", str(tmp_path / "new")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == [WEIGHTS["clip"].name]


def test_what_cannot_be_fetched_is_one_sentence(no_network, tmp_path, capsys):
    assert fetch_weights.main(["dinov2", "--weights_dir", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fetch_weights: error: The dinov2 weights (1218 MB)") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        fetch_weights.main(["vgg"])
    assert "choose from inception, dinov2, clip" in capsys.readouterr().err
