"""Evaluations: the same numbers however they are computed, interrupted ones go on, and errors say where.

Shapes: N images in all, uint8 (N, 3, 32, 32); features (N, F).
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import main_jit
import util.shards
from denoiser import Denoiser
from sampler import guidance_scale
from tests import toy_evaluation as toy
from tests.conftest import flags, raw, read_log, state_differences, train
from tests.golden_inputs import small_denoiser
from tests.toy_evaluation import N, Recorder, Toy, ToySuite
from util import preparation
from util.distributed import World
from util.errors import UserError
from util.evaluation import decided_by_of, finished_report, report_path
from util.generation import Sampling, generate
from util.progress import ImageProgress
from util.shards import BLOCK, Shards, digest, weights_identity

ONE = World()


@pytest.fixture
def folder(tmp_path):
    """A run's folder with a checkpoint in it."""
    toy.checkpoint(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def made(monkeypatch):
    return Recorder(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def features_folder(folder):
    (found,) = (folder / "eval").glob("*.features")
    return found


def shards(folder):
    return sorted(path.name for path in features_folder(folder).glob("block-*.npz"))


def pngs(folder):
    paths = sorted(folder.glob("*.png"))
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(len(paths))]
    return np.stack([np.asarray(Image.open(path)) for path in paths])


class Stop(Exception):
    pass


def stopping(after):
    """A suite that raises when it has seen `after` batches."""
    suite, seen = ToySuite(), []
    extract = suite.extract

    def limited(images):
        if len(seen) == after:
            raise Stop
        seen.append(len(images))
        return extract(images)

    suite.extract = limited
    return suite


# --- the same, however computed --------------------------------------------------------------------------------------


def test_images_and_features_do_not_depend_on_batch_size_or_processes(tmp_path):
    """A transformer: one process with batches of 64 and of 7, and two processes with batches of 7.

    Batches of other sizes add in another order. Tolerance: less than 0.1% of the bytes differ, and by one level.
    """
    runs = {"a": {"batch_size": 64}, "b": {"batch_size": 7}, "two": {"batch_size": 7}}
    found, values = {}, {}
    for name, settings in runs.items():
        where = tmp_path / name
        toy.checkpoint(where)
        settings |= {"save_images": str(where / "png"), "keep_features": True}
        if name == "two":
            done = toy.finish(toy.start("tests.toy_evaluation", [where, json.dumps(settings | {"network": True})], 2))
            assert [code for code, _, _ in done] == [0, 0], done
            assert json.loads(done[0][1]) == json.loads(done[1][1])  # all processes know the result
            (path,) = (where / "eval").glob("*.json")
            assert json.loads(path.read_text())["processes"] == 2
        else:
            _, path = toy.run(where, denoiser=small_denoiser(), **settings | {"save_images": where / "png"})
        values[name] = json.loads(path.read_text())["metrics"]["class_agreement"]
        kept = Shards(features_folder(where), {}, N, ToySuite().streams)
        found[name] = pngs(where / "png"), kept.read_all()["means"]
    images, features = found["a"]
    assert images.shape == (N, 32, 32, 3) and images.std() > 20
    for name in ("b", "two"):
        difference = np.abs(found[name][0].astype(int) - images)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        assert torch.allclose(found[name][1], features, atol=0.05)
        assert values[name] == pytest.approx(values["a"], rel=1e-4)
    pooled = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(ToySuite().extract(pooled)["means"], features)  # row i is of image i
    assert torch.equal(torch.from_numpy(images[:, :, :, 0])[:, 0, :1].float(), ToySuite().extract(pooled)["first"])


@pytest.mark.parametrize("batch_size", [7, 64, 100, 1000])
def test_exactly_n_images_and_the_last_batch_is_smaller(folder, made, batch_size):
    suite = ToySuite()
    report, _ = toy.run(folder, suite=suite, batch_size=batch_size)
    assert made.images == list(range(N))
    assert [len(batch) for batch in made.batches[:-1]] == [batch_size] * ((N - 1) // batch_size)
    assert suite.labels.tolist() == [i // 15 for i in range(N)]
    assert report["images_made"] == N == report["num_images"]
    expected = torch.cat(
        list(generate(Denoiser(Toy(), pred_param="v"), sampling(), suite.labels.tolist(), SHAPE, 10, ONE))
    )
    assert torch.equal(suite.features["means"], ToySuite().extract(expected)["means"])


SHAPE = (3, 32, 32)


def sampling(**changes):
    settings = {"solver": "heun", "steps": 2, "cfg": 2.0, "interval": (0.1, 1.0), "seed": 3, "batch_size": 64}
    return Sampling(**{**settings, **changes})


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize(("cfg", "interval"), [(2.0, (0.25, 0.8)), (1.0, (0.0, 1.0)), (3.0, (0.0, 1.0))])
def test_guidance_is_one_batch_and_without_it_there_is_one_forward(solver, cfg, interval):
    net = Toy()
    list(
        generate(
            Denoiser(net, pred_param="v"),
            sampling(solver=solver, steps=4, cfg=cfg, interval=interval),
            [0] * 5,
            SHAPE,
            10,
            ONE,
        )
    )
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    times = grid[:4] if solver == "euler" else [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    on = [cfg != 1 and t < interval[1] and (interval[0] == 0 or t > interval[0]) for t in times]
    assert net.rows == [10 if guided else 5 for guided in on]
    assert [float(guidance_scale(torch.tensor(t), cfg, *interval)) == cfg != 1 for t in times] == on


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on(folder, tmp_path, made, capsys):
    """64 + 64 images in batches of 50: when the third batch fails, the first block is there and the second is not."""
    with pytest.raises(Stop):
        toy.run(folder, suite=stopping(2), batch_size=50)
    assert shards(folder) == ["block-000000.npz"] and not list((folder / "eval").glob("*.json"))
    before = (features_folder(folder) / "block-000000.npz").stat().st_mtime_ns
    made.batches.clear()
    suite = ToySuite()
    suite.compute = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):  # all blocks are made, then the metrics fail
        toy.run(folder, suite=suite, batch_size=7)
    assert made.images == list(range(BLOCK, N)) and len(shards(folder)) == 3
    assert (features_folder(folder) / "block-000000.npz").stat().st_mtime_ns == before
    assert "64 of 150 images are there: going on" in capsys.readouterr().err
    made.batches.clear()
    report, path = toy.run(folder, batch_size=100)
    assert made.images == [] and report["images_made"] == 0 and report["images_per_s"] is None
    assert not list((folder / "eval").glob("*.features")) and path.is_file()
    toy.checkpoint(tmp_path / "whole")
    whole, _ = toy.run(tmp_path / "whole")
    assert report["metrics"] == whole["metrics"]
    assert report["fingerprint"] == whole["fingerprint"]


def test_killed_processes_are_gone_on_with_by_one(folder, tmp_path, made):
    """Two processes, each killed when it has written a block; then one process with other batches."""
    done = toy.finish(toy.start("tests.toy_evaluation", [folder, json.dumps({"die_after": 1})], 2))
    assert [code for code, _, _ in done] == [-9, -9], done
    assert shards(folder) == ["block-000000.npz", "block-000001.npz"]
    report, _ = toy.run(folder, batch_size=7)
    assert made.images == list(range(128, N))
    toy.checkpoint(tmp_path / "whole")
    assert report["metrics"] == toy.run(tmp_path / "whole")[0]["metrics"]


def test_processes_that_wait_and_errors_of_rank_0(folder, tmp_path):
    """Rank 1's features, then rank 0's metrics take five times what the default group waits, and nothing ends it.

    Then rank 0 alone looks into the folder for images, and the error is everybody's.
    """
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "000000.png").touch()
    settings = json.dumps({"slow": 1.5, "refused": str(tmp_path / "png")})
    done = toy.finish(toy.start("tests.toy_evaluation", [folder, settings], 2))
    assert len(list((folder / "eval").glob("*.json"))) == 1
    assert all(code == 1 and "UserError: --save_images" in err for code, _, err in done), done


DAMAGE = {
    "truncated": lambda data: data[:-100],
    "empty": lambda data: b"",
    "a byte": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
    "no zip": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("how", [*DAMAGE, "rows", "type", "stream", "pickle"])
def test_a_damaged_shard_is_made_again_and_that_is_said(folder, made, capsys, how):
    first, _ = toy.run(folder, keep_features=True)
    path = features_folder(folder) / "block-000001.npz"
    good = path.read_bytes()
    if how in DAMAGE:
        path.write_bytes(DAMAGE[how](good))
    else:
        arrays = dict(np.load(path))
        means = arrays.pop("means")
        changed = {
            "rows": {"means": means[:-1]},
            "type": {"means": means.astype(np.float64)},
            "stream": {},
            "pickle": {"means": np.array([object()])},
        }
        np.savez(path, **arrays, **changed[how])
    made.batches.clear()
    again, _ = toy.run(folder, keep_features=True)
    assert made.images == list(range(64, 128)) and path.read_bytes()[:4] == b"PK\x03\x04"
    assert again["metrics"] == first["metrics"]
    err = capsys.readouterr().err
    assert "block-000001.npz is damaged" in err and "64 images are made again" in err


CHANGES = {
    "seed": {"seed": 4},
    "cfg": {"cfg": 2.5},
    "interval": {"interval": (0.2, 1.0)},
    "steps": {"steps": 3},
    "solver": {"solver": "euler"},
    "images": {"num_images": 160},
    "ema": {"ema": "ema2"},
    "epoch": {"epoch": 1},
}


@pytest.mark.parametrize("change", [*CHANGES, "weights", "extractor", "streams", "precision"])
def test_another_fingerprint_is_another_folder(folder, made, change):
    with pytest.raises(Stop):
        toy.run(folder, suite=stopping(2))
    (old,) = (folder / "eval").glob("*.features")
    made.batches.clear()
    suite, denoiser = ToySuite(), Denoiser(Toy(), pred_param="v")
    if change == "weights":
        toy.checkpoint(folder, content=1)
    elif change == "extractor":
        suite.sha256 = "1"
    elif change == "streams":
        del suite.streams["first"]
        suite.compute = lambda features, labels: {"x": 1.0}
    elif change == "precision":
        denoiser.autocast_dtype = torch.bfloat16
    toy.run(folder, suite=suite, denoiser=denoiser, keep_features=True, **CHANGES.get(change, {}))
    assert made.images == list(range(CHANGES.get(change, {}).get("num_images", N)))
    folders = set((folder / "eval").glob("*.features"))
    assert len(folders) == 2 and len(list(old.glob("block-*.npz"))) == 2
    digests = {digest(json.loads((path / "fingerprint.json").read_text())): path.name for path in folders}
    assert len(digests) == 2 and all(text in name for text, name in digests.items())


def test_batch_size_and_processes_are_not_in_the_fingerprint(folder, made):
    with pytest.raises(Stop):
        toy.run(folder, suite=stopping(2))
    made.batches.clear()
    toy.run(folder, batch_size=5)
    assert made.images == list(range(128, N))


def test_features_of_unknown_origin_are_not_used(folder, made, capsys):
    toy.run(folder, keep_features=True)
    (features_folder(folder) / "fingerprint.json").write_text("{}")
    made.batches.clear()
    toy.run(folder)
    assert made.images == list(range(N)) and "all are made again" in capsys.readouterr().err


def test_identity_of_weights(tmp_path):
    """The same content is the same, wherever and whenever it was written; another value of a tensor is not."""
    a, b = weights_identity(toy.checkpoint(tmp_path / "a")), weights_identity(toy.checkpoint(tmp_path / "b"))
    assert a == b != weights_identity(toy.checkpoint(tmp_path / "b", content=1))
    old = tmp_path / "old.pth"
    torch.save({"x": torch.zeros(3)}, old, _use_new_zipfile_serialization=False)
    first = weights_identity(old)
    torch.save({"x": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    assert weights_identity(old) != first


def test_a_folder_that_others_do_not_see(folder, monkeypatch):
    monkeypatch.setattr(util.shards, "PATIENCE", 0.0)
    with pytest.raises(UserError, match="all processes share"):
        Shards(folder / "unseen", {"images": {}}, N, {"means": 12}).seen()


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_saved_with_their_block(folder, tmp_path, made):
    """A PNG that is missing has its block made again, and only that."""
    where = tmp_path / "deep" / "png"
    with pytest.raises(Stop):
        toy.run(folder, suite=stopping(2), batch_size=50, save_images=where)
    assert len(pngs(where)) == BLOCK == 64
    (where / "000003.png").unlink()
    made.batches.clear()
    suite = ToySuite()
    toy.run(folder, suite=suite, save_images=where, keep_features=True)
    assert made.images == list(range(N))
    images = torch.from_numpy(pngs(where)).permute(0, 3, 1, 2)
    assert torch.equal(ToySuite().extract(images)["means"], suite.features["means"])
    made.batches.clear()
    (where / "000149.png").unlink()
    toy.run(folder, save_images=where, keep_features=True)
    assert made.images == list(range(128, N)) and len(pngs(where)) == N
    made.batches.clear()
    toy.run(folder, save_images=tmp_path / "other", keep_features=True)  # the features are there, its PNGs are not
    assert made.images == list(range(N)) and np.array_equal(pngs(tmp_path / "other"), pngs(where))


def test_images_of_other_settings_are_not_mixed(folder, tmp_path, made):
    toy.run(folder, save_images=tmp_path / "png")
    made.batches.clear()
    before = pngs(tmp_path / "png")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "cat.png").touch()
    for where, change in (("png", {"cfg": 1.0}), ("png", {"num_images": 100}), ("foreign", {})):
        with pytest.raises(UserError, match=r"--save_images .*name another folder"):
            toy.run(folder, save_images=tmp_path / where, **change)
    assert made.images == [] and np.array_equal(pngs(tmp_path / "png"), before)


class Breaks(Toy):
    """Not finite for label 6 from time `since` on."""

    def __init__(self, since, value):
        super().__init__()
        self.since, self.value = since, value

    def forward(self, z, t, y):
        bad = (y == 6) & (t >= self.since - 1e-6)
        return torch.where(bad[:, None, None, None], self.value, super().forward(z, t, y))


@pytest.mark.parametrize(
    ("solver", "since", "value", "step"),
    [
        ("euler", 0.0, math.nan, 1),
        ("euler", 0.5, math.nan, 3),
        ("euler", 0.75, math.inf, 4),
        ("heun", 0.0, math.nan, 1),
        ("heun", 0.5, math.nan, 2),  # asked for at t = 0.5 by the second stage of step 2
        ("heun", 0.75, math.nan, 3),
        ("heun", 0.25, 3e38, 2),  # all velocities are finite, and the sum of both of step 2 is not
        ("heun", 1.0, math.nan, None),  # never asked for: the last step is Euler's
    ],
)
def test_the_error_names_the_step(folder, solver, since, value, step):
    settings = {
        "solver": solver,
        "steps": 4,
        "denoiser": Denoiser(Breaks(since, value), pred_param="v"),
    }
    if step is None:
        toy.run(folder, **settings)
        return
    with pytest.raises(UserError) as error:
        toy.run(folder, **settings, cfg=1.0)
    t = f"{(step - 1) / 4:g}"
    message = str(error.value)
    assert f"seed 3 gave values that are not finite: image 90 (label 6) from step {step} of 4 (t = {t}) on, " in message
    assert "image 94" in message and "image 89" not in message and "15 in this batch" in message


# --- reports and progress --------------------------------------------------------------------------------------------


def test_the_report_says_what_was_measured(folder, tmp_path):
    suite = ToySuite()
    suite.details, suite.plot = {"bands": [1.0, 2.0]}, lambda path: path.touch()
    report, path = toy.run(folder, suite=suite, batch_size=50, save_images=tmp_path / "png")
    assert json.loads(path.read_text()) == report
    expected = {
        **{"ema": "ema1", "cfg": 2.0, "interval": [0.1, 1.0], "steps": 2, "solver": "heun", "seed": 3},
        **{"num_images": N, "images_made": N, "processes": 1, "batch_size": 50, "epoch": 0, "precision": "float32"},
        **{"checkpoint": str(folder / "checkpoint-last.pth"), "details": {"bands": [1.0, 2.0]}, "reference": {}},
        **{"images": str(tmp_path / "png"), "weights": weights_identity(folder / "checkpoint-last.pth")},
    }
    assert {name: report[name] for name in expected} == expected
    assert set(report["seconds"]) == {"sampling", "features", "gathering", "metrics"}
    assert set(report["tf32"]) == {"matmul", "cudnn"} and report["images_per_s"] > 0
    assert {"date", "command", "commit", "versions", "hardware"} <= set(report)
    assert path.with_suffix(".png").is_file()
    assert path.name == "epoch0001-ema1-heun2-cfg2-seed3-n150.json"


def test_progress_without_a_terminal(monkeypatch, capsys):
    """A line for each tenth, but not more often than TENTH_AFTER; one after LINE_AFTER in any case; none at the end."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = ImageProgress("evaluating", 1000, 200, ONE)
    for at, done in ((1, 400), (6, 420), (7, 600), (40, 610), (67, 611), (101, 612), (102, 999), (150, 1000)):
        now[0] = at
        progress.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.search(r"(\d+)/1000", line)[1]) for line in lines] == [420, 610, 612]
    assert lines[0] == "evaluating: 420/1000 images (42%), 36.7 images/s, 16 s left"
    ImageProgress("evaluating", 10, 0, World(rank=1, size=2)).update(9)
    assert capsys.readouterr().err == ""


# --- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def toy_metrics(monkeypatch, tiny):
    monkeypatch.setattr(preparation, "MetricSuite", ToySuite)


def test_an_evaluation_that_training_left_open_is_completed(tmp_path, toy_metrics, monkeypatch, capsys):
    """Interrupted in the evaluation after epoch 2 of 4; no checkpoint was due then, but for the evaluation."""
    settings = {"epochs": 4, "eval_freq": 2, "save_last_freq": 10, "online_eval": True, "num_images": 100}
    whole = train(tmp_path / "whole", **settings)
    monkeypatch.setattr(preparation, "MetricSuite", lambda *args: stopping(1))
    train(tmp_path / "run", **settings, gen_bsz=70, code=1)
    assert "Stop" in capsys.readouterr().err
    assert raw(tmp_path / "run")["epoch"] == 1 and shards(tmp_path / "run") == ["block-000000.npz"]
    monkeypatch.setattr(preparation, "MetricSuite", ToySuite)
    recorder = Recorder(monkeypatch)
    capsys.readouterr()
    train(tmp_path / "run", **settings)
    assert recorder.images == [*range(64, 100), *range(100)]
    assert "the look at samples after epoch 2 was due" in capsys.readouterr().out
    reports = {}
    for run in (whole, tmp_path / "run"):
        reports[run] = {path.name: json.loads(path.read_text())["metrics"] for path in (run / "eval").glob("*.json")}
        assert len(reports[run]) == 2 and not list((run / "eval").glob("*.features"))
        values = [(line["step"], line["epoch"], line["class_agreement"]) for line in read_log(run, "eval")]
        assert len(values) == 2 and values == [
            (line["step"], line["epoch"], line["class_agreement"]) for line in read_log(whole, "eval")
        ]
    assert reports[whole] == reports[tmp_path / "run"] and state_differences(whole, tmp_path / "run") == []
    recorder.batches.clear()
    train(tmp_path / "run", **settings)
    assert recorder.images == []  # finished: nothing is missing
    next((tmp_path / "run" / "eval").glob("epoch0004*.json")).unlink()
    train(tmp_path / "run", **settings)
    assert recorder.images == list(range(100)) and len(list((tmp_path / "run" / "eval").glob("*.json"))) == 2


def test_evaluate_from_the_command_line(trained, tmp_path, toy_metrics, capsys):
    where, png = tmp_path / "out", tmp_path / "png"
    argv = flags(resume=trained, output_dir=where, device="cpu", evaluate_gen=True, num_images=70, cfg=1.5, seed=5)
    assert main_jit.main([*argv, "--save_images", str(png), "--keep_features", "--gen_bsz", "9"]) == 0
    (path,) = (where / "eval").glob("*.json")
    report = json.loads(path.read_text())
    assert str(path) in capsys.readouterr().out and len(pngs(png)) == 70 and len(shards(where)) == 2
    assert report["batch_size"] == 9 and report["checkpoint"] == str(trained / "checkpoint-last.pth")
    assert report["epoch"] == 1 and report["seed"] == 5
    assert main_jit.main([*argv, "--save_images", str(png), "--ema", "ema2"]) == 2
    assert "name another folder" in capsys.readouterr().err


def test_saving_images_is_for_evaluations(tmp_path, capsys):
    assert main_jit.main(["--save_images", str(tmp_path / "png")]) == 2
    assert "--save_images: only with --evaluate_gen" in capsys.readouterr().err


def test_a_report_is_never_replaced_by_another_one(tmp_path):
    """The same evaluation again has the same file; other metrics, a damaged file or one of an older kind do not."""
    first = report_path(tmp_path, "epoch0001", "aaaa")
    assert first == tmp_path / "epoch0001.json"
    first.write_text(json.dumps({"decided_by": "aaaa"}))
    assert report_path(tmp_path, "epoch0001", "aaaa") == first
    assert report_path(tmp_path, "epoch0001", "bbbb") == tmp_path / "epoch0001-bbbb.json"
    for content in ("{", "{}", "[]"):
        first.write_text(content)
        assert report_path(tmp_path, "epoch0001", "aaaa") == tmp_path / "epoch0001-aaaa.json"


def test_a_finished_evaluation_is_found_under_either_name(tmp_path):
    (tmp_path / "epoch0001.json").write_text(json.dumps({"decided_by": "aaaa", "metrics": 1}))
    (tmp_path / "epoch0001-bbbb.json").write_text(json.dumps({"decided_by": "bbbb", "metrics": 2}))
    (tmp_path / "epoch0001-cccc.json").write_text("{")
    assert finished_report(tmp_path, "epoch0001", "aaaa")[0]["metrics"] == 1
    assert finished_report(tmp_path, "epoch0001", "bbbb")[1] == tmp_path / "epoch0001-bbbb.json"
    assert finished_report(tmp_path, "epoch0001", "cccc") is None
    assert finished_report(tmp_path / "nowhere", "epoch0001", "aaaa") is None


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    block = Shards(tmp_path / "features", {"images": 1, "features": 2}, 10, {"means": 3})
    block.prepare()
    features = torch.ones(10, 3)
    features[4, 1] = math.nan
    with pytest.raises(UserError, match="images 0 to 9 are not finite"):
        block.write(0, {"means": features})
    assert block.prepare()[0] == [0]


def test_what_decides_a_report_is_content_not_names(tmp_path):
    """The path and the order of what was asked for do not matter; the content of the reference does."""

    class Suite(ToySuite):
        def __init__(self, names, file, sha256):
            super().__init__(names)
            self.reference = {"file": file, "sha256": sha256}

        def describe(self):
            return super().describe() | {"references": {"fid": self.reference}, "warnings": [self.reference["file"]]}

    first = decided_by_of({"images": 1}, Suite(("fid", "is"), "a.npz", "00"))
    assert decided_by_of({"images": 1}, Suite(("is", "fid"), "/abs/a.npz", "00")) == first
    assert decided_by_of({"images": 1}, Suite(("fid", "is"), "a.npz", "01")) != first
    assert decided_by_of({"images": 1}, Suite(("fid",), "a.npz", "00")) != first
    assert decided_by_of({"images": 2}, Suite(("fid", "is"), "a.npz", "00")) != first
