"""Reference files: statistics of the real images that generated ones are compared with.

A file is an npz of these arrays and `meta`, a JSON text. Files of mu and sigma alone (TTUR, JiT) are accepted, too.

Shapes: F features of the extractor, K rings of a spectrum
    mu (F,), sigma (F, F)                      mean and unbiased covariance of the features of the real images
    features (M, F)                            optional: those of M of the images, for precision, recall and KID
    grey_spectrum, rapsd, rapsd_centred (K,)   optional: mean spectra of the images (spectral_ops.spectrum)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_forcing import num_rings
from util.data.datasets import DATASETS
from util.errors import UserError
from util.evaluation.features import Extractor
from util.io import FID_STATS, check_zip, replacing, sha256_file

PUBLISHED_ARRAYS = {"mu_s", "sigma_s", "arr_0"}  # of ADM's files, which are not read
SPECTRA = ("grey_spectrum", "rapsd", "rapsd_centred")
META = ("dataset", "img_size", "extractor", "extractor_sha256", "num_images")  # the keys that are read


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference file: features in float32, the other arrays in float64."""

    arrays: dict[str, Tensor]
    meta: dict | None
    path: Path
    sha256: str
    warnings: list[str]

    def describe(self) -> dict[str, Any]:
        return {"file": str(self.path), "sha256": self.sha256, "meta": self.meta}


class Moments:
    """Mean and unbiased covariance in float64, batch by batch, and mergeable between ranks (Chan et al. 1979).

    With M = sum (x - mean)(x - mean)^T and d = mean_b - mean_a, M = M_a + M_b + d d^T n_a n_b / n, sigma = M / (n - 1).
    """

    def __init__(self, dim: int):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (B, F) on the CPU. Raises UserError if one of them is not finite."""
        if not features.isfinite().all():
            raise UserError("The extractor returned a non-finite feature for a real image.")
        x = features.double()
        batch = Moments(x.shape[1])
        batch.n, batch.mean = len(x), x.mean(dim=0)
        batch.scatter = len(x) * torch.cov(x.T, correction=0)
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Add the moments of a disjoint set of images."""
        shift = other.mean - self.mean
        weight = other.n / max(self.n + other.n, 1)
        self.scatter += other.scatter + torch.outer(shift, shift) * (self.n * weight)
        self.mean = self.mean + shift * weight
        self.n += other.n

    def finish(self) -> dict[str, Tensor]:
        """Return mu (F,) and sigma (F, F) of at least two images."""
        return {"mu": self.mean, "sigma": self.scatter / (self.n - 1)}


def default_reference(dataset: str, img_size: int, extractor: str) -> Path:
    """Return where the reference of a data set is looked for: in fid_stats/ of the repository."""
    if dataset == "imagefolder" and extractor == "inception" and img_size in (256, 512):
        return FID_STATS / f"jit_in{img_size}_stats.npz"  # as in the JiT repository
    return FID_STATS / f"{dataset}_{img_size}_{extractor}.npz"


def save_reference(path: Path, arrays: Mapping[str, Tensor | np.ndarray], meta: dict) -> str:
    """Write a reference file and return its sha256."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
        return sha256_file(path)
    except OSError as error:
        raise UserError(
            f"The reference file {path} cannot be written ({error.strerror}). Name another --out."
        ) from error


def load_reference(
    path: str | Path, dataset: str, img_size: int, extractor: Extractor | None = None, stream: str = ""
) -> Reference:
    """Load a reference file of images of `img_size` pixels per side, made with the same extractor and weights.

    Without an extractor only the spectra are used, whatever the features. Raises UserError for a file that is damaged
    or of something else.
    """
    path = Path(path)
    name = extractor.name if extractor else "inception"
    try:
        sha256 = sha256_file(path)
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            optional = [key for key in ("features", *SPECTRA) if key in file.files]
            if unknown := set(file.files) - {"mu", "sigma", "meta", *optional} - PUBLISHED_ARRAYS:
                raise ValueError(f"unknown arrays {unknown}")  # a damaged name: what it was may be missed
            arrays = {key: file[key] for key in ("mu", "sigma", *optional)}
            meta = json.loads(str(file["meta"])) if "meta" in file.files else None
        dim = extractor.streams[stream] if extractor else arrays["mu"].size
        shapes = {"mu": (dim,), "sigma": (dim, dim)} | dict.fromkeys(SPECTRA, (num_rings(img_size),))
    except FileNotFoundError as error:
        data = max((name for name in DATASETS if f"{dataset}-".startswith(f"{name}-")), key=len)  # Config.real_images
        part = dataset[len(data) + 1 :]
        data += "" if DATASETS[data].in_memory else " --data_path DIR"
        data += " --channels 1" if part.endswith("grey") else ""
        data += " --labels_file FILE" if part not in ("", "grey") else ""
        command = f"python prepare_ref.py --dataset {data} --img_size {img_size} --extractor {name} --out {path}"
        raise UserError(f"The reference {path} does not exist. Make it: {command} (fid_stats/README.md).") from error
    except Exception as error:  # a damaged or hostile file may raise anything
        expected = "an npz with mu, sigma and, if present, a JSON text in meta was expected"
        raise UserError(f"{path} is not a reference file: {expected} ({type(error).__name__}).") from error
    for key, array in arrays.items():
        shape = shapes.get(key, (*array.shape[:1], dim))
        if array.shape != shape or not array.size or not np.issubdtype(array.dtype, np.floating):
            expected = f"floating-point {shape} was expected for {name} and images of {img_size} x {img_size} pixels"
            raise UserError(f"{key} in {path} is {array.dtype} {array.shape}; {expected}.")
        with np.errstate(over="ignore"):
            arrays[key] = torch.from_numpy(array.astype(np.float32 if key == "features" else np.float64))
        if not arrays[key].isfinite().all():
            raise UserError(f"{key} in {path} has non-finite numbers. Make the file again with prepare_ref.py.")
        if key in SPECTRA and array.min() <= 0:
            raise UserError(f"{key} in {path} has a power <= 0. Make the file again with prepare_ref.py.")
    sigma = arrays["sigma"]
    if (sigma - sigma.T).abs().max() > 1e-5 * sigma.abs().max() or sigma.diagonal().min() < 0:
        raise UserError(f"sigma in {path} is not a covariance: it must be symmetric with a non-negative diagonal.")
    warnings = _check_meta(path, meta, dataset, img_size, extractor, dim) if extractor else []
    return Reference(arrays, meta, path, sha256, warnings)


def _check_meta(path: Path, meta: Any, dataset: str, img_size: int, extractor: Extractor, dim: int) -> list[str]:
    """Return warnings. Raises UserError for metadata that is incomplete or of another extractor or image size."""
    if meta is None:
        return [f"{path} has no metadata: its extractor, weights, crop and image size could not be checked."]
    if not isinstance(meta, dict) or not set(META) <= meta.keys() or not isinstance(meta["num_images"], int):
        raise UserError(f"The metadata in {path} is incomplete; it must include {', '.join(META)}.")
    expected = {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "img_size": img_size}
    for key, value in expected.items():
        if meta[key] != value:
            advice = "Give another file with --fid_stats or make one with prepare_ref.py."
            raise UserError(f"{path} was made with {key} {meta[key]!r}; this evaluation needs {value!r}. {advice}")
    warnings = []
    if meta["num_images"] <= dim:
        warnings.append(f"{path} is of {meta['num_images']} images; a covariance of {dim} features needs more.")
    if meta["dataset"] != dataset:
        warnings.append(f"{path} was made from {meta['dataset']}, but the data set is {dataset}.")
    return warnings
