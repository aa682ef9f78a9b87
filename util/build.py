"""A denoiser from a handful of plain settings: what a checkpoint, an export and a new run have in common."""

from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any

import torch

from denoiser import Denoiser
from model_jit import JiT_models
from spectral_conditioning import ImageSchedules
from spectral_forcing import SpectralForcing
from util.errors import UserError

# Newer than files that exist: at their defaults they are not written.
NEWER = (
    "spectral_residual",
    "spectral_residual_scale",
    "sf_schedule",
    "sf_alpha",
    "sf_snr_floor",
    "sf_power",
    "schedule_delta",
    "schedule_level",
)


@dataclass(frozen=True)
class DenoiserConfig:
    """Everything that decides what a denoiser computes, apart from its weights. Names as the flags of main_jit.py.

    sf_power: P_k of the data set, where Spectral Forcing's schedule is snr.
    schedule_delta, schedule_level: of the schedules that the network is told (spectral_conditioning.ImageSchedules);
        None where it is not told of any.
    """

    model: str
    img_size: int
    class_num: int
    pred_param: str
    t_eps: float
    noise_scale: float
    spectral_forcing: bool
    window_size: int | None
    sf_c_min: float
    sf_c_max: float
    sf_kappa: float
    sf_fixed_scale: float | None
    attn_dropout: float = 0.0
    proj_dropout: float = 0.0
    attn_fp32: bool = False
    sf_schedule: str = "linear"
    sf_alpha: float | None = None
    sf_snr_floor: float = 1.0
    sf_power: list[float] | None = None
    schedule_delta: float | None = None
    schedule_level: list[float] | None = None
    spectral_residual: str = "off"
    spectral_residual_scale: float = 1.0

    @classmethod
    def from_args(cls, args: Namespace) -> "DenoiserConfig":
        same = {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}
        return cls(
            **same,
            spectral_forcing=not args.disable_dct_patchify,
            sf_fixed_scale=args.dct_fixed_scale if args.disable_dct_scale_schedule else None,
        )

    def settings(self) -> dict[str, Any]:
        """For JSON; DenoiserConfig(**settings) is the same again."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if name not in NEWER or value != default}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.img_size, self.img_size

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.class_num

    def build(self, autocast_dtype: torch.dtype | None = None) -> Denoiser:
        """The denoiser with freshly initialised weights, on the CPU (or on torch's current default device).

        Raises:
            UserError: settings that do not fit together.
        """
        try:
            return self._build(autocast_dtype)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _build(self, autocast_dtype: torch.dtype | None) -> Denoiser:
        if self.model not in JiT_models:
            raise UserError(f"unknown model {self.model!r}; known: {', '.join(JiT_models)}")
        net = JiT_models[self.model](
            input_size=self.img_size,
            num_classes=self.class_num,
            attn_drop=self.attn_dropout,
            proj_drop=self.proj_dropout,
            attn_fp32=self.attn_fp32,
            told_schedule=self.schedule_delta is not None,
            spectral_residual=self.spectral_residual,
            spectral_residual_scale=self.spectral_residual_scale,
        )
        schedules = None
        if self.schedule_delta is not None:
            schedules = ImageSchedules(self.img_size, self.schedule_level, self.schedule_delta, self.noise_scale)
        operator = self._operator() if self.spectral_forcing else None
        return Denoiser(net, operator, self.pred_param, self.t_eps, self.noise_scale, autocast_dtype, schedules)

    def _operator(self) -> SpectralForcing:
        return SpectralForcing(
            self.img_size,
            self.window_size,
            self.sf_c_min,
            self.sf_c_max,
            self.sf_kappa,
            self.sf_fixed_scale,
            self.sf_schedule,
            self.sf_alpha,
            self.sf_snr_floor * (self.noise_scale**2 if self.sf_schedule == "power" else 1),
            None if self.sf_power is None else [power / self.noise_scale**2 for power in self.sf_power],
        )

    def describe_operator(self) -> str:
        """One phrase on Spectral Forcing."""
        if not self.spectral_forcing:
            return "off (plain JiT)"
        window = "whole image" if self.window_size in (None, self.img_size) else f"{self.window_size} px windows"
        f = f"f = {'t' if self.sf_fixed_scale is None else self.sf_fixed_scale}"
        if self.sf_schedule != "linear":
            exponent = f" (alpha {self.sf_alpha})" if self.sf_schedule == "power" else ""
            f = f"schedule {self.sf_schedule}{exponent}, data-to-noise ratio {self.sf_snr_floor} at it"
        return f"on: {window}, cutoff from {self.sf_c_min} to {self.sf_c_max} with {f}, kappa {self.sf_kappa}"
