"""From a configuration to noise schedules: training times, the sampling grids of generated images, spectrum files.

A run that was trained with a spectrum records in its configuration what it depends on, so that its checkpoints and
exports need no file, and resuming it with another file is refused. Schedules of generated images need the file.

Shapes: B generated images of a batch, S steps; grid (S + 1,) or (S + 1, B), logsnr_range (B, 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoiser import LogitNormal, TimeSampler
from sampler import uniform_grid
from spectral_ops.conditioning import ImageSchedules, InstanceTimeSampler
from spectral_ops.resolution import LevelTimes
from spectral_ops.schedule import GlobalTimeSampler, TightSchedule, latest_time
from util.build import resolution_of
from util.data.spectrum_file import DataSpectrum, default_spectrum_file, load_spectrum
from util.errors import UserError

EXAMPLES = 256  # images whose densities of times stand for those of the data set


def _settings(config: Any) -> dict[str, Any]:
    return {"variant": config.spectral_variant, "delta": config.spectral_delta, "noise_scale": config.noise_scale}


def open_spectrum(config: Any) -> DataSpectrum:
    """Load the configuration's spectrum file. Raises UserError if there is none, or none that fits."""
    path = config.spectrum_file or default_spectrum_file(config.dataset, config.img_size, config.data_path)
    spectrum = load_spectrum(path, config.img_size, config.class_num)
    if len(spectrum.level) != config.channels:
        raise UserError(f"{path} is of {len(spectrum.level)} channels, and this network has {config.channels}.")
    return spectrum


def _kept(config: Any) -> dict[str, str]:
    """Return what a run's configuration keeps of its spectrum file: name of the setting -> that in the file."""
    kept = {}
    if config.sf_schedule in ("snr", "budget") and config.input_operator == "spectral_forcing":
        kept["sf_power"] = "power" if config.sf_schedule == "snr" else "dct_power"
    if config.levels:
        kept["resolution_power"] = "dct_power"
    return kept


def record_spectrum(config: Any, saved_args: Mapping[str, Any] | None) -> Any:
    """Return the configuration of a training run with what it records; a run that resumes (`saved_args`) has that.

    Raises UserError if a run that resumes is given another spectrum file than it was trained with.
    """
    kept = _kept(config)
    trained, resumes = config.t_sampler.startswith("spectral_"), saved_args is not None
    is_new = not resumes or config.spectrum_file != saved_args.get("spectrum_file")
    if not ((kept and is_new) or trained or config.sampling_grid != "uniform"):
        return config
    spectrum = open_spectrum(config)
    found = {}
    for name, array in kept.items() if is_new else ():
        if (power := getattr(spectrum, array)) is None:
            raise UserError(f"{spectrum.path} is an earlier one, without the power of DCT modes. Measure it again.")
        found[name] = power.tolist()
    if resumes:
        other = any(getattr(config, name) != power for name, power in found.items())
        if other or (trained and spectrum.sha256 != config.spectrum_sha256):
            sha256 = f" (sha256 {config.spectrum_sha256})" if config.spectrum_sha256 else ""
            known = f"the spectrum file that this run was trained with{sha256}"
            raise UserError(f"{spectrum.path} is not {known}. Name that one with --spectrum_file.")
        return config
    config = replace(config, **found)
    if trained:
        config = replace(config, spectrum_sha256=spectrum.sha256)
    if config.t_sampler == "spectral_instance":
        config = replace(config, schedule_delta=config.spectral_delta, schedule_level=spectrum.level.tolist())
    return config


def other_images_warnings(config: Any, labels: np.ndarray) -> list[str]:
    """Warn if the spectrum file of a new run was measured on other images than those to train on, by their labels."""
    if not (_kept(config) or config.t_sampler.startswith("spectral_")):
        return []
    spectrum = open_spectrum(config)
    inside = spectrum.index < len(labels)
    same = (labels[spectrum.index[inside]] == spectrum.labels[inside]).sum()
    if same == len(spectrum.index):
        return []
    return [
        f"{spectrum.path} was measured on other images: {len(spectrum.index) - same} of its {len(spectrum.index)} are "
        "missing here or of another class. --spectrum_file names another file"
    ]


