"""Evaluations: the same numbers however they are computed, and stopped ones continue; util/evaluation/evaluate.py.

Shapes: N images in all, uint8 (N, 3, 16, 16); features (N, F).
"""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ONE
from tests.util.evaluation import toy
from tests.util.evaluation.toy import CONFIG, N, Recorder, Stop, ToySuite, stopping, toy_denoiser
from util import io
from util.dist.preemption import Preempted
from util.errors import UserError
from util.evaluation import evaluate, generate
from util.evaluation.evaluate import (
    FeatureCache,
    build_suite,
    find_report,
    identify,
    loggable,
    metric_line,
    report_exists,
    report_name,
    weights_hash,
)
from util.evaluation.generate import generate_all


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


def stored(folder):
    return sorted(path.name for path in features_folder(folder).glob("*.npz"))


def pngs(folder):
    paths = sorted(folder.glob("*.png"))
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(len(paths))]
    return np.stack([np.asarray(Image.open(path)) for path in paths])


# --- the same, however computed --------------------------------------------------------------------------------------


def test_images_and_features_do_not_depend_on_batch_size_or_ranks(tmp_path):
    """A transformer: one rank with batches of 64 and of 7, and two ranks with batches of 7.

    Batches of other sizes add in another order. Tolerance: less than 0.1% of the bytes differ, and by one level.
    """
    found, values = {}, {}
    for name, gen_bsz in {"a": 64, "b": 7, "two": 7}.items():
        where = tmp_path / name
        toy.checkpoint(where)
        settings = {"gen_bsz": gen_bsz, "save_images": str(where / "png"), "keep_features": True}
        if name == "two":
            done = toy.evaluate_on(2, where, network=True, **settings)
            assert [code for code, _, _ in done] == [0, 0], done
            assert json.loads(done[0][1]) == json.loads(done[1][1])  # all ranks know the result
            (path,) = (where / "eval").glob("*.json")
            assert json.loads(path.read_text())["ranks"] == 2
        else:
            _, path = toy.run(where, denoiser=toy.network(), **settings)
        values[name] = json.loads(path.read_text())["metrics"]["class_agreement"]
        cache = FeatureCache(features_folder(where), N, ToySuite().streams)
        found[name] = pngs(where / "png"), cache.read_all()["means"]
    images, features = found["a"]
    assert images.shape == (N, 16, 16, 3) and images.std() > 20
    for name in ("b", "two"):
        difference = np.abs(found[name][0].astype(int) - images)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        assert torch.allclose(found[name][1], features, atol=0.05)
        assert values[name] == pytest.approx(values["a"], rel=1e-4)
    assert torch.equal(ToySuite().extract(torch.from_numpy(images).permute(0, 3, 1, 2))["means"], features)


