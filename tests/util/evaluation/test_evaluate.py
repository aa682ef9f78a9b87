"""Evaluations: the same numbers however they are computed, and stopped ones continue; util/evaluation/evaluate.py.

Shapes: N images in all, uint8 (N, 3, 16, 16); features (N, F).
"""

import json
import math
import os
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.conftest import ONE
from tests.util.evaluation import toy
from tests.util.evaluation.toy import CONFIG, N, Recorder, Stop, ToySuite, toy_denoiser
from util import io
from util.errors import UserError
from util.evaluation import evaluate
from util.evaluation.evaluate import FeatureCache, find_report, identify, report_exists, weights_hash
from util.evaluation.generate import generate_all

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def folder(tmp_path):
    """A run's folder with a checkpoint in it."""
    toy.checkpoint(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def whole(tmp_path):
    """The report of an evaluation without interruptions."""
    toy.checkpoint(tmp_path / "whole")
    return toy.run(tmp_path / "whole")[0]


@pytest.fixture
def made(monkeypatch):
    return Recorder(monkeypatch)


def features_folder(folder):
    (found,) = (folder / "eval").glob("*.features")
    return found


def stored(folder):
    return sorted(path.name for path in features_folder(folder).glob("*.npz"))


def pngs(folder):
    paths = sorted(folder.glob("*.png"))
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(len(paths))]
    return np.stack([np.asarray(Image.open(path)) for path in paths])


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
            work = lambda ctx: print(toy.run(where, ctx, denoiser=toy.transformer(), **settings)[0]["metrics"])  # noqa
            done = toy.on_ranks(2, tmp_path, work)
            assert [code for code, _ in done] == [0, 0], done
            results = [text.splitlines()[-1] for _, text in done]
            assert results[0] == results[1]  # all ranks know the result
            (path,) = (where / "eval").glob("*.json")
            assert json.loads(path.read_text())["ranks"] == 2
        else:
            _, path = toy.run(where, denoiser=toy.transformer(), **settings)
        values[name] = json.loads(path.read_text())["metrics"]["class_agreement"]
        cache = FeatureCache(features_folder(where), N, ["means"])
        found[name] = pngs(where / "png"), cache.read_all()["means"]
    images, features = found["a"]
    assert images.shape == (N, 16, 16, 3) and images.std() > 20
    for name in ("b", "two"):
        difference = np.abs(found[name][0].astype(int) - images)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        assert torch.allclose(found[name][1], features, atol=0.05)
        assert values[name] == pytest.approx(values["a"], rel=1e-4)
    assert torch.equal(ToySuite().extract(torch.from_numpy(images).permute(0, 3, 1, 2))["means"], features)


def test_exactly_n_images_are_made_and_the_last_batch_is_smaller(folder, made):
    suite = ToySuite()
    report, _ = toy.run(folder, suite=suite, gen_bsz=64)
    assert made.images == list(range(N)) and report["images_made"] == N == report["num_images"]
    assert [len(batch) for batch in made.batches] == [64, 64, 22]
    assert suite.labels.tolist() == [i // 15 for i in range(N)]
    expected = generate_all(toy_denoiser(), CONFIG, suite.labels.tolist(), ONE)
    assert torch.equal(suite.features["means"], ToySuite().extract(expected)["means"])


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_continues(folder, whole, made, capsys):
    with pytest.raises(Stop):
        toy.run(folder, suite=ToySuite(stop_after=2), gen_bsz=50)
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
    assert report["metrics"] == whole["metrics"] and report["config_hash"] == whole["config_hash"]


def signal_after_each_batch(number):
    """Send this process, a forked one, a signal whenever it has stored features."""
    write = FeatureCache.write
    FeatureCache.write = lambda *args: (write(*args), os.kill(os.getpid(), number))


def test_it_stops_on_all_ranks_and_continues(folder, tmp_path, whole, made):
    """Rank 1 of two is asked when it has written its first batch."""

    def work(ctx):
        if ctx.rank == 1:
            signal_after_each_batch(signal.SIGUSR1)
        suite = ToySuite()
        suite.extract = lambda images: (time.sleep(0.2), ToySuite.extract(suite, images))[1]
        toy.run(folder, ctx, suite, gen_bsz=8)

    done = toy.on_ranks(2, tmp_path, work)
    assert all(code == 1 and "Preempted: Stopped; the features so far" in text for code, text in done), done
    kept = stored(folder)
    assert 2 <= len(kept) < 2 * 10 and {"000000.npz", "000075.npz"} <= set(kept)
    report, _ = toy.run(folder)
    assert report["metrics"] == whole["metrics"] and report["images_made"] == len(made.images) < N


def test_one_rank_continues_what_two_killed_ranks_began(folder, tmp_path, whole, made):
    done = toy.on_ranks(2, tmp_path, lambda ctx: (signal_after_each_batch(signal.SIGKILL), toy.run(folder, ctx)))
    assert [code for code, _ in done] == [-9, -9], done
    assert stored(folder) == ["000000.npz", "000075.npz"]
    report, _ = toy.run(folder, gen_bsz=7)
    assert made.images == [*range(64, 75), *range(139, N)] and report["metrics"] == whole["metrics"]


def test_ranks_wait_longer_than_the_default_timeout_and_share_rank_0s_error(folder, tmp_path):
    """Rank 1's features, then rank 0's metrics take five times what the default group waits, and nothing ends it.

    In the second run rank 0 alone finds a PNG in the folder for images, and the error is raised on all ranks.
    """
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "000000.png").touch()

    def work(ctx):
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.3))
        suite, method = ToySuite(), "compute" if ctx.is_main else "extract"
        original = getattr(suite, method)
        setattr(suite, method, lambda *args: (time.sleep(1.5), original(*args))[1])
        toy.run(folder, ctx, suite)
        toy.run(folder, ctx, save_images=str(tmp_path / "png"))

    done = toy.on_ranks(2, tmp_path, work)
    assert all(code == 1 and "UserError: --save_images" in text for code, text in done), done
    assert len(list((folder / "eval").glob("*.json"))) == 1