def spectrum_warnings(config: Any) -> list[str]:
    """Warn if a network that is conditioned on schedules will be given those of another spectrum file."""
    if config.schedule_delta is None:
        return []
    spectrum = open_spectrum(config)
    if spectrum.sha256 == config.spectrum_sha256:
        return []
    return [f"schedules come from {spectrum.path}, which is not the spectrum file of the network's training"]


def build_time_sampler(config: Any, device: torch.device) -> TimeSampler:
    """Return the sampler of training times, spread over the levels of resolution, with its tables on the device."""
    sampler, resolution = _times(config, device), resolution_of(config)
    return sampler if resolution is None else LevelTimes(sampler, resolution)


def _times(config: Any, device: torch.device) -> TimeSampler:
    """Return the sampler that --t_sampler names."""
    if config.t_sampler == "logit_normal":
        return LogitNormal(config.P_mean, config.P_std)
    if config.t_sampler == "uniform":
        return GlobalTimeSampler()
    spectrum = open_spectrum(config)
    if config.t_sampler == "spectral_global":
        return GlobalTimeSampler(spectrum.schedule(device, **_settings(config)), config.t_uniform_mix)
    schedules = ImageSchedules(config.img_size, spectrum.level.tolist(), config.spectral_delta, config.noise_scale)
    examples = torch.from_numpy(spectrum.fits[:: -(-len(spectrum.fits) // EXAMPLES)]).to(device)
    return InstanceTimeSampler(schedules.to(device), config.spectral_variant, config.t_uniform_mix, examples)


@dataclass(frozen=True)
class SampleSchedules:
    """The sampling grids of generated images, and their logsnr_range for a network that is conditioned on it.

    Each image draws its own schedule from its class, the same for both guidance branches. logsnr_range is
    drawn on every grid: the network has learned p(x | lambda_0, lambda_1), of which one pair for all is a slice.
    """

    config: Any
    spectrum: DataSpectrum | None = None  # None: a uniform grid, and no conditioning

    @classmethod
    def from_config(cls, config: Any) -> "SampleSchedules":
        needed = config.sampling_grid != "uniform" or config.schedule_delta is not None
        return cls(config, open_spectrum(config) if needed else None)

    def times(self, steps: int, rng, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (grid, logsnr_range or None) for labels y (B,), on the CPU; `rng` has the numbers of the B images."""
        config, size = self.config, self.config.img_size
        grid, logsnr_range = uniform_grid(steps), None
        if config.sampling_grid == "spectral_global":
            grid = self.spectrum.schedule(**_settings(config)).sampling_grid(steps)
        if config.sampling_grid == "spectral_instance" or config.schedule_delta is not None:
            fits = self.spectrum.distribution().sample(rng, y)  # (B, 4)
        if config.sampling_grid == "spectral_instance":
            grid = TightSchedule.of_fits(fits, size, **_settings(config)).sampling_grid(steps)
        if config.schedule_delta is not None:
            settings = {**_settings(config), "variant": "logsnr", "delta": config.schedule_delta}
            logsnr_range = TightSchedule.of_fits(fits, size, **settings).logsnr_range
        return grid, logsnr_range

    def t_eps(self, t_eps: float) -> float:
        """Return the clamp of 1 - t: `t_eps`, or less where that would act on the last time of a spectral grid."""
        if self.config.sampling_grid == "uniform":
            return t_eps
        if self.config.sampling_grid == "spectral_instance":
            last = latest_time(self.config.noise_scale)
        else:
            last = float(self.spectrum.schedule(**_settings(self.config)).sampling_grid(3)[-2])
        return min(t_eps, 1 - last)

    def describe(self) -> dict[str, Any]:
        """Return the settings for reports; none without a spectrum."""
        if self.spectrum is None:
            return {}
        config = self.config
        described = {"grid": config.sampling_grid, "spectrum_sha256": self.spectrum.sha256}
        if config.sampling_grid != "uniform":
            described |= {"spectral_variant": config.spectral_variant, "spectral_delta": config.spectral_delta}
        return described

    @property
    def name(self) -> str:
        """Part of a file name; empty without a spectrum."""
        if self.spectrum is None:
            return ""
        config = self.config
        grid = f"{config.sampling_grid}-{config.spectral_variant}-delta{config.spectral_delta:.10g}"
        if config.sampling_grid == "uniform":
            grid = "told"  # conditioned on schedules; folders have this name since the first version
        return f"-{grid}-{self.spectrum.sha256[:8]}"
