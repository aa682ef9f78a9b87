"""Named protocols: what they set, and everything that would make their numbers something else is refused."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import ONE
from tests.util.evaluation.colours import DIM, SIZE, SpatialColours, extras, meta
from util.config import resolve
from util.errors import UserError
from util.evaluation import metrics, protocols
from util.evaluation.evaluate import build_suite
from util.evaluation.features import SPATIAL as SFID
from util.evaluation.features import InceptionAntialias, InceptionV3
from util.evaluation.metrics import METRICS
from util.evaluation.protocols import PROTOCOLS, check_protocol, protocol_reference, protocol_settings
from util.evaluation.reference import save_reference
from util.evaluation.weights import NOT_PUBLISHED, WEIGHTS

STATISTICS = {"mu": np.zeros(DIM), "sigma": np.eye(DIM)}
SPATIAL = {"mu_s": np.zeros(DIM), "sigma_s": np.eye(DIM)}


class Antialiased(SpatialColours):
    name = "antialiased"


@pytest.fixture
def stats(monkeypatch, tmp_path):
    """Colours in the place of all networks, fid_stats/ in tmp_path."""
    for name, metric in METRICS.items():
        if metric.extractor in (InceptionV3, InceptionAntialias):
            stream = SFID if metric.stream == SFID else "inception_2048"
            monkeypatch.setitem(METRICS, name, replace(metric, extractor=SpatialColours, stream=stream))
    monkeypatch.setattr(protocols, "FID_STATS", tmp_path)
    return tmp_path


def configuration(name, **changes):
    """A configuration for the data of the protocol."""
    protocol = PROTOCOLS[name]
    data, size = (*protocol.data, "cifar10")[0], protocol.size or SIZE
    return resolve({"protocol": name, "dataset": data, "img_size": size, **changes})


def test_a_protocol_sets_metrics_and_number_of_images():
    config = configuration("adm")
    assert (config.metrics, config.num_images) == ("fid,is", 50_000)
    assert configuration("adm", metrics="is,fd_effnet,fid", num_images=50_000).metrics == "is,fd_effnet,fid"
    assert (configuration("spectraldit").metrics, configuration("spectraldit").num_images) == ("fid_antialias", 10_000)
    assert protocol_settings("none", {"num_images": 7}) == {} and resolve({"num_images": 7}).num_images == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_images": 10_000}, "--protocol adm has --num_images 50000, not 10000"),
        ({"metrics": "fid"}, "--protocol adm has --metrics fid,is, not fid"),
        ({"metrics": "fid,nonsense"}, "nonsense is unknown"),
    ],
)
def test_flags_that_contradict_a_protocol_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        configuration("adm", **given)


def test_a_protocol_of_a_checkpoint_does_not_bind_its_evaluation():
    saved = vars(configuration("torch-fidelity-50k", model="JiT-Ti/4"))
    assert resolve({"num_images": 100}, saved, training=False).num_images == 100


def test_adm_needs_its_file_and_all_five_numbers(stats, monkeypatch):
    config = configuration("adm")
    with pytest.raises(UserError, match=r"adm needs .*VIRTUAL_imagenet256_labeled.npz, which does not exist. Download"):
        build_suite(config, ONE, config.num_images)
    path = stats / "VIRTUAL_imagenet256_labeled.npz"
    images = np.zeros((20, 256, 256, 3), np.uint8)
    for arrays, message in (
        (STATISTICS | {"arr_0": images}, "has sfid, which cannot be computed"),
        (STATISTICS | SPATIAL, "has precision, which cannot be computed"),
        (STATISTICS | SPATIAL | {"arr_0": images}, "has fewer than the 10000 images"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            build_suite(config, ONE, config.num_images)
    monkeypatch.setitem(PROTOCOLS, "adm", replace(PROTOCOLS["adm"], reference_images=20))  # 10,000 are 2 GB
    suite = build_suite(config, ONE, config.num_images)
    values = {value for metric in suite.metrics.values() for value in metric.values}
    assert values >= {"fid", "sfid", "is_mean", "precision", "recall"}
    assert json.loads(json.dumps(suite.describe()))["protocol"] == "adm"
    assert build_suite(config, ONE, 8000).describe()["protocol"] == "torch-fidelity"  # a sweep's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "train"}, "it is not of all images of the split test. Make it: python prepare_ref.py"),
        ({"subset_seed": 0}, "not of all images"),
        ({"reconstructed_by": "a VAE"}, "not of all images"),
        ({"dataset": "cifar10-grey"}, "it was made from cifar10-grey, not from cifar10. Make it"),
        (None, "it has no metadata that says"),
    ],
)
def test_spectraldit_needs_the_whole_test_split(stats, changes, message):
    config = configuration("spectraldit")
    path = stats / "cifar10_32_inception_antialias_test.npz"
    with pytest.raises(UserError, match=r"which does not exist. Make it: .*--split test --extractor inception_anti"):
        build_suite(config, ONE, config.num_images)
    right = meta(dataset="cifar10", split="test", subset_seed=None)
    save_reference(path, STATISTICS, right)
    assert build_suite(config, ONE, config.num_images).files["fid_antialias"].path == path
    if changes:
        save_reference(path, STATISTICS, right | changes)
    else:
        np.savez(path, **STATISTICS)
    with pytest.raises(UserError, match=message):
        build_suite(config, ONE, config.num_images)


def test_the_file_of_a_protocol_is_that_of_its_own_metric(stats, monkeypatch):
    """Also with another metric that needs one, and comes first in the registry."""
    monkeypatch.setitem(METRICS, "fid_antialias", replace(METRICS["fid_antialias"], extractor=Antialiased))
    monkeypatch.setattr(metrics, "default_reference", lambda *of: stats / "usual.npz")
    right = meta(dataset="cifar10", split="test", subset_seed=None)
    save_reference(stats / "cifar10_32_inception_antialias_test.npz", STATISTICS, right | {"extractor": "antialiased"})
    save_reference(stats / "usual.npz", STATISTICS, meta(dataset="cifar10"))
    for names in ("fid_antialias,fid", "fid,fid_antialias"):
        config = configuration("spectraldit", metrics=names)
        for num_images in (config.num_images, 500):  # an evaluation, and a sweep
            files = build_suite(config, ONE, num_images).files
            assert files["fid_antialias"].path.name == "cifar10_32_inception_antialias_test.npz"
            assert files["fid"].path.name == "usual.npz"


def test_adm_is_of_imagenet_in_any_form():
    for dataset in ("imagefolder", "webdataset", "huggingface"):
        with pytest.raises(UserError, match=r"needs .*VIRTUAL_imagenet256_labeled\.npz, which does not exist"):
            protocol_reference(configuration("adm", dataset=dataset))


def test_other_data_and_other_weights_are_refused(stats):
    for settings, found in (({"dataset": "digits"}, "digits at 32"), ({"img_size": 64}, "cifar10 at 64")):
        with pytest.raises(UserError, match=f"spectraldit is defined for cifar10 at 32 pixels, not for {found} pixels"):
            config = configuration("spectraldit", **settings)
            build_suite(config, ONE, config.num_images)
    save_reference(stats / "own.npz", STATISTICS | extras(), meta(dataset="cifar10"))
    config = configuration("torch-fidelity-50k", fid_stats=str(stats / "own.npz"))
    suite = build_suite(config, ONE, config.num_images)
    assert suite.describe()["protocol"] == "torch-fidelity-50k"
    np.savez(stats / "bare.npz", **STATISTICS)
    for data, accepted in (("cifar10", False), ("webdataset", True)):  # which may be ImageNet, as JiT's file is
        of = {"dataset": data, "data_path": "shards", "class_num": 10, "fid_stats": str(stats / "bare.npz")}
        config = configuration("torch-fidelity-50k", **of)
        with contextlib.nullcontext() if accepted else pytest.raises(UserError, match="no metadata that says"):
            build_suite(config, ONE, config.num_images)
    own = SimpleNamespace(describe=lambda: {"weights": NOT_PUBLISHED}, file=WEIGHTS["inception"], path="own.pth")
    suite.extractors.append(own)
    with pytest.raises(UserError, match=r"torch-fidelity-50k needs the weights https.*, not own.pth"):
        check_protocol("torch-fidelity-50k", suite)