@pytest.mark.parametrize("gen_bsz", [7, 64, 1000])
def test_exactly_n_images_are_made_and_the_last_batch_is_smaller(folder, made, gen_bsz):
    suite = ToySuite()
    report, _ = toy.run(folder, suite=suite, gen_bsz=gen_bsz)
    assert made.images == list(range(N))
    assert [len(batch) for batch in made.batches[:-1]] == [gen_bsz] * ((N - 1) // gen_bsz)
    assert suite.labels.tolist() == [i // 15 for i in range(N)]
    assert report["images_made"] == N == report["num_images"]
    expected = generate_all(toy_denoiser(), CONFIG, suite.labels.tolist(), ONE)
    assert torch.equal(suite.features["means"], ToySuite().extract(expected)["means"])


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_continues(folder, tmp_path, made, capsys):
    with pytest.raises(Stop):
        toy.run(folder, suite=stopping(2), gen_bsz=50)
    assert stored(folder) == ["000000.npz", "000050.npz"] and not list((folder / "eval").glob("*.json"))
    before = (features_folder(folder) / "000000.npz").stat().st_mtime_ns
    made.batches.clear()
    suite = ToySuite()
    suite.compute = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):  # all features are there, then the metrics fail
        toy.run(folder, suite=suite, gen_bsz=7)
    assert made.images == list(range(100, N)) and len(stored(folder)) == 2 + 8
    assert (features_folder(folder) / "000000.npz").stat().st_mtime_ns == before
    assert "100 of 150 images have features" in capsys.readouterr().err
    made.batches.clear()
    report, path = toy.run(folder, gen_bsz=100)
    assert made.images == [] and report["images_made"] == 0 and report["images_per_s"] is None
    assert not list((folder / "eval").glob("*.features")) and path.is_file()
    toy.checkpoint(tmp_path / "whole")
    whole, _ = toy.run(tmp_path / "whole")
    assert report["metrics"] == whole["metrics"] and report["config_hash"] == whole["config_hash"]


def test_a_request_to_stop_ends_it_between_two_batches(folder, made, monkeypatch):
    monkeypatch.setattr(generate, "requested_on_any_rank", lambda ctx: "SIGTERM" if len(made.batches) == 2 else None)
    monkeypatch.setattr(evaluate, "requested_on_any_rank", lambda ctx: "SIGTERM")
    with pytest.raises(Preempted, match=r"features so far are in .*\.features"):
        toy.run(folder)
    assert stored(folder) == ["000000.npz", "000064.npz"] and not list((folder / "eval").glob("*.json"))


@pytest.mark.parametrize("asked", [0, 1])
def test_it_stops_on_all_ranks_and_continues(folder, tmp_path, asked):
    """One of two ranks is asked when it has written its first batch."""
    done = toy.evaluate_on(2, folder, asked=asked, gen_bsz=8)
    assert all(code == 1 and "Preempted: Stopped; the features so far" in err for code, _, err in done), done
    kept = stored(folder)
    assert 2 <= len(kept) < 2 * 10 and {"000000.npz", "000075.npz"} <= set(kept)
    report, _ = toy.run(folder)
    toy.checkpoint(tmp_path / "whole")
    assert report["metrics"] == toy.run(tmp_path / "whole")[0]["metrics"]
    assert report["images_made"] == N - sum(3 if name == "000072.npz" or name == "000147.npz" else 8 for name in kept)


def test_one_rank_continues_what_two_killed_ranks_began(folder, tmp_path, made):
    done = toy.evaluate_on(2, folder, killed=1)
    assert [code for code, _, _ in done] == [-9, -9], done
    assert stored(folder) == ["000000.npz", "000075.npz"]
    report, _ = toy.run(folder, gen_bsz=7)
    assert made.images == [*range(64, 75), *range(139, N)]
    toy.checkpoint(tmp_path / "whole")
    assert report["metrics"] == toy.run(tmp_path / "whole")[0]["metrics"]


def test_ranks_wait_longer_than_the_default_timeout_and_share_rank_0s_error(folder, tmp_path):
    """Rank 1's features, then rank 0's metrics take five times what the default group waits, and nothing ends it.

    In the second run rank 0 alone finds a PNG in the folder for images, and the error is raised on all ranks.
    """
    done = toy.evaluate_on(2, folder, slow=1.5)
    assert [code for code, _, _ in done] == [0, 0] and len(list((folder / "eval").glob("*.json"))) == 1, done
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "000000.png").touch()
    done = toy.evaluate_on(2, folder, save_images=str(tmp_path / "png"))
    assert all(code == 1 and "UserError: --save_images" in err for code, _, err in done), done


