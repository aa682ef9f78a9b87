"""The suite of metrics: values against torch-fidelity, what is computed beside what; refusals before the first image.

Inception has random weights here: its FID and IS say nothing about quality, but two programs that read the same file
must agree on them. Where only the choice of metrics matters, statistics of colours stand in for the networks.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_ref
from spectral_ops.spectrum import grey_spectrum, spectrum_gap
from tests.conftest import smooth_images
from tests.util.evaluation.colours import (
    DIM,
    REAL,
    SIZE,
    Colours,
    OtherColours,
    SpatialColours,
    extras,
    use_colours,
    write_reference,
)
from tests.util.evaluation.networks import MetasNetwork, SmallDinoV2, dinov2_state
from util.data.datasets import build_dataset
from util.errors import UserError
from util.evaluation import metrics as module
from util.evaluation.features import SPATIAL
from util.evaluation.formulas import density_coverage
from util.evaluation.metrics import (
    METRICS,
    Metric,
    MetricSuite,
    parse_metrics,
)


def write_pngs(folder, images: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


def as_pngs(folder) -> tuple[torch.Tensor, list[str]]:
    """Write 12 generated and 10 real images. Return the first, and flags of prepare_ref.py for the second."""
    generated, real = smooth_images(12, 1, 1.0), smooth_images(10, 2, 0.6)
    write_pngs(folder / "generated", generated)
    write_pngs(folder / "real" / "train" / "class0", real)
    flags = {"dataset": "imagefolder", "data_path": folder / "real", "img_size": SIZE, "out": folder / "reference.npz"}
    flags |= {"batch_size": 7, "num_workers": 0, "device": "cpu"}
    return generated, [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def torch_fidelity_on(folder, *metrics, **settings) -> dict[str, float]:
    import torch_fidelity

    folders = {"input1": str(folder / "generated"), "input2": str(folder / "real" / "train" / "class0")}
    switches = dict.fromkeys(metrics, True) | dict.fromkeys(("cuda", "cache", "verbose"), False)
    return torch_fidelity.calculate_metrics(**folders, **switches, kid_subset_size=10, batch_size=8, **settings)


def in_batches(suite, images) -> dict[str, float]:
    parts = [suite.extract(images[i : i + 7]) for i in range(0, len(images), 7)]
    features = {stream: torch.cat([part[stream] for part in parts]) for stream in suite.streams}
    return suite.compute(features, torch.zeros(len(images), dtype=torch.int64))[0] | {"features": features}


def distance_of_few(generated: torch.Tensor, real: torch.Tensor) -> float:
    """The Fréchet distance of N and M rows that are fewer than features.

    With A, B the centred rows over sqrt(N - 1), sqrt(M - 1), sigma_1 sigma_2 has the eigenvalues of (A B^T)(A B^T)^T.
    """
    x, y = generated.double(), real.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    shift = x.mean(0) - y.mean(0)
    return (shift @ shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()


def distance_to_white(features: torch.Tensor) -> float:
    """The Fréchet distance of rows to mean 0 and covariance I: |mu|^2 + sum of (sqrt(eigenvalue) - 1)^2."""
    x = features.double()
    spread = torch.linalg.eigvalsh(torch.cov(x.T)).clamp_min(0).sqrt()
    return (x.mean(0).square().sum() + (spread - 1).square().sum()).item()


def test_fd_dinov2_equals_torch_fidelity_on_pngs(dinov2_file, tmp_path, monkeypatch):
    """With Meta's network, written out, in the place of what torch hub would load."""
    monkeypatch.setattr(torch.hub, "load", lambda *of: MetasNetwork(dinov2_state()))
    for name in ("fd_dinov2", "precision_recall_dinov2", "density_coverage_dinov2"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], extractor=SmallDinoV2, stream="dinov2_384"))
    monkeypatch.setitem(prepare_ref.EXTRACTORS, SmallDinoV2.name, METRICS["fd_dinov2"])
    generated, flags = as_pngs(tmp_path)
    expected = torch_fidelity_on(tmp_path, "fid", "prc", feature_extractor="dinov2-vit-s-14")
    assert prepare_ref.main([*flags, "--extractor", SmallDinoV2.name, "--dinov2_weights", str(dinov2_file)]) == 0
    weights = {"dinov2_weights": dinov2_file}
    suite = MetricSuite(("fd_dinov2",), "imagefolder", SIZE, 12, "cpu", tmp_path / "reference.npz", weights)
    found = in_batches(suite, generated)
    assert found["fd_dinov2"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert (found["precision_dinov2"], found["recall_dinov2"]) == (expected["precision"], expected["recall"])
    assert {"density_dinov2", "coverage_dinov2", "spectrum_gap"} < found.keys()


def test_kid_clip_equals_torch_fidelity_on_pngs(clip_files, tmp_path):
    archive, state = clip_files
    generated, flags = as_pngs(tmp_path)
    how = {"kid_kernel": "rbf", "feature_extractor": "clip-vit-l-14-336px"}
    expected = torch_fidelity_on(tmp_path, "kid", **how, feature_extractor_weights_path=str(archive))
    assert prepare_ref.main([*flags, "--extractor", "clip_vit_l_14_336px", "--clip_weights", str(state)]) == 0
    weights = {"clip_weights": state}
    suite = MetricSuite(("kid_clip",), "imagefolder", SIZE, 12, "cpu", tmp_path / "reference.npz", weights)
    found = in_batches(suite, generated)
    assert found["kid_clip_mean"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert found["kid_clip_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    assert found["kid_clip_mean"] > 1e-5 and "heldout" not in suite.files["kid_clip"].arrays


def test_values_equal_torch_fidelity_on_pngs(inception_file, tmp_path):
    """The whole path: prepare_ref on one folder of PNGs, the suite on the other, against calculate_metrics."""
    generated, flags = as_pngs(tmp_path)
    real = smooth_images(10, 2, 0.6)
    how = {"feature_extractor": "inception-v3-compat", "feature_layer_prc": "2048"}
    metrics = ("isc", "fid", "kid", "prc")
    expected = torch_fidelity_on(tmp_path, *metrics, **how, feature_extractor_weights_path=str(inception_file))
    assert prepare_ref.main([*flags, "--inception_weights", str(inception_file)]) == 0
    reference, weights = tmp_path / "reference.npz", {"inception_weights": inception_file}
    suite = MetricSuite(("fid", "is"), "imagefolder", SIZE, len(generated), "cpu", reference, weights)
    result = in_batches(suite, generated)

    for ours, theirs, tolerance in (
        ("fid", "frechet_inception_distance", 1e-5),
        ("is_mean", "inception_score_mean", 1e-4),
        ("is_std", "inception_score_std", 1e-4),
        ("kid_mean", "kernel_inception_distance_mean", 1e-4),
        ("kid_std", "kernel_inception_distance_std", 1e-3),
        ("precision", "precision", 1e-7),
        ("recall", "recall", 1e-7),
    ):
        assert result[ours] == pytest.approx(expected[theirs], rel=tolerance), ours
    assert expected["frechet_inception_distance"] > 0.1 and expected["inception_score_mean"] > 1.01
    assert 0 < expected["precision"] != expected["recall"] > 0  # a swap or a constant would be seen
    gap = spectrum_gap(*(grey_spectrum(x).mean(dim=0) for x in (real, generated)))
    assert result["spectrum_gap"] == pytest.approx(gap, rel=1e-5)

    generated, real = result["features"], suite.extract(real)
    assert result["sfid"] == pytest.approx(distance_of_few(generated[SPATIAL], real[SPATIAL]), rel=1e-4)
    assert result["fid"] == pytest.approx(distance_of_few(*(x["inception_2048"] for x in (generated, real))), rel=1e-4)
    dense = density_coverage(generated["inception_2048"], real["inception_2048"])
    assert (result["density"], result["coverage"]) == pytest.approx(dense)

    report = json.loads(json.dumps(suite.describe()))
    assert report["references"].keys() == {"fid", "spectrum_gap"}
    assert report["references"]["fid"]["meta"]["num_images"] == 10
    assert report["extractors"][0]["weights"] == "not the published file"
    assert report["not_computed"].keys() == {"fid_ratio", "sfid_ratio"} and set(report["tf32"]) == {"matmul", "cudnn"}
    assert any("rank deficient" in warning for warning in report["warnings"])


def test_suites_share_their_networks():
    few = MetricSuite(("class_agreement",), "digits", SIZE, 100, "cpu")
    assert MetricSuite(("class_agreement",), "digits", SIZE, 500, "cpu", like=few).extractors == few.extractors
    assert MetricSuite(("class_agreement",), "digits", SIZE, 500, "cpu").extractors != few.extractors


def test_class_agreement_on_real_digits_and_on_shuffled_labels():
    dataset = build_dataset("digits", None, SIZE, "train")
    images = torch.stack([dataset[i][0] for i in range(500)])
    labels = torch.tensor([dataset[i][1] for i in range(500)])
    suite = MetricSuite(("class_agreement",), "digits", SIZE, 500, "cpu")
    features = suite.extract(images)
    assert features["digit_8x8"].shape == (500, 64)
    result, _ = suite.compute(features, labels)
    assert result["class_agreement"] > 0.98
    assert 0.96 < result["class_agreement_real"] < 1  # held out: not all of them are right
    shuffled, _ = suite.compute(features, labels[torch.randperm(500, generator=torch.Generator().manual_seed(0))])
    assert shuffled["class_agreement"] == pytest.approx(0.1, abs=0.05)


# --- registry and suite ----------------------------------------------------------------------------------------------


@pytest.fixture
def colours(monkeypatch):
    use_colours(monkeypatch)


@pytest.fixture
def usual(monkeypatch, tmp_path):
    """Reference files are looked for in tmp_path."""
    monkeypatch.setattr(module, "default_reference", lambda dataset, size, extractor: tmp_path / f"{extractor}.npz")
    return tmp_path


def measure(suite, images):
    return suite.compute(suite.extract(images), torch.zeros(len(images), dtype=torch.int64))[0]


NEIGHBOURS = {"precision", "recall", "kid_mean", "kid_std", "density", "coverage"}
LACKING = {"sfid", "fid_ratio"}  # in the files of these tests, unless they say otherwise


def test_parse_metrics():
    assert parse_metrics("fid,is") == ("fid", "is")
    assert parse_metrics(" is , fid,is") == ("is", "fid")
    assert parse_metrics("none") == parse_metrics("") == ()
    for text in ("fid,kid", "none,fid", "FID"):
        with pytest.raises(UserError, match=r"Choose from fid, fd_dinov2, kid_clip, fd_effnet, .*, is, or none"):
            parse_metrics(text)


def test_an_entry_in_the_registry_is_a_metric(colours, monkeypatch, tmp_path):
    """It can be asked for, gets what it needs, shares the reference of its extractor, and is refused without it."""
    path = write_reference(tmp_path / "r.npz", **extras())
    compute = lambda features, labels, real, size: (features.sum() - real.sum(), labels.sum() + size)  # noqa: E731
    metric = Metric(Colours, "inception_2048", ("new", "newer"), compute, ("labels", "features", "img_size"))
    monkeypatch.setitem(METRICS, "new", metric)
    suite = MetricSuite(parse_metrics("new"), "digits", SIZE, len(REAL), "cpu", path)
    result, _ = suite.compute(suite.extract(REAL), torch.ones(len(REAL)))
    assert result == {"new": pytest.approx(0), "newer": len(REAL) + SIZE, "spectrum_gap": pytest.approx(0, abs=1e-6)}
    assert suite.describe()["references"].keys() == {"new", "spectrum_gap"}
    both = MetricSuite(("fid", "new"), "digits", SIZE, len(REAL), "cpu", path)
    assert measure(both, REAL).keys() == {"fid", "new", "newer", "spectrum_gap"} | NEIGHBOURS
    with pytest.raises(UserError, match=r"new needs features"):
        MetricSuite(("new",), "digits", SIZE, len(REAL), "cpu", write_reference(tmp_path / "plain.npz"))


@pytest.mark.parametrize(
    ("names", "dataset", "num_images", "message"),
    [
        (("class_agreement",), "cifar10", 100, "data set digits, not for cifar10"),
        (("is",), "cifar10", 9, "at least 10 images"),
        (("fid",), "cifar10", 1, "at least 2 images"),
        (("fid",), "cifar10", 100, "--inception_weights.*INCEPTION_WEIGHTS"),
    ],
)
def test_suite_refuses_before_the_first_image(no_network, names, dataset, num_images, message):
    with pytest.raises(UserError, match=message):
        MetricSuite(names, dataset, SIZE, num_images, "cpu")


def test_suite_refuses_a_missing_reference_and_names_the_command(inception_file, monkeypatch, usual):
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(inception_file))  # instead of the argument
    with pytest.raises(UserError, match=r"prepare_ref\.py --dataset cifar10 --img_size 32 --extractor inception"):
        MetricSuite(("fid",), "cifar10", SIZE, 3000, "cpu")


@pytest.mark.filterwarnings("ignore:overflow")
def test_jit_like_files_are_accepted_with_warnings_and_a_distance_must_be_finite(colours, tmp_path):
    path = tmp_path / "jit_like.npz"
    np.savez(path, mu=np.full(DIM, 1e200), sigma=np.eye(DIM))
    suite = MetricSuite(("fid",), "imagefolder", 256, 4, "cpu", path)
    assert suite.streams == {"inception_2048": DIM}
    assert len(suite.warnings) == 2 and "no metadata" in suite.warnings[0] and "rank deficient" in suite.warnings[1]
    with pytest.raises(UserError, match="fid is inf"):
        suite.compute({"inception_2048": torch.zeros(4, DIM)}, torch.zeros(4))


def test_real_images_score_perfectly_and_blurred_ones_lack_power_and_recall(colours, tmp_path):
    path = write_reference(tmp_path / "r.npz", **extras())
    suite = MetricSuite(("fid",), "digits", SIZE, len(REAL), "cpu", path)
    assert suite.streams == {"inception_2048": DIM, "grey_spectrum": 23} and suite.not_computed.keys() == LACKING
    result, details = suite.compute(suite.extract(REAL), torch.zeros(len(REAL)))
    assert result.keys() == {"fid", "spectrum_gap"} | NEIGHBOURS
    assert result["precision"] == result["recall"] == 1
    assert abs(result["fid"]) < 1e-6 and result["spectrum_gap"] < 1e-6
    np.testing.assert_allclose(details["ring_ratio"], 1, rtol=1e-6)
    assert len(json.loads(json.dumps(details))["grey_spectrum"]) == 23
    blurred = torch.nn.functional.avg_pool2d(REAL.float(), 3, 1, 1).round().to(torch.uint8)
    result, details = suite.compute(suite.extract(blurred), torch.zeros(len(REAL)))
    ratio = details["ring_ratio"]
    assert max(ratio[8:]) < 0.5 < ratio[0] and result["spectrum_gap"] > 0.5
    assert result["recall"] < 1 and result["kid_mean"] > 1e-6


@pytest.mark.parametrize(
    ("missing", "absent"), [({"features"}, NEIGHBOURS), ({"features", "grey_spectrum"}, NEIGHBOURS | {"spectrum_gap"})]
)
def test_what_a_reference_lacks_is_left_out_and_reported(colours, tmp_path, missing, absent):
    more = {key: value for key, value in extras().items() if key not in missing}
    suite = MetricSuite(("fid",), "digits", SIZE, 8, "cpu", write_reference(tmp_path / "r.npz", **more))
    assert measure(suite, smooth_images(8, 1, 0.5)).keys() == ({"fid", "spectrum_gap"} | NEIGHBOURS) - absent
    reasons = suite.describe()["not_computed"]
    assert reasons.keys() == absent | LACKING and all("prepare_ref.py stores" in why for why in reasons.values())


@pytest.mark.parametrize(("count", "ratio"), [(8, True), (9, False), (11, False)])
def test_a_distance_is_also_divided_by_that_of_as_many_heldout_images(colours, tmp_path, count, ratio):
    """8 held-out images scored 0.5, all 10 of them 0.25."""
    path = write_reference(tmp_path / "r.npz", heldout=np.array([[8, 0.5], [10, 0.25]]))
    suite = MetricSuite(("fid",), "digits", SIZE, count, "cpu", path)
    found = measure(suite, smooth_images(count, 1, 0.5))
    if ratio:
        assert found["fid_ratio"] == pytest.approx(found["fid"] / 0.5) and "fid_ratio" not in suite.not_computed
    else:
        why = suite.not_computed["fid_ratio"]
        assert "fid_ratio" not in found and f"no distance of {count} held-out images (only of 8, 10);" in why
        assert f"--heldout_counts {count}" in why


def test_sfid_has_a_table_of_its_own(colours, monkeypatch, tmp_path):
    for name in ("fid", "sfid"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], extractor=SpatialColours))
    statistics = {"mu_s": np.zeros(DIM), "sigma_s": np.eye(DIM)}
    tables = {"heldout": np.array([[8, 0.5]]), "heldout_s": np.array([[8, 0.25]])}
    path = write_reference(tmp_path / "r.npz", SpatialColours, **statistics, **tables)
    images = smooth_images(8, 1, 0.5)
    found = measure(MetricSuite(("fid",), "digits", SIZE, 8, "cpu", path), images)
    sfid = distance_to_white(SpatialColours()(images)[SPATIAL])
    assert found["sfid"] == pytest.approx(sfid, rel=1e-4) != pytest.approx(found["fid"])
    assert (found["fid_ratio"], found["sfid_ratio"]) == pytest.approx((found["fid"] / 0.5, found["sfid"] / 0.25))


