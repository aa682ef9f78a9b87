"""Runs: curves are what the files say."""

import json

import pytest

from tests.tools.test_report import write
from tools.explorer import runs
from util.errors import UserError
from util.log import read_log


def test_curves_are_those_of_the_log(tmp_path):
    lines = [
        {"event": "start", "step": 0, "steps_per_epoch": 4},
        {"event": "train", "step": 1, "epoch": 0, "loss": 2.0, "lr": 0.1, "images_per_s": 50},
        {"event": "train", "step": 3, "epoch": 0, "loss": None, "lr": 0.2, "images_per_s": 60},
        {"event": "val", "step": 4, "epoch": 0, "loss_ema1": 3.0},
        {"event": "eval", "step": 4, "loss": 9.0},
        {"event": "train", "step": "many"},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n[1]\n\x00\xff\n{"event": "train", "st'
    (tmp_path / "log.jsonl").write_text(text)
    found = runs.curves(read_log(tmp_path))
    assert {name: (x.tolist(), y.tolist()) for name, (x, y) in found.items()} == {
        "loss": ([0.5], [2.0]),
        "lr": ([0.5, 1.0], [0.1, 0.2]),
        "images_per_s": ([0.5, 1.0], [50, 60]),
        "loss_ema1": ([1.0], [3.0]),
    }
    axes = runs.draw_curves({"a": found, "b": {}}).axes
    assert [len(ax.lines) for ax in axes] == [2, 1, 1] and axes[2].get_ylabel() == "images / s"
    assert runs.curves([{"event": "train", "step": 1, "loss": 2.0}]) == {}  # without the length of an epoch


def test_a_damaged_picture_is_one_sentence(tmp_path):
    write(tmp_path, "samples/epoch0001.png", "no picture")
    (grid,) = runs.sample_grids(tmp_path)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        runs.picture(grid)
