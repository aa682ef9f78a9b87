"""Spectrum files: what noise schedules depend on of a data set. tools/measure_spectrum.py writes them.

A file is an npz of the arrays of `DataSpectrum` and of `meta`, a JSON text with the data set, its size, the noise
bounds and the provenance of the file. Pickled content is never loaded.

Shapes: K rings of frequency, N images, C classes; FIT has 4 numbers (spectral_ops/spectrum.py:image_fits).
"""

import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from spectral_forcing import num_rings
from spectral_ops.schedule import FIT, FitDistribution, TightSchedule
from util.errors import UserError
from util.io import FID_STATS, replacing, sha256_file

COMMAND = "python -m tools.measure_spectrum"
META_CHECKED = ("dataset", "split", "img_size", "class_num", "num_images")


@dataclass(frozen=True)
class DataSpectrum:
    """The content of a spectrum file."""

    power: np.ndarray  # (K,) P_k of x in [-1, 1], mean over all images
    centred: np.ndarray  # (K,) P^c_k, the same without the mean image
    counts: np.ndarray  # (K,) modes in each ring
    level: np.ndarray  # (3,) mean pixel of each channel, in [-1, 1]
    fits: np.ndarray  # (N, 4) FIT of each image, float32
    labels: np.ndarray  # (N,) its class
    index: np.ndarray  # (N,) its number in the data set
    mean: np.ndarray  # (C, 4), and so on: of the fits of each class, see FitDistribution
    covariance: np.ndarray  # (C, 4, 4)
    low: np.ndarray  # (C, 4)
    high: np.ndarray  # (C, 4)
    meta: dict
    path: Path | None = None
    sha256: str | None = None

    def schedule(self, device: torch.device | str = "cpu", **settings) -> TightSchedule:
        """Return the schedule of the data set's spectrum: `spectral_global`."""
        power, centred = (torch.from_numpy(values).to(device) for values in (self.power, self.centred))
        return TightSchedule.of_spectrum(power, centred, self.meta["img_size"], **settings)

    def distribution(self) -> FitDistribution:
        """Return the distribution that generated images draw their own schedule from: `spectral_instance`."""
        return FitDistribution(*(torch.from_numpy(a) for a in (self.mean, self.covariance, self.low, self.high)))


ARRAYS = tuple(field.name for field in fields(DataSpectrum) if field.type is np.ndarray)


def default_spectrum_file(dataset: str, img_size: int) -> Path:
    """Return the default place of a data set's spectrum, inside the repository's fid_stats/."""
    return FID_STATS / f"{dataset}_{img_size}_spectrum.npz"


def save_spectrum(spectrum: DataSpectrum, path: str | Path) -> str:
    """Write a spectrum file and return its SHA-256. Raises UserError if it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            arrays = {name: getattr(spectrum, name) for name in ARRAYS}
            np.savez(file, meta=np.array(json.dumps(spectrum.meta)), **arrays)
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"The spectrum file {path} cannot be written ({error.strerror}).") from error


def load_spectrum(path: str | Path, img_size: int, class_num: int) -> DataSpectrum:
    """Load a spectrum file for images of `img_size` pixels with `class_num` classes.

    Raises:
        UserError: a file that is missing, unreadable, of another image size or number of classes, or with numbers
            that cannot be what they stand for.
    """
    path = Path(path)
    if not path.exists():
        make = f"{COMMAND} --dataset ... --img_size {img_size} --out {path}"
        raise UserError(f"The spectrum file {path} does not exist. Make it with `{make}`.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays, meta = {name: file[name] for name in ARRAYS}, json.loads(str(file["meta"]))
        sha256 = sha256_file(path)
        missing = [key for key in META_CHECKED if key not in meta]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an npz of `{COMMAND}`, or cannot be read ({error!r}).") from error
    if missing:
        raise UserError(f"The metadata of {path} lack {', '.join(missing)}. Measure the spectrum again.")
    for key, value in (("img_size", img_size), ("class_num", class_num)):
        if meta[key] != value:
            found = f"{path} was measured with {key} {meta[key]!r} and this run has {value}"
            raise UserError(f"{found}. Name another file with --spectrum_file, or make one with `{COMMAND}`.")
    _check(path, arrays, img_size, class_num)
    return DataSpectrum(**arrays, meta=meta, path=path, sha256=sha256)


def _check(path: Path, arrays: dict[str, np.ndarray], img_size: int, class_num: int) -> None:
    k, n, c, f = num_rings(img_size), len(arrays["fits"]), class_num, len(FIT)
    shapes = {"power": (k,), "centred": (k,), "counts": (k,), "level": (3,), "fits": (n, f), "labels": (n,)}
    shapes |= {"index": (n,), "mean": (c, f), "covariance": (c, f, f), "low": (c, f), "high": (c, f)}
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype.kind not in "fiu":
            raise UserError(f"{name} in {path} is {array.dtype} {array.shape}; expected {shape}.")
        if not np.isfinite(array).all():
            raise UserError(f"{name} in {path} holds numbers that are not finite. Measure the spectrum again.")
        if name in ("power", "centred") and array.min() <= 0:
            raise UserError(f"{name} in {path} is not a spectrum: every power must be above 0.")