DAMAGE = {
    "truncated": lambda data: data[:-100],
    "empty": lambda data: b"",
    "a byte": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
    "no zip": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("how", [*DAMAGE, "stream", "pickle"])
def test_damaged_features_are_made_again_with_a_note(folder, made, capsys, how):
    first, _ = toy.run(folder, keep_features=True)
    path = features_folder(folder) / "000064.npz"
    if how in DAMAGE:
        path.write_bytes(DAMAGE[how](path.read_bytes()))
    else:
        arrays = dict(np.load(path))
        del arrays["means"]
        np.savez(path, **arrays, **({"means": np.array([object()])} if how == "pickle" else {}))
    made.batches.clear()
    again, _ = toy.run(folder, keep_features=True)
    assert made.images == list(range(64, 128)) and path.read_bytes()[:4] == b"PK\x03\x04"
    assert again["metrics"] == first["metrics"]
    err = capsys.readouterr().err
    assert "000064.npz is damaged" in err and "generated again" in err


CHANGES = {
    "seed": {"seed": 4},
    "cfg": {"cfg": 2.5},
    "interval": {"interval_min": 0.2},
    "steps": {"num_sampling_steps": 3},
    "solver": {"sampling_method": "euler"},
    "images": {"num_images": 160},
    "ema": {"ema": "ema2"},
    "epoch": {"epoch": 1},
    "model": {"noise_scale": 2.0},
}


@pytest.mark.parametrize("change", [*CHANGES, "weights", "extractor", "streams", "precision"])
def test_features_of_other_settings_are_not_used(folder, made, change):
    with pytest.raises(Stop):
        toy.run(folder, suite=stopping(2))
    old = features_folder(folder)
    made.batches.clear()
    suite, denoiser = ToySuite(), toy_denoiser()
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
    assert len(set((folder / "eval").glob("*.features"))) == 2 and len(list(old.glob("*.npz"))) == 2


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    cache = FeatureCache(tmp_path / "features", 10, {"means": 3})
    cache.prepare()
    features = torch.ones(10, 3)
    features[4, 1] = math.nan
    with pytest.raises(UserError, match="images 0 to 9 are non-finite"):
        cache.write(range(10), {"means": features}, None)
    assert cache.prepare() == list(range(10))


def test_missing_and_unwritable_features_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "SHARED_FILE_SECONDS", 0)
    cache = FeatureCache(tmp_path / "features", 10, {"means": 3})
    with pytest.raises(UserError, match="same output folder"):  # `prepare` ran on a node with another file system
        cache.write(range(4), {"means": torch.ones(4, 3)}, None)
    cache.prepare()
    cache.write(range(4), {"means": torch.ones(4, 3)}, None)
    with pytest.raises(UserError, match="has 4 of 10 images"):
        cache.read_all()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        FeatureCache(tmp_path / "file" / "features", 10, {}).prepare()


def test_weights_are_identified_by_content(tmp_path):
    """The same content has the same hash, wherever and whenever it was written; another value of a tensor has not."""
    a, b = weights_hash(toy.checkpoint(tmp_path / "a")), weights_hash(toy.checkpoint(tmp_path / "b"))
    assert a == b != weights_hash(toy.checkpoint(tmp_path / "b", content=1))
    old, hashes = tmp_path / "old.pth", set()
    for value in (0.0, 1.0):
        torch.save({"x": torch.full((3,), value)}, old, _use_new_zipfile_serialization=False)
        (tmp_path / "last.dcp").mkdir(exist_ok=True)
        (tmp_path / "last.dcp" / "checkpoint.json").write_text(str(value))
        hashes |= {weights_hash(old), weights_hash(tmp_path / "last.dcp")}
    assert len(hashes) == 4


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_are_saved_before_their_features(folder, tmp_path, made):
    where = tmp_path / "deep" / "png"
    with pytest.raises(Stop):
        toy.run(folder, suite=stopping(2), gen_bsz=50, save_images=where)
    assert len(pngs(where)) == 100
    suite = ToySuite()
    toy.run(folder, suite=suite, save_images=where, keep_features=True)
    assert made.images == [*range(150), *range(100, N)] and len(pngs(where)) == N
    images = torch.from_numpy(pngs(where)).permute(0, 3, 1, 2)
    assert torch.equal(ToySuite().extract(images)["means"], suite.features["means"])
    made.batches.clear()
    toy.run(folder, save_images=tmp_path / "other", keep_features=True)  # features without these PNGs do not count
    assert made.images == list(range(N)) and np.array_equal(pngs(tmp_path / "other"), pngs(where))


def test_images_of_other_settings_are_not_mixed(folder, tmp_path, made):
    toy.run(folder, save_images=tmp_path / "png")
    made.batches.clear()
    before = pngs(tmp_path / "png")
    for change in ({"cfg": 1.0}, {"num_images": 100}, {}):
        with pytest.raises(UserError, match=r"--save_images .* Name another folder"):
            toy.run(folder, save_images=tmp_path / "png", **change)
    assert made.images == [] and np.array_equal(pngs(tmp_path / "png"), before)


