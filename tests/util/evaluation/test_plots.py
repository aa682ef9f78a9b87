"""Pictures: each is a PNG that depends on what it shows."""

import json
from pathlib import Path

import numpy as np

from util.evaluation import plots
from util.evaluation.plots import new_figure, plot_spectra, plot_sweep

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "cifar10_spectrum.json").read_text())


def test_plot_of_spectra_depends_on_both(tmp_path):
    p = np.array(GOLDEN["P"])
    pictures = []
    for real, generated in ((p, p), (p, p**0.9), (p**0.9, p)):
        plot_spectra(real.tolist(), generated.tolist(), tmp_path / "a.png")
        pictures.append((tmp_path / "a.png").read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and len(set(pictures)) == 3


def test_plot_of_a_sweep_has_a_line_for_each_ema_and_interval(tmp_path, monkeypatch):
    """The point without guidance is on the lines of all intervals; a metric that is not defined is left out."""
    rows = [
        {"ema": "ema1", "cfg": 1.0, "interval_min": None, "interval_max": None, "fid": 9.0, "gap": None, "best": False},
        {"ema": "ema1", "cfg": 3.0, "interval_min": 0.1, "interval_max": 1.0, "fid": 5.0, "gap": None, "best": True},
        {"ema": "ema1", "cfg": 2.0, "interval_min": 0.1, "interval_max": 1.0, "fid": 6.0, "gap": 0.2, "best": False},
        {"ema": "ema1", "cfg": 2.0, "interval_min": 0.2, "interval_max": 0.8, "fid": 7.0, "gap": 0.3, "best": False},
        {"ema": "ema2", "cfg": 2.0, "interval_min": 0.2, "interval_max": 0.8, "fid": 8.0, "gap": 0.4, "best": False},
    ]
    figures = []
    monkeypatch.setattr(plots, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    plot_sweep(tmp_path / "metrics.png", rows, ["fid", "gap"])
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    fid, gap = figures[0].axes
    lines = {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in fid.lines}
    assert lines["ema1, (0.1, 1)"] == [(1, 9), (2, 6), (3, 5)] and lines["ema1, (0.2, 0.8)"] == [(1, 9), (2, 7)]
    assert lines["ema2, (0.2, 0.8)"] == [(2, 8)] and len(fid.lines) == 4  # and the ring around the best
    assert fid.lines[-1].get_xydata().tolist() == [[3, 5]] and len(gap.lines) == 3
    plot_sweep(tmp_path / "metrics.png", [{**rows[0], "best": True}], ["fid"])  # no guidance at all
    assert figures[1].axes[0].lines[0].get_label() == "ema1"