def test_images_in_a_reference_file_have_features_when_they_are_needed(colours, tmp_path, capsys):
    """As in ADM's files: arr_0 in the place of features, and no metadata."""
    plain, own = tmp_path / "adm.npz", write_reference(tmp_path / "own.npz", **extras())
    with np.load(own) as file:
        np.savez(plain, mu=file["mu"], sigma=file["sigma"], arr_0=REAL.permute(0, 2, 3, 1).numpy())
    images = smooth_images(12, 1, 0.5)
    ours, theirs = (MetricSuite(("fid",), "imagefolder", SIZE, 12, "cpu", path) for path in (own, plain))
    assert "computing" not in capsys.readouterr().err
    found, expected = measure(theirs, images), measure(ours, images)
    assert found.keys() == expected.keys() - {"spectrum_gap"} == {"fid"} | NEIGHBOURS
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)
    assert capsys.readouterr().err.count("computing features of the 40 images") == 1  # not once for each metric


def test_each_extractor_has_its_own_reference(colours, usual):
    """The spectrum comes from the first file that holds one."""
    own = write_reference(usual / "own.npz")
    write_reference(usual / "effnet_lite0.npz", OtherColours, **extras(OtherColours))
    suite = MetricSuite(("fd_effnet", "fid"), "digits", SIZE, len(REAL), "cpu", own)
    result = measure(suite, REAL)
    beside = {f"{name}_effnet_lite0" for name in ("precision", "recall", "density", "coverage")}
    assert result.keys() == {"fid", "fd_effnet_lite0", "spectrum_gap"} | beside
    assert result["precision_effnet_lite0"] == result["recall_effnet_lite0"] == 1
    described = suite.describe()
    assert described["not_computed"].keys() == NEIGHBOURS | LACKING | {"fd_effnet_lite0_ratio"}
    files = {value: reference["file"] for value, reference in described["references"].items()}
    effnet = str(usual / "effnet_lite0.npz")
    assert files == {"fid": str(own), "fd_effnet_lite0": effnet, "spectrum_gap": effnet}
    write_reference(own, grey_spectrum=2 * extras()["grey_spectrum"])
    suite = MetricSuite(("fid", "fd_effnet"), "digits", SIZE, len(REAL), "cpu", own)
    assert measure(suite, REAL)["spectrum_gap"] == pytest.approx(np.log(2), rel=1e-5)


