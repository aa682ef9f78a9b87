"""Sweeps over cfg, EMA and interval: what is asked for, what is best, and a whole one, interrupted."""

import csv
import json
from dataclasses import replace

import pytest

import main_jit
from denoiser import Denoiser
from tests.conftest import ONE, flags, listing
from tests.util.evaluation import toy
from tests.util.evaluation.toy import CONFIG, Recorder, Stop, Toy, ToySuite
from util.errors import UserError
from util.evaluation.evaluate import EvalTarget
from util.evaluation.sweep import best, parse_axis, plan_sweep, run_sweep

# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "text", "values"),
    [
        ("sweep_cfg", "1.0:4.0:0.1", [float(f"{k // 10}.{k % 10}") for k in range(10, 41)]),
        ("sweep_cfg", "1:2:0.3", [1.0, 1.3, 1.6, 1.9]),
        ("sweep_cfg", "1,1:2:0.5,4, 2.0", [1.0, 1.5, 2.0, 4.0]),
        ("sweep_cfg", "0.1:100:0.1", [float(f"{k // 10}.{k % 10}") for k in range(1, 1001)]),
        ("sweep_ema", "2, 0", ["ema2", "model"]),
        ("sweep_ema", "model,1,ema1", ["model", "ema1"]),
        ("sweep_interval", "0.1:1.0,0.2:0.8,0.10:1", [(0.1, 1.0), (0.2, 0.8)]),
    ],
)
def test_values_are_exactly_the_numbers_that_a_person_types(flag, text, values):
    assert parse_axis(flag, text) == values


BAD = {
    "sweep_cfg": " one 1:2:3:4 2:1:0.1 1:2:0 1:2:-0.1 1:2: nan 1:inf:1 inf 0:1000:1 -1",
    "sweep_ema": " 3 1:2",
    "sweep_interval": " 0.1 0.5:0.5 0.8:0.2 0:1.1 -0.1:1 0:nan 0:0.5:1 a:b",
}


@pytest.mark.parametrize("flag", BAD)
def test_errors_name_the_flag_and_the_wrong_part(flag):
    for part in BAD[flag].split(" "):
        text = f"{'0:1' if flag == 'sweep_interval' else 1}, {part}"
        with pytest.raises(UserError) as error:
            parse_axis(flag, text)
        assert str(error.value).startswith(f"--{flag} {text!r}: {part!r} is not understood. Give ")


IMAGENET = replace(CONFIG, class_num=1000, cfg=2.9, save_images="png", keep_features=True)


def points(**given):
    """(settings, number of images) of a plan."""
    plan = plan_sweep(replace(IMAGENET, **given))
    (images,) = {point.num_images for point in plan}
    assert all((p.save_images, p.keep_features) == (None, False) for p in plan)
    return [(p.ema, p.cfg, p.interval_min, p.interval_max) for p in plan], images


def test_a_setting_without_a_sweep_flag_stays_as_it_is():
    assert plan_sweep(IMAGENET) == []
    assert points(sweep_ema="2,1") == ([("ema2", 2.9, 0.1, 1.0), ("ema1", 2.9, 0.1, 1.0)], 8000)
    assert points(sweep_cfg="1.5", sweep_images=2000) == ([("ema1", 1.5, 0.1, 1.0)], 2000)
    assert len(points(sweep_cfg="1.0:4.0:0.1", sweep_ema="1,2")[0]) == 62


def test_without_guidance_the_interval_counts_once():
    found, _ = points(sweep_ema="1,2", sweep_cfg="2,1", sweep_interval="0.1:1,0.2:0.8")
    expected = [(1.0, 0.1, 1.0), (2.0, 0.1, 1.0), (2.0, 0.2, 0.8)]
    assert found == [(ema, *rest) for ema in ("ema1", "ema2") for rest in expected]


def test_sizes_that_are_refused():
    for images in (0, -1000, 8001):
        with pytest.raises(UserError, match=rf"--sweep_images {images} .*1000 classes"):
            plan_sweep(replace(IMAGENET, sweep_cfg="1", sweep_images=images))
    with pytest.raises(UserError, match="--sweep_cfg, --sweep_ema or --sweep_interval"):
        plan_sweep(replace(IMAGENET, sweep_images=8000))


def test_the_lowest_score_wins_then_the_lowest_cfg_then_the_first():
    points = [replace(CONFIG, cfg=cfg) for cfg in (3.0, 1.0, 2.0, 2.0)]
    cases = {(3.0, 1.0, 2.0, 4.0): 1, (2.0,) * 4: 1, (1.0, 3.0, 1.0, 3.0): 2, (9.0, 5.0, 1.0, 1.0): 2}
    assert {scores: best(points, scores) for scores in cases} == cases


# --- a whole one -----------------------------------------------------------------------------------------------------


class Weighted(Toy):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, z, t, y):
        return self.factor * super().forward(z, t, y)


def sweep(folder, out, suite=ToySuite, **changes):
    """cfg 1, 2, 3 on two intervals (five settings) of two EMAs, 70 images each, then the best one with 100."""
    asked = {"sweep_cfg": "1:3:1", "sweep_ema": "1,2", "sweep_interval": "0.1:1,0.4:0.8", "sweep_images": 70}
    config = replace(CONFIG, **{**asked, "num_images": 100, "seed": 7, "num_sampling_steps": 3, **changes})

    def target_of(settings):
        denoiser = Denoiser(Weighted({"ema1": 1.0, "ema2": 0.9}[settings.ema]), pred_param="v")
        return EvalTarget(denoiser, settings, 0, folder / "checkpoint-last.pth")

    return run_sweep(plan_sweep(config), config, target_of, (suite(), suite()), out, ONE)


