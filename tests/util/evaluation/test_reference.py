"""Reference files: their statistics, the round trip, every refusal."""

import json
import pickle

import numpy as np
import pytest
import torch

from spectral_forcing import num_rings
from tests.conftest import Payload
from tests.util.evaluation.colours import DIM, SIZE, Colours, SpatialColours, meta
from util.data.datasets import DATASETS
from util.errors import UserError
from util.evaluation.reference import Moments, default_reference, load_reference, save_reference


@pytest.fixture
def statistics():
    x = np.random.RandomState(0).randn(50, DIM)
    return {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)}


def load(path, img_size=SIZE, dataset="digits", network=Colours):
    return load_reference(path, dataset, img_size, network(), "inception_2048")


# --- statistics and format -------------------------------------------------------------------------------------------


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
    found = total.finish()
    np.testing.assert_allclose(found["mu"], x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found["sigma"], np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_refuse_non_finite_features():
    with pytest.raises(UserError, match="non-finite"):
        Moments(2).update(torch.tensor([[1.0, float("inf")]]))


def test_round_trip(tmp_path, statistics):
    path = tmp_path / "new" / "r.npz"
    rng = np.random.RandomState(1)
    more = {"features": rng.randn(9, DIM), "grey_spectrum": rng.rand(23) + 1, "rapsd_centred": rng.rand(23) + 1}
    sha256 = save_reference(path, statistics | more, meta())
    reference = load(path)
    assert reference.arrays.keys() == (statistics | more).keys()
    for name, values in (statistics | more).items():
        np.testing.assert_array_equal(
            reference.arrays[name], values.astype(np.float32) if name == "features" else values
        )
    assert reference.arrays["features"].dtype == torch.float32 and reference.arrays["mu"].dtype == torch.float64
    assert reference.meta == meta() and reference.sha256 == sha256 and reference.warnings == []
    assert json.loads(json.dumps(reference.describe())) == {"file": str(path), "sha256": sha256, "meta": meta()}
    assert [p.name for p in path.parent.iterdir()] == ["r.npz"]  # no temporary file is left


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_of_mu_and_sigma_alone_are_accepted_with_a_warning(tmp_path, statistics, dtype):
    np.savez(tmp_path / "r.npz", **{key: array.astype(dtype) for key, array in statistics.items()})
    reference = load(tmp_path / "r.npz", img_size=256)
    assert {array.dtype for array in reference.arrays.values()} == {torch.float64} and reference.meta is None
    assert "could not be checked" in reference.warnings[0]


def test_files_of_adm_are_read(tmp_path, statistics):
    """Statistics for FID and sFID, which another extractor does not need, and images in the place of features."""
    spatial = {f"{key}_s": array for key, array in statistics.items()}
    images = np.random.RandomState(0).randint(0, 256, (7, SIZE, SIZE, 3), np.uint8)
    np.savez(tmp_path / "r.npz", **statistics, **spatial, arr_0=images, arr_1=np.arange(7))
    reference, other = load(tmp_path / "r.npz", network=SpatialColours), load(tmp_path / "r.npz")
    assert reference.arrays.keys() == {"mu", "sigma", "mu_s", "sigma_s"} and other.arrays.keys() == {"mu", "sigma"}
    np.testing.assert_array_equal(reference.arrays["sigma_s"], statistics["sigma"])
    assert reference.rows("features") == 7 and reference.rows("mu_s") == DIM and reference.rows("grey_spectrum") == 0
    np.testing.assert_array_equal(reference.images(), images)
    with pytest.raises(UserError, match=r"arr_0 in .* is uint8 \(7, 32, 32, 3\); uint8 \(M, 16, 16, 3\) was expected"):
        load(tmp_path / "r.npz", img_size=16)
    for name, array in {"mu_s": np.zeros(5), "sigma_s": np.eye(5)}.items():
        np.savez(tmp_path / "r.npz", **statistics | spatial | {name: array})
        with pytest.raises(UserError, match=f"{name} in"):
            load(tmp_path / "r.npz", network=SpatialColours)


def test_distances_of_heldout_images(tmp_path, statistics):
    save_reference(tmp_path / "r.npz", statistics | {"heldout": np.array([[8, 0.5], [10, 0.25]])}, meta())
    reference = load(tmp_path / "r.npz")
    assert reference.heldout("heldout") == {8: 0.5, 10: 0.25} and reference.heldout("heldout_s") == {}


def test_few_images_and_another_data_set_are_warned_about(tmp_path, statistics):
    save_reference(tmp_path / "r.npz", statistics, meta(num_images=DIM))
    few, other = load(tmp_path / "r.npz", dataset="cifar10").warnings
    assert "needs more" in few and "made from digits, but the data set is cifar10" in other


def test_spectra_are_read_whatever_the_extractor(tmp_path, statistics):
    save_reference(tmp_path / "r.npz", statistics | {"rapsd": np.ones(23)}, meta(extractor="another"))
    assert load_reference(tmp_path / "r.npz", "digits", SIZE).arrays["rapsd"].tolist() == [1] * 23
    with pytest.raises(UserError, match="rapsd"):
        load_reference(tmp_path / "r.npz", "digits", 16)


def test_default_references():
    names = {
        ("imagefolder", 256, "inception"): "jit_in256_stats.npz",
        ("imagefolder", 512, "inception"): "jit_in512_stats.npz",
        ("imagefolder", 256, "effnet_lite0"): "imagefolder_256_effnet_lite0.npz",
        ("imagefolder", 64, "inception"): "imagefolder_64_inception.npz",
        ("cifar10", 32, "inception"): "cifar10_32_inception.npz",
    }
    paths = [default_reference(*of) for of in names]
    assert [path.name for path in paths] == list(names.values())
    assert all(path.is_absolute() and path.parent.name == "fid_stats" for path in paths)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    path = tmp_path / "none.npz"
    for dataset, flags in (("cifar10", "cifar10"), ("imagefolder", "imagefolder --data_path DIR")):
        command = rf"prepare_ref.py --dataset {flags} --img_size 32 --extractor inception --out {path}"
        with pytest.raises(UserError, match=f"does not exist.*{command}"):
            load(path, dataset=dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractor": "effnet_lite0"}, "extractor 'effnet_lite0'"),
        ({"extractor_sha256": None}, "extractor_sha256 None"),
        ({"img_size": 64}, "img_size 64; this evaluation needs 32"),
        ({"num_images": "many"}, "metadata in .* is incomplete"),
    ],
)
def test_metadata_that_does_not_match_is_refused(tmp_path, statistics, change, message):
    save_reference(tmp_path / "r.npz", statistics, meta(**change))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "r.npz")


