"""Reference files, what is known of the real images: the format, how a file is found, what is refused.

    F  features of the extractor (2048 for Inception, 1280 for EfficientNet-Lite0)        K  rings of a spectrum

    mu             (F,)    mean of the features of the real images
    sigma          (F, F)  their unbiased covariance
    features       (M, F)  optional: float32 features of M of the images, for precision, recall and KID
    grey_spectrum  (K,)    optional: for the spectrum gap; see util.spectrum
    rapsd, rapsd_centred   (K,)  optional: for noise schedules

The file is an npz of these and of `meta`, a JSON text. Files with mu and sigma alone (the format of the TTUR and
JiT repositories) are accepted with a warning. Pickled content is never loaded.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from util.extractor import MetricError
from util.spectrum import num_rings

FID_STATS = Path(__file__).resolve().parent.parent / "fid_stats"  # of the repository, whatever the working directory
SPECTRA = ("grey_spectrum", "rapsd", "rapsd_centred")
META_CHECKED = ("dataset", "split", "img_size", "crop", "extractor", "extractor_sha256", "num_images")


@dataclass(frozen=True)
class Reference:
    """Statistics of real images: mu (F,), sigma (F, F) and spectra (K,) in float64, features (M, F) in float32."""

    mu: np.ndarray
    sigma: np.ndarray
    meta: dict | None  # None: a file without metadata
    path: Path
    sha256: str
    warnings: tuple[str, ...] = ()
    features: np.ndarray | None = None
    spectra: dict[str, np.ndarray] = field(default_factory=dict)  # of SPECTRA those that the file holds

    def statistics(self) -> dict[str, np.ndarray]:
        """The form that torch_fidelity.metric_fid.fid_statistics_to_metric takes."""
        return {"mu": self.mu, "sigma": self.sigma}

    def describe(self) -> dict:
        """For reports: file, sha256, metadata."""
        return {"file": str(self.path), "sha256": self.sha256, "meta": self.meta}


class Moments:
    """Mean and unbiased covariance in float64, batch by batch, and mergeable between processes.

    With n, mean and M = sum of (x - mean)(x - mean)^T of two disjoint sets a and b and d = mean_b - mean_a
    (Chan, Golub, LeVeque 1979):

        n = n_a + n_b,   mean = mean_a + d n_b / n,   M = M_a + M_b + d d^T n_a n_b / n,   sigma = M / (n - 1)
    """

    def __init__(self, dim: int):
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    def update(self, features: Tensor) -> None:
        """Add features (B, F). Raises MetricError if one of them is not finite."""
        x = features.double().numpy()  # (B, F)
        if not np.isfinite(x).all():
            raise MetricError("The extractor returned a non-finite feature for a real image.")
        batch = Moments(x.shape[1])
        batch.n, batch.mean = len(x), x.mean(axis=0)
        centred = x - batch.mean
        batch.scatter = centred.T @ centred  # (F, F)
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Add the moments of a disjoint set of images."""
        n = self.n + other.n
        if n == 0:
            return
        shift = other.mean - self.mean  # (F,)
        self.scatter += other.scatter + np.outer(shift, shift) * (self.n * other.n / n)
        self.mean = self.mean + shift * (other.n / n)
        self.n = n

    def pack(self) -> np.ndarray:
        """n, mean and scatter as one float64 vector, to be sent to another process."""
        return np.concatenate([[self.n], self.mean, self.scatter.ravel()])

    def unpack(self, vector: np.ndarray) -> "Moments":
        """New moments of the same size from what `pack` returned."""
        moments, dim = Moments(len(self.mean)), len(self.mean)
        moments.n = int(vector[0])
        moments.mean, moments.scatter = vector[1 : dim + 1].copy(), vector[dim + 1 :].reshape(dim, dim).copy()
        return moments

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """(mu (F,), sigma (F, F)). Raises MetricError for fewer than two images."""
        if self.n < 2:
            raise MetricError(f"A covariance needs at least 2 images, not {self.n}.")
        return self.mean, self.scatter / (self.n - 1)


def default_reference(dataset: str, img_size: int, extractor: str) -> Path:
    """Where the reference of a dataset is looked for, inside the repository's fid_stats/.

    Args:
        dataset: imagefolder, cifar10 or digits.
        img_size: pixels per side.
        extractor: name of the extractor, inception or effnet_lite0.
    """
    if dataset == "imagefolder" and extractor == "inception" and img_size in (256, 512):
        return FID_STATS / f"jit_in{img_size}_stats.npz"  # the names that the JiT repository uses
    return FID_STATS / f"{dataset}_{img_size}_{extractor}.npz"


