"""Tables and figures come from the lines of the runs."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import scipy.fft
import scipy.stats

from experiments import figures, principle, resolution, results, run, studies, synthetic, train
from experiments.arms import ARMS
from experiments.train import Run
from spectral_forcing import dct_rings, num_rings
from util.data import spectrum_file
from util.errors import UserError

pytestmark = pytest.mark.usefixtures("cifar10_of_noise")
N = synthetic.SIZE


def test_interval_is_that_of_a_paired_t_test():
    a, b = {0: 1.0, 1: 1.3, 2: 0.9}, {2: 1.0, 0: 1.2, 1: 1.45, 7: 9.0}
    found = results.paired(a, b)
    low, high = scipy.stats.ttest_rel([1.0, 1.3, 0.9], [1.2, 1.45, 1.0]).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low) and found.mean + found.half == pytest.approx(high)
    assert found.pairs == 3 and found.percent == pytest.approx(100 * -0.15 / 3.65 * 3)
    assert str(results.paired({0: 1.0}, {0: 2.0})) == "-50.0%"
    with pytest.raises(UserError, match="common seed"):
        results.paired({0: 1.0}, {1: 1.0})


def line(arm="plain", seed=0, level=1.0, **changes):
    settings = asdict(Run("cifar10", 16, arm, seed)) | changes
    table = (level * np.ones((20, 22))).tolist()
    return {"run": settings, "loss": table, "commit": "abc", "hardware": "x", "train_s": 1.0, "measure_s": 1.0}


def test_numbers_of_a_table():
    flat = results.numbers(line(level=0.5))
    assert flat["density"] == pytest.approx(0.5) and flat["uniform"] == pytest.approx(0.5)
    u = np.hypot(*np.mgrid[:N, :N]) / 2
    assert flat["low"] == pytest.approx(0.5 * (u < 6).mean())


@pytest.mark.parametrize("name", ["steps", "images", "data", "patch", "lr", "width"])
def test_runs_of_different_settings_are_not_compared(name):
    other = {"steps": 5, "images": 9, "data": "power2", "patch": 8, "lr": 1.0, "width": 4}[name]
    with pytest.raises(UserError, match=f"different {name}"):
        results.compare([line(), line("linear", **{name: other})], "plain")


def test_figures_come_from_the_lines(tmp_path, monkeypatch, capsys):
    def fake(study):
        return [
            line(level=1 + 0.1 * r.seed + 0.2 * (r.arm == "linear")) | {"run": asdict(r), "tflop": 1.0}
            for r in studies.STUDIES[study].runs()
        ], []

    monkeypatch.setattr(figures, "load", fake)
    monkeypatch.setattr(resolution, "load", fake)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    points = [
        {"data": kind, "arm": arm, "hidden_noise": 0.5, "lost_percent": {"hard": 1.0}}
        for kind in principle.DATA
        for arm in principle.CUTOFFS
    ]
    (tmp_path / "principle.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    assert figures.main(["--out", str(tmp_path / "figures")]) == 0
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == set(figures.FIGURES)
    (tmp_path / "principle.jsonl").unlink()
    assert figures.main(["--out", str(tmp_path / "fewer")]) == 0
    assert "lost_and_hidden.png is left out" in capsys.readouterr().err


def test_levels_are_compared_with_plain_steps_at_their_cost(monkeypatch, tmp_path, capsys):
    def fake(study):
        if "samples" in study:
            levels = study not in ("cifar10_samples", "resolution_samples_fine")
            arm, steps, distance = ("levels_half", 1100, 600.0) if levels else ("half", 600, 800.0)
            counts = (25, 50) if "fine" in study else (20,)
            found = {"precision": 0.5, "recall": 0.1, "spectrum_gap": 0.2}
            found = [found | {"steps": n, "fd_effnet_lite0": distance * n / counts[0]} for n in counts]
            runs = [line(arm, seed, steps=steps, sampling_steps=counts) for seed in (0, 1)]
            return [made | {"samples": found} for made in runs], []
        if study not in ("resolution", "resolution_photographs"):
            raise UserError("not run")
        data = "photographs" if "photographs" in study else "cifar10"
        made = [("plain", 600, 1.0, 10.0), ("levels", 600, 0.8, 5.0), ("levels", 1200, 0.7, 10.5)]
        patches = [patch for of, patch in resolution.ARMS if of == data]
        runs = [(patch, seed, *run) for patch in patches for seed in (0, 1) for run in made]
        return [
            line(arm, seed, level + seed, patch=patch, steps=steps, data=data) | {"tflop": cost}
            for patch, seed, arm, steps, level, cost in runs
        ], []

    monkeypatch.setattr(resolution, "load", fake)
    found = resolution.by_cost(resolution.lines_of("cifar10", 4))
    assert list(found) == [("plain", 600), ("levels", 600), ("levels", 1200)]
    assert found["levels", 1200]["operations"] == pytest.approx(1.05)
    assert found["levels", 600]["density"].percent == pytest.approx(-100 * 0.2 / 1.5)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert resolution.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("| levels | 1200 | 1.05 | - | -20.0% ± 0.0 |") == 3
    assert "| levels_half | 1100 | 20 | 600 | -25.0% ± 0.0 | 0.500 (+0.000 ± 0.000) |" in said
    assert "| levels_half | 1100 | 50 | 1200 | -25.0% ± 0.0 | 0.500 (+0.000 ± 0.000) |" in said
    seconds = {"plain": [4.0, 2.0], "levels": [1.0, 1.0]}
    monkeypatch.setattr(resolution, "step_time", lambda of: seconds[of.arm][of.patch // 8])
    monkeypatch.setattr(resolution, "ARMS", {("cifar10", patch): ("plain", "levels") for patch in (4, 8)})
    assert resolution.main(["--time"]) == 0
    said = capsys.readouterr().out
    assert "| levels | 1200 | 1.05 | 0.50 |" in said and "| levels | 1200 | 1.05 | 1.00 |" in said


def test_studies_of_levels_that_have_not_been_run_are_left_out(monkeypatch, tmp_path, capsys):
    def one(study):
        if study != "resolution":
            raise UserError("not run")
        return [line(patch=8, steps=600, data="cifar10") | {"tflop": 1.0}], []

    def none(study):
        raise UserError("not run")

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(resolution, "load", one)
    assert resolution.main([]) == 0
    said = capsys.readouterr()
    assert "cifar10, patch 8" in said.out and "left out: There is no run of plain JiT on cifar10 at patch 4" in said.err
    monkeypatch.setattr(resolution, "load", none)
    assert resolution.main([]) == 2 and "no run of plain JiT on cifar10 at patch 4" in capsys.readouterr().err


def test_savings_with_the_spectrum_of_other_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resolution, "MODELS", ("JiT-Ti/4", "JiT-B/32"))
    k = np.maximum(np.arange(len(dct_rings(64)[1])), 1)
    meta = {"img_size": 64, "class_num": 3}
    fourier = np.ones(num_rings(64))
    arrays = {name: np.ones(3) for name in spectrum_file.ARRAYS} | {"power": fourier, "centred": fourier}
    np.savez(tmp_path / "x.npz", meta=np.array(json.dumps(meta)), dct_power=np.stack([400.0 / k**2.7] * 3), **arrays)
    assert resolution.main(["--spectrum", str(tmp_path / "x.npz")]) == 0
    header, _, one, two = capsys.readouterr().out.splitlines()
    assert header.startswith("| 64 px: levels") and one.startswith("| 1 | 0.") and two.startswith("| 2 | 0.")
    assert all(float(ratio) > 1 for ratio in one.split("|")[3:5]) and two.endswith(" | - |")
    assert resolution.main(["--spectrum", str(tmp_path / "none.npz")]) == 2
    assert "is no spectrum file" in capsys.readouterr().err


def test_operations_are_those_of_the_steps_and_of_each_level():
    """Of a level with a quarter of the patches: products with patches are a quarter, attention less, embeddings not."""
    plain = train.operations(Run("cifar10", 4, "plain", 0, steps=2))
    assert train.operations(Run("cifar10", 4, "plain", 0, steps=6)) == 3 * plain
    arm = train.time_sampler(ARMS["levels"], "cifar10", train.CPU)
    share = sum(0.25**level for level in arm.levels) / 8
    assert resolution.step_time(Run("cifar10", 16, "plain", 0), 1, 3) > 0
    found = train.operations(Run("cifar10", 4, "levels", 0, steps=2))
    assert found / plain == pytest.approx(share, abs=0.03)
