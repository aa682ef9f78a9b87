"""The metrics of generated images: one registry entry each, and the suite that computes those of an evaluation.

A script adds a metric with METRICS["name"] = Metric(...); --metrics, sweeps and tools/report.py then know it.
FID, IS, KID, precision and recall are computed by torch-fidelity's functions.

Shapes: N generated images, M real images in a reference file, F features of a stream, K rings of a spectrum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_ops.spectrum import ring_ratio, spectrum_gap
from util.data.datasets import Digits
from util.errors import UserError
from util.evaluation.features import DigitPixels, EffNetLite0, Extractor, GreySpectrum, InceptionV3
from util.evaluation.plots import plot_spectra
from util.evaluation.reference import Reference, default_reference, load_reference

ISC = {"splits": 10, "shuffle": True, "rng_seed": 2020}  # these three are torch-fidelity's defaults, and in each report
PRC = {"prc_neighborhood": 3}
KID = {"kid_subsets": 100, "kid_subset_size": 1000, "rng_seed": 2020}
PRC_ROWS = 1000  # rows of the distance matrix at a time: 1000 x 50,000 are 200 MB


def frechet_distance(features: Tensor, mu: Tensor | np.ndarray, sigma: Tensor | np.ndarray) -> float:
    """Compute the Fréchet distance between the Gaussians fitted to two sets of features.

        d = |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2))

    The statistics of `features` (N, F) are computed in their own type, as torch-fidelity does with float32 (Heusel et
    al. 2017, arXiv:1706.08500, equation 6).
    """
    from torch_fidelity import metric_fid

    pair = metric_fid.fid_features_to_statistics(features), {"mu": mu, "sigma": sigma}
    pair = [{key: np.asarray(array, dtype=np.float64) for key, array in moments.items()} for moments in pair]
    return metric_fid.fid_statistics_to_metric(*pair, False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Compute mean and standard deviation over 10 splits of the Inception Score, exp(E_x KL(p(y|x) || p(y))).

    `logits` (N, 1008) are in index order, which decides the splits (Salimans et al. 2016, arXiv:1606.03498).
    """
    from torch_fidelity import metric_isc

    out = metric_isc.isc_features_to_metric(logits, **ISC)
    return out[metric_isc.KEY_METRIC_ISC_MEAN], out[metric_isc.KEY_METRIC_ISC_STD]


def precision_recall(generated: Tensor, real: Tensor, rows: int = PRC_ROWS) -> tuple[float, float]:
    """Compute improved precision and recall (P, R) of features (N, F) and (M, F), with k = 3.

        r_k(y, Y) = distance from y in Y to its k-th nearest other point of Y
        P = share of generated x with |x - y| <= r_k(y, real) for some real y;   R the same with the sets exchanged

    `rows` of the distance matrices exist at a time (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 to 3).
    """
    from torch_fidelity import metric_prc

    how = {"prc_batch_size": rows, "save_cpu_ram": True, "verbose": False}
    out = metric_prc.prc_features_to_metric(generated, real, **PRC, **how)
    return out[metric_prc.KEY_METRIC_PRECISION], out[metric_prc.KEY_METRIC_RECALL]


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Compute mean and standard deviation of the Kernel Inception Distance over 100 random subsets of 1000 images.

        MMD^2 between X and Y, unbiased, with the kernel k(x, y) = (x . y / F + 1)^3; may be slightly negative

    A subset of fewer than 1000 images is all of them (Binkowski et al. 2018, arXiv:1801.01401, section 4).
    """
    from torch_fidelity import metric_kid

    how = KID | {"kid_subset_size": min(KID["kid_subset_size"], len(generated), len(real)), "verbose": False}
    out = metric_kid.kid_features_to_metric(generated, real, **how)
    return out[metric_kid.KEY_METRIC_KID_MEAN], out[metric_kid.KEY_METRIC_KID_STD]


@cache
def digit_classifier(img_size: int) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Fit a support vector machine to scikit-learn's 1797 real digits, as images of img_size pixels per side.

    Returns a function from features (n, 64) to classes (n,), and the accuracy of a fit to 1200 digits on the other 597.
    """
    from sklearn.svm import SVC

    images, labels = zip(*Digits(img_size), strict=True)
    x, y = DigitPixels()(torch.stack(images))["digit_8x8"].numpy(), np.array(labels)  # (1797, 64), (1797,)
    test, train = np.split(np.random.RandomState(0).permutation(len(y)), [597])
    model = SVC(kernel="rbf", C=10.0, gamma=0.001)
    accuracy = model.fit(x[train], y[train]).score(x[test], y[test])
    return model.fit(x, y).predict, accuracy