def save_reference(
    path: str | Path, mu: np.ndarray, sigma: np.ndarray, meta: dict, more: Mapping[str, np.ndarray] | None = None
) -> str:
    """Write a reference file under a temporary name, rename it to `path`, and return its sha256.

    Args:
        more: of features and SPECTRA those that are to be stored.
    Raises: MetricError if `meta` lacks a key that load_reference checks, or the folder cannot be written.
    """
    missing = [key for key in META_CHECKED if key not in meta]
    if missing:
        raise MetricError(f"The metadata of a reference file must say {', '.join(missing)}.")
    path = Path(path)
    buffer = io.BytesIO()
    np.savez(buffer, mu=mu, sigma=sigma, meta=np.array(json.dumps(meta)), **(more or {}))
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(buffer.getbuffer())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is readable by its owner alone
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise MetricError(f"The reference file {path} cannot be written ({error.strerror}).") from error
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def load_reference(path: str | Path, dim: int, extractor, img_size: int, make: str | None = None) -> Reference:
    """Load a reference file and refuse one that does not belong to this evaluation.

    Args:
        path: the npz file.
        dim: F, the width of the extractor's features.
        extractor: the extractor of the generated images; its `.name` and `.sha256` must be those of the file.
        img_size: pixels per side of the generated images; must be that of the file.
        make: the command that makes the missing file, for the message; by default one without a data set.
    Raises: MetricError for a file that is missing, unreadable, of the wrong shape or type, not finite, not
        symmetric, or made by another extractor, other weights or at another image size.
    """
    path = Path(path)
    make = make or f"python prepare_ref.py --img_size {img_size} --extractor {extractor.name} --out {path}"
    content = _read(path, make)
    arrays, meta = _parse(path, content)
    mu, sigma, features = arrays.pop("mu"), arrays.pop("sigma"), arrays.pop("features", None)
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise MetricError(
            f"{path} holds mu {mu.shape} and sigma {sigma.shape}, but {extractor.name} needs ({dim},) and "
            f"({dim}, {dim})."
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise MetricError(f"{path} holds non-finite numbers.")
    if np.abs(sigma - sigma.T).max() > 1e-5 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise MetricError(f"sigma in {path} is not a covariance: it must be symmetric with a non-negative diagonal.")

    _check_more(path, dim, img_size, features, arrays)

    sha256 = hashlib.sha256(content).hexdigest()
    if meta is None:
        warning = (
            f"{path} has no metadata: that it was made with this extractor, these weights, images of "
            f"{img_size} x {img_size} pixels and this crop could not be checked."
        )
        return Reference(mu, sigma, None, path, sha256, (warning,), features, arrays)
    _check_meta(path, meta, extractor, img_size)
    warnings = ()
    if meta["num_images"] <= dim:
        warnings = (f"{path} was made from {meta['num_images']} images: a covariance of {dim} features needs more.",)
    return Reference(mu, sigma, meta, path, sha256, warnings, features, arrays)


def load_spectra(path: str | Path, img_size: int) -> tuple[dict[str, np.ndarray], dict]:
    """The spectra (K,) in a reference file, whatever extractor it was made with, and {file, sha256, meta} for a report.

    Raises: MetricError for a file that is missing or unreadable, or spectra of another image size.
    """
    path = Path(path)
    content = _read(path, f"python prepare_ref.py --img_size {img_size} --out {path}")
    arrays, meta = _parse(path, content)
    spectra = {key: arrays[key] for key in SPECTRA if key in arrays}
    _check_more(path, 0, img_size, None, spectra)
    return spectra, {"file": str(path), "sha256": hashlib.sha256(content).hexdigest(), "meta": meta}


def _read(path: Path, make: str) -> bytes:
    """The content of a reference file. Raises MetricError where there is none, with the command that makes it."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MetricError(
            f"The reference statistics {path} do not exist: make them with `{make}` or copy them there "
            "(fid_stats/README.md)."
        ) from error
    except OSError as error:
        raise MetricError(f"The reference statistics {path} cannot be read ({error.strerror}).") from error


def _parse(path: Path, content: bytes) -> tuple[dict[str, np.ndarray], dict | None]:
    """The known arrays, features in float32 and the others in float64, and the metadata or None.

    Raises: MetricError for anything else than that.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            optional = [key for key in ("features", *SPECTRA) if key in file.files]
            arrays = {key: file[key] for key in ("mu", "sigma", *optional)}
            meta = json.loads(str(file["meta"])) if "meta" in file.files else None
    except Exception as error:  # whatever a damaged or hostile file raises, it is refused
        raise MetricError(
            f"{path} is not a reference file: an npz with the arrays mu and sigma and, where present, a JSON text "
            f"in meta was expected ({type(error).__name__})."
        ) from error
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise MetricError(f"{key} in {path} is of type {array.dtype}; floating-point numbers were expected.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        return {k: a.astype(np.float32 if k == "features" else np.float64) for k, a in arrays.items()}, meta


def _check_more(
    path: Path, dim: int, img_size: int, features: np.ndarray | None, spectra: Mapping[str, np.ndarray]
) -> None:
    """Refuse features of another width, spectra of another size, and numbers that cannot be either."""
    if features is not None:
        if features.ndim != 2 or features.shape[1] != dim or len(features) < 1:
            raise MetricError(f"{path} holds features {features.shape}, but rows of {dim} numbers are needed.")
        if not np.isfinite(features).all():
            raise MetricError(f"features in {path} hold non-finite numbers.")
    for key, values in spectra.items():
        if values.shape != (num_rings(img_size),):
            raise MetricError(
                f"{path} holds {key} {values.shape}, but images of {img_size} x {img_size} pixels have "
                f"{num_rings(img_size)} rings of frequencies."
            )
        if not (np.isfinite(values).all() and values.min() > 0):
            raise MetricError(f"{key} in {path} is not a spectrum: every power must be finite and above zero.")


def _check_meta(path: Path, meta, extractor, img_size: int) -> None:
    """Refuse metadata that is incomplete or that says another extractor, other weights or another image size."""
    missing = [key for key in META_CHECKED if not isinstance(meta, dict) or key not in meta]
    if missing or not isinstance(meta["num_images"], int):
        raise MetricError(f"The metadata in {path} is incomplete: {', '.join(missing) or 'num_images'}.")
    expected = {"extractor": extractor.name, "extractor_sha256": extractor.sha256, "img_size": img_size}
    for key, value in expected.items():
        if meta[key] != value:
            raise MetricError(
                f"{path} was made with {key} {meta[key]!r}, but this evaluation uses {value!r}: give another file with "
                "--fid_stats or make one with prepare_ref.py."
            )
