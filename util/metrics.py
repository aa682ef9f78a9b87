"""The metrics of generated images: which there are, what each needs, and their values from gathered features.

    N  generated images        F  features of one stream        labels  (N,) class of each image
    K  rings of a spectrum     M  real images whose features the reference file holds

    fid               Fréchet distance over Inception's 2048 features, as torch-fidelity 0.4.0
    is                Inception Score over the unbiased logits, as torch-fidelity 0.4.0
    fd_effnet         Fréchet distance over EfficientNet-Lite0: FD-EffNet-Lite0, a different number from FID
    class_agreement   digits only: how often a classifier of real digits sees the class that was asked for

What else a reference file allows is computed beside its Fréchet distance: precision, recall and, with Inception, KID
where it holds features; the spectrum gap where it holds a spectrum. `describe` says what was left out, and why.

A MetricSuite checks all that its metrics need when it is built, before the first image. It then turns batches
into features (any process) and, where the features of all images are gathered in index order, into numbers.
"""

from pathlib import Path

import torch
from torch import Tensor

from util.features import DigitPixels, EffNetLite0, GreySpectrum, InceptionV3, MetricError, ensure_inception_weights
from util.reference import Reference, default_reference, load_reference, load_spectra
from util.scores import (
    FIDELITY_SEED,
    IS_SPLITS,
    KID_SUBSETS,
    PRC_NEIGHBOURS,
    DigitClassifier,
    frechet_distance,
    inception_score,
    kernel_distance,
    kid_subset_size,
    precision_recall,
)
from util.spectrum import plot_spectra, ring_ratio, spectrum_gap

__all__ = ["METRICS", "MetricError", "MetricSuite", "ensure_inception_weights", "parse_metrics"]

METRICS = ("fid", "is", "fd_effnet", "class_agreement")
STREAM = {
    "fid": "inception_2048",
    "is": "inception_logits_unbiased",
    "fd_effnet": "effnet_lite0",
    "class_agreement": "digit_8x8",
}
FRECHET = {"fid": "fid", "fd_effnet": "fd_effnet_lite0"}  # metric -> name of its value
PRECISION_RECALL = {  # metric -> names of the values that need features of real images
    "fid": ("precision", "recall"),
    "fd_effnet": ("precision_effnet_lite0", "recall_effnet_lite0"),
}
KID = ("kid_mean", "kid_std")  # beside fid, of the same features
SPECTRUM = "grey_spectrum"  # name of the stream and of the array in a reference file
FID_MIN_IMAGES = 2048