@pytest.mark.parametrize("text", ["[]", '{"extractor": "inception"}', "no json"])
def test_incomplete_metadata_is_refused(tmp_path, statistics, text):
    np.savez(tmp_path / "r.npz", **statistics, meta=np.array(text))
    with pytest.raises(UserError, match=r"metadata|not a reference file"):
        load(tmp_path / "r.npz")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("mu", np.zeros(DIM - 1), r"mu in .* \(5,\); floating-point \(6,\)"),
        ("mu", np.full(DIM, np.nan), "mu in .* non-finite"),
        ("mu", np.zeros(DIM, int), "mu in .* floating-point"),
        ("sigma", np.eye(DIM)[:5], "sigma in .* inception"),
        ("features", np.zeros((9, DIM + 1)), r"features in .* \(9, 7\); floating-point \(9, 6\)"),
        ("features", np.zeros(DIM), "features in"),
        ("features", np.zeros((0, DIM)), "features in"),
        ("features", np.full((9, DIM), 1e300), "features in .* non-finite"),
        ("heldout", np.ones((4, 3)), r"heldout in .* \(4, 3\); floating-point \(4, 2\)"),
        ("grey_spectrum", np.ones(22), r"grey_spectrum in .* \(23,\)"),
        ("rapsd", np.full(23, np.inf), "rapsd in .* non-finite"),
    ],
)
@pytest.mark.parametrize("with_meta", [True, False])
def test_arrays_that_are_not_what_they_say_are_refused(tmp_path, statistics, name, array, message, with_meta):
    arrays = statistics | {name: array} | ({"meta": np.array(json.dumps(meta()))} if with_meta else {})
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "r.npz")


def test_files_that_are_not_npz_are_refused_and_nothing_in_them_is_executed(tmp_path, statistics):
    path, marker = tmp_path / "r.npz", tmp_path / "executed"
    save_reference(path, statistics, meta())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(statistics["sigma"].tobytes()) + 5] ^= 0xFF
    np.save(tmp_path / "single.npy", statistics["sigma"])
    single = (tmp_path / "single.npy").read_bytes()
    for content in (b"", b"text", whole[:-50], whole[:100], bytes(flipped), pickle.dumps(Payload(marker)), single):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a reference file"):
            load(path)
    for missing in ("mu", "sigma"):
        np.savez(path, **{key: array for key, array in statistics.items() if key != missing})
        with pytest.raises(UserError, match="not a reference file"):
            load(path)
    for key in ("mu", "meta", "features", "rapsd"):
        np.savez(path, **(statistics | {key: np.array([Payload(marker)], dtype=object)}))
        with pytest.raises(UserError, match="not a reference file"):
            load(path)
    assert not marker.exists()


# --- every byte ------------------------------------------------------------------------------------------------------


def outcomes(path, read):
    """What `read` returns for a file in which one bit is flipped, at each byte; None where it refuses."""
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        try:
            yield read(path)
        except UserError:
            yield None


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, statistics):
    """Nothing but a refusal is raised; what is read has the metadata and, to the bit, the arrays."""
    spectra = {name: np.ones(num_rings(SIZE)) for name in ("grey_spectrum", "rapsd", "rapsd_centred")}
    save_reference(tmp_path / "a.npz", {**statistics, **spectra, "heldout": np.ones((1, 2))}, meta())
    expected = load(tmp_path / "a.npz")
    found = list(outcomes(tmp_path / "a.npz", load))
    assert found.count(None) > 0.5 * len(found)
    for reference in filter(None, found):
        assert reference.meta == expected.meta and reference.arrays.keys() == expected.arrays.keys()
        assert all(torch.equal(reference.arrays[key], value) for key, value in expected.arrays.items())


def test_a_file_that_would_unpack_to_far_more_is_refused_unread(tmp_path, statistics):
    np.savez_compressed(tmp_path / "a.npz", **statistics)
    load(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "a.npz", **statistics, features=np.zeros((200_000, DIM)))
    with pytest.raises(UserError, match="not a reference file"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("part", ["", "-grey", "-some-abc123"])
def test_a_missing_file_of_a_data_set_with_a_dash_in_its_name(monkeypatch, tmp_path, part):
    monkeypatch.setitem(DATASETS, "my-data", DATASETS["digits"])
    with pytest.raises(UserError, match=r"Make it: python prepare_ref.py --dataset my-data "):
        load_reference(tmp_path / "none.npz", f"my-data{part}", 32)
