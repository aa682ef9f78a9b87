"""python -m tools.report: which files are reports, the table, its order, and what it says is not comparable."""

import csv
import json

import pytest

from tools import report

SHA = {"a": "a" * 64, "b": "b" * 64}


def made_up(reference="a", extractor="a", **changes):
    """A report as main_jit.py writes it, without what the table does not read."""
    weights = {"weights_sha256": SHA[extractor], "weights": "published by torch-fidelity"}
    content = {
        "metrics": {"fid": 12.345678, "is_mean": 100.0},
        "num_images": 5000,
        "solver": "heun",
        "steps": 50,
        "cfg": 2.9,
        "interval": [0.1, 1.0],
        "seed": 0,
        "measured_with": {
            "references": {"fid": {"file": f"/x/stats_{reference}.npz", "sha256": SHA[reference], "meta": None}},
            "extractors": [{"extractor": "inception", "streams": {}, **weights}],
        },
        "ema": "ema1",
        "epoch": 199,
        "quantisation": "round",
    }
    return {**content, **changes}


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def show(capsys):
    """show(*arguments): (exit code, lines of the table, what went to stderr)."""

    def call(*arguments):
        code = report.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


cells = str.split


def test_runs_side_by_side(tmp_path, show):
    write(tmp_path, "one/eval/x.json", made_up())
    write(tmp_path, "one/eval/y.json", made_up(cfg=1.5, metrics={"fid": 20.0}))
    write(tmp_path, "two/sweep/deep/down/z.json", made_up(epoch=39, metrics={"fid": 3.0, "precision": 0.5}))
    code, lines, err = show(tmp_path / "one", tmp_path / "two")
    assert (code, err) == (0, "")
    assert lines[0] == (
        "all: ema ema1, interval 0.1-1, solver heun50, seed 0, N 5000, reference fid stats_a aaaaaaaaa, "
        "extractor inception aaaaaaaaa, quantisation round"
    )
    assert cells(lines[1]) == ["run", "epoch", "cfg", "fid", "is_mean", "precision"]
    assert cells(lines[3]) == ["one", "200", "2.9", "12.346", "100", "-"]
    assert cells(lines[4]) == ["one", "200", "1.5", "20", "-", "-"]
    assert cells(lines[5]) == ["two", "40", "2.9", "3", "-", "0.5"]
    assert len({len(line) for line in lines[2:]}) == 1  # numbers end below each other


def test_a_single_row_has_its_settings_above(tmp_path, show):
    content = made_up()
    content["measured_with"]["extractors"][0]["weights"] = "not the published file"
    code, lines, _ = show(write(tmp_path, "run/eval/x.json", content))
    assert code == 0 and "epoch 200" in lines[0] and "cfg 2.9" in lines[0] and "N 5000" in lines[0]
    assert "extractor inception not published aaaaaaaaa" in lines[0]
    assert cells(lines[1]) == ["run", "fid", "is_mean"] and cells(lines[3]) == ["run", "12.346", "100"]


def test_the_protocol_is_a_column(tmp_path, show):
    """It warns of nothing itself: images, reference and weights, which it fixes, do."""
    for name in ("adm", "torch-fidelity"):
        content = made_up()
        content["measured_with"]["protocol"] = name
        write(tmp_path, f"{name}/eval/x.json", content)
    _, lines, _ = show(tmp_path / "adm", tmp_path / "torch-fidelity")
    assert cells(lines[1])[:2] == ["run", "protocol"] and [cells(line)[1] for line in lines[3:5]] == [
        "adm",
        "torch-fidelity",
    ]
    assert len(lines) == 5


def test_which_files_are_reports(tmp_path, show):
    """Tables of sweeps, pictures and other folders are no reports; a file that was found twice is one row."""
    x = write(tmp_path, "run/eval/x.json", made_up())
    write(tmp_path, "run/eval/x.png", "no JSON")
    write(tmp_path, "run/eval/x.features/part.json", made_up(seed=7))
    table = write(tmp_path, "run/sweep/table.json", {"points": [made_up()], "epoch": 1})
    write(tmp_path, "run/sweep/numbers.json", [1, 2])
    write(tmp_path, "run/config.json", made_up(seed=8))
    code, lines, err = show(tmp_path / "run", x, tmp_path / "run")
    assert (code, err) == (0, "") and len(lines) == 4
    code, _, err = show(x, table)
    assert code == 0 and "table.json is skipped" in err and "not the report" in err


