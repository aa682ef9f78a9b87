"""Named protocols: what must be equal before numbers can stand beside published ones, set and checked together.

`--protocol NAME` sets metrics and number of images, and refuses flags, data, reference files and weights that would
make the numbers something else. Sampling is the model's own affair: a report says its settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.evaluation.metrics import MetricSuite, parse_metrics
from util.evaluation.weights import NOT_PUBLISHED
from util.io import FID_STATS


@dataclass(frozen=True)
class Protocol:
    """What a protocol fixes."""

    metrics: tuple[str, ...]  # at least these
    values: tuple[str, ...]  # numbers that its report has
    num_images: int
    split: str  # part of the data set that the reference is of, all of its images
    data: tuple[str, ...] = ()  # data sets that it is defined for; none: for all
    size: int | None = None  # of the images
    reference: str | None = None  # file in fid_stats/; None: the one that evaluation looks for
    how: str = "Give another --fid_stats, or make it with prepare_ref.py"  # to get that file
    reference_images: int = 0  # in its arr_0


# Data sets that may be ImageNet: ADM's and JiT's files are of it, and have no metadata.
IMAGENET = ("imagefolder", "webdataset", "huggingface")
ADM_FILE = "VIRTUAL_imagenet256_labeled.npz"
ADM_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/{ADM_FILE}"
SPECTRALDIT_FILE = "cifar10_32_inception_antialias_test.npz"
PROTOCOLS = {
    "torch-fidelity-50k": Protocol(("fid", "is"), ("fid", "is_mean"), 50_000, "train"),
    "adm": Protocol(
        ("fid", "is"),
        ("fid", "sfid", "is_mean", "precision", "recall"),
        50_000,
        "train",
        data=IMAGENET,
        size=256,
        reference=ADM_FILE,
        how=f"Download {ADM_URL} (2 GB) into fid_stats/",
        reference_images=10_000,
    ),
    "spectraldit": Protocol(
        ("fid_antialias",),
        ("fid_antialias",),
        10_000,
        "test",
        data=("cifar10",),
        size=32,
        reference=SPECTRALDIT_FILE,
        how="Make it: python prepare_ref.py --dataset cifar10 --split test --extractor inception_antialias "
        f"--out fid_stats/{SPECTRALDIT_FILE}",
    ),
}


def protocol_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a protocol; further metrics may be given. UserError for flags that contradict it."""
    if name == "none":
        return {}
    protocol = PROTOCOLS[name]
    settings = {"metrics": ",".join(protocol.metrics), "num_images": protocol.num_images}
    if set(protocol.metrics) <= set(parse_metrics(given.get("metrics") or "")):
        settings["metrics"] = given["metrics"]
    for flag, value in settings.items():
        if given.get(flag, value) != value:
            raise UserError(f"--protocol {name} has --{flag} {value}, not {given[flag]}. Leave out one of the two.")
    return settings


def protocol_reference(config: Any) -> str | Path | None:
    """Return the reference file, None for the usual one. Raises UserError if it is missing, or for other data."""
    name, protocol = config.protocol, PROTOCOLS.get(config.protocol)
    if protocol is None:
        return config.fid_stats
    if protocol.data and not (config.real_images in protocol.data and config.pixels == protocol.size):
        wanted = f"{' or '.join(protocol.data)} at {protocol.size} pixels"
        found = f"{config.real_images} at {config.pixels} pixels"
        raise UserError(f"--protocol {name} is defined for {wanted}, not for {found}. Leave it out.")
    if config.fid_stats or protocol.reference is None:
        return config.fid_stats
    if not (path := FID_STATS / protocol.reference).exists():
        raise UserError(f"--protocol {name} needs {path}, which does not exist. {protocol.how}.")
    return path


def check_protocol(name: str, suite: MetricSuite) -> None:
    """Raise a UserError if the numbers of a suite would not be those of the protocol."""
    protocol = PROTOCOLS[name]
    computed = {value for metric in suite.metrics.values() for value in metric.values}
    for value in protocol.values:
        if value not in computed:
            why = suite.not_computed.get(value, "no metric gives it")
            raise UserError(f"--protocol {name} has {value}, which cannot be computed: {why}.")
    for extractor in suite.extractors:
        if extractor.describe().get("weights") == NOT_PUBLISHED:
            raise UserError(f"--protocol {name} needs the weights {extractor.file.url}, not {extractor.path}.")
    file = suite.files[protocol.metrics[0]]
    meta = file.meta or {}
    whole = meta.get("subset_seed") is None and "reconstructed_by" not in meta
    if file.meta is None and suite.dataset not in IMAGENET:
        what = "has no metadata that says what it is of"
    elif meta.get("dataset", suite.dataset) != suite.dataset:
        what = f"was made from {meta['dataset']}, not from {suite.dataset}"
    elif meta.get("split", protocol.split) != protocol.split or not whole:
        what = f"is not of all images of the split {protocol.split}"
    elif file.num_images < protocol.reference_images:
        what = f"has fewer than the {protocol.reference_images} images (arr_0) that precision and recall need"
    else:
        return
    raise UserError(f"--protocol {name} cannot use {file.path}: it {what}. {protocol.how}.")