def test_neighbours_need_one_image_more_than_neighbours(colours, tmp_path):
    path = write_reference(tmp_path / "r.npz", **extras())
    few, some, enough = (MetricSuite(("fid",), "digits", SIZE, n, "cpu", path) for n in (3, 4, 6))
    assert measure(few, REAL[:3]).keys() == {"fid", "spectrum_gap"}
    assert few.not_computed.keys() == NEIGHBOURS | LACKING and "at least 4 images" in few.not_computed["recall"]
    assert some.not_computed.keys() == {"density", "coverage"} | LACKING
    assert measure(enough, REAL[:6]).keys() >= NEIGHBOURS


def test_images_of_one_colour_have_no_gap_but_their_other_metrics(colours, tmp_path):
    suite = MetricSuite(("fid",), "digits", SIZE, 8, "cpu", write_reference(tmp_path / "r.npz", **extras()))
    result, details = suite.compute(suite.extract(torch.zeros_like(REAL[:8])), torch.zeros(8))
    assert result.keys() == {"fid"} | NEIGHBOURS and "not defined" in details["spectrum_gap"]


@pytest.mark.parametrize("named", [True, False])
def test_the_spectrum_gap_needs_no_network(usual, named):
    """Class agreement alone: the file that was named, or one in its usual place, gives the spectrum."""
    path = usual / "effnet_lite0.npz"
    spectrum = grey_spectrum(REAL).mean(0).numpy()
    write_reference(path, OtherColours, grey_spectrum=2 * spectrum)
    write_reference(usual / "inception.npz")
    suite = MetricSuite(("class_agreement",), "digits", SIZE, len(REAL), "cpu", path if named else None)
    assert suite.warnings == [] and suite.streams["grey_spectrum"] == len(spectrum)
    assert measure(suite, REAL)["spectrum_gap"] == pytest.approx(np.log(2), rel=1e-6)
    assert suite.describe()["references"]["spectrum_gap"]["file"] == str(path)


def test_without_a_spectrum_there_is_no_spectrum_gap(usual):
    plain = write_reference(usual / "plain.npz")
    small = write_reference(usual / "small.npz", grey_spectrum=np.ones(3))
    for path in (None, plain):
        suite = MetricSuite(("class_agreement",), "digits", SIZE, 10, "cpu", path)
        assert list(suite.streams) == ["digit_8x8"] and suite.describe()["references"] == {}
        assert not path or "not used" in suite.warnings[0]
    for path, message in ((usual / "nowhere.npz", "does not exist"), (small, "grey_spectrum")):
        with pytest.raises(UserError, match=message):
            MetricSuite(("class_agreement",), "digits", SIZE, 10, "cpu", path)
