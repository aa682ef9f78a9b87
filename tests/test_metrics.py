"""Metrics: the values against torch-fidelity and closed forms, and every refusal before the first image.

N images, F features. Inception has random weights here, written to a file by a fixture: its FID and IS say
nothing about quality, but two programs that read the same file must agree on them.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_ref
from tests.conftest import smooth_images
from util import metrics as metrics_module
from util.metrics import MetricError, MetricSuite, parse_metrics
from util.reference import default_reference
from util.scores import DigitClassifier
from util.spectrum import grey_spectrum, spectrum_gap

SIZE = 32


def write_pngs(folder, images: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


# --- values ---------------------------------------------------------------------------------------------------------


def test_values_equal_torch_fidelity_on_pngs(inception_file, tmp_path):
    """The whole path: prepare_ref on one folder of PNGs, the suite on the other, against calculate_metrics."""
    import torch_fidelity

    generated, real = smooth_images(20, 1, 1.0), smooth_images(16, 2, 0.6)
    write_pngs(tmp_path / "generated", generated)
    write_pngs(tmp_path / "real" / "train" / "class0", real)
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real" / "train" / "class0"),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=16,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(inception_file),
        cache=False,
        verbose=False,
        batch_size=8,
    )
    reference = tmp_path / "reference.npz"
    arguments = ["--dataset", "imagefolder", "--data_path", tmp_path / "real", "--img_size", SIZE, "--out", reference]
    arguments += ["--inception_weights", inception_file, "--batch_size", 10, "--num_workers", 0, "--device", "cpu"]
    assert prepare_ref.main([str(a) for a in arguments]) == 0

    suite = MetricSuite(("fid", "is"), "imagefolder", SIZE, len(generated), "cpu", reference, inception_file)
    parts = [suite.extract(generated[i : i + 12]) for i in range(0, len(generated), 12)]
    gathered = {stream: torch.cat([part[stream] for part in parts]) for stream in suite.streams}
    result = suite.compute(gathered, torch.zeros(len(generated), dtype=torch.int64))

    for ours, theirs, tolerance in (
        ("fid", "frechet_inception_distance", 1e-5),
        ("is_mean", "inception_score_mean", 1e-4),
        ("is_std", "inception_score_std", 1e-4),
        ("kid_mean", "kernel_inception_distance_mean", 1e-4),
        ("kid_std", "kernel_inception_distance_std", 1e-3),
        ("precision", "precision", 1e-7),
        ("recall", "recall", 1e-7),
    ):
        print(f"{ours:10} {result[ours]:.9g}  torch-fidelity {expected[theirs]:.9g}")  # pytest -s shows it
        assert result[ours] == pytest.approx(expected[theirs], rel=tolerance), ours
    assert expected["frechet_inception_distance"] > 0.1 and expected["inception_score_mean"] > 1.01
    assert 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1  # a swap or a constant would be seen
    assert expected["precision"] != expected["recall"]
    mean = {name: grey_spectrum(x).mean(dim=0) for name, x in (("real", real), ("generated", generated))}
    assert result["spectrum_gap"] == pytest.approx(spectrum_gap(mean["real"], mean["generated"]), rel=1e-5)

    report = json.loads(json.dumps(suite.describe()))
    assert report["references"]["fid"]["meta"]["num_images"] == 16
    assert report["extractors"][0]["weights"] == "not the published file"
    assert report["kid"]["subset_size"] == report["precision"]["real_images"] == 16
    assert report["not_computed"] == {} and "num_images" not in report
    assert set(report["tf32"]) == {"matmul", "cudnn"}
    assert any("rank deficient" in warning for warning in report["warnings"])


def test_class_agreement_on_real_digits_and_on_shuffled_labels():
    from util.data import build_dataset

    dataset = build_dataset("digits", None, SIZE, "train")
    images = torch.stack([dataset[i][0] for i in range(500)])
    labels = torch.tensor([dataset[i][1] for i in range(500)])
    suite = MetricSuite(("class_agreement",), "digits", SIZE, 500, "cpu")
    features = suite.extract(images)
    assert features["digit_8x8"].shape == (500, 64)
    result = suite.compute(features, labels)
    assert result["class_agreement"] > 0.98
    assert 0.96 < result["class_agreement_real"] < 1  # held out: not all of them are right
    shuffled = suite.compute(features, labels[torch.randperm(500, generator=torch.Generator().manual_seed(0))])
    assert shuffled["class_agreement"] == pytest.approx(0.1, abs=0.05)
    assert DigitClassifier(SIZE).held_out_accuracy == result["class_agreement_real"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_parse_metrics():
    assert parse_metrics("fid,is") == ("fid", "is")
    assert parse_metrics(" is , fid,is") == ("is", "fid")
    assert parse_metrics("none") == parse_metrics("") == ()
    for text in ("fid,kid", "none,fid", "FID"):
        with pytest.raises(MetricError, match="known are fid, is, fd_effnet, class_agreement"):
            parse_metrics(text)


def test_no_metrics_need_nothing(no_network):
    suite = MetricSuite((), "imagefolder", 256, 1, "cpu")
    assert suite.streams == {} and suite.extract(smooth_images(2, 0, 1.0)) == {}
    assert suite.compute({}, torch.zeros(1, dtype=torch.int64)) == {}


@pytest.mark.parametrize(
    ("names", "dataset", "num_images", "message"),
    [
        (("class_agreement",), "cifar10", 100, "digits only"),
        (("is",), "cifar10", 9, "at least 10 images"),
        (("fid",), "cifar10", 1, "at least 2 images"),
        (("kid",), "cifar10", 100, "Unknown metric kid"),
        (("class_agreement",), "digits", 0, "at least 1 image"),
        (("fid",), "cifar10", 100, "--inception_weights.*INCEPTION_WEIGHTS"),
    ],
)
def test_suite_refuses_before_anything_else(no_network, names, dataset, num_images, message):
    with pytest.raises(MetricError, match=message):
        MetricSuite(names, dataset, SIZE, num_images, "cpu")


def test_suite_refuses_a_missing_reference_and_names_the_command(inception_file, monkeypatch, tmp_path):
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(inception_file))  # instead of the argument
    monkeypatch.setattr(metrics_module, "default_reference", lambda *args: tmp_path / "none.npz")
    with pytest.raises(MetricError, match=r"prepare_ref\.py --dataset cifar10 --img_size 32 --extractor inception"):
        MetricSuite(("fid",), "cifar10", SIZE, 3000, "cpu")


def test_suite_features_and_warnings(inception_file, tmp_path):
    path = tmp_path / "jit_like.npz"
    np.savez(path, mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    suite = MetricSuite(("fid",), "imagefolder", 256, 4, "cpu", path, inception_file)
    assert suite.streams == {"inception_2048": 2048}
    assert len(suite.warnings) == 2 and "no metadata" in suite.warnings[1]
    good, labels = torch.zeros(4, 2048), torch.zeros(4, dtype=torch.int64)
    bad = good.clone()
    bad[1, 5] = float("nan")
    for rows, message in ((bad, "non-finite"), (good[:3], "expected shape"), (None, "expected shape")):
        with pytest.raises(MetricError, match=message):
            suite.compute({} if rows is None else {"inception_2048": rows}, labels)
    with pytest.raises(MetricError, match="Labels"):
        suite.compute({"inception_2048": good}, labels[:2])
    with pytest.raises(MetricError, match="uint8 images"):
        suite.extract(torch.zeros(1, 3, SIZE, SIZE))


def test_default_references():
    assert default_reference("imagefolder", 256, "inception").name == "jit_in256_stats.npz"
    assert default_reference("imagefolder", 512, "inception").name == "jit_in512_stats.npz"
    assert default_reference("imagefolder", 256, "effnet_lite0").name == "imagefolder_256_effnet_lite0.npz"
    assert default_reference("imagefolder", 64, "inception").name == "imagefolder_64_inception.npz"
    path = default_reference("cifar10", 32, "inception")
    assert path.name == "cifar10_32_inception.npz" and path.is_absolute() and path.parent.name == "fid_stats"
