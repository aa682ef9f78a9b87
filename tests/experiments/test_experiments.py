"""The scripts in experiments/ run as their documentation says, and print what it shows."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import smooth_images
from util.data import datasets
from util.evaluation import features
from util.io import REPOSITORY

SPECTRUM = REPOSITORY / "tests" / "golden" / "cifar10_spectrum.json"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(script, *words) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(REPOSITORY / "experiments" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_schedule_gaps_of_cifar10(run):
    """The table of the specification, for the spectrum of CIFAR-10."""
    rows = run("schedule_gaps.py", "--spectrum", SPECTRUM).splitlines()
    uniform = [float(cell) for cell in rows[2].split("|")[2:-1]]
    logsnr = [float(cell) for cell in next(row for row in rows if row.startswith("| logsnr")).split("|")[2:-1]]
    assert uniform == pytest.approx([1.309, 0.729, 0.466, 0.295, 0.143, 1.326, 0.698, 0.315], abs=2e-3)
    assert logsnr == pytest.approx([0.549, 0.256, 0.162, 0.109, 0.064, 0.324, 0.048, 0.017], abs=2e-3)


@pytest.mark.usefixtures("tiny")
def test_pictures_are_drawn(run, tmp_path, trained):
    content = json.loads(SPECTRUM.read_text())
    fit = {name: (content["power_law_fit"][f"{name}_mean"], 0.0) for name in ("a", "alpha")}
    meta = {"dataset": "cifar10", "img_size": 32, "num_images": 50000, "fit_mean_and_std": fit}
    np.savez(tmp_path / "s.npz", power=content["P"], centred=content["P_centred"], meta=json.dumps(meta))
    run("what_the_network_sees.py", "--out", tmp_path / "a.png", "--size", 32)
    run("plot_log.py", trained, "--out", tmp_path / "b.png")
    run("frequency_time_plane.py", "--spectrum", tmp_path / "s.npz", "--out", tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 2000 for name in "abc")


def test_metrics_of_damaged_images(run, tmp_path, monkeypatch):
    """With images and an extractor that need no download."""
    images = smooth_images(64, 0, 1.0)
    monkeypatch.setattr(datasets, "build_dataset", lambda *_: [(image, 0) for image in images])
    pooled = lambda x: {"effnet_lite0": torch.nn.functional.adaptive_avg_pool2d(x / 50, 3).flatten(1)}  # noqa: E731
    extractor = SimpleNamespace(describe=lambda: {"name": "pooled"})
    kind = type("Pooled", (), {"__call__": lambda self, x: pooled(x), "describe": lambda self: extractor.describe()})
    monkeypatch.setattr(features, "EffNetLite0", lambda device: kind())
    run("metric_sanity.py", "--num_images", 32, "--device", "cpu", "--out", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    gaps = [found["metrics"][name]["spectrum_gap"] for name in ("real", "noise, sigma 8", "noise, sigma 25")]
    assert gaps == sorted(gaps) and found["extractors"] == [{"name": "pooled"}]
    bias = list(found["real_by_num_images"]["fd_effnet_lite0"].values())
    assert bias == sorted(bias, reverse=True)  # fewer images, a larger distance
    assert bias[-1] == found["metrics"]["real"]["fd_effnet_lite0"]