@pytest.mark.parametrize("how", ["truncated", "empty", "a byte", "pickle"])
def test_damaged_features_are_made_again_with_a_note(folder, whole, made, capsys, how):
    toy.run(folder, keep_features=True)
    path = features_folder(folder) / "000064.npz"
    data, arrays = path.read_bytes(), dict(np.load(path))
    flipped = data[:500] + bytes([data[500] ^ 1]) + data[501:]
    path.write_bytes({"truncated": data[:-100], "a byte": flipped}.get(how, b""))
    if how == "pickle":
        np.savez(path, **{**arrays, "means": np.array([object()])})
    made.batches.clear()
    again, _ = toy.run(folder, keep_features=True)
    assert made.images == list(range(64, 128)) and again["metrics"] == whole["metrics"]
    assert "000064.npz is damaged" in capsys.readouterr().err


def identity(
    folder, names=("fid", "is"), sha256="00", file="a.npz", precision=None, content=0, extractor="0", **changes
):
    toy.checkpoint(folder, content)
    suite, target = ToySuite(names), toy.target(folder, **changes)
    suite.sha256, target.denoiser.autocast_dtype = extractor, precision
    about = suite.describe() | {"references": {"fid": {"file": file, "sha256": sha256}}, "warnings": [file]}
    suite.describe = lambda: about
    return identify(target, suite, ONE.device)


CHANGES = [
    *[{"seed": 4}, {"cfg": 2.5}, {"interval_min": 0.2}, {"epoch": 1}, {"num_sampling_steps": 3}, {"ema": "ema2"}],
    *[{"sampling_method": "euler"}, {"num_images": 160}, {"noise_scale": 2.0}, {"precision": torch.bfloat16}],
    *[{"content": 1}, {"extractor": "1"}, {"names": ("fid",)}, {"sha256": "01"}],
]


def test_the_identity_of_a_report_has_all_that_decides_its_numbers(folder):
    """Not the path of the reference, nor the order of the metrics; the features do not depend on metrics and files."""
    plain = identity(folder)
    assert identity(folder, ("is", "fid"), file="/abs/a.npz") == plain
    changed = [identity(folder, **change) for change in CHANGES]
    assert len({io.json_hash(found) for found in [plain, *changed]}) == 1 + len(CHANGES)
    of_features = [[found["images"], found["features"]] != [plain["images"], plain["features"]] for found in changed]
    assert of_features == [True] * 12 + [False] * 2


def test_features_of_other_settings_are_not_used(folder, made):
    with pytest.raises(Stop):
        toy.run(folder, suite=ToySuite(stop_after=2))
    made.batches.clear()
    suite = ToySuite()
    suite.streams = {"means": 12}
    suite.compute = lambda features, labels: ({"x": 1.0}, {})
    toy.run(folder, suite=suite, keep_features=True)
    toy.run(folder, cfg=2.5, keep_features=True)
    assert made.images == [*range(N), *range(N)] and len(set((folder / "eval").glob("*.features"))) == 3


def test_features_that_cannot_be_used_or_written_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "SHARED_FILE_SECONDS", 0)
    cache, features = FeatureCache(tmp_path / "features", 10, ["means"]), torch.ones(4, 3)
    with pytest.raises(UserError, match="same output folder"):  # as on a node that does not share it
        cache.write(range(4), {"means": features}, None)
    assert cache.prepare() == list(range(10))
    cache.write(range(4), {"means": features}, None)
    with pytest.raises(UserError, match="has 4 of 10 images"):
        cache.read_all()
    features[2, 1] = math.nan
    with pytest.raises(UserError, match="images 4 to 7 are non-finite"):
        cache.write(range(4, 8), {"means": features}, None)
    assert cache.prepare() == list(range(4, 10))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        FeatureCache(tmp_path / "file" / "features", 10, []).prepare()