def test_runs_of_one_name_are_told_apart(tmp_path, show):
    for parent in ("a", "b"):
        write(tmp_path, f"{parent}/run/eval/x.json", made_up())
    _, lines, _ = show(tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert [cells(line)[0] for line in lines[3:]] == [str(tmp_path / p / "run") for p in "ab"]


@pytest.mark.parametrize(
    ("changes", "column", "shown"),
    [
        ({"num_images": 50000}, "N", "(5000, 50000)"),
        ({"reference": "b"}, "reference fid", "(stats_a aaaaaaaaa, stats_b bbbbbbbbb)"),
        ({"extractor": "b"}, "extractor inception", "(aaaaaaaaa, bbbbbbbbb)"),
        ({"quantisation": "floor"}, "quantisation", "(round, floor)"),
    ],
    ids=["N", "reference", "extractor", "quantisation"],
)
def test_rows_that_are_not_comparable_are_warned_about(tmp_path, show, changes, column, shown):
    write(tmp_path, "run/eval/a.json", made_up())
    write(tmp_path, "run/eval/b.json", made_up(**changes))
    code, lines, _ = show(tmp_path / "run")
    warnings = [line for line in lines if line.startswith("warning")]
    assert code == 0 and len(warnings) == 1 and lines[-1] == warnings[0]
    assert f"across {column} {shown}" in warnings[0]
    assert [part.strip() for part in lines[1].split("  ") if "!" in part] == [f"{column} !"]


def test_other_differences_are_no_warning(tmp_path, show):
    """The same statistics under another name, and a metric without reference and extractor."""
    write(tmp_path, "run/eval/a.json", made_up())
    moved = made_up(seed=1, cfg=1.0, steps=20, ema="ema2")
    moved["measured_with"]["references"]["fid"]["file"] = "/elsewhere/other.npz"
    write(tmp_path, "run/eval/b.json", moved)
    other = {"references": {}, "extractors": [{"extractor": "digit_pixels", "weights_sha256": None}]}
    write(tmp_path, "run/eval/c.json", made_up(metrics={"class_agreement": 0.5}, measured_with=other))
    code, lines, _ = show(tmp_path / "run")
    assert code == 0 and not any("warning" in line or "!" in line for line in lines)
    assert cells(lines[1])[:5] == ["run", "ema", "cfg", "solver", "seed"]


@pytest.mark.parametrize(("metric", "order"), [("fid", "bca"), ("is_mean", "acb")])
def test_sort_is_best_first(tmp_path, show, metric, order):
    found = {"a": {"is_mean": 300.0}, "b": {"fid": 4.0, "is_mean": 20.0}, "c": {"fid": 20.0, "is_mean": 100.0}}
    for name, metrics in found.items():
        write(tmp_path, f"{name}/eval/x.json", made_up(metrics=metrics))
    code, lines, _ = show(*(tmp_path / name for name in "abc"), "--sort", metric)
    assert code == 0 and "".join(cells(line)[0] for line in lines[3:6]) == order
    code, lines, err = show(tmp_path / "a", "--sort", "recall")
    assert (code, lines) == (2, []) and "--sort recall" in err and "there are is_mean" in err


def test_csv_has_everything_in_full(tmp_path, show):
    write(tmp_path, "run/eval/a.json", made_up())
    write(tmp_path, "run/eval/b.json", made_up(seed=3, metrics={"fid": 1 / 3}))
    assert show(tmp_path / "run", "--csv", tmp_path / "t.csv")[0] == 0
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fid"]) for row in rows] == [12.345678, 1 / 3] and rows[1]["is_mean"] == ""
    assert [row["seed"] for row in rows] == ["0", "3"] and rows[0]["solver"] == "heun50" and rows[0]["N"] == "5000"
    code, _, err = show(tmp_path / "run", "--csv", tmp_path / "no" / "t.csv")
    assert code == 2 and "t.csv" in err and "No such file" in err


def test_files_that_cannot_be_read_are_named_and_skipped(tmp_path, show):
    write(tmp_path, "run/eval/a.json", made_up())
    write(tmp_path, "run/eval/cut.json", json.dumps(made_up())[:50])
    write(tmp_path, "run/eval/odd.json", made_up(interval=3))
    (tmp_path / "run/eval/bytes.json").write_bytes(b"\xff\xfe{")
    code, lines, err = show(tmp_path / "run")
    assert code == 0 and len(lines) == 4
    assert [line.startswith("warning: ") for line in err.splitlines()] == [True] * 3
    assert all(f"{name}.json is skipped" in err for name in ("cut", "odd", "bytes"))


def test_no_reports_is_an_error(tmp_path, show):
    bad = write(tmp_path, "run/eval/bad.json", "{")
    code, lines, err = show(tmp_path / "run")
    assert (code, lines) == (2, []) and str(bad) in err and "expected eval/*.json" in err
    code, _, err = show(tmp_path / "nowhere")
    assert code == 2 and f"{tmp_path / 'nowhere'} is skipped: there is no such file or folder" in err
