"""From settings to noise schedules: training times, the grids of generated images, what a run keeps of a spectrum file.

A run that was trained with a spectrum keeps in its settings what it depends on (RECORDED), so that its checkpoints and
exports need no file, and going on with another file is refused. Drawing schedules for generated images needs the file.

Shapes: B generated images of a batch, S steps; grid (S + 1,) or (S + 1, B), bounds (B, 2).
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiser import Density, LogitNormal
from sampler import uniform_grid
from spectral_conditioning import ImageSchedules, InstanceTimes
from spectral_schedule import TightSchedule, TrainingTimes, latest_time, sample_t_eps
from util.errors import UserError
from util.flags import DEFAULTS
from util.spectrum_file import DataSpectrum, default_spectrum_file, load_spectrum

# In a run's settings beside its flags, None where it does not depend on it: P_k of sf_schedule snr; delta and mean
# pixel of the schedules that the network is told; content of the file that training times came from.
RECORDED = ("sf_power", "schedule_delta", "schedule_level", "spectrum_sha256")
EXAMPLES = 256  # images whose densities stand for the data set's


def open_spectrum(args: Namespace) -> DataSpectrum:
    """The spectrum file of these settings. Raises UserError where there is none, or none that fits."""
    path = Path(args.spectrum_file or default_spectrum_file(args.dataset, args.img_size))
    state = path.stat() if path.is_file() else None
    return _open(path, args.img_size, args.class_num, state and (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=2)
def _open(path: Path, img_size: int, class_num: int, state: tuple[int, int] | None) -> DataSpectrum:
    return load_spectrum(path, img_size, class_num)


def spectral(name: str) -> bool:
    """Whether a choice of --t_sampler or --sampling_grid is made from a spectrum."""
    return name.startswith("spectral_")


def record(args: Namespace, saved: Mapping[str, Any] | None) -> None:
    """Settle RECORDED in the settings of a training run, and refuse what it cannot train or sample with.

    Args:
        saved: settings of the checkpoint that it goes on from; `args` already has what they record.

    Raises:
        UserError: a spectrum file that is missing or does not fit, or another one than the run began with.
    """
    snr = args.sf_schedule == "snr" and not args.disable_dct_patchify
    if spectral(args.t_sampler) or spectral(args.sampling_grid) or (snr and saved is None):
        spectrum = open_spectrum(args)
    if saved is None:
        args.sf_power = spectrum.power.tolist() if snr else None
        if args.t_sampler == "spectral_instance":
            args.schedule_delta, args.schedule_level = args.spectral_delta, spectrum.level.tolist()
        args.spectrum_sha256 = spectrum.sha256 if spectral(args.t_sampler) else None
    elif spectral(args.t_sampler) and spectrum.sha256 != args.spectrum_sha256:
        raise UserError(
            f"{spectrum.path} is not the spectrum file that this run was trained with until now (sha256 "
            f"{spectrum.sha256[:12]} instead of {str(args.spectrum_sha256)[:12]}): name that one with --spectrum_file"
        )


def training_times(args: Namespace, device: torch.device) -> Density:
    """The density that --t_sampler names, with its tables on the device."""
    if args.t_sampler == "logit_normal":
        return LogitNormal(args.P_mean, args.P_std)
    if args.t_sampler == "uniform":
        return TrainingTimes()
    spectrum, settings = open_spectrum(args), {"delta": args.spectral_delta, "noise_scale": args.noise_scale}
    if args.t_sampler == "spectral_global":
        return TrainingTimes(spectrum.schedule(device, variant=args.spectral_variant, **settings), args.t_uniform_mix)
    schedules = ImageSchedules(args.img_size, spectrum.level.tolist(), **settings).to(device)
    every = -(-len(spectrum.fits) // EXAMPLES)
    examples = torch.from_numpy(spectrum.fits[::every]).to(device)
    return InstanceTimes(schedules, args.spectral_variant, args.t_uniform_mix, examples)


@dataclass(frozen=True)
class GeneratedSchedules:
    """The schedules of generated images: on which grid each is sampled, and what the network is told of it.

    Without a spectrum the grid is uniform and nothing is told. An image draws its own schedule from the distribution of
    its class, where the grid or what is told needs one; both guidance branches have the same. What a network is told is
    always drawn, on every grid: it has learned p(x | lambda_0, lambda_1), of which one pair for all is a slice.

    told_delta: delta of the schedules that the network was trained on; None for a network that is not told.
    """

    grid: str = "uniform"
    spectrum: DataSpectrum | None = None
    variant: str = DEFAULTS["spectral_variant"]
    delta: float = DEFAULTS["spectral_delta"]
    noise_scale: float = 1.0
    told_delta: float | None = None

    @classmethod
    def from_args(cls, args: Namespace) -> "GeneratedSchedules":
        told_delta = getattr(args, "schedule_delta", None)
        if not spectral(args.sampling_grid) and told_delta is None:
            return cls()
        spectrum = open_spectrum(args)
        return cls(
            args.sampling_grid, spectrum, args.spectral_variant, args.spectral_delta, args.noise_scale, told_delta
        )

    def times(self, steps: int, seed: int, index: Sequence[int], y: Tensor) -> tuple[Tensor, Tensor | None]:
        """(grid, bounds or None) on the CPU: functions of (seed, image index, label) alone."""
        grid, bounds = uniform_grid(steps), None
        if self.grid == "spectral_global":
            grid = self._of_data_set(self.variant, self.delta).sampling_grid(steps)
        if self.grid == "spectral_instance" or self.told_delta is not None:
            fits = self.spectrum.distribution().draw(seed, index, y)  # (B, 4)
            if self.grid == "spectral_instance":
                grid = self._of_fits(fits, self.variant, self.delta).sampling_grid(steps)
            if self.told_delta is not None:
                bounds = self._of_fits(fits, "logsnr", self.told_delta).bounds
        return grid, bounds

    def t_eps(self, t_eps: float) -> float:
        """The clamp of 1 - t that no grid of these reaches, at most that of training. See `sample_t_eps`."""
        if self.grid == "uniform":
            return t_eps
        if self.grid == "spectral_instance":
            return sample_t_eps(t_eps, latest_time(self.noise_scale))
        return sample_t_eps(t_eps, float(self._of_data_set(self.variant, self.delta).sampling_grid(3)[-2]))

    def _of_data_set(self, variant: str, delta: float) -> TightSchedule:
        return self.spectrum.schedule(variant=variant, delta=delta, noise_scale=self.noise_scale)

    def _of_fits(self, fits: Tensor, variant: str, delta: float) -> TightSchedule:
        img_size = self.spectrum.meta["img_size"]
        return TightSchedule.of_fits(fits, img_size, variant=variant, delta=delta, noise_scale=self.noise_scale)

    def describe(self) -> dict[str, Any]:
        """For reports; empty where there is no spectrum."""
        if self.spectrum is None:
            return {}
        about = {"grid": self.grid, "spectrum_sha256": self.spectrum.sha256}
        if spectral(self.grid):
            about |= {"spectral_variant": self.variant, "spectral_delta": self.delta}
        return about

    @property
    def name(self) -> str:
        """Part of a file name; empty where there is no spectrum."""
        if self.spectrum is None:
            return ""
        how = f"{self.grid}-{self.variant}-delta{self.delta:.10g}" if spectral(self.grid) else "told"
        return f"-{how}-{self.spectrum.sha256[:8]}"


def check(args: Namespace) -> list[str]:
    """Refuse settings of schedules that cannot work. Returns warnings about those without effect."""
    if not 0 < args.spectral_delta < 1:
        raise UserError(f"--spectral_delta {args.spectral_delta} must be above 0 and below 1")
    if not 0 <= args.t_uniform_mix <= 1:
        raise UserError(f"--t_uniform_mix {args.t_uniform_mix} must be between 0 and 1")
    if args.sample_t_eps is not None and not 0 < args.sample_t_eps < 1:
        raise UserError(f"--sample_t_eps {args.sample_t_eps} must be above 0 and below 1")
    if spectral(args.sampling_grid) and args.num_sampling_steps < 3:
        raise UserError(
            f"--num_sampling_steps {args.num_sampling_steps} with --sampling_grid {args.sampling_grid}: a spectral "
            "grid needs at least 3"
        )
    sf = not args.disable_dct_patchify
    if sf and args.sf_schedule != "linear" and args.disable_dct_scale_schedule:
        raise UserError(
            f"--sf_schedule {args.sf_schedule} with --disable_dct_scale_schedule, a mask that does not depend on time: "
            "leave one of them out"
        )
    if sf and args.sf_schedule == "power" and not (args.sf_alpha or 0) > 0:
        raise UserError(
            f"--sf_schedule power with --sf_alpha {args.sf_alpha}: it needs the exponent of the spectrum, a positive "
            "number (2 to 3 for photographs; util.measure_spectrum prints it)"
        )
    if not args.sf_snr_floor > 0:
        raise UserError(f"--sf_snr_floor {args.sf_snr_floor} must be above 0")
    return _idle(args) + _of_another(args)


def _of_another(args: Namespace) -> list[str]:
    """A warning where a network that is told schedules will be told those of other images than it was trained with."""
    trained_with = getattr(args, "spectrum_sha256", None)
    if getattr(args, "schedule_delta", None) is None or trained_with is None:
        return []
    spectrum = open_spectrum(args)
    if spectrum.sha256 == trained_with:
        return []
    return [f"{spectrum.path} is not the spectrum file that the network was trained with, and schedules come from it"]


def _idle(args: Namespace) -> list[str]:
    """Flags that differ from their defaults and do nothing."""
    trains, samples = spectral(args.t_sampler), spectral(args.sampling_grid)
    needed = {
        "t_uniform_mix": (trains, "a spectral --t_sampler"),
        "spectral_variant": (trains or samples, "a spectral --t_sampler or --sampling_grid"),
        "spectral_delta": (trains or samples, "a spectral --t_sampler or --sampling_grid"),
        "spectrum_file": (trains or samples or args.sf_schedule == "snr", "anything that is made from a spectrum"),
        "P_mean": (args.t_sampler == "logit_normal", "--t_sampler logit_normal"),
        "P_std": (args.t_sampler == "logit_normal", "--t_sampler logit_normal"),
        "sample_t_eps": (args.pred_param == "x", "--pred_param x"),
        "sf_alpha": (args.sf_schedule == "power", "--sf_schedule power"),
        "sf_snr_floor": (args.sf_schedule != "linear", "--sf_schedule power or snr"),
    }
    return [
        f"--{name} {getattr(args, name)} has no effect without {what}"
        for name, (used, what) in needed.items()
        if not used and getattr(args, name) != DEFAULTS[name]
    ]
