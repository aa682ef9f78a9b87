"""The metrics of generated images: which there are, what each needs, and their values from gathered features.

    N  generated images        F  features of one stream        labels  (N,) class of each image

    fid               Fréchet distance over Inception's 2048 features, as torch-fidelity 0.4.0
    is                Inception Score over the unbiased logits, as torch-fidelity 0.4.0
    fd_effnet         Fréchet distance over EfficientNet-Lite0: FD-EffNet-Lite0, a different number from FID
    class_agreement   digits only: how often a classifier of real digits sees the class that was asked for

A MetricSuite checks all that its metrics need when it is built, before the first image. It then turns batches
into features (any process) and, where the features of all images are gathered in index order, into numbers.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.features import DigitPixels, EffNetLite0, InceptionV3, MetricError, ensure_inception_weights
from util.reference import Reference, default_reference, load_reference

__all__ = ["METRICS", "MetricError", "MetricSuite", "ensure_inception_weights", "frechet_distance", "parse_metrics"]

METRICS = ("fid", "is", "fd_effnet", "class_agreement")
STREAM = {
    "fid": "inception_2048",
    "is": "inception_logits_unbiased",
    "fd_effnet": "effnet_lite0",
    "class_agreement": "digit_8x8",
}
FRECHET = {"fid": "fid", "fd_effnet": "fd_effnet_lite0"}  # metric -> name of its value
FID_MIN_IMAGES = 2048
IS_SPLITS, IS_SEED = 10, 2020  # torch-fidelity's defaults
DIGITS_HELD_OUT, DIGITS_SEED = 597, 0  # of 1797 real digits, 1200 train the classifier whose accuracy is reported


def parse_metrics(text: str) -> tuple[str, ...]:
    """'fid,is' -> ('fid', 'is'), without repetitions; 'none' and '' -> (). Raises MetricError for unknown names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise MetricError(f"Unknown metric {', '.join(unknown)}: known are {', '.join(METRICS)}, or none by itself.")
    return tuple(dict.fromkeys(names))


def frechet_distance(features: Tensor, statistics: dict[str, np.ndarray]) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features.

        d = |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2))

    Both steps are torch-fidelity's functions. The statistics of `features` are computed in the type that they
    come in, as torch-fidelity does with float32, and then cast to float64.

    Args:
        features: (N, F) on the CPU, N >= 2.
        statistics: mu (F,) and sigma (F, F) in float64.
    Raises: MetricError if the distance cannot be computed or is not finite.
    Source: Heusel et al. 2017, arXiv:1706.08500, equation 6.
    """
    from torch_fidelity import metric_fid

    ours = metric_fid.fid_features_to_statistics(features)
    ours = {key: np.asarray(value, dtype=np.float64) for key, value in ours.items()}
    try:
        distance = metric_fid.fid_statistics_to_metric(ours, statistics, False)[metric_fid.KEY_METRIC_FID]
    except np.linalg.LinAlgError as error:
        raise MetricError(f"The Fréchet distance could not be computed: {error}.") from error
    if not np.isfinite(distance):
        raise MetricError(f"The Fréchet distance is {distance}: the features or the reference are too large.")
    return distance


def inception_score(logits: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of the Inception Score over 10 splits, exp(E_x KL(p(y|x) || p(y))), torch-fidelity's.

    Args:
        logits: (N, 1008) in index order: which images share a split depends on it.
    Source: Salimans et al. 2016, arXiv:1606.03498.
    """
    from torch_fidelity import metric_isc

    out = metric_isc.isc_features_to_metric(logits, splits=IS_SPLITS, shuffle=True, rng_seed=IS_SEED)
    return out[metric_isc.KEY_METRIC_ISC_MEAN], out[metric_isc.KEY_METRIC_ISC_STD]


class DigitClassifier:
    """A support vector machine on the 64 numbers of DigitPixels, fitted to scikit-learn's 1797 real digits.

    The real digits go through the images of the training set, so that real and generated ones take the same path.
    `held_out_accuracy` is that of the same kind of classifier, fitted to 1200 digits of a fixed permutation and
    tested on the other 597: what perfect generation would about reach.

    Args:
        img_size: pixels per side of the generated images, at least 8.
    """

    def __init__(self, img_size: int):
        from util.data import build_dataset

        dataset = build_dataset("digits", None, img_size, "train")
        images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        x = DigitPixels()(torch.stack(images))["digit_8x8"].numpy()  # (1797, 64)
        y = np.array(labels)  # (1797,)
        order = np.random.RandomState(DIGITS_SEED).permutation(len(y))
        held_out, rest = order[:DIGITS_HELD_OUT], order[DIGITS_HELD_OUT:]
        self.held_out_accuracy = float(self._new().fit(x[rest], y[rest]).score(x[held_out], y[held_out]))
        self.model = self._new().fit(x, y)

    @staticmethod
    def _new():
        from sklearn.svm import SVC

        return SVC(kernel="rbf", C=10.0, gamma=0.001)

    def agreement(self, features: Tensor, labels: Tensor) -> float:
        """Share of the features (N, 64) whose predicted class is that of `labels` (N,)."""
        return float((self.model.predict(features.numpy()) == labels.cpu().numpy()).mean())


