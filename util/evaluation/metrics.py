"""The metrics of generated images: one registry entry each, and the suite that computes those of an evaluation.

A script adds a metric with METRICS["name"] = Metric(...); --metrics, sweeps and tools/report.py then know it.

Shapes: N generated images, M real images in a reference file, F features of a stream, K rings of a spectrum.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_ops.spectrum import ring_ratio, spectrum_gap
from util.errors import UserError
from util.evaluation.features import (
    SPATIAL,
    Clip,
    DigitPixels,
    DinoV2,
    EffNetLite0,
    Extractor,
    GreySpectrum,
    InceptionAntialias,
    InceptionV3,
)
from util.evaluation.formulas import (
    DENSITY,
    ISC,
    KID,
    KID_CLIP,
    PRC,
    class_agreement,
    clip_distance,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from util.evaluation.images import rgb
from util.evaluation.reference import Reference, default_reference, load_reference

BATCH = 64  # images of a reference file whose features are computed at a time


@dataclass(frozen=True)
class Metric:
    """What is known of a metric by its name."""

    extractor: type[Extractor]
    stream: str  # of the extractor
    values: tuple[str, ...]  # names of the numbers; the first one ranks models
    compute: Callable[..., float | tuple[float, ...]]  # of features (N, F) and, in that order, what it needs:
    needs: tuple[str, ...] = ()  # arrays of a reference file, "labels" (N,), "img_size"
    lower_is_better: bool = True
    beside: str | None = None  # computed unasked beside this metric ("any": all) if its reference file has the arrays
    least: int = 1  # images, generated and real
    dataset: str | None = None  # the only one for which it is defined

    @property
    def arrays(self) -> set[str]:
        return set(self.needs) - {"labels", "img_size"}

    @property
    def table(self) -> str | None:
        """Name of the array with this distance of held-out real images; None for what is no Fréchet distance."""
        return self.needs[0].replace("mu", "heldout") if self.compute is frechet_distance else None

    def can_use(self, file: Reference, num_images: int) -> bool:
        """Whether there are enough images, and a file has what this metric needs of as many."""
        return min(num_images, *(file.rows(name) for name in self.arrays)) >= self.least


FRECHET = {"compute": frechet_distance, "needs": ("mu", "sigma"), "least": 2}
NEIGHBOURS = {"compute": precision_recall, "needs": ("features",), "lower_is_better": False, "least": 4}
DENSE = {"compute": density_coverage, "needs": ("features",), "lower_is_better": False, "least": 6}
METRICS = {  # in the order in which a sweep prefers them
    "fid": Metric(InceptionV3, "inception_2048", ("fid",), **FRECHET),
    "fd_dinov2": Metric(DinoV2, "dinov2_1024", ("fd_dinov2",), **FRECHET),
    "kid_clip": Metric(Clip, "clip_768", ("kid_clip_mean", "kid_clip_std"), clip_distance, ("features",), least=4),
    "fd_effnet": Metric(EffNetLite0, "effnet_lite0", ("fd_effnet_lite0",), **FRECHET),
    "fid_antialias": Metric(InceptionAntialias, "inception_antialias_2048", ("fid_antialias",), **FRECHET),
    "class_agreement": Metric(
        DigitPixels,
        "digit_8x8",
        ("class_agreement", "class_agreement_real"),
        class_agreement,
        needs=("labels", "img_size"),
        lower_is_better=False,
        dataset="digits",
    ),
    "is": Metric(
        InceptionV3,
        "inception_logits_unbiased",
        ("is_mean", "is_std"),
        inception_score,
        lower_is_better=False,
        least=ISC["splits"],
    ),
    "sfid": Metric(InceptionV3, SPATIAL, ("sfid",), beside="fid", **FRECHET | {"needs": ("mu_s", "sigma_s")}),
    "precision_recall": Metric(InceptionV3, "inception_2048", ("precision", "recall"), beside="fid", **NEIGHBOURS),
    "density_coverage": Metric(InceptionV3, "inception_2048", ("density", "coverage"), beside="fid", **DENSE),
    "kid": Metric(
        InceptionV3, "inception_2048", ("kid_mean", "kid_std"), kernel_distance, ("features",), beside="fid", least=4
    ),
    "precision_recall_dinov2": Metric(
        DinoV2, "dinov2_1024", ("precision_dinov2", "recall_dinov2"), beside="fd_dinov2", **NEIGHBOURS
    ),
    "density_coverage_dinov2": Metric(
        DinoV2, "dinov2_1024", ("density_dinov2", "coverage_dinov2"), beside="fd_dinov2", **DENSE
    ),
    "precision_recall_effnet": Metric(
        EffNetLite0, "effnet_lite0", ("precision_effnet_lite0", "recall_effnet_lite0"), beside="fd_effnet", **NEIGHBOURS
    ),
    "density_coverage_effnet": Metric(
        EffNetLite0, "effnet_lite0", ("density_effnet_lite0", "coverage_effnet_lite0"), beside="fd_effnet", **DENSE
    ),
    "spectrum_gap": Metric(
        GreySpectrum,
        "grey_spectrum",
        ("spectrum_gap",),
        lambda spectra, real: spectrum_gap(real, spectra.double().mean(dim=0)),
        needs=("grey_spectrum",),
        beside="any",
    ),
}


def parse_metrics(text: str) -> tuple[str, ...]:
    """Return the names in 'fid,is' without repetitions; 'none' and '' name none. Raises UserError for unknown ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [name for name, metric in METRICS.items() if metric.beside is None]
    if names == ["none"]:
        return ()
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--metrics {', '.join(unknown)} is unknown. Choose from {', '.join(known)}, or none alone.")
    return tuple(dict.fromkeys(names))