def test_weights_are_identified_by_content(tmp_path):
    """The same content has the same hash, wherever and whenever it was written; another value of a tensor has not."""
    a, b = weights_hash(toy.checkpoint(tmp_path / "a")), weights_hash(toy.checkpoint(tmp_path / "b"))
    assert a == b != weights_hash(toy.checkpoint(tmp_path / "b", content=1))
    (tmp_path / "last.dcp").mkdir()
    hashes = set()
    for value in (0.0, 1.0):
        torch.save({"x": torch.full((3,), value)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        (tmp_path / "last.dcp" / "checkpoint.json").write_text(str(value))
        hashes |= {weights_hash(tmp_path / "old.pth"), weights_hash(tmp_path / "last.dcp")}
    assert len(hashes) == 4


# --- images and reports ----------------------------------------------------------------------------------------------


def test_images_are_saved_and_those_of_other_evaluations_are_not_mixed(folder, tmp_path, made):
    where = tmp_path / "deep" / "png"
    with pytest.raises(Stop):
        toy.run(folder, suite=ToySuite(stop_after=2), gen_bsz=50, save_images=where)
    assert len(pngs(where)) == 100
    with pytest.raises(UserError, match=r"--save_images .* Name another folder"):
        toy.run(folder, save_images=where, cfg=1.0)
    suite = ToySuite()
    toy.run(folder, suite=suite, save_images=where)
    assert made.images == [*range(150), *range(100, N)]
    images = torch.from_numpy(pngs(where)).permute(0, 3, 1, 2)
    assert torch.equal(ToySuite().extract(images)["means"], suite.features["means"])


def test_the_report_says_what_was_measured(folder):
    suite = ToySuite()
    details = {"grey_spectrum": [1.0, 2.0], "grey_spectrum_real": [2.0, 2.0]}
    suite.compute = lambda features, labels: ({"class_agreement": 0.5, "spectrum_gap": 0.25}, details)
    report, path = toy.run(folder, suite=suite, gen_bsz=50)
    assert json.loads(path.read_text()) == report
    expected = {
        **{"ema": "ema1", "cfg": 2.0, "interval": [0.1, 1.0], "steps": 2, "solver": "heun", "seed": 3},
        **{"num_images": N, "images_made": N, "ranks": 1, "batch_size": 50, "epoch": 0, "precision": "float32"},
        **{"checkpoint": str(folder / "checkpoint-last.pth"), "details": details},
        **{"weights": weights_hash(folder / "checkpoint-last.pth"), "measured_with": suite.describe()},
    }
    assert {name: report[name] for name in expected} == expected
    assert set(report["tf32"]) == {"matmul", "cudnn"} and report["images_per_s"] > 0
    assert {"date", "command", "commit", "versions", "hardware", "quantisation", "denoiser"} <= set(report)
    assert path.with_suffix(".png").is_file() and path.name == "epoch0001-ema1-heun2-cfg2-seed3-n150.json"
    assert report_exists(folder / "eval", CONFIG, 0) and not report_exists(folder / "eval", CONFIG, 1)
    assert evaluate.report_name(CONFIG, 3, "-step7") == "epoch0004-ema1-heun2-cfg2-step7-seed3-n150"
    report |= {"num_images": 10, "measured_with": {}}
    assert evaluate.metric_line(report) == "class_agreement 0.5  spectrum_gap 0.25  (10 images)"
    report["measured_with"]["protocol"] = "torch-fidelity"
    assert evaluate.metric_line(report).endswith("  (10 images, torch-fidelity)")
    logged = evaluate.loggable(report)
    assert logged["class_agreement"] == 0.5 and logged["cfg"] == 2.0
    assert all(isinstance(value, int | float) for value in logged.values())
    assert {"seconds_sampling", "seconds_features", "seconds_metrics"} < set(logged)


def test_a_report_is_never_replaced_by_another_one(folder):
    """The same evaluation again has the same file; other metrics, a damaged file or one of an older kind do not."""
    first, path = toy.run(folder)
    assert toy.run(folder)[1] == path
    other, beside = toy.run(folder, suite=ToySuite(("class_agreement", "is")))
    assert beside.name == f"{path.stem}-{other['config_hash']}.json"
    target, identity = toy.target(folder), identify(toy.target(folder), ToySuite(), ONE.device)
    assert find_report(folder / "eval", target, identity)[0]["metrics"] == first["metrics"]
    hashed = path.with_name(f"{path.stem}-{io.json_hash(identity)}.json")
    for content in ("{", "{}", "[]"):
        path.write_text(content)
        assert find_report(folder / "eval", target, identity) == (None, hashed)
    hashed.write_text(json.dumps(first))
    assert find_report(folder / "eval", target, identity) == (first, hashed)
