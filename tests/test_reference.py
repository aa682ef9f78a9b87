"""Reference files: their statistics, the round trip, every refusal."""

import json
import pickle

import numpy as np
import pytest
import torch

from tests.conftest import Payload
from util.features import MetricError
from util.reference import META_CHECKED, Moments, load_reference, save_reference

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
        total.merge(total.unpack(moments.pack()))  # as between processes
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


def test_round_trip_of_what_is_optional(tmp_path, statistics):
    rng = np.random.RandomState(1)
    more = {"features": rng.randn(9, DIM), "grey_spectrum": rng.rand(23) + 1, "rapsd_centred": rng.rand(23) + 1}
    save_reference(tmp_path / "r.npz", *statistics, meta(), more)
    reference = load_reference(tmp_path / "r.npz", DIM, Colours(), 32)
    assert reference.features.dtype == np.float32
    np.testing.assert_array_equal(reference.features, more["features"].astype(np.float32))
    assert reference.spectra.keys() == {"grey_spectrum", "rapsd_centred"}
    for name, values in reference.spectra.items():
        np.testing.assert_array_equal(values, more[name])
    save_reference(tmp_path / "old.npz", *statistics, meta())
    old = load_reference(tmp_path / "old.npz", DIM, Colours(), 32)
    assert old.features is None and old.spectra == {}


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"features": np.zeros((9, DIM + 1))}, "rows of 6 numbers"),
        ({"features": np.zeros(DIM)}, "rows of 6 numbers"),
        ({"features": np.zeros((0, DIM))}, "rows of 6 numbers"),
        ({"features": np.full((9, DIM), np.nan)}, "features in .* non-finite"),
        ({"features": np.full((9, DIM), 1e300)}, "features in .* non-finite"),
        ({"features": np.zeros((9, DIM), int)}, "features in .* floating-point"),
        ({"grey_spectrum": np.ones(22)}, "have 23 rings"),
        ({"rapsd": np.ones((1, 23))}, "have 23 rings"),
        ({"grey_spectrum": np.arange(23.0)}, "grey_spectrum in .* above zero"),
        ({"rapsd_centred": -np.ones(23)}, "rapsd_centred in .* above zero"),
        ({"rapsd": np.full(23, np.inf)}, "rapsd in .* finite"),
        ({"rapsd": np.full(23, np.nan)}, "rapsd in .* finite"),
    ],
)
@pytest.mark.parametrize("with_meta", [True, False])
def test_optional_arrays_that_are_not_what_they_say(tmp_path, statistics, more, message, with_meta):
    if with_meta:
        save_reference(tmp_path / "r.npz", *statistics, meta(), more)
    else:
        np.savez(tmp_path / "r.npz", mu=statistics[0], sigma=statistics[1], **more)
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
    for key in ("mu", "meta", "features", "rapsd"):
        arrays = {"mu": statistics[0], "sigma": statistics[1]} | {key: np.array([Payload(marker)], dtype=object)}
        np.savez(path, **arrays)
        with pytest.raises(MetricError, match="not a reference file"):
            load_reference(path, DIM, Colours(), 32)
    assert not marker.exists()
