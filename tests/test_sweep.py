"""Sweeps over cfg, EMA and interval: what is asked for, what is best, and a whole one, interrupted."""

import csv
import json
import os
import sys
from argparse import Namespace

import pytest

import main_jit
from tests import toy_evaluation as toy
from tests.conftest import flags, listing, register
from tests.test_evaluation import stopping
from tests.toy_evaluation import Recorder, ToySuite
from util import preparation, sweep
from util.errors import UserError
from util.sweep import Plan, Point, best, criterion, make_points, parse_cfg, parse_ema, parse_interval

# --- grammar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("2.9", [2.9]),
        ("1.0:4.0:0.1", [float(f"{k // 10}.{k % 10}") for k in range(10, 41)]),
        ("1:2:0.5", [1.0, 1.5, 2.0]),
        ("1:1:0.1", [1.0]),
        ("0:0.3:0.1", [0.0, 0.1, 0.2, 0.3]),
        ("1:2:0.3", [1.0, 1.3, 1.6, 1.9]),
        ("3,1.5, 2", [1.5, 2.0, 3.0]),
        ("1,1:2:0.5,4,2.0", [1.0, 1.5, 2.0, 4.0]),
        ("0.1:100:0.1", [float(f"{k // 10}.{k % 10}") for k in range(1, 1001)]),
    ],
)
def test_guidance_scales(text, values):
    assert parse_cfg(text) == values  # exactly: a value that was counted is the one that a person types


def test_emas_and_intervals():
    assert parse_ema("1,2") == ["ema1", "ema2"] and parse_ema("2, 0") == ["ema2", "model"]
    assert parse_ema("model,1,ema1") == ["model", "ema1"]
    assert parse_interval("0.1:1.0,0.2:0.8") == [(0.1, 1.0), (0.2, 0.8)]
    assert parse_interval("0:1,0.0:1.0") == [(0.0, 1.0)]


@pytest.mark.parametrize(
    ("parse", "flag", "text", "piece", "form"),
    [
        *(
            (parse_cfg, "--sweep_cfg", text, piece, "1.0:4.0:0.1")
            for text, piece in [
                ("", ""),
                ("1,,2", ""),
                ("one", "one"),
                ("1,2:3", "2:3"),
                ("1:2:3:4", "1:2:3:4"),
                ("2:1:0.1", "2:1:0.1"),
                ("1:2:0", "1:2:0"),
                ("1:2:-0.1", "1:2:-0.1"),
                ("1:2:", "1:2:"),
                ("nan", "nan"),
                ("1:inf:1", "1:inf:1"),
                ("-1", "-1"),
                ("1:4:0.0001", "1:4:0.0001"),
            ]
        ),
        *(
            (parse_ema, "--sweep_ema", text, piece, "as in 1,2")
            for text, piece in [("1,3", "3"), ("", ""), ("1:2", "1:2")]
        ),
        *(
            (parse_interval, "--sweep_interval", text, piece, "lo:hi")
            for text, piece in [
                ("0.1", "0.1"),
                ("0:1,0.8:0.2", "0.8:0.2"),
                ("0.5:0.5", "0.5:0.5"),
                ("0:1.1", "0:1.1"),
                ("-0.1:1", "-0.1:1"),
                ("0:nan", "0:nan"),
                ("0:0.5:1", "0:0.5:1"),
                ("a:b", "a:b"),
            ]
        ),
    ],
)
def test_grammar_errors_name_flag_piece_and_form(parse, flag, text, piece, form):
    with pytest.raises(UserError) as error:
        parse(text)
    message = str(error.value)
    assert message.startswith(f"{flag} {text!r}: {piece!r} is wrong") and form in message


def plan(**given):
    own = {"cfg": 2.9, "ema": "ema1", "interval_min": 0.1, "interval_max": 1.0, "class_num": 1000}
    return Plan.from_args(Namespace(**{**own, **dict.fromkeys(sweep.FLAGS), **given}))


