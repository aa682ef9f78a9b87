"""The scripts in experiments/ run as their documentation says, and print what it shows."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch

from experiments import metric_sanity
from tests.experiments.conftest import Pixels, smooth_images
from tests.spectral_ops.test_schedule import PUBLISHED
from util.data.images import Images
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


def test_the_published_table_of_gaps_is_printed(run):
    rows = [row.split("|")[1:-1] for row in run("schedule_gaps.py", "--spectrum", SPECTRUM).splitlines()[2:]]
    assert {name.strip() for name, *_ in rows} == set(PUBLISHED)
    for name, *gaps in rows:
        assert [float(gap) for gap in gaps] == pytest.approx(PUBLISHED[name.strip()], abs=2e-3)


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


def test_a_log_that_was_cut_off_or_has_no_loss_yet(run, tmp_path):
    lines = [{"time": 1, "event": "start", "step": 0}, {"time": 2, "event": "train", "step": 0, "loss": None}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="does not exist"):
        run("plot_log.py", tmp_path / "missing", "--out", tmp_path / "a.png")
    with pytest.raises(SystemExit, match="has no loss yet"):
        run("plot_log.py", tmp_path, "--out", tmp_path / "a.png")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"time": 3, "event": "train", "step": 1, "loss": 1.0}\n{"time": 4, "event": "tr')
    run("plot_log.py", tmp_path, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_damage_to_images_moves_the_metrics(cifar10_of_noise, monkeypatch, tmp_path, capsys):
    class Few(Images):
        def __getitem__(self, i):
            return smooth_images()[0][i], 0

    monkeypatch.setattr(Pixels, "describe", lambda self: {}, raising=False)
    monkeypatch.setattr(metric_sanity, "build_dataset", lambda *args: Few(32, ["0"], np.zeros(200, int)))
    metric_sanity.main(["--num_images", "100", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert list(found) == list(metric_sanity.DAMAGE) and "| 3 x 3 box blur |" in capsys.readouterr().out
    gaps = {name: row["spectrum_gap"] for name, row in found.items()}
    assert min(gaps, key=gaps.get) == "real" and gaps["noise, sigma 25"] > gaps["noise, sigma 8"]
    assert all(row["fd_effnet_lite0"] > 0 for row in found.values())


def test_damage_is_what_its_name_says():
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    assert (metric_sanity.noise(grey, 8).double().std() - 8).abs() < 0.3
    assert torch.equal(metric_sanity.box_blur(grey), grey)
    spike = grey.clone()
    spike[..., 10, 10] = 218  # 90 above, spread over 9 pixels
    assert metric_sanity.box_blur(spike)[0, 0, 9:12, 9:12].unique().tolist() == [138]
    assert (metric_sanity.jpeg(grey, 20).int() - 128).abs().max() <= 2
