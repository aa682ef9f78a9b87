"""From a configuration to the denoiser: the one place where network, operators and path come together."""

import dataclasses
from typing import Any

import torch

from denoiser import Denoiser, HybridWeight
from model_jit import JiT, JiT_models
from spectral_ops.conditioning import ImageSchedules
from spectral_ops.resolution import ResolutionSchedule
from util.config import ModelConfig, PathConfig, all_flags
from util.errors import UserError
from util.operators import BLOCK_OPERATORS, INPUT_OPERATORS


def autocast_dtype(config: Any, device: torch.device) -> torch.dtype | None:
    """Return the type of matrix products in the network; None for float32 throughout."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else None


def build_network(config: Any) -> JiT:
    """Build the network with fresh weights on torch's default device. Raises ValueError for sizes that do not fit."""
    operators = {name: entry.build(config) for name, entry in BLOCK_OPERATORS.items()}
    return JiT_models[config.model](
        input_size=config.img_size,
        num_classes=config.class_num,
        in_channels=config.channels,
        out_channels=config.channels * (2 if config.pred_param == "hybrid" else 1),  # data and velocity
        attn_drop=config.attn_dropout,
        proj_drop=config.proj_dropout,
        attn_fp32=config.attn_fp32,
        block_operators={name: make for name, make in operators.items() if make is not None},
        schedule_cond=config.schedule_delta is not None,
        levels=config.levels,
    )


def build_denoiser(config: Any, dtype: torch.dtype | None = None, net: JiT | None = None) -> Denoiser:
    """Build the denoiser, on torch's default device, around `net` or a network with fresh weights.

    Raises:
        UserError: settings that do not fit together.
    """
    try:
        net = build_network(config) if net is None else net
        schedules = None
        if config.schedule_delta is not None:
            schedules = ImageSchedules(
                config.img_size, config.schedule_level, config.schedule_delta, config.noise_scale
            )
        entry = INPUT_OPERATORS.get(config.input_operator)
        operator = None if entry is None else entry.build(config)
        hybrid = HybridWeight(
            config.hybrid_x_weight_mode,
            config.hybrid_x_weight_power,
            config.hybrid_x_weight_min,
            config.hybrid_x_weight_max,
        )
        path = config.pred_param, config.t_eps, config.noise_scale
        return Denoiser(net, operator, *path, dtype, schedules, hybrid, resolution_of(config))
    except ValueError as error:
        raise UserError(str(error)) from error


def resolution_of(config: Any) -> ResolutionSchedule | None:
    """Return the levels of resolution, or None without --resolution_schedule."""
    if not config.levels:
        return None
    if config.resolution_power is None:
        raise UserError("--resolution_schedule spectrum needs the spectrum that the network was trained with.")
    power = torch.tensor(config.resolution_power, dtype=torch.float64, device="cpu") / config.noise_scale**2
    return ResolutionSchedule(config.img_size, power, config.levels, config.resolution_delta)


def denoiser_settings(config: Any) -> dict[str, Any]:
    """Return what decides the denoiser's function, weights aside, as JSON. `added` settings at their default are left
    out, so that the settings of a model do not change when the code learns another option."""
    names = [field.name for group in (ModelConfig, PathConfig) for field in dataclasses.fields(group)]
    for entry in (*INPUT_OPERATORS.values(), *BLOCK_OPERATORS.values()):
        names += [field.name for field in dataclasses.fields(entry.settings)]
    flags, values = all_flags(), {}
    for name in (*names, "schedule_delta", "schedule_level", "latents"):
        value = getattr(config, name)
        settled = name not in flags or flags[name].metadata["added"]
        default = flags[name].default if name in flags else None
        if name not in ("P_mean", "P_std") and not (settled and value == default):
            values[name] = value
    return values


def describe_operators(config: Any) -> str:
    """Return a phrase on the operators, for the log."""
    entry = INPUT_OPERATORS.get(config.input_operator)
    phrases = [f"{config.input_operator}: {entry.describe(config)}" if entry else "no input operator (plain JiT)"]
    if (resolution := resolution_of(config)) is not None:
        until = ", ".join(f"{resolution.size(i)} px until t = {t:.3f}" for i, t in enumerate(resolution.times, 1))
        phrases.append(f"resolution: {until} (SNR {config.resolution_delta:g})")
    phrases += [name for name, operator in BLOCK_OPERATORS.items() if operator.build(config) is not None]
    return "; ".join(phrases)