class MetricSuite:
    """The metrics of an evaluation: those asked for, and beside them those for which a reference file has the arrays.

    Each rank extracts features of its images; those of all images, gathered in index order, give the numbers. Raises
    UserError if something that the metrics asked for need is missing or does not match; none is replaced.

    Args:
        names: of the metrics asked for.
        img_size: pixels per side.
        fid_stats: the reference file of the metric `reference_of`; those of other extractors are in fid_stats/.
        weights: paths of weights by the names of their flags (util.evaluation.weights).
        protocol: name of the protocol that the evaluation follows, for its report.
        reference_of: name of a metric; by default the first one that needs a reference file.

    Attributes:
        metrics: {name: Metric} of all that are computed.
        files: {name: reference file} of the metrics that need one.
        streams: {stream: F} of what `extract` returns and `compute` takes.
        not_computed: {value: why it cannot be computed beside the metrics asked for}.
    """

    def __init__(
        self,
        names: Sequence[str],
        dataset: str,
        img_size: int,
        num_images: int,
        device: torch.device | str,
        fid_stats: str | Path | None = None,
        weights: Mapping[str, Any] | None = None,
        protocol: str | None = None,
        reference_of: str | None = None,
        like: "MetricSuite | None" = None,
    ):
        self.names, self.dataset, self.img_size, self.protocol = tuple(names), dataset, img_size, protocol
        self.metrics = {name: metric for name, metric in METRICS.items() if name in names}
        self.files: dict[str, Reference] = {}
        self.warnings: list[str] = []
        self.not_computed: dict[str, str] = {}
        self._build = build = like._build if like else cache(lambda extractor: extractor(device, weights, img_size))
        self._real_features = cache(self._features_of)

        # The metrics asked for. Those of one extractor share a reference file.
        file_of: dict[type[Extractor], Reference] = {}
        reference_of = reference_of or next((name for name, metric in self.metrics.items() if metric.arrays), None)
        for name, metric in self.metrics.items():
            if metric.dataset not in (None, dataset, dataset.removesuffix("-grey")):
                raise UserError(
                    f"{name} is defined for the data set {metric.dataset}, not for {dataset}. Drop it from --metrics."
                )
            if num_images < metric.least:
                raise UserError(f"{name} needs at least {metric.least} images, not {num_images}. Raise --num_images.")
            extractor = build(metric.extractor)
            if metric.arrays:
                if metric.extractor not in file_of:
                    path = default_reference(dataset, img_size, extractor.name)
                    if fid_stats and metric.extractor is METRICS[reference_of].extractor:
                        path = fid_stats
                    file_of[metric.extractor] = load_reference(path, dataset, img_size, extractor, metric.stream)
                    self.warnings += file_of[metric.extractor].warnings
                self.files[name] = file = file_of[metric.extractor]
                if missing := {array for array in metric.arrays if not file.rows(array)}:
                    lacks = f"{name} needs {', '.join(sorted(missing))}, which {file.path} lacks"
                    raise UserError(f"{lacks}. Make the file again: prepare_ref.py stores it.")
            if "sigma" in metric.needs and num_images < (dim := extractor.streams[metric.stream]):
                self.warnings.append(
                    f"{name} from {num_images} images is biased, as the covariance is rank deficient with fewer than "
                    f"{dim}. Compare it only with values from the same number of images."
                )

        # The spectrum gap needs no network: if there is no file so far, any one that holds a spectrum will do.
        of_any = list(self.files.values())
        if not of_any:
            usual = [default_reference(dataset, img_size, e.name) for e in (InceptionV3, EffNetLite0)]
            paths = [fid_stats] if fid_stats else [path for path in usual if path.exists()]
            found = [load_reference(path, dataset, img_size) for path in paths]
            of_any = [file for file in found if "grey_spectrum" in file.arrays]
            if fid_stats and not of_any:
                self.warnings.append(f"{fid_stats} is not used: no metric needs it, and it holds no grey_spectrum.")

        # The metrics beside them, where a file has the arrays.
        for name, metric in METRICS.items():
            if metric.beside == "any":
                files = of_any
            else:
                files = [self.files[metric.beside]] if metric.beside in names else []
            usable = [file for file in files if metric.can_use(file, num_images)]
            if usable:
                self.metrics[name], self.files[name] = metric, usable[0]
            elif files:
                where = " or ".join(str(file.path) for file in files)
                why = f"it needs at least {metric.least} images and {', '.join(sorted(metric.arrays))} in {where}"
                self.not_computed |= dict.fromkeys(metric.values, f"{why}; prepare_ref.py stores them")

        self.floors = self._find_floors(num_images)
        self.extractors = [build(extractor) for extractor in dict.fromkeys(m.extractor for m in self.metrics.values())]
        self.streams = {m.stream: build(m.extractor).streams[m.stream] for m in self.metrics.values()}

    def _find_floors(self, num_images: int) -> dict[str, float]:
        """Return {value of a ratio: Fréchet distance of as many held-out real images}; note why others have none."""
        floors = {}
        for name, metric in self.metrics.items():
            if metric.table is None:
                continue
            file, ratio = self.files[name], f"{metric.values[0]}_ratio"
            known = file.heldout(metric.table)
            if num_images in known:
                floors[ratio] = known[num_images]
            else:
                stored = f" (only of {', '.join(map(str, known))})" if known else ""
                self.not_computed[ratio] = (
                    f"{file.path} has no distance of {num_images} held-out images{stored}; prepare_ref.py stores it "
                    f"with --heldout_counts {num_images} if --heldout_split has so many"
                )
        return floors

    def _features_of(self, file: Reference, extractor: type[Extractor], stream: str) -> Tensor:
        """Return the features (M, F) of the real images in a file."""
        if "features" in file.arrays:
            return file.arrays["features"]
        print(f"computing features of the {file.num_images} images in {file.path}", file=sys.stderr, flush=True)
        images = torch.from_numpy(file.images()).permute(0, 3, 1, 2)  # (M, 3, H, W)
        return torch.cat([self._build(extractor)(part)[stream] for part in images.split(BATCH)])

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Return {stream: float32 (B, F) on the CPU} of uint8 images (B, C, H, W) on any device."""
        features = {}
        for extractor in self.extractors:
            features |= extractor(rgb(images))
        return {stream: features[stream] for stream in self.streams}

    def compute(self, features: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return {value: number} of features {stream: (N, F)} and the class (N,) of each image, and details.

        Beside each Fréchet distance stands its ratio to that of as many held-out real images, where the file has it.

        The details are the spectra grey_spectrum, grey_spectrum_real and ring_ratio (generated / real), and {value: why
        it is not defined for these images}.
        """
        numbers, details = {}, {}
        for name, metric in self.metrics.items():
            inputs: dict[str, Any] = {"labels": labels, "img_size": self.img_size}
            if name in self.files:
                inputs |= self.files[name].arrays
            if "features" in metric.needs:
                inputs["features"] = self._real_features(self.files[name], metric.extractor, metric.stream)
            found = metric.compute(features[metric.stream], *(inputs[key] for key in metric.needs))
            for value, number in zip(metric.values, found if isinstance(found, tuple) else (found,), strict=True):
                if math.isfinite(number):
                    numbers[value] = float(number)
                elif metric.beside is None:
                    raise UserError(f"{value} is {number}: the features or those of the reference file are too large.")
                else:
                    details[value] = f"not defined for these images (it is {number})"
        for ratio, floor in self.floors.items():
            if (value := ratio.removesuffix("_ratio")) in numbers:
                numbers[ratio] = numbers[value] / floor
        if "spectrum_gap" in self.metrics:
            real = self.files["spectrum_gap"].arrays["grey_spectrum"]
            generated = features["grey_spectrum"].double().mean(dim=0)
            details["grey_spectrum"] = generated.tolist()
            details["grey_spectrum_real"] = real.tolist()
            details["ring_ratio"] = ring_ratio(real, generated).tolist()
        return numbers, details

    def describe(self) -> dict[str, Any]:
        """Return for reports what decides the numbers, and warnings: ready for JSON."""
        names = [extractor.name for extractor in self.extractors]
        own = {name: metric for name, metric in self.metrics.items() if metric.beside in (None, "any")}
        return {
            "metrics": list(self.names),
            "protocol": self.protocol or ("torch-fidelity" if InceptionV3.name in names else None),
            "extractors": [extractor.describe() for extractor in self.extractors],
            "references": {m.values[0]: self.files[name].describe() for name, m in own.items() if name in self.files},
            "tf32": {"matmul": False, "cudnn": torch.backends.cudnn.allow_tf32},
            "warnings": self.warnings,
            "settings": {
                "is": ISC,
                "precision_recall": PRC,
                "density_coverage": DENSITY,
                "kid": KID,
                "kid_clip": KID_CLIP,
            },
            "not_computed": self.not_computed,
        }