def class_agreement(features: Tensor, labels: Tensor, img_size: int) -> tuple[float, float]:
    """Return the share of images read as the class asked for, and about what perfect generation would reach."""
    predict, accuracy = digit_classifier(img_size)
    return (predict(features.numpy()) == labels.cpu().numpy()).mean(), accuracy


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


INCEPTION, EFFNET = (InceptionV3, "inception_2048"), (EffNetLite0, "effnet_lite0")
LOGITS, DIGITS, SPECTRUM = (InceptionV3, "inception_logits_unbiased"), (DigitPixels, "digit_8x8"), "grey_spectrum"
NEIGHBOURS = {"compute": precision_recall, "needs": ("features",), "lower_is_better": False, "least": 4}
METRICS = {  # in the order in which a sweep prefers them
    "fid": Metric(*INCEPTION, ("fid",), frechet_distance, ("mu", "sigma"), least=2),
    "fd_effnet": Metric(*EFFNET, ("fd_effnet_lite0",), frechet_distance, ("mu", "sigma"), least=2),
    "class_agreement": Metric(
        *DIGITS,
        ("class_agreement", "class_agreement_real"),
        class_agreement,
        needs=("labels", "img_size"),
        lower_is_better=False,
        dataset="digits",
    ),
    "is": Metric(*LOGITS, ("is_mean", "is_std"), inception_score, lower_is_better=False, least=ISC["splits"]),
    "precision_recall": Metric(*INCEPTION, ("precision", "recall"), beside="fid", **NEIGHBOURS),
    "kid": Metric(*INCEPTION, ("kid_mean", "kid_std"), kernel_distance, ("features",), beside="fid", least=4),
    "precision_recall_effnet": Metric(
        *EFFNET, ("precision_effnet_lite0", "recall_effnet_lite0"), beside="fd_effnet", **NEIGHBOURS
    ),
    "spectrum_gap": Metric(
        GreySpectrum,
        SPECTRUM,
        ("spectrum_gap",),
        lambda spectra, real: spectrum_gap(real, spectra.double().mean(dim=0)),
        needs=(SPECTRUM,),
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
        raise UserError(f"--metrics {', '.join(unknown)} is unknown; known are {', '.join(known)}, or none by itself.")
    return tuple(dict.fromkeys(names))


class MetricSuite:
    """The metrics of an evaluation. The constructor checks all that they need; none is replaced by another one.

    Each rank extracts features of its images; those of all images, gathered in index order, give the numbers.
    `img_size` is in pixels per side. `fid_stats` is the reference file of the first metric that needs one; by default
    those in fid_stats/. Raises UserError if something that `names` need is missing or does not match.

    Attributes:
        streams: {stream: F} of what `extract` returns and `compute` takes.
        not_computed: {value: why it cannot be computed beside the metrics that were asked for}.
        details: what the last `compute` found beyond single numbers: the spectra grey_spectrum, grey_spectrum_real and
            ring_ratio (generated / real); {value: why it is not defined for these images}.
    """

    def __init__(
        self,
        names: Sequence[str],
        dataset: str,
        img_size: int,
        num_images: int,
        device: torch.device | str,
        fid_stats: str | Path | None = None,
        inception_weights: str | Path | None = None,
    ):
        self.names, self.img_size, self.num_images = parse_metrics(",".join(names)), img_size, num_images
        self.warnings, self.not_computed, self.details = [], {}, {}
        self.files: dict[str, Reference] = {}  # first value of a metric that was asked for -> its reference file
        self.real: dict[str, dict[str, Tensor]] = {}  # metric -> the arrays of its file
        self.metrics = {name: metric for name, metric in METRICS.items() if name in self.names}
        for name, metric in self.metrics.items():
            if dataset != (metric.dataset or dataset):
                raise UserError(f"{name} is defined for the data set {metric.dataset}, not for {dataset}.")
            if num_images < metric.least:
                raise UserError(f"{name} needs at least {metric.least} images, not {num_images}.")
        build = cache(lambda extractor: extractor(device, inception_weights, img_size))
        loaded: dict[type[Extractor], Reference] = {}
        for name, metric in self.metrics.items():
            extractor = build(metric.extractor)
            if metric.arrays and metric.extractor not in loaded:
                usual = default_reference(dataset, img_size, extractor.name)
                path = usual if loaded else fid_stats or usual
                loaded[metric.extractor] = load_reference(path, dataset, img_size, extractor, metric.stream)
                self.warnings += loaded[metric.extractor].warnings
            if metric.arrays:
                self.files[metric.values[0]] = file = loaded[metric.extractor]
                self.real[name] = file.arrays
                if missing := metric.arrays - file.arrays.keys():
                    raise UserError(
                        f"{name} needs {', '.join(missing)}, which {file.path} lacks; prepare_ref.py stores it."
                    )
            if "sigma" in metric.needs and num_images < (dim := extractor.streams[metric.stream]):
                self.warnings.append(
                    f"{name} from {num_images} images is biased, as the covariance is rank deficient with fewer than "
                    f"{dim}. Compare it only with values from the same number of images."
                )
        if not loaded:  # the spectrum gap needs no network
            usual = [default_reference(dataset, img_size, e.name) for e in (EffNetLite0, InceptionV3)]
            for path in [fid_stats] if fid_stats else [path for path in usual if path.exists()]:
                file = load_reference(path, dataset, img_size)
                self.files |= {"spectrum_gap": file} if SPECTRUM in file.arrays else {}
            if fid_stats and not self.files:
                self.warnings.append(f"{fid_stats} is not used: no metric needs it, and it holds no {SPECTRUM}.")
        for name, metric in METRICS.items():
            files = list(self.files.values()) if metric.beside == "any" else []
            if metric.beside in self.names:
                files = [self.files[METRICS[metric.beside].values[0]]]
            for file in files:
                rows = [len(file.arrays.get(key, ())) for key in metric.arrays]
                if name not in self.metrics and min(num_images, *rows) >= metric.least:
                    self.metrics[name], self.real[name] = metric, file.arrays
            if files and name not in self.metrics:
                where = " or ".join(str(file.path) for file in files)
                why = f"it needs at least {metric.least} images and {', '.join(metric.arrays)} in {where}"
                self.not_computed |= dict.fromkeys(metric.values, f"{why}; prepare_ref.py stores them")
        self.extractors = [build(extractor) for extractor in dict.fromkeys(m.extractor for m in self.metrics.values())]
        self.streams = {m.stream: build(m.extractor).streams[m.stream] for m in self.metrics.values()}

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Return {stream: float32 (B, F) on the CPU} of uint8 images (B, 3, H, W) on any device."""
        features = {}
        for extractor in self.extractors:
            features |= extractor(images)
        return {stream: features[stream] for stream in self.streams}

    def compute(self, features: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
        """Return {value: number} of features {stream: (N, F)} and the class (N,) of each image; fill `details`.

        Raises UserError for features that are missing, misshapen or non-finite.
        """
        for stream, dim in self.streams.items():
            shape = tuple(features[stream].shape) if stream in features else None
            if shape != (self.num_images, dim) or not features[stream].isfinite().all():
                expected = f"finite numbers of shape ({self.num_images}, {dim})"
                raise UserError(f"Features {stream}: {expected} were expected, not {shape or 'none'}.")
        out, self.details = {}, {}
        for name, metric in self.metrics.items():
            inputs = {"labels": labels, "img_size": self.img_size} | self.real.get(name, {})
            numbers = metric.compute(features[metric.stream], *(inputs[key] for key in metric.needs))
            for value, number in zip(metric.values, numbers if isinstance(numbers, tuple) else (numbers,), strict=True):
                if math.isfinite(number):
                    out[value] = float(number)
                elif metric.beside is None:
                    raise UserError(f"{value} is {number}: the features or the reference are too large.")
                else:
                    self.details[value] = f"not defined for these images (it is {number})"
        if "spectrum_gap" in self.metrics:
            real, generated = self.real["spectrum_gap"][SPECTRUM], features[SPECTRUM].double().mean(dim=0)
            spectra = {SPECTRUM: generated, f"{SPECTRUM}_real": real, "ring_ratio": ring_ratio(real, generated)}
            self.details |= {key: value.tolist() for key, value in spectra.items()}
        return out

    def plot(self, path: Path) -> None:
        """Draw the spectra that the last `compute` found into a PNG, if there are any."""
        if "ring_ratio" in self.details and "spectrum_gap" not in self.details:
            plot_spectra(self.details["grey_spectrum_real"], self.details["grey_spectrum"], path)

    def describe(self) -> dict[str, Any]:
        """Return for reports what decides the numbers, and warnings: ready for JSON, independent of `compute`."""
        return {
            "metrics": list(self.names),
            "extractors": [extractor.describe() for extractor in self.extractors],
            "references": {value: file.describe() for value, file in self.files.items()},
            "tf32": {"matmul": False, "cudnn": torch.backends.cudnn.allow_tf32},
            "warnings": self.warnings,
            "settings": {"is": ISC, "precision_recall": PRC, "kid": KID},
            "not_computed": self.not_computed,
        }