class MetricSuite:
    """Everything that a set of metrics needs, checked in the constructor; nothing is replaced by another metric.

    Args:
        names: metrics out of METRICS, as parse_metrics returns them.
        dataset: imagefolder, cifar10 or digits.
        img_size: pixels per side of the generated images.
        num_images: how many images `compute` will get.
        device: where the networks run.
        fid_stats: reference file of fid, or of fd_effnet where fid is not asked for; by default default_reference.
        inception_weights: see util.features.ensure_inception_weights.
    Raises: MetricError if anything that `names` need is missing or does not match.

    `.streams` is {stream: F} of what `extract` returns and `compute` takes; `.warnings` a list of sentences.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        dataset: str,
        img_size: int,
        num_images: int,
        device: torch.device | str,
        fid_stats: str | Path | None = None,
        inception_weights: str | Path | None = None,
    ):
        self.names = parse_metrics(",".join(names))
        self.num_images = num_images
        self.warnings: list[str] = []
        self._check_arguments(dataset, img_size)

        self.extractors = []
        if {"fid", "is"} & set(self.names):
            self.extractors.append(InceptionV3(device, inception_weights))
        if "fd_effnet" in self.names:
            self.extractors.append(EffNetLite0(device))
        self.classifier = None
        if "class_agreement" in self.names:
            self.extractors.append(DigitPixels())
            self.classifier = DigitClassifier(img_size)
        wanted = {STREAM[name] for name in self.names}
        self.streams = {s: dim for e in self.extractors for s, dim in e.streams.items() if s in wanted}

        asked = [name for name in FRECHET if name in self.names]
        if fid_stats is not None and not asked:
            self.warnings.append(f"The reference file {fid_stats} is not used: no metric that was asked for needs one.")
        self.references = {}
        for name in asked:
            own = fid_stats if name == asked[0] else None
            self.references[name] = self._reference(STREAM[name], dataset, img_size, own)

    def _check_arguments(self, dataset: str, img_size: int) -> None:
        if "class_agreement" in self.names and dataset != "digits":
            raise MetricError(f"class_agreement is defined for the data set digits only, not for {dataset}.")
        if "class_agreement" in self.names and img_size < 8:
            raise MetricError(f"class_agreement needs images of at least 8 x 8 pixels, not {img_size} x {img_size}.")
        for name in self.names:
            least = {"is": IS_SPLITS, "fid": 2, "fd_effnet": 2}.get(name, 1)
            if self.num_images < least:
                raise MetricError(f"{name} needs at least {least} images, not {self.num_images}.")
        for name, dim in (("fid", FID_MIN_IMAGES), ("fd_effnet", EffNetLite0.streams[STREAM["fd_effnet"]])):
            if name in self.names and self.num_images < dim:
                self.warnings.append(
                    f"{name} from {self.num_images} images: with fewer than {dim} the covariance is rank deficient and "
                    "the distance is biased; compare it only with values from the same number of images."
                )

    def _reference(self, stream: str, dataset: str, img_size: int, path: str | Path | None) -> Reference:
        extractor = next(e for e in self.extractors if stream in e.streams)
        path = Path(path) if path is not None else default_reference(dataset, img_size, extractor.name)
        make = (
            f"python prepare_ref.py --dataset {dataset}{' --data_path <folder>' if dataset == 'imagefolder' else ''} "
            f"--img_size {img_size} --extractor {extractor.name} --out {path}"
        )
        reference = load_reference(path, extractor.streams[stream], extractor, img_size, make)
        self.warnings.extend(reference.warnings)
        if reference.meta is not None and reference.meta["dataset"] != dataset:
            self.warnings.append(f"{path} was made from {reference.meta['dataset']}, but the data set is {dataset}.")
        return reference

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images (B, 3, H, W) on any device -> {stream: float32 (B, F) on the CPU}, for all of `.streams`."""
        features = {}
        for extractor in self.extractors:
            features |= extractor(images)
        return {stream: features[stream] for stream in self.streams}

    def compute(self, features: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
        """The metrics of all images.

        Args:
            features: {stream: (N, F) on the CPU} with row i from image index i, N = num_images.
            labels: (N,) class of each image; read by class_agreement.
        Returns: of fid, is_mean, is_std, fd_effnet_lite0, class_agreement and class_agreement_real (the accuracy
            of the same kind of classifier on held-out real digits) those that were asked for.
        Raises: MetricError for missing, misshapen or non-finite features.
        """
        for stream, dim in self.streams.items():
            shape = tuple(features[stream].shape) if stream in features else None
            if shape != (self.num_images, dim):
                raise MetricError(f"Features {stream}: expected shape ({self.num_images}, {dim}), got {shape}.")
            if not torch.isfinite(features[stream]).all():
                raise MetricError(f"Features {stream} hold non-finite numbers.")
        if tuple(labels.shape) != (self.num_images,):
            raise MetricError(f"Labels: expected shape ({self.num_images},), got {tuple(labels.shape)}.")

        out = {}
        for name in self.names:
            rows = features[STREAM[name]]
            if name in FRECHET:
                out[FRECHET[name]] = frechet_distance(rows, self.references[name].statistics())
            elif name == "is":
                out["is_mean"], out["is_std"] = inception_score(rows)
            elif name == "class_agreement":
                out["class_agreement"] = self.classifier.agreement(rows, labels)
                out["class_agreement_real"] = self.classifier.held_out_accuracy
        return out

    def describe(self) -> dict:
        """For reports, ready for JSON: extractors, reference files and their sha256, TF32 settings, warnings."""
        out = {
            "metrics": list(self.names),
            "num_images": self.num_images,
            "extractors": [extractor.describe() for extractor in self.extractors],
            "references": {FRECHET[name]: reference.describe() for name, reference in self.references.items()},
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "cudnn": torch.backends.cudnn.allow_tf32,
            },
            "warnings": list(self.warnings),
        }
        if "is" in self.names:
            out["inception_score"] = {"splits": IS_SPLITS, "shuffle": True, "seed": IS_SEED}
        return out