def test_what_has_no_sweep_flag_stays_as_it_is():
    assert plan() is None
    assert plan(sweep_ema="2,1") == Plan((Point("ema2", 2.9, (0.1, 1.0)), Point("ema1", 2.9, (0.1, 1.0))), 8000)
    assert plan(sweep_cfg="1.5", sweep_images=2000) == Plan((Point("ema1", 1.5, (0.1, 1.0)),), 2000)
    assert plan(sweep_interval="0:1") == Plan((Point("ema1", 2.9, (0.0, 1.0)),), 8000)
    assert len(plan(sweep_cfg="1.0:4.0:0.1", sweep_ema="1,2").points) == 62


def test_sizes_that_are_refused():
    for images in (0, -1000, 8001):
        with pytest.raises(UserError, match=rf"--sweep_images {images} .*1000 classes"):
            plan(sweep_cfg="1", sweep_images=images)
    with pytest.raises(UserError, match="--sweep_cfg, --sweep_ema, --sweep_interval"):
        plan(sweep_images=8000)


def test_without_guidance_the_interval_counts_once():
    a, b = (0.1, 1.0), (0.2, 0.8)
    expected = [(1.0, a), (2.0, a), (2.0, b)]
    points = make_points(["ema1", "ema2"], [1.0, 2.0], [a, b])
    assert [(p.ema, p.cfg, p.interval) for p in points] == [(e, *rest) for e in ("ema1", "ema2") for rest in expected]


# --- choice ----------------------------------------------------------------------------------------------------------


def test_criterion():
    assert criterion(["is", "fd_effnet", "fid"]) == ("fid", True)
    assert criterion(["is", "class_agreement", "fd_effnet"]) == ("fd_effnet_lite0", True)
    assert criterion(["is", "class_agreement"]) == ("class_agreement", False)
    assert criterion(["is"]) == ("is_mean", False)
    with pytest.raises(UserError, match="kid"):
        criterion(["kid"])


@pytest.mark.parametrize(
    ("values", "lowest", "highest"),
    [
        ([3.0, 1.0, 2.0, 4.0], 1, 3),
        ([2.0, 2.0, 2.0, 2.0], 1, 1),  # the lowest cfg is position 1
        ([1.0, 3.0, 1.0, 3.0], 2, 1),  # of 0 (cfg 3) and 2 (cfg 2); of 1 (cfg 1) and 3 (cfg 2)
        ([9.0, 5.0, 1.0, 1.0], 2, 0),  # the same cfg: the one that was asked for first
        ([float("nan"), 5.0, float("inf"), 7.0], 1, 3),
    ],
)
def test_best(values, lowest, highest):
    points = [Point("ema1", cfg, (0.0, 1.0)) for cfg in (3.0, 1.0, 2.0, 2.0)]
    reports = [{"metrics": {"fid": value, "other": -value}} for value in values]
    assert best(points, reports, "fid", lowest=True) == lowest
    assert best(points, reports, "fid", lowest=False) == highest


# --- a whole one -----------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_metrics(monkeypatch, tiny):
    monkeypatch.setattr(preparation, "MetricSuite", ToySuite)


def argv(run, out, **changes):
    """cfg 1, 2, 3 on two intervals (five settings) of two EMAs, 70 images each."""
    settings = {"sweep_cfg": "1:3:1", "sweep_ema": "1,2", "sweep_interval": "0.1:1,0.4:0.8", "sweep_images": 70}
    base = {"resume": run, "output_dir": out, "device": "cpu", "evaluate_gen": True, "num_images": 100, "seed": 7}
    base["num_sampling_steps"] = 3
    return [str(word) for word in flags(**{**base, **settings, **changes})]


def table(out):
    (path,) = out.glob("sweep/*/table.csv")
    with open(path) as file:
        return list(csv.DictReader(file)), json.loads(path.with_name("table.json").read_text())