# --- reports ---------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_measured(folder, tmp_path):
    suite = ToySuite()
    suite.details, suite.plot = {"bands": [1.0, 2.0]}, lambda path: path.touch()
    report, path = toy.run(folder, suite=suite, gen_bsz=50, save_images=tmp_path / "png")
    assert json.loads(path.read_text()) == report
    expected = {
        **{"ema": "ema1", "cfg": 2.0, "interval": [0.1, 1.0], "steps": 2, "solver": "heun", "seed": 3},
        **{"num_images": N, "images_made": N, "ranks": 1, "batch_size": 50, "epoch": 0, "precision": "float32"},
        **{"checkpoint": str(folder / "checkpoint-last.pth"), "details": {"bands": [1.0, 2.0]}},
        **{"weights": weights_hash(folder / "checkpoint-last.pth"), "measured_with": suite.describe()},
    }
    assert {name: report[name] for name in expected} == expected
    assert set(report["seconds"]) == {"sampling", "features", "metrics"}
    assert set(report["tf32"]) == {"matmul", "cudnn"} and report["images_per_s"] > 0
    assert {"date", "command", "commit", "versions", "hardware", "quantisation", "denoiser"} <= set(report)
    assert path.with_suffix(".png").is_file()
    assert path.name == "epoch0001-ema1-heun2-cfg2-seed3-n150.json"
    assert report_exists(folder / "eval", CONFIG, 0) and not report_exists(folder / "eval", CONFIG, 1)
    assert report_name(CONFIG, 3, "-step7") == "epoch0004-ema1-heun2-cfg2-step7-seed3-n150"
    assert metric_line(report) == "class_agreement {:.4g}  first {:.4g}".format(*report["metrics"].values())
    logged = loggable(report)
    assert logged["class_agreement"] == report["metrics"]["class_agreement"] and logged["cfg"] == 2.0
    assert all(isinstance(value, int | float) for value in logged.values()) and "seconds_metrics" in logged


def test_a_report_is_never_replaced_by_another_one(folder, made):
    """The same evaluation again has the same file; other metrics, a damaged file or one of an older kind do not."""
    first, path = toy.run(folder)
    assert toy.run(folder)[1] == path
    other, beside = toy.run(folder, suite=ToySuite(("class_agreement", "is")))
    assert beside.name == f"{path.stem}-{other['config_hash']}.json" and json.loads(path.read_text())["date"]
    target, suite = toy.target(folder), ToySuite()
    identity = identify(target, suite, ONE.device)
    assert find_report(folder / "eval", target, identity)[0]["metrics"] == first["metrics"]
    assert find_report(folder / "nowhere", target, identity) == (None, folder / "nowhere" / path.name)
    for content in ("{", "{}", "[]"):
        path.write_text(content)
        hashed = path.with_name(f"{path.stem}-{io.json_hash(identity)}.json")
        assert find_report(folder / "eval", target, identity) == (None, hashed)
    hashed.write_text(json.dumps(first))
    assert find_report(folder / "eval", target, identity) == (first, hashed)


def test_content_identifies_a_reference_not_its_name(folder):
    """The path and the order of what was asked for do not matter; the content of the reference does."""

    class Suite(ToySuite):
        def __init__(self, names, file, sha256):
            super().__init__(names)
            self.reference = {"file": file, "sha256": sha256}

        def describe(self):
            return super().describe() | {"references": {"fid": self.reference}, "warnings": [self.reference["file"]]}

    def config_hash(*suite):
        return io.json_hash(identify(toy.target(folder), Suite(*suite), ONE.device))

    first = config_hash(("fid", "is"), "a.npz", "00")
    assert config_hash(("is", "fid"), "/abs/a.npz", "00") == first
    assert first not in (config_hash(("fid", "is"), "a.npz", "01"), config_hash(("fid",), "a.npz", "00"))


def test_the_suite_is_the_one_that_the_flags_name(no_network, tmp_path):
    suite = build_suite(CONFIG, ONE, 100)
    assert suite.names == ("class_agreement",) and suite.num_images == 100
    for metrics, missing in (("none", "names no metric"), ("psnr", "psnr"), ("fid", "INCEPTION_WEIGHTS")):
        with pytest.raises(UserError, match=re.escape(missing)):
            build_suite(replace(CONFIG, metrics=metrics), ONE, 100)
