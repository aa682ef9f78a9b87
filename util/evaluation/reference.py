"""Reference files: statistics of the real images that generated ones are compared with.

A file is an npz of these arrays and `meta`, a JSON text. Files of mu and sigma alone (TTUR, JiT) are accepted, too,
and those of ADM, which have no `features` but images in `arr_0`, whose features are computed when they are needed.

Shapes: F features of the extractor, S of its stream for sFID, K rings of a spectrum, R rows of a table
    mu (F,), sigma (F, F)                      mean and unbiased covariance of the features of the real images
    all others are optional:
    mu_s (S,), sigma_s (S, S)                  the same for sFID
    features (M, F)                            those of M of the images, for precision, recall, KID and the like
    heldout, heldout_s (R, 2)                  numbers of held-out real images, and their Fréchet distance to the others
    grey_spectrum (K,)                         mean spectrum of the images (spectral_ops.spectrum)
    arr_0 (M, H, W, 3)                         uint8 images, of ADM's files
"""

import json
import zipfile
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
from util.evaluation.features import SPATIAL, Extractor
from util.io import FID_STATS, check_zip, replacing, sha256_file

FRECHET = ("mu", "sigma", "heldout")  # each also with the suffix _s, of the stream SPATIAL
IMAGES, CLASSES = "arr_0", "arr_1"  # of ADM's files; the second one is not read
SPECTRA = ("grey_spectrum", "rapsd", "rapsd_centred")  # the latter two: of earlier files, and not used
META = ("dataset", "img_size", "extractor", "extractor_sha256", "num_images")  # the keys that are read


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference file: features in float32, the other arrays in float64."""

    arrays: dict[str, Tensor]
    meta: dict | None
    path: Path
    sha256: str
    warnings: list[str]
    num_images: int = 0  # in arr_0

    def rows(self, name: str) -> int:
        """Return how many rows an array has, or will have once the features of arr_0 are computed; 0: it has none."""
        return len(self.arrays[name]) if name in self.arrays else self.num_images * (name == "features")

    def heldout(self, name: str) -> dict[int, float]:
        """Return {number of held-out images: their Fréchet distance} of the table `name`; empty if there is none."""
        return {int(count): distance for count, distance in self.arrays.get(name, torch.empty(0, 2)).tolist()}

    def images(self) -> np.ndarray:
        """Read arr_0, uint8 (M, H, W, 3)."""
        with np.load(self.path, allow_pickle=False) as file:
            return file[IMAGES]

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
            spatial = [f"{key}_s" for key in FRECHET]
            optional = {"heldout", *spatial, "features", *SPECTRA} & set(file.files)
            if unknown := set(file.files) - {"mu", "sigma", "meta", IMAGES, CLASSES, *optional}:
                raise ValueError(f"unknown arrays {unknown}")  # a damaged name: what it was may be missed
            if extractor is None or SPATIAL not in extractor.streams:
                optional -= set(spatial)
            arrays = {key: file[key] for key in ("mu", "sigma", *sorted(optional))}
            meta = json.loads(str(file["meta"])) if "meta" in file.files else None
            num_images = _check_images(path, img_size) if IMAGES in file.files else 0
        dim = extractor.streams[stream] if extractor else arrays["mu"].size
        shapes = {"mu": (dim,), "sigma": (dim, dim)} | dict.fromkeys(SPECTRA, (num_rings(img_size),))
        shapes |= {key: (*arrays[key].shape[:1], 2) for key in ("heldout", "heldout_s") if key in arrays}
        if any(key in arrays for key in spatial):
            shapes |= {"mu_s": (extractor.streams[SPATIAL],), "sigma_s": (extractor.streams[SPATIAL],) * 2}
    except FileNotFoundError as error:
        data = max((name for name in DATASETS if f"{dataset}-".startswith(f"{name}-")), key=len)  # Config.real_images
        part = dataset[len(data) + 1 :]
        data += "" if DATASETS[data].in_memory else " --data_path DIR"
        data += " --channels 1" if part.endswith("grey") else ""
        data += " --labels_file FILE" if part not in ("", "grey") else ""
        command = f"python prepare_ref.py --dataset {data} --img_size {img_size} --extractor {name} --out {path}"
        raise UserError(f"The reference {path} does not exist. Make it: {command} (fid_stats/README.md).") from error
    except UserError:
        raise
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
    warnings = _check_meta(path, meta, dataset, img_size, extractor, dim) if extractor else []
    return Reference(arrays, meta, path, sha256, warnings, num_images)


def _check_images(path: Path, img_size: int) -> int:
    """Return how many images arr_0 has, from its header: they may be gigabytes. Raises UserError for another size."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (img_size, img_size, 3):
        expected = f"uint8 (M, {img_size}, {img_size}, 3) was expected for images of {img_size} x {img_size} pixels"
        raise UserError(f"{IMAGES} in {path} is {dtype} {shape}; {expected}.")
    return shape[0]


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