def parse_metrics(text: str) -> tuple[str, ...]:
    """'fid,is' -> ('fid', 'is'), without repetitions; 'none' and '' -> (). Raises MetricError for unknown names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise MetricError(f"Unknown metric {', '.join(unknown)}: known are {', '.join(METRICS)}, or none by itself.")
    return tuple(dict.fromkeys(names))


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

    `.streams` is {stream: F} of what `extract` returns and `compute` takes; `.warnings` a list of sentences;
    `.not_computed` {value: why the reference does not allow it}; `.details` what the last `compute` found beyond
    single numbers, ready for JSON: grey_spectrum, grey_spectrum_real and ring_ratio (generated / real), K numbers each.
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
        self.not_computed: dict[str, str] = {}
        self.details: dict[str, list[float] | str] = {}
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
        self.references = {}
        for name in asked:
            own = fid_stats if name == asked[0] else None
            self.references[name] = self._reference(STREAM[name], dataset, img_size, own)
        for name in asked:
            self._plan_neighbours(name)
        self._plan_spectrum(device, dataset, img_size, fid_stats)

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

    def _plan_neighbours(self, name: str) -> None:
        """Note why precision, recall and KID of a metric's reference cannot be computed, if so."""
        reference = self.references[name]
        why = None
        if reference.features is None:
            why = f"{reference.path} holds no features of real images; prepare_ref.py stores them (--num_features)"
        elif min(self.num_images, len(reference.features)) <= PRC_NEIGHBOURS:
            why = (
                f"more than {PRC_NEIGHBOURS} images are needed on both sides; {self.num_images} are generated and "
                f"{reference.path} holds the features of {len(reference.features)}"
            )
        if why:
            values = PRECISION_RECALL[name] + (KID if name == "fid" else ())
            self.not_computed |= dict.fromkeys(values, why)

    def _plan_spectrum(
        self, device: torch.device | str, dataset: str, img_size: int, fid_stats: str | Path | None
    ) -> None:
        """Take the spectrum of the first reference that holds one, and a stream for that of the generated images.

        It needs no network: where no metric has a reference, the file that was named is looked into, or those in their
        usual places.
        """
        self.spectrum_reference: dict | None = None
        found = [r.spectra[SPECTRUM] for r in self.references.values() if r.spectra.get(SPECTRUM) is not None]
        if not self.references:
            usual = [default_reference(dataset, img_size, name) for name in (InceptionV3.name, EffNetLite0.name)]
            for path in [fid_stats] if fid_stats is not None else [path for path in usual if path.exists()]:
                spectra, described = load_spectra(path, img_size)
                if SPECTRUM in spectra and not found:
                    found, self.spectrum_reference = [spectra[SPECTRUM]], described
            if fid_stats is not None and not found:
                self.warnings.append(f"{fid_stats} is not used: no metric needs it, and it holds no {SPECTRUM}.")
        self.real_spectrum = found[0] if found else None  # (K,)
        if found:
            self.extractors.append(GreySpectrum(device, img_size))
            self.streams |= self.extractors[-1].streams
        elif self.references:
            names = " and ".join(str(r.path) for r in self.references.values())
            self.not_computed["spectrum_gap"] = f"no {SPECTRUM} in {names}; prepare_ref.py stores it"

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
            of the same kind of classifier on held-out real digits) those that were asked for; and of precision,
            recall, kid_mean, kid_std, precision_effnet_lite0, recall_effnet_lite0 and spectrum_gap those that the
            references allow. Fills `.details`.
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
                out |= self._neighbours(name, rows)
            elif name == "is":
                out["is_mean"], out["is_std"] = inception_score(rows)
            elif name == "class_agreement":
                out["class_agreement"] = self.classifier.agreement(rows, labels)
                out["class_agreement_real"] = self.classifier.held_out_accuracy
        return out | self._spectrum(features)

    def _neighbours(self, name: str, rows: Tensor) -> dict[str, float]:
        """Precision and recall, beside fid also KID, of features (N, F), where the reference allows them."""
        if PRECISION_RECALL[name][0] in self.not_computed:
            return {}
        real = torch.from_numpy(self.references[name].features)  # (M, F)
        out = dict(zip(PRECISION_RECALL[name], precision_recall(rows, real), strict=True))
        if name == "fid":
            out |= dict(zip(KID, kernel_distance(rows, real), strict=True))
        return out

    def _spectrum(self, features: dict[str, Tensor]) -> dict[str, float]:
        """The spectrum gap, where there is a reference for it, and `.details`."""
        self.details = {}
        if self.real_spectrum is None:
            return {}
        generated = features[SPECTRUM].double().mean(dim=0).numpy()  # (K,)
        self.details = {
            "grey_spectrum": generated.tolist(),
            "grey_spectrum_real": self.real_spectrum.tolist(),
            "ring_ratio": ring_ratio(self.real_spectrum, generated).tolist(),
        }
        if generated.min() <= 0:  # of images of one colour, say; not worth losing the other metrics
            self.details["spectrum_gap"] = "not defined: the generated images have no power at all in some ring"
            return {}
        return {"spectrum_gap": spectrum_gap(self.real_spectrum, generated)}

    def plot(self, path: str | Path, title: str = "") -> Path | None:
        """Draw the spectra that the last `compute` found: to `path` if it ends in .png, else to spectra.png in it.

        Returns: the file; None where there is nothing to draw.
        """
        if self.details.get("ring_ratio") is None or "spectrum_gap" in self.details:
            return None
        path = Path(path)
        path = path if path.suffix == ".png" else path / "spectra.png"
        return plot_spectra(self.details["grey_spectrum_real"], self.details["grey_spectrum"], path, title)

    def describe(self) -> dict:
        """For reports, ready for JSON, and the same before and after `compute`: extractors, reference files and their
        sha256, TF32 settings, warnings, settings of the metrics, what is not computed and why.
        """
        out = {
            "metrics": list(self.names),
            "extractors": [extractor.describe() for extractor in self.extractors],
            "references": {FRECHET[name]: reference.describe() for name, reference in self.references.items()},
            "tf32": {
                "matmul": False,  # Extractor sees to that
                "cudnn": torch.backends.cudnn.allow_tf32,
            },
            "warnings": list(self.warnings),
        }
        if self.spectrum_reference is not None:
            out["references"]["spectrum_gap"] = self.spectrum_reference
        if "is" in self.names:
            out["inception_score"] = {"splits": IS_SPLITS, "shuffle": True, "seed": FIDELITY_SEED}
        real = {name: len(r.features) for name, r in self.references.items() if r.features is not None}
        for name in real:
            if PRECISION_RECALL[name][0] not in self.not_computed:
                out[PRECISION_RECALL[name][0]] = {"neighbours": PRC_NEIGHBOURS, "real_images": real[name]}
        if "fid" in real and KID[0] not in self.not_computed:
            size = kid_subset_size(self.num_images, real["fid"])
            out["kid"] = {"subsets": KID_SUBSETS, "subset_size": size, "kernel_degree": 3, "seed": FIDELITY_SEED}
        out["not_computed"] = dict(self.not_computed)
        return out