def reports(out):
    return {path.name: path for path in out.glob("sweep/*/epoch*.json")}


def test_sweep(trained, tmp_path, toy_metrics, monkeypatch, capsys):
    """Interrupted inside its fourth point, then completed; each value is that of an evaluation of its own."""
    out = tmp_path / "out"
    monkeypatch.setattr(preparation, "MetricSuite", lambda *args: stopping(7))  # two batches a point
    assert main_jit.main(argv(trained, out, gen_bsz=64)) == 1 and "Stop" in capsys.readouterr().err
    done = {name: path.stat().st_mtime_ns for name, path in reports(out).items()}
    assert len(done) == 3 and not list(out.glob("sweep/*/table.*")) and not (out / "eval").exists()
    monkeypatch.setattr(preparation, "MetricSuite", ToySuite)
    recorder = Recorder(monkeypatch)
    capsys.readouterr()
    assert main_jit.main(argv(trained, out)) == 0
    text = capsys.readouterr().out
    assert "10 settings with 70 images each and seed 7, 3 of them done" in text and "highest class_agreement" in text
    assert "100 images and seed 8, which the sweep did not use" in text
    assert recorder.images == [*range(64, 70), *list(range(70)) * 6, *range(100)]
    found = reports(out)
    assert len(found) == 10 and all(found[name].stat().st_mtime_ns == at for name, at in done.items())
    assert not list(out.glob("**/*.features"))

    rows, content = table(out)
    assert len(rows) == 10 and [row["cfg"] for row in rows] == ["1.0", "2.0", "3.0", "2.0", "3.0"] * 2
    assert [row["interval_min"] for row in rows] == ["", "0.1", "0.1", "0.4", "0.4"] * 2
    assert [row["ema"] for row in rows] == ["ema1"] * 5 + ["ema2"] * 5
    values = [float(row["class_agreement"]) for row in rows]
    assert len(set(values)) == 10  # the settings matter
    winner = max(range(10), key=values.__getitem__)
    assert [row["best"] for row in rows] == [str(i == winner) for i in range(10)]
    assert [point["class_agreement"] for point in content["points"]] == values
    for i in (1, 4, 5, 8):  # each with its own weights and settings
        alone, row = tmp_path / f"alone{i}", rows[i]
        own = {"cfg": row["cfg"], "ema": row["ema"], "num_images": 70, "num_sampling_steps": 3}
        if i < 3:
            own["gen_bsz"] = 64  # as when it was made: in another batch sums are rounded in another way
        if row["interval_min"]:
            own |= {"interval_min": row["interval_min"], "interval_max": row["interval_max"]}
        single = flags(resume=trained, output_dir=alone, device="cpu", evaluate_gen=True, seed=7, **own)
        assert main_jit.main(single) == 0
        (path,) = alone.glob("eval/*.json")
        assert json.loads(path.read_text())["metrics"]["class_agreement"] == values[i]

    (path,) = out.glob("eval/*.json")
    final = json.loads(path.read_text())
    assert (final["seed"], final["num_images"], final["cfg"]) == (8, 100, float(rows[winner]["cfg"]))
    assert final["ema"] == rows[winner]["ema"] and final["chosen"]["by"] == "highest class_agreement"
    assert content["full_size"] == {"report": str(path), "metrics": final["metrics"]} and content["seed"] == 7
    assert (path.parent.parent / "sweep").joinpath(os.listdir(out / "sweep")[0], "metrics.png").stat().st_size > 1000
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:3] == ["ema", "interval", "cfg"])
    assert [line.startswith("*") for line in lines[head + 1 : head + 11]] == [i == winner for i in range(10)]

    recorder.batches.clear()  # finished: nothing is made again
    before = listing(out)
    assert main_jit.main(argv(trained, out)) == 0
    assert recorder.images == [] and listing(out).keys() == before.keys()
    assert main_jit.main(argv(trained, out, sweep_cfg="2:4:1", sweep_ema="2")) == 0  # cfg 4 is new, on two intervals
    assert recorder.images[:140] == list(range(70)) * 2 and len(table(out)[0]) == 6
    recorder.batches.clear()
    assert main_jit.main(argv(trained, out, sweep_cfg="2", sweep_ema="2", num_sampling_steps=2)) == 0
    assert len(list(out.glob("sweep/*"))) == 2 and len(recorder.images) == 240  # other settings are another sweep


