"""The registries of operators. To add one: write its module, and add one entry with its settings here or elsewhere.

An input operator (z (B, C, H, W), t (B,)) -> z decides what the network sees. A block operator
(r (B, N, D), t_emb (B, D), y_emb (B, D)) -> (B, N, D) is added to the residual r of each block's MLP, at its N patch
tokens. N is smaller at lower levels of resolution (spectral_ops/resolution.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spectral_forcing import SCHEDULES, SpectralForcing
from spectral_ops.residual import MODES, SpectralResidual
from util.errors import UserError
from util.flags import LOCKED, flag, recorded


@dataclass(frozen=True)
class InputOperator:
    """An entry of INPUT_OPERATORS.

    Attributes:
        settings: dataclass whose fields are the operator's flags.
        build: config -> module.
        describe: config -> phrase for the log.
        check: config -> warnings; raises UserError for settings that cannot work.
    """

    settings: type
    build: Callable[[Any], nn.Module]
    describe: Callable[[Any], str] = lambda config: "on"
    check: Callable[[Any], list[str]] = lambda config: []


@dataclass(frozen=True)
class BlockOperator:
    """An entry of BLOCK_OPERATORS. Its name is that of the submodule in each block.

    Attributes:
        settings: dataclass whose fields are the operator's flags.
        build: config -> constructor (D, side of the token grid) -> module; None if the operator is off.
        flag: what turns it on, for messages.
        check: as for an input operator.
    """

    settings: type
    build: Callable[[Any], Callable[[int, int], nn.Module] | None]
    flag: str
    check: Callable[[Any], list[str]] = lambda config: []


# ------------------------------------------------------------------------------------------------- Spectral Forcing


@dataclass(frozen=True)
class SpectralForcingConfig:
    """Spectral Forcing (arXiv 2606.15236)"""

    disable_dct_patchify: bool = flag(False, LOCKED, "plain JiT, without an input operator")
    window_size: int | None = flag(None, LOCKED, "window in pixels (default: the whole image)")
    disable_dct_scale_schedule: bool = flag(False, LOCKED, "a mask that does not depend on time")
    dct_fixed_scale: float = flag(1.0, LOCKED, "constant f with --disable_dct_scale_schedule")
    sf_c_min: float = flag(0.05, LOCKED, "cutoff at t = 0")
    sf_c_max: float = flag(1.0, LOCKED, "cutoff at t = 1")
    sf_kappa: float = flag(30.0, LOCKED, "steepness of the mask")
    sf_schedule: str = flag(
        "linear", LOCKED, "schedule of the cutoff; snr and budget need --spectrum_file", SCHEDULES, added=True
    )
    sf_alpha: float | None = flag(None, LOCKED, "exponent of the spectrum, for power", added=True)
    sf_snr_floor: float | None = flag(
        None, LOCKED, "SNR at the cutoff, for power and snr (default: 0.03)", added=True, gt=0
    )
    sf_budget: float = flag(
        0.03, LOCKED, "share of the least possible loss that hiding may cost, for budget", added=True, gt=0
    )
    sf_power: list | None = recorded()  # spectrum of the data set: P_k for snr, variances of DCT modes for budget


def _build_spectral_forcing(config) -> SpectralForcing:
    variance = config.noise_scale**2
    return SpectralForcing(
        config.img_size,
        config.window_size,
        config.sf_c_min,
        config.sf_c_max,
        config.sf_kappa,
        config.dct_fixed_scale if config.disable_dct_scale_schedule else None,
        config.sf_schedule,
        config.sf_alpha,
        (config.sf_snr_floor or 1.0) * (variance if config.sf_schedule == "power" else 1),
        None if config.sf_power is None else torch.tensor(config.sf_power, dtype=torch.float64) / variance,
        config.sf_budget,
    )


def _describe_spectral_forcing(config) -> str:
    window = "whole image" if config.window_size in (None, config.img_size) else f"{config.window_size} px windows"
    f = f"f = {config.dct_fixed_scale if config.disable_dct_scale_schedule else 't'}"
    if config.sf_schedule != "linear":
        exponent = f" (alpha {config.sf_alpha})" if config.sf_schedule == "power" else ""
        f = f"schedule {config.sf_schedule}{exponent}, SNR {config.sf_snr_floor} at the cutoff"
    if config.sf_schedule == "budget":
        f = f"schedule budget, {100 * config.sf_budget:g}% of the least possible loss"
    return f"{window}, cutoff from {config.sf_c_min} to {config.sf_c_max} with {f}, kappa {config.sf_kappa}"


def _check_spectral_forcing(config) -> list[str]:
    if config.window_size is not None and (config.window_size < 2 or config.img_size % config.window_size):
        raise UserError(
            f"--window_size {config.window_size} must be at least 2 and divide the image size {config.img_size}."
        )
    if config.sf_schedule != "linear" and config.disable_dct_scale_schedule:
        raise UserError(f"--sf_schedule {config.sf_schedule} and --disable_dct_scale_schedule are mutually exclusive.")
    if config.sf_schedule == "power" and not (config.sf_alpha or 0) > 0:
        raise UserError(
            f"--sf_schedule power needs the spectrum's exponent, a positive --sf_alpha, not {config.sf_alpha}. "
            "Photographs have 2 to 3; tools.measure_spectrum prints it."
        )
    return []


# ------------------------------------------------------------------------------------------------ spectral residual


@dataclass(frozen=True)
class SpectralResidualConfig:
    """Spectral residual (SpectralDiT, arXiv 2606.18765)"""

    spectral_residual: str = flag(
        "off", LOCKED, "what the gates of the correction depend on", ("off", *MODES), added=True
    )
    spectral_residual_scale: float = flag(1.0, LOCKED, "bound of the gates", added=True, gt=0, lt=math.inf)


def _build_spectral_residual(config) -> Callable[[int, int], nn.Module] | None:
    if config.spectral_residual == "off":
        return None
    return partial(SpectralResidual, mode=config.spectral_residual, scale=config.spectral_residual_scale)


INPUT_OPERATORS: dict[str, InputOperator] = {
    "spectral_forcing": InputOperator(
        SpectralForcingConfig, _build_spectral_forcing, _describe_spectral_forcing, _check_spectral_forcing
    ),
}
BLOCK_OPERATORS: dict[str, BlockOperator] = {
    "spectral_residual": BlockOperator(SpectralResidualConfig, _build_spectral_residual, "--spectral_residual"),
}
