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
from util.evaluation.images import rgb
from util.evaluation.reference import Reference, default_reference, load_reference

ISC = {"splits": 10, "shuffle": True, "rng_seed": 2020}  # these three are torch-fidelity's defaults, and in each report
PRC = {"prc_neighborhood": 3}
KID = {"kid_subsets": 100, "kid_subset_size": 1000, "rng_seed": 2020}


def frechet_distance(features: Tensor, mu: Tensor | np.ndarray, sigma: Tensor | np.ndarray) -> float:
    """Compute the Fréchet distance between the Gaussians fitted to two sets of features.

        d = |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2))

    The statistics of `features` (N, F) are computed in their own type, as torch-fidelity does with float32 (Heusel et
    al. 2017, arXiv:1706.08500, equation 6).
    """
    from torch_fidelity import metric_fid

    return frechet_of_moments(*metric_fid.fid_features_to_statistics(features).values(), mu, sigma)


def frechet_of_moments(*moments: Tensor | np.ndarray) -> float:
    """Compute the same of mu_1 (F,), sigma_1 (F, F), mu_2, sigma_2."""
    from torch_fidelity import metric_fid

    mu_1, sigma_1, mu_2, sigma_2 = (np.asarray(array, dtype=np.float64) for array in moments)
    pair = {"mu": mu_1, "sigma": sigma_1}, {"mu": mu_2, "sigma": sigma_2}
    return metric_fid.fid_statistics_to_metric(*pair, False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Compute mean and standard deviation over 10 splits of the Inception Score, exp(E_x KL(p(y|x) || p(y))).

    `logits` (N, 1008) are in index order, which decides the splits (Salimans et al. 2016, arXiv:1606.03498).
    """
    from torch_fidelity import metric_isc

    out = metric_isc.isc_features_to_metric(logits, **ISC)
    return out[metric_isc.KEY_METRIC_ISC_MEAN], out[metric_isc.KEY_METRIC_ISC_STD]


def precision_recall(generated: Tensor, real: Tensor, rows: int = 1000) -> tuple[float, float]:
    """Compute improved precision and recall (P, R) of features (N, F) and (M, F), with k = 3.

        r_k(y, Y) = distance from y in Y to its k-th nearest other point of Y
        P = share of generated x with |x - y| <= r_k(y, real) for some real y;   R the same with the sets exchanged

    `rows` of the distance matrices exist at a time: 1000 x 50,000 are 200 MB (Kynkäänniemi et al. 2019,
    arXiv:1904.06991, equations 1 to 3).
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

    def can_use(self, file: Reference, num_images: int) -> bool:
        """Whether there are enough images, and a file has what this metric needs of as many."""
        rows = [len(file.arrays.get(name, ())) for name in self.arrays]
        return min(num_images, *rows) >= self.least


NEIGHBOURS = {"compute": precision_recall, "needs": ("features",), "lower_is_better": False, "least": 4}
METRICS = {  # in the order in which a sweep prefers them
    "fid": Metric(InceptionV3, "inception_2048", ("fid",), frechet_distance, needs=("mu", "sigma"), least=2),
    "fd_effnet": Metric(
        EffNetLite0, "effnet_lite0", ("fd_effnet_lite0",), frechet_distance, needs=("mu", "sigma"), least=2
    ),
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
    "precision_recall": Metric(InceptionV3, "inception_2048", ("precision", "recall"), beside="fid", **NEIGHBOURS),
    "kid": Metric(
        InceptionV3, "inception_2048", ("kid_mean", "kid_std"), kernel_distance, ("features",), beside="fid", least=4
    ),
    "precision_recall_effnet": Metric(
        EffNetLite0, "effnet_lite0", ("precision_effnet_lite0", "recall_effnet_lite0"), beside="fd_effnet", **NEIGHBOURS
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
        fid_stats: the reference file of the first metric that needs one; the other files are those in fid_stats/.

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
        inception_weights: str | Path | None = None,
    ):
        self.names, self.img_size = tuple(names), img_size
        self.metrics = {name: metric for name, metric in METRICS.items() if name in names}
        self.files: dict[str, Reference] = {}
        self.warnings: list[str] = []
        self.not_computed: dict[str, str] = {}
        build = cache(lambda extractor: extractor(device, inception_weights, img_size))

        # The metrics asked for. Those of one extractor share a reference file.
        file_of: dict[type[Extractor], Reference] = {}
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
                    if fid_stats and not file_of:
                        path = fid_stats
                    file_of[metric.extractor] = load_reference(path, dataset, img_size, extractor, metric.stream)
                    self.warnings += file_of[metric.extractor].warnings
                self.files[name] = file = file_of[metric.extractor]
                if missing := metric.arrays - file.arrays.keys():
                    lacks = f"{name} needs {', '.join(missing)}, which {file.path} lacks"
                    raise UserError(f"{lacks}. Make the file again: prepare_ref.py stores it.")
            if "sigma" in metric.needs and num_images < (dim := extractor.streams[metric.stream]):
                self.warnings.append(
                    f"{name} from {num_images} images is biased, as the covariance is rank deficient with fewer than "
                    f"{dim}. Compare it only with values from the same number of images."
                )
        self.references = {self.metrics[name].values[0]: file for name, file in self.files.items()}  # for reports

        # The spectrum gap needs no network: if there is no file so far, any one that holds a spectrum will do.
        if not self.references:
            usual = [default_reference(dataset, img_size, e.name) for e in (InceptionV3, EffNetLite0)]
            paths = [fid_stats] if fid_stats else [path for path in usual if path.exists()]
            found = [load_reference(path, dataset, img_size) for path in paths]
            found = [file for file in found if "grey_spectrum" in file.arrays]
            if found:
                self.references["spectrum_gap"] = found[0]
            elif fid_stats:
                self.warnings.append(f"{fid_stats} is not used: no metric needs it, and it holds no grey_spectrum.")

        # The metrics beside them, where a file has the arrays.
        for name, metric in METRICS.items():
            if metric.beside == "any":
                files = list(self.references.values())
            else:
                files = [self.files[metric.beside]] if metric.beside in names else []
            usable = [file for file in files if metric.can_use(file, num_images)]
            if usable:
                self.metrics[name], self.files[name] = metric, usable[0]
            elif files:
                where = " or ".join(str(file.path) for file in files)
                why = f"it needs at least {metric.least} images and {', '.join(metric.arrays)} in {where}"
                self.not_computed |= dict.fromkeys(metric.values, f"{why}; prepare_ref.py stores them")

        self.extractors = [build(extractor) for extractor in dict.fromkeys(m.extractor for m in self.metrics.values())]
        self.streams = {m.stream: build(m.extractor).streams[m.stream] for m in self.metrics.values()}

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Return {stream: float32 (B, F) on the CPU} of uint8 images (B, C, H, W) on any device."""
        features = {}
        for extractor in self.extractors:
            features |= extractor(rgb(images))
        return {stream: features[stream] for stream in self.streams}

    def compute(self, features: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return {value: number} of features {stream: (N, F)} and the class (N,) of each image, and details.

        The details are the spectra grey_spectrum, grey_spectrum_real and ring_ratio (generated / real), and {value: why
        it is not defined for these images}.
        """
        numbers, details = {}, {}
        for name, metric in self.metrics.items():
            inputs: dict[str, Any] = {"labels": labels, "img_size": self.img_size}
            if name in self.files:
                inputs |= self.files[name].arrays
            found = metric.compute(features[metric.stream], *(inputs[key] for key in metric.needs))
            for value, number in zip(metric.values, found if isinstance(found, tuple) else (found,), strict=True):
                if math.isfinite(number):
                    numbers[value] = float(number)
                elif metric.beside is None:
                    raise UserError(f"{value} is {number}: the features or those of the reference file are too large.")
                else:
                    details[value] = f"not defined for these images (it is {number})"
        if "spectrum_gap" in self.metrics:
            real = self.files["spectrum_gap"].arrays["grey_spectrum"]
            generated = features["grey_spectrum"].double().mean(dim=0)
            details["grey_spectrum"] = generated.tolist()
            details["grey_spectrum_real"] = real.tolist()
            details["ring_ratio"] = ring_ratio(real, generated).tolist()
        return numbers, details

    def describe(self) -> dict[str, Any]:
        """Return for reports what decides the numbers, and warnings: ready for JSON."""
        return {
            "metrics": list(self.names),
            "protocol": "torch-fidelity" if any(isinstance(e, InceptionV3) for e in self.extractors) else None,
            "extractors": [extractor.describe() for extractor in self.extractors],
            "references": {value: file.describe() for value, file in self.references.items()},
            "tf32": {"matmul": False, "cudnn": torch.backends.cudnn.allow_tf32},
            "warnings": self.warnings,
            "settings": {"is": ISC, "precision_recall": PRC, "kid": KID},
            "not_computed": self.not_computed,
        }