def table(out):
    (path,) = out.glob("sweep/*/table.csv")
    with open(path) as file:
        return list(csv.DictReader(file)), json.loads(path.with_name("table.json").read_text())


@pytest.fixture
def folder(tmp_path):
    toy.checkpoint(tmp_path / "run")
    return tmp_path / "run"


def test_an_interrupted_sweep_continues_and_ends_with_the_best_on_an_unseen_seed(folder, tmp_path, monkeypatch, capsys):
    """Interrupted in its fourth setting, then completed."""
    out, shared = tmp_path / "out", ToySuite(stop_after=7)  # two batches for each setting
    with pytest.raises(Stop):
        sweep(folder, out, suite=lambda: shared)
    done = {path: path.stat().st_mtime_ns for path in out.glob("sweep/*/epoch*.json")}
    assert len(done) == 3 and not list(out.glob("sweep/*/table.*")) and not (out / "eval").exists()
    recorder = Recorder(monkeypatch)
    capsys.readouterr()
    final, products = sweep(folder, out)
    text = capsys.readouterr().out
    assert "10 settings with 70 images each and seed 7, 3 of them done" in text and "highest class_agreement" in text
    assert "100 images and seed 8, which the sweep does not use" in text
    assert recorder.images == [*range(64, 70), *list(range(70)) * 6, *range(100)]
    assert len(list(out.glob("sweep/*/epoch*.json"))) == 10 and not list(out.glob("**/*.features"))
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())

    rows, content = table(out)
    assert [row["cfg"] for row in rows] == ["1.0", "2.0", "3.0", "2.0", "3.0"] * 2
    assert [row["interval_min"] for row in rows] == ["", "0.1", "0.1", "0.4", "0.4"] * 2
    assert [row["ema"] for row in rows] == ["ema1"] * 5 + ["ema2"] * 5
    values = [float(row["class_agreement"]) for row in rows]
    assert len(set(values)) == 10  # the settings matter
    winner = max(range(10), key=values.__getitem__)
    assert [row["best"] for row in rows] == [str(i == winner) for i in range(10)]
    assert [point["class_agreement"] for point in content["points"]] == values
    (path,) = out.glob("eval/*.json")
    assert json.loads(path.read_text()) == final and products[1] == f"report: {path}"
    assert (final["seed"], final["num_images"], final["cfg"]) == (8, 100, float(rows[winner]["cfg"]))
    assert final["ema"] == rows[winner]["ema"] and final["chosen"]["by"] == "highest class_agreement"
    assert content["full_size"] == {"report": str(path), "metrics": final["metrics"]} and content["seed"] == 7
    (picture,) = out.glob("sweep/*/metrics.png")
    assert picture.stat().st_size > 1000
    recorder.batches.clear()  # finished: nothing is generated again
    before = listing(out)
    sweep(folder, out)
    assert recorder.images == [] and listing(out).keys() == before.keys()
    sweep(folder, out, sweep_cfg="2:4:1", sweep_ema="2")  # cfg 4 is new, on two intervals
    assert recorder.images[:140] == list(range(70)) * 2 and len(table(out)[0]) == 6
    recorder.batches.clear()
    png = tmp_path / "png"  # other settings are another sweep; PNGs are of the evaluation at full size alone
    sweep(folder, out, sweep_cfg="2", sweep_ema="2", num_sampling_steps=2, save_images=str(png))
    assert len(list(out.glob("sweep/*"))) == 2 and len(recorder.images) == 240 and len(list(png.glob("*.png"))) == 100


def test_the_metric_that_is_first_in_the_registry_decides(folder, tmp_path):
    class Suite(ToySuite):
        def __init__(self):
            super().__init__(("is", "fid"))

        def compute(self, features, labels):
            value = super().compute(features, labels)[0]["class_agreement"]
            return {"is_mean": value, "fid": value}, {}

    final, _ = sweep(folder, tmp_path / "out", Suite, sweep_ema="1", sweep_interval=None)
    values = [float(row["fid"]) for row in table(tmp_path / "out")[0]]
    assert final["chosen"]["by"] == "lowest fid" and final["cfg"] == 1.0 + values.index(min(values))


def argv(run, out, **changes):
    settings = {"sweep_cfg": "1,2", "sweep_ema": "2,1", "sweep_images": 20, "num_images": 30, "num_sampling_steps": 2}
    return flags(**{"resume": run, "output_dir": out, "device": "cpu", "evaluate_gen": True, **settings, **changes})


def test_a_sweep_from_the_command_line(trained, tmp_path, tiny, monkeypatch, capsys):
    assert main_jit.main(argv(trained, tmp_path / "out")) == 0
    rows, content = table(tmp_path / "out")
    assert [row["ema"] for row in rows] == ["ema2"] * 2 + ["ema1"] * 2
    assert {"class_agreement", "class_agreement_real"} <= set(rows[0]) and content["num_images"] == 20
    assert "report: " in capsys.readouterr().out
    recorder = Recorder(monkeypatch)
    for change in ({"sweep_cfg": "4:1:0.1"}, {"sweep_images": 75}, {"num_images": 75}, {"metrics": "none"}):
        assert main_jit.main(argv(trained, tmp_path / "refused", **change)) == 2
        assert f"--{next(iter(change))}" in capsys.readouterr().err
    assert recorder.batches == [] and not (tmp_path / "refused").exists()
