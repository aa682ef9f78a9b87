"""Spectrum files: what noise schedules depend on of a data set. tools/measure_spectrum.py writes them.

A file is an npz of the arrays of `DataSpectrum` and of `meta`, a JSON text with the data set, its size, the noise
bounds and the provenance of the file. Pickled content is never loaded.

Shapes: K rings of frequency, N images, C classes; FIT has 4 numbers (spectral_ops/spectrum.py:image_fits).
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from spectral_forcing import num_rings
from spectral_ops.schedule import FitDistribution, TightSchedule
from util.data.latents import LATENTS
from util.errors import UserError
from util.io import FID_STATS, check_zip, replacing, sha256_file

COMMAND = "python -m tools.measure_spectrum"


@dataclass(frozen=True)
class DataSpectrum:
    """The content of a spectrum file."""

    power: np.ndarray  # (K,) P_k of x, mean over all images
    centred: np.ndarray  # (K,) P^c_k, the same without the mean image
    counts: np.ndarray  # (K,) modes in each ring
    level: np.ndarray  # mean of x in each channel: (3,) for RGB
    fits: np.ndarray  # (N, 4) FIT of each image, float32
    labels: np.ndarray  # (N,) its class
    index: np.ndarray  # (N,) its number in the data set
    mean: np.ndarray  # (C, 4), and so on: of the fits of each class, see FitDistribution
    covariance: np.ndarray  # (C, 4, 4)
    low: np.ndarray  # (C, 4)
    high: np.ndarray  # (C, 4)
    meta: dict
    dct_power: np.ndarray | None = None  # (channels, K') variance of DCT modes along colour axes; not in old files
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


def default_spectrum_file(dataset: str, img_size: int, data_path: str | Path | None = None) -> Path:
    """Return the default place of a data set's spectrum: the repository's fid_stats/, or beside latents."""
    if dataset == "latents" and (train := LATENTS.find(data_path)):
        return train.parent / "spectrum.npz"
    return FID_STATS / f"{dataset}_{img_size}_spectrum.npz"


def save_spectrum(spectrum: DataSpectrum, path: str | Path) -> None:
    """Write a spectrum file. Raises UserError if it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            arrays = {name: getattr(spectrum, name) for name in (*ARRAYS, "dct_power")}
            np.savez(file, meta=np.array(json.dumps(spectrum.meta)), **arrays)
    except OSError as error:
        raise UserError(f"The spectrum file {path} cannot be written ({error.strerror}). Name another one.") from error


def load_spectrum(path: str | Path, img_size: int, class_num: int) -> DataSpectrum:
    """Load a spectrum file for images of `img_size` pixels with `class_num` classes.

    Raises:
        UserError: a file that is missing, unreadable, of another image size or number of classes, or without a
            power above 0 for each ring.
    """
    path = Path(path)
    if not path.exists():
        make = f"{COMMAND} --dataset ... --img_size {img_size} --out {path}"
        raise UserError(f"The spectrum file {path} does not exist. Make it with `{make}`.")
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            names = [*ARRAYS, *(["dct_power"] if "dct_power" in file.files else [])]
            arrays, meta = {name: file[name] for name in names}, json.loads(str(file["meta"]))
        measured = {key: meta[key] for key in ("img_size", "class_num")}
        sha256 = sha256_file(path)
    except Exception as error:  # damaged bytes raise many types
        raise UserError(
            f"{path} is not an npz of `{COMMAND}`, or cannot be read ({error!r}). Measure the spectrum again."
        ) from error
    for key, value in (("img_size", img_size), ("class_num", class_num)):
        if measured[key] != value:
            found = f"{path} was measured with {key} {measured[key]!r} and this run has {value}"
            raise UserError(f"{found}. Name another file with --spectrum_file, or make one with `{COMMAND}`.")
    for name in ("power", "centred"):
        power, rings = arrays[name], num_rings(img_size)
        if power.shape != (rings,) or not (np.isfinite(power) & (power > 0)).all():
            raise UserError(
                f"{name} in {path} is no spectrum; expected {rings} numbers above 0, one for each ring of frequency. "
                "Measure the spectrum again."
            )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} in {path} holds numbers that are not finite. Measure the spectrum again.")
    return DataSpectrum(**arrays, meta=meta, path=path, sha256=sha256)
