"""Reference files: their statistics, the round trip, every refusal, and the command that makes them."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_ref
from util.features import MetricError
from util.reference import META_CHECKED, Moments, load_reference, save_reference

ROOT = Path(prepare_ref.__file__).parent
DIM = 6


class Colours:
    """A stand-in for an extractor: mean and mean square of each channel."""

    name, sha256, streams, device = "inception", "abc", {"inception_2048": DIM}, torch.device("cpu")

    def __init__(self, *args):
        pass

    def __call__(self, images):
        x = images.float() / 255  # (B, 3, H, W)
        return {"inception_2048": torch.cat([x.mean(dim=(2, 3)), (x**2).mean(dim=(2, 3))], dim=1)}  # (B, 6)

    def describe(self):
        return {"extractor": self.name}


def meta(**changes) -> dict:
    values = {
        "dataset": "digits",
        "split": "train",
        "img_size": 32,
        "crop": "none",
        "extractor": "inception",
        "extractor_sha256": "abc",
        "num_images": 50,
        "date": "2026-01-01",
        "versions": {},
    }
    return values | changes


@pytest.fixture
def statistics():
    x = np.random.RandomState(0).randn(50, DIM)
    return x.mean(axis=0), np.cov(x, rowvar=False)


@pytest.fixture
def fake_extractor(monkeypatch):
    monkeypatch.setattr(prepare_ref, "InceptionV3", Colours)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# --- statistics and format ------------------------------------------------------------------------------------------


def test_moments_equal_numpy_for_any_batches_and_merges():
    """Also far from the origin, where a sum of squares would cancel."""
    x = np.random.RandomState(0).randn(101, DIM) * [1, 1e-3, 5, 1, 1, 1] + 1e4
    parts = [Moments(DIM) for _ in range(3)]
    for moments, rows in zip(parts, (x[:1], x[1:40], x[40:]), strict=True):
        for i in range(0, len(rows), 7):
            moments.update(torch.from_numpy(rows[i : i + 7]))
    total = Moments(DIM)
    for moments in (parts[2], Moments(DIM), parts[0], parts[1]):
        total.merge(moments)
    mu, sigma = total.finish()
    np.testing.assert_allclose(mu, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_refuse_one_image_and_non_finite_features():
    moments = Moments(2)
    moments.update(torch.ones(1, 2))
    with pytest.raises(MetricError, match="at least 2 images"):
        moments.finish()
    with pytest.raises(MetricError, match="non-finite"):
        moments.update(torch.tensor([[1.0, float("inf")]]))


def test_round_trip(tmp_path, statistics):
    path = tmp_path / "new" / "r.npz"
    sha256 = save_reference(path, *statistics, meta())
    reference = load_reference(path, DIM, Colours(), 32)
    np.testing.assert_array_equal(reference.mu, statistics[0])
    np.testing.assert_array_equal(reference.sigma, statistics[1])
    assert reference.meta == meta() and reference.sha256 == sha256 and reference.warnings == ()
    assert json.loads(json.dumps(reference.describe()))["sha256"] == sha256
    assert [p.name for p in path.parent.iterdir()] == ["r.npz"]  # no temporary file is left


def test_metadata_must_be_complete(tmp_path, statistics):
    for key in META_CHECKED:
        with pytest.raises(MetricError, match=key):
            save_reference(tmp_path / "r.npz", *statistics, {k: v for k, v in meta().items() if k != key})
    for text in ("[]", "{}", '{"extractor": "inception"}', "no json", json.dumps(meta(num_images="many"))):
        np.savez(tmp_path / "r.npz", mu=statistics[0], sigma=statistics[1], meta=np.array(text))
        with pytest.raises(MetricError, match=r"metadata|not a reference file"):
            load_reference(tmp_path / "r.npz", DIM, Colours(), 32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_of_mu_and_sigma_alone_are_accepted_with_a_warning(tmp_path, statistics, dtype):
    np.savez(tmp_path / "r.npz", mu=statistics[0].astype(dtype), sigma=statistics[1].astype(dtype))
    reference = load_reference(tmp_path / "r.npz", DIM, Colours(), 256)
    assert reference.mu.dtype == reference.sigma.dtype == np.float64 and reference.meta is None
    assert "could not be checked" in reference.warnings[0] and "256" in reference.warnings[0]


def test_few_images_are_warned_about(tmp_path, statistics):
    save_reference(tmp_path / "r.npz", *statistics, meta(num_images=DIM))
    assert "needs more" in load_reference(tmp_path / "r.npz", DIM, Colours(), 32).warnings[0]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(MetricError, match=r"do not exist.*prepare_ref\.py --img_size 32 --extractor inception"):
        load_reference(tmp_path / "none.npz", DIM, Colours(), 32)
    with pytest.raises(MetricError, match="cannot be read"):
        load_reference(tmp_path, DIM, Colours(), 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractor": "effnet_lite0"}, "extractor 'effnet_lite0'"),
        ({"extractor_sha256": "other"}, "extractor_sha256 'other'"),
        ({"extractor_sha256": None}, "extractor_sha256 None"),
        ({"img_size": 64}, "img_size 64, but this evaluation uses 32"),
    ],
)
def test_metadata_that_does_not_match(tmp_path, statistics, change, message):
    save_reference(tmp_path / "r.npz", *statistics, meta(**change))
    with pytest.raises(MetricError, match=message):
        load_reference(tmp_path / "r.npz", DIM, Colours(), 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mu, sigma: (mu[:5], sigma), "needs"),
        (lambda mu, sigma: (mu, sigma[:5]), "needs"),
        (lambda mu, sigma: (mu[None], sigma), "needs"),
        (lambda mu, sigma: (mu * np.nan, sigma), "non-finite"),
        (lambda mu, sigma: (mu, sigma / 0), "non-finite"),
        (lambda mu, sigma: (mu, sigma + np.triu(np.ones_like(sigma))), "not a covariance"),
        (lambda mu, sigma: (mu, -sigma), "not a covariance"),
        (lambda mu, sigma: (mu.astype(int), sigma), "floating-point"),
        (lambda mu, sigma: (mu, sigma.astype(complex)), "floating-point"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_arrays_that_are_not_statistics(tmp_path, statistics, change, message):
    mu, sigma = change(*statistics)
    save_reference(tmp_path / "r.npz", mu, sigma, meta())
    with pytest.raises(MetricError, match=message):
        load_reference(tmp_path / "r.npz", DIM, Colours(), 32)


def test_files_that_are_not_npz(tmp_path, statistics):
    path, marker = tmp_path / "r.npz", tmp_path / "executed"
    save_reference(path, *statistics, meta())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    np.save(tmp_path / "single.npy", statistics[1])
    pickled = pickle.dumps(Payload(marker))
    for content in (
        b"",
        b"text",
        whole[:-50],
        whole[:100],
        bytes(flipped),
        pickled,
        (tmp_path / "single.npy").read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(MetricError, match="not a reference file"):
            load_reference(path, DIM, Colours(), 32)
    np.savez(path, mu=statistics[0])
    with pytest.raises(MetricError, match="not a reference file"):
        load_reference(path, DIM, Colours(), 32)
    for key in ("mu", "meta"):
        arrays = {"mu": statistics[0], "sigma": statistics[1]} | {key: np.array([Payload(marker)], dtype=object)}
        np.savez(path, **arrays)
        with pytest.raises(MetricError, match="not a reference file"):
            load_reference(path, DIM, Colours(), 32)
    assert not marker.exists()


# --- prepare_ref.py -------------------------------------------------------------------------------------------------


def test_prepare_ref_writes_what_numpy_computes(tmp_path, fake_extractor, capsys):
    from util.data import build_dataset

    out = tmp_path / "digits.npz"
    arguments = ["--dataset", "digits", "--num_images", "70", "--batch_size", "32", "--device", "cpu"]
    arguments += ["--out", str(out)]
    assert prepare_ref.main(arguments) == 0
    indices = prepare_ref.choose_indices(1797, 70)
    assert (
        len(set(indices)) == 70
        and indices == sorted(indices)
        and set(indices) < set(prepare_ref.choose_indices(1797, 90))
    )
    dataset = build_dataset("digits", None, 32, "train")
    x = Colours()(torch.stack([dataset[i][0] for i in indices]))["inception_2048"].double().numpy()
    reference = load_reference(out, DIM, Colours(), 32)
    np.testing.assert_allclose(reference.mu, x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(reference.sigma, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-12)
    assert reference.meta["num_images"] == 70 and reference.meta["subset_seed"] == 0
    assert reference.meta["dataset"] == "digits" and "torch" in reference.meta["versions"]
    printed = capsys.readouterr().out
    assert str(out) in printed and reference.sha256 in printed

    assert prepare_ref.main(arguments) == 2  # it exists
    assert "--overwrite" in capsys.readouterr().err
    assert prepare_ref.main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digits", "--num_images", "1798"], "from 2 to 1797"),
        (["--dataset", "digits", "--num_images", "1"], "from 2 to 1797"),
        (["--dataset", "digits", "--batch_size", "0"], "--batch_size must be"),
        (["--dataset", "digits", "--device", "abacus"], "--device abacus"),
        (["--dataset", "digits", "--split", "test"], "no split"),
        (["--dataset", "digits", "--out", "statistics"], r"end in \.npz"),
        (["--dataset", "imagefolder"], "--data_path"),
        (["--dataset", "imagefolder", "--data_path", "nowhere"], "does not exist"),
    ],
)
def test_prepare_ref_errors_are_one_sentence(tmp_path, monkeypatch, fake_extractor, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "r.npz")]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert prepare_ref.main([*arguments, *device, *out]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(message, error[0]), error[0]
    assert list(tmp_path.iterdir()) == []


def test_another_split_needs_a_name(fake_extractor, capsys):
    assert prepare_ref.main(["--dataset", "cifar10", "--split", "val", "--device", "cpu"]) == 2
    assert "give --out" in capsys.readouterr().err


def test_prepare_ref_as_a_program(tmp_path):
    """No traceback and exit code 2, from another working directory."""
    environment = os.environ | {"INCEPTION_WEIGHTS": str(tmp_path / "none.pth")}
    arguments = ["--dataset", "digits", "--device", "cpu", "--out", str(tmp_path / "r.npz")]
    done = subprocess.run(
        [sys.executable, ROOT / "prepare_ref.py", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "INCEPTION_WEIGHTS" in done.stderr