def test_sweep_of_digits_with_their_metric(trained, tmp_path, tiny, capsys):
    options = {"sweep_cfg": "1,2", "sweep_ema": "model", "sweep_interval": None, "sweep_images": 20, "num_images": 30}
    assert main_jit.main(argv(trained, tmp_path / "out", **options)) == 0
    rows, content = table(tmp_path / "out")
    assert [row["ema"] for row in rows] == ["model"] * 2 and {"class_agreement", "class_agreement_real"} <= set(rows[0])
    assert content["chosen"]["by"] == "highest class_agreement" and content["num_images"] == 20
    assert "class_agreement" in capsys.readouterr().out


def test_sweep_by_two_processes(trained, tmp_path, toy_metrics):
    words = argv(trained, tmp_path / "two", sweep_cfg="1,2", sweep_ema="2,1", gen_bsz=9, save_images=tmp_path / "png")
    done = toy.finish(toy.start("tests.test_sweep", words, 2))
    assert [code for code, _, _ in done] == [0, 0], done
    assert done[1][1] == "" and "report: " in done[0][1]
    assert main_jit.main(argv(trained, tmp_path / "one", sweep_cfg="1,2", sweep_ema="2,1")) == 0
    two, one = (table(tmp_path / name)[0] for name in ("two", "one"))
    for a, b in zip(two, one, strict=True):
        assert float(a["class_agreement"]) == pytest.approx(float(b["class_agreement"]), rel=1e-3)
    assert [row["best"] for row in two] == [row["best"] for row in one] and len(two) == 6
    assert len(list((tmp_path / "png").glob("*.png"))) == 100  # of the evaluation at full size alone


# --- refusals --------------------------------------------------------------------------------------------------------


def test_sweeps_are_for_evaluations(here, capsys):
    for more in (["--sweep_cfg", "1"], ["--sweep_ema", "1"], ["--sweep_interval", "0:1"], ["--sweep_images", "10"]):
        for what in ([], ["--sample"]):
            assert main_jit.main([*more, *what, "--output_dir", "out"]) == 2
            assert f"{more[0]}: only with --evaluate_gen" in capsys.readouterr().err
    assert listing(here) == {}


def test_refused_before_the_first_image(trained, tmp_path, toy_metrics, monkeypatch, capsys):
    recorder = Recorder(monkeypatch)
    for change, part in (
        ({"sweep_cfg": "4:1:0.1"}, "--sweep_cfg '4:1:0.1'"),
        ({"sweep_ema": "3"}, "--sweep_ema '3'"),
        ({"sweep_interval": "1:0"}, "--sweep_interval '1:0'"),
        ({"sweep_images": 75}, "--sweep_images 75"),
        ({"num_images": 75}, "--num_images 75"),
    ):
        assert main_jit.main(argv(trained, tmp_path / "out", **change)) == 2
        assert part in capsys.readouterr().err
    monkeypatch.setattr(preparation, "MetricSuite", lambda names, *args: ToySuite(("kid",)))
    assert main_jit.main(argv(trained, tmp_path / "out")) == 2
    assert "a sweep chooses by" in capsys.readouterr().err
    assert recorder.batches == [] and not (tmp_path / "out").exists()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        patch.setattr(preparation, "MetricSuite", ToySuite)
        sys.exit(main_jit.main(sys.argv[1:]))
