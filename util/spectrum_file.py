"""Spectrum files: what noise schedules need to know of a data set. Written by util/measure_spectrum.py.

    K  rings of frequency (util.spectrum)        N  images        C  classes        FIT  see spectral_schedule

    power, centred   (K,)       P_k and P^c_k of x in [-1, 1], means over all images
    counts           (K,)       modes in each ring
    level            (3,)       mean pixel of each channel, in [-1, 1]
    fits             (N, 4)     FIT of each image, float32
    labels           (N,)       its class
    index            (N,)       its number in the data set
    mean, covariance, low, high  (C, 4), (C, 4, 4), (C, 4), (C, 4)   of the fits of each class; see FitDistribution

The file is an npz of these and of `meta`, a JSON text with the data set, its size, the bounds and what made the file.
Pickled content is never loaded.
"""

import hashlib
import io
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectral_schedule import FIT, QUANTISATION, FitDistribution, TightSchedule
from util.errors import UserError
from util.reference import FID_STATS
from util.spectrum import fit_power_law, num_rings

META_CHECKED = ("dataset", "split", "img_size", "class_num", "num_images")


@dataclass(frozen=True)
class DataSpectrum:
    """The content of a spectrum file, arrays as the module says."""

    power: np.ndarray
    centred: np.ndarray
    counts: np.ndarray
    level: np.ndarray
    fits: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    low: np.ndarray
    high: np.ndarray
    meta: dict
    path: Path | None = None
    sha256: str | None = None

    def schedule(self, device: torch.device | str = "cpu", **settings) -> TightSchedule:
        """The schedule of the data set's spectrum: `spectral_global`."""
        power, centred = (torch.from_numpy(values).to(device) for values in (self.power, self.centred))
        return TightSchedule.of_spectrum(power, centred, self.meta["img_size"], **settings)

    def distribution(self) -> FitDistribution:
        """What generated images draw their own schedule from: `spectral_instance`."""
        return FitDistribution(*(torch.from_numpy(a) for a in (self.mean, self.covariance, self.low, self.high)))

    def describe(self) -> dict:
        """For reports: file, sha256, metadata."""
        return {"file": str(self.path), "sha256": self.sha256, "meta": self.meta}


ARRAYS = tuple(f.name for f in fields(DataSpectrum) if f.type is np.ndarray)


def image_fits(power: Tensor, level: Tensor, mean_level: Tensor, img_size: int) -> Tensor:
    """FIT of each image: (B, 4) float64.

    P^c_0 and P_min are measured, not taken from the power law, which is far above the last rings. Both are at least
    QUANTISATION, below which a schedule does not tell them apart. Mirrored images have the same fits.

    Args:
        power: P_k (B, K).
        level: mean pixel of each channel of each image (B, C), in [-1, 1].
        mean_level: the same of all images (C,).
    """
    centred_dc = (level - mean_level).double().square().mean(1) * img_size**2
    ends = torch.stack([centred_dc, power[:, 1:].amin(1)], dim=1).clamp_min(QUANTISATION).log()
    return torch.cat([fit_power_law(power), ends], dim=1)


def default_spectrum_file(dataset: str, img_size: int) -> Path:
    """Where the spectrum of a data set is looked for, inside the repository's fid_stats/."""
    return FID_STATS / f"{dataset}_{img_size}_spectrum.npz"


def save_spectrum(spectrum: DataSpectrum, path: str | Path) -> str:
    """Write a file aside, rename it to `path`, and return its sha256. Raises UserError where that fails."""
    path, buffer = Path(path), io.BytesIO()
    arrays = {name: getattr(spectrum, name) for name in ARRAYS}
    np.savez(buffer, meta=np.array(json.dumps(spectrum.meta)), **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        aside.write_bytes(buffer.getbuffer())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"the spectrum file {path} cannot be written ({error.strerror})") from error
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def load_spectrum(path: str | Path, img_size: int, class_num: int) -> DataSpectrum:
    """Load a spectrum file and refuse one that does not belong to this run.

    Raises: UserError for a file that is missing, unreadable, of another image size or number of classes, or with a
        power that is 0 or not finite.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"the spectrum file {path} does not exist: make it with `python -m util.measure_spectrum --dataset ... "
            f"--img_size {img_size} --out {path}`"
        ) from error
    except OSError as error:
        raise UserError(f"the spectrum file {path} cannot be read ({error.strerror})") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
            meta = json.loads(str(file["meta"]))
        missing = [key for key in META_CHECKED if key not in meta]
    except Exception as error:  # whatever a damaged or hostile file raises, it is refused
        raise UserError(
            f"{path} is not a spectrum file: an npz as `python -m util.measure_spectrum` writes it was expected "
            f"({type(error).__name__})"
        ) from error
    if missing:
        raise UserError(f"the metadata in {path} is incomplete ({', '.join(missing)}): measure the spectrum again")
    for key, value in (("img_size", img_size), ("class_num", class_num)):
        if meta[key] != value:
            raise UserError(
                f"{path} was measured with {key} {meta[key]!r} and this run has {value}: give another file with "
                "--spectrum_file or make one with `python -m util.measure_spectrum`"
            )
    _check(path, arrays, img_size, class_num)
    return DataSpectrum(**arrays, meta=meta, path=path, sha256=hashlib.sha256(content).hexdigest())


def _check(path: Path, arrays: dict[str, np.ndarray], img_size: int, class_num: int) -> None:
    """Refuse arrays of another shape and numbers that cannot be what they are taken for."""
    k, n, c, f = num_rings(img_size), len(arrays["fits"]), class_num, len(FIT)
    shapes = {"power": (k,), "centred": (k,), "counts": (k,), "level": (3,), "fits": (n, f), "labels": (n,)}
    shapes |= {"index": (n,), "mean": (c, f), "covariance": (c, f, f), "low": (c, f), "high": (c, f)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape or arrays[name].dtype.kind not in "fiu":
            raise UserError(f"{name} in {path} is {arrays[name].dtype} {arrays[name].shape}; {shape} was expected")
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{name} in {path} holds numbers that are not finite: measure the spectrum again")
    for name in ("power", "centred"):
        if arrays[name].min() <= 0:
            raise UserError(f"{name} in {path} is not a spectrum: every power must be above 0")
