"""Metrics: values against torch-fidelity, closed forms and naive loops; every refusal before the first image.

Inception has random weights here: its FID and IS say nothing about quality, but two programs that read the same file
must agree on them. Where only the choice of metrics matters, statistics of colours stand in for the networks.
Shapes: N generated and M real images, F features.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_ref
from spectral_ops.spectrum import grey_spectrum, spectrum_gap
from tests.conftest import smooth_images
from tests.util.evaluation.colours import DIM, REAL, SIZE, Colours, OtherColours, extras, use_colours, write_reference
from util.data.datasets import build_dataset
from util.errors import UserError
from util.evaluation import metrics as module
from util.evaluation.metrics import (
    METRICS,
    Metric,
    MetricSuite,
    frechet_distance,
    inception_score,
    kernel_distance,
    parse_metrics,
    precision_recall,
)

# --- the numbers -----------------------------------------------------------------------------------------------------


def test_frechet_distance_of_commuting_gaussians():
    """Diagonal in one basis: d = |mu_1 - mu_2|^2 + sum_i (sqrt(a_i) - sqrt(b_i))^2, with a_i, b_i the eigenvalues."""
    n, f = 40, 6
    rng = np.random.RandomState(0)
    basis = np.linalg.qr(rng.randn(f, f))[0]  # (F, F)
    white = rng.randn(n, f)
    white = np.linalg.qr(white - white.mean(axis=0))[0] * np.sqrt(n - 1)  # (N, F), zero mean, covariance I
    a, b = np.array([4.0, 1.0, 0.25, 9.0, 0.0, 2.0]), np.array([1.0, 1.0, 4.0, 0.0, 3.0, 2.5])
    mu_1, mu_2 = rng.randn(f), rng.randn(f)
    features = torch.from_numpy(white * np.sqrt(a) @ basis.T + mu_1)
    distance = frechet_distance(features, mu_2, basis * b @ basis.T)
    expected = ((mu_1 - mu_2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-6)


def test_inception_score_of_confident_and_of_constant_predictions():
    """One-hot predictions that fill C classes evenly in every split score C; equal predictions score 1."""
    assert inception_score(torch.zeros(100, 8)) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    classes = torch.empty(100, dtype=torch.int64)
    order = np.random.RandomState(2020).permutation(100)  # the shuffle of torch-fidelity
    classes[torch.from_numpy(order)] = torch.arange(100) % 5
    mean, std = inception_score(torch.nn.functional.one_hot(classes, 8) * 100.0)
    assert (mean, std) == (pytest.approx(5, rel=1e-6), pytest.approx(0, abs=1e-5))


def clouds(n: int, m: int, shift: float, width: float, f: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated (n, f), narrower by `width` and shifted, and real (m, f)."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, f, generator=g) * width + shift, torch.randn(m, f, generator=g)


def naive_share(points, centres, k: int = 3) -> float:
    """Share of the points inside a ball around some centre, whose radius is that of its k-th nearest other centre."""
    radii = [
        sorted(np.linalg.norm(c - d) for j, d in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
    ]
    inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize(("shift", "width"), [(0.8, 0.6), (0.0, 0.3)])
def test_precision_and_recall_equal_a_naive_loop(shift, width):
    generated, real = clouds(37, 52, shift, width)
    precision, recall = precision_recall(generated, real)
    x, y = generated.double().numpy(), real.double().numpy()
    assert precision == pytest.approx(naive_share(x, y)) and recall == pytest.approx(naive_share(y, x))
    assert precision != recall


def test_precision_and_recall_do_not_depend_on_the_chunks():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    generated, real = clouds(203, 151, 0.1, 0.95, f=40)
    whole = calculate_precision_recall_full(generated, real, 3)
    assert 0 < whole[1] < whole[0] < 1
    for rows in (7, 50, 151, 1000):
        assert precision_recall(generated, real, rows) == pytest.approx(whole, abs=1e-7)


def test_precision_and_recall_of_far_equal_and_repeated_images():
    x, y = clouds(30, 30, 100.0, 1.0)
    assert precision_recall(x, y) == (0, 0) and precision_recall(x, x.clone()) == (1, 1)
    copies = y[:1] + 1e-4 * torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    assert precision_recall(copies, y) == (1, pytest.approx(1 / 30))  # good images, but always the same


def test_kid_of_whole_sets_equals_the_unbiased_estimate():
    """Where a subset is the whole set, each of the 100 gives the same value, and no deviation."""
    x, y = (z.double().numpy() for z in clouds(12, 12, 0.5, 1.0))

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    between = sum(kernel(a, b) for a in x for b in y) / n**2
    mean, std = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert mean == pytest.approx(within - 2 * between, rel=1e-9) and std == pytest.approx(0, abs=1e-12)
    assert mean > 0.01


def write_pngs(folder, images: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


def test_values_equal_torch_fidelity_on_pngs(inception_file, tmp_path):
    """The whole path: prepare_ref on one folder of PNGs, the suite on the other, against calculate_metrics."""
    import torch_fidelity

    generated, real = smooth_images(12, 1, 1.0), smooth_images(10, 2, 0.6)
    write_pngs(tmp_path / "generated", generated)
    write_pngs(tmp_path / "real" / "train" / "class0", real)
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real" / "train" / "class0"),
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        kid_subset_size=10,
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(inception_file),
        batch_size=8,
    )
    reference = tmp_path / "reference.npz"
    arguments = ["--dataset", "imagefolder", "--data_path", tmp_path / "real", "--img_size", SIZE, "--out", reference]
    arguments += ["--inception_weights", inception_file, "--batch_size", 7, "--num_workers", 0, "--device", "cpu"]
    assert prepare_ref.main([str(a) for a in arguments]) == 0

    suite = MetricSuite(("fid", "is"), "imagefolder", SIZE, len(generated), "cpu", reference, inception_file)
    parts = [suite.extract(generated[i : i + 7]) for i in range(0, len(generated), 7)]
    gathered = {stream: torch.cat([part[stream] for part in parts]) for stream in suite.streams}
    result, _ = suite.compute(gathered, torch.zeros(len(generated), dtype=torch.int64))

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

    report = json.loads(json.dumps(suite.describe()))
    assert report["references"].keys() == {"fid"} and report["references"]["fid"]["meta"]["num_images"] == 10
    assert report["extractors"][0]["weights"] == "not the published file"
    assert report["not_computed"] == {} and set(report["tf32"]) == {"matmul", "cudnn"}
    assert any("rank deficient" in warning for warning in report["warnings"])


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


NEIGHBOURS = {"precision", "recall", "kid_mean", "kid_std"}


def test_parse_metrics():
    assert parse_metrics("fid,is") == ("fid", "is")
    assert parse_metrics(" is , fid,is") == ("is", "fid")
    assert parse_metrics("none") == parse_metrics("") == ()
    for text in ("fid,kid", "none,fid", "FID"):
        with pytest.raises(UserError, match="Choose from fid, fd_effnet, class_agreement, is, or none"):
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
    assert suite.describe()["references"].keys() == {"new"}
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
    assert suite.streams == {"inception_2048": DIM, "grey_spectrum": 23} and suite.not_computed == {}
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
    assert reasons.keys() == absent and all("prepare_ref.py stores" in why for why in reasons.values())


def test_each_extractor_has_its_own_reference(colours, usual):
    """The spectrum comes from the first file that holds one."""
    own = write_reference(usual / "own.npz")
    write_reference(usual / "effnet_lite0.npz", OtherColours, **extras(OtherColours))
    suite = MetricSuite(("fd_effnet", "fid"), "digits", SIZE, len(REAL), "cpu", own)
    result = measure(suite, REAL)
    assert result.keys() == {"fid", "fd_effnet_lite0", "spectrum_gap", "precision_effnet_lite0", "recall_effnet_lite0"}
    assert result["precision_effnet_lite0"] == result["recall_effnet_lite0"] == 1
    described = suite.describe()
    assert described["not_computed"].keys() == NEIGHBOURS
    files = {value: reference["file"] for value, reference in described["references"].items()}
    assert files == {"fid": str(own), "fd_effnet_lite0": str(usual / "effnet_lite0.npz")}
    write_reference(own, grey_spectrum=2 * extras()["grey_spectrum"])
    suite = MetricSuite(("fid", "fd_effnet"), "digits", SIZE, len(REAL), "cpu", own)
    assert measure(suite, REAL)["spectrum_gap"] == pytest.approx(np.log(2), rel=1e-5)


def test_neighbours_need_four_images(colours, tmp_path):
    path = write_reference(tmp_path / "r.npz", **extras())
    few, enough = (MetricSuite(("fid",), "digits", SIZE, n, "cpu", path) for n in (3, 4))
    assert measure(few, REAL[:3]).keys() == {"fid", "spectrum_gap"}
    assert few.not_computed.keys() == NEIGHBOURS and "at least 4 images" in few.not_computed["recall"]
    assert measure(enough, REAL[:4]).keys() >= NEIGHBOURS


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
