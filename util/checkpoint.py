"""Checkpoints in the published form: ours load there and theirs load here.

A file is a torch.save'd dict: `model`, `model_ema1`, `model_ema2` (state dicts, every key prefixed "net."),
`optimizer` (AdamW; group 0 without and group 1 with weight decay), `epoch` (last finished), `args` (a Namespace).
Ours add `run`: what a later process needs to continue the same run at the same step, as plain numbers and strings.
"""

import argparse
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util import sharded_checkpoint
from util.checkpoint_folder import NAME, candidates, find, save, verify
from util.errors import UserError
from util.sharded_content import WEIGHTS, Lazy, merged

__all__ = ["CHOICES", "NAME", "Checkpoint", "find", "load", "load_optimizer", "load_weights", "save"]

PREFIX = "net."
OPTIONAL = {  # what marks the names of parameters that not every network has -> what they are, and which flag adds them
    ".spectral_residual.": ("a spectral residual", "--spectral_residual"),
    ".schedule_embedder.": ("an embedding of schedules", "--t_sampler spectral_instance"),
}
PROJ1 = PREFIX + "x_embedder.proj1.weight"
CHOICES = {"model": "model", "ema1": "model_ema1", "ema2": "model_ema2"}  # name in a flag -> name in the file


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in host memory, with `proj1` in the convolution's layout whatever the file has.

    Attributes:
        path: the file, or the folder of one in shards.
        weights: "model", "model_ema1", "model_ema2" -> state dict with keys prefixed "net.".
        optimizer: AdamW's state dict, or None in a file without one.
        epoch: the last finished epoch, counted from 0.
        args: the flags it was trained with; what decides Spectral Forcing and the spectral residual is always there.
        sf_source: how that was known, as a phrase for a message.
        run: our additions, empty for a foreign file.
        verified: of one in shards, the settings that util/sharded_checkpoint.py reads it with.
        notes: about newer files that are damaged, as warnings.
    """

    path: Path
    weights: Mapping[str, dict[str, Tensor]]
    optimizer: Mapping[str, Any] | None
    epoch: int
    args: dict[str, Any]
    sf_source: str
    run: dict[str, Any]
    verified: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def at(self) -> str:
        """Part of a file name for a checkpoint in the middle of an epoch, "-step000012345"; else empty."""
        step, length = self.run.get("step"), self.run.get("steps_per_epoch")
        return f"-step{step:09d}" if step and length and step % length else ""


def load(folder: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """Read the checkpoint of a run, ours or a published one, without executing anything in it.

    A newest one that is damaged is passed over for the one before it, and `notes` says so.

    Args:
        name: of the file in the folder, if it must be a certain one.

    Raises:
        UserError: no checkpoint there, or none that is whole; a foreign file.
    """
    folder = Path(folder)
    if find(folder) is None and not (name and (folder / name).exists()):
        why = f"there is no {NAME} in it" if folder.is_dir() else "there is no such folder"
        raise UserError(f"no checkpoint in {folder}: {why}")
    files = candidates(folder) if name is None else [folder / name]
    problems: list[UserError] = []
    for path in files:
        try:
            saved = _read(path)
        except UserError as error:
            problems.append(error)
            continue
        instead = f"using {path.name} of step {saved.run.get('step', 'unknown')} instead"
        return replace(saved, notes=tuple(f"{problem}; {instead}" for problem in problems))
    raise problems[0]


def _read(path: Path) -> Checkpoint:
    if not path.exists():
        there = ", ".join(other.name for other in candidates(path.parent))
        raise UserError(f"no checkpoint {path}: in that folder are {there}")
    if path.suffix == ".dcp":
        return _from_folder(path)
    try:
        verify(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged, foreign or hostile file raises, it is refused
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} cannot be read as a checkpoint; it is truncated, or not a file of tensors and plain settings: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    return _understand(path, content)


def _from_folder(path: Path) -> Checkpoint:
    """A checkpoint in shards; its tensors are read, merged, where they are asked for."""
    verified = sharded_checkpoint.verify(path)
    content = merged(path, verified)
    args = vars(content["args"])
    if "disable_dct_patchify" not in args:
        raise UserError(f"{path} is not a JiT checkpoint: its settings do not say whether Spectral Forcing is on")
    weights = Lazy({name: partial(content.__getitem__, name) for name in WEIGHTS})
    source = "its settings say so"
    return Checkpoint(path, weights, content["optimizer"], content["epoch"], args, source, content["run"], verified)


def _understand(path: Path, content: Any) -> Checkpoint:
    missing = [k for k in (*WEIGHTS, "epoch", "args") if k not in content] if isinstance(content, dict) else ["all"]
    if missing:
        raise UserError(f"{path} is not a JiT checkpoint: it lacks {', '.join(missing)}")
    states = [content[name] for name in WEIGHTS]
    if not all(isinstance(s, Mapping) and all(isinstance(v, Tensor) for v in s.values()) for s in states):
        raise UserError(f"{path} is not a JiT checkpoint: {', '.join(WEIGHTS)} must be state dicts")
    if any(PROJ1 not in state for state in states):
        raise UserError(f"{path} is not a JiT checkpoint: its weights have no {PROJ1}")
    if not isinstance(content["args"], argparse.Namespace) or not isinstance(content["epoch"], int):
        raise UserError(f"{path} is not a JiT checkpoint: args must be a Namespace and epoch a number")
    args = vars(content["args"])
    linear = content["model"][PROJ1].dim() == 2
    if "disable_dct_patchify" in args:
        sf_source = "its settings say so"
    else:
        args = {**args, "disable_dct_patchify": not linear}
        sf_source = f"its settings do not say, and its patch projection is {'linear' if linear else 'a convolution'}"
    args = _foreign_settings(args)
    weights = {name: _to_convolution(path, state) for name, state in zip(WEIGHTS, states, strict=True)}
    run = content["run"] if isinstance(content.get("run"), dict) else {}
    return Checkpoint(path, weights, content.get("optimizer"), content["epoch"], args, sf_source, run)


def _foreign_settings(args: dict[str, Any]) -> dict[str, Any]:
    """Settings as ours say them: published runs leave the global batch to batch size and number of processes."""
    args = dict(args)
    if (
        "global_batch" not in args
        and isinstance(args.get("batch_size"), int)
        and isinstance(args.get("world_size"), int)
    ):
        args["global_batch"] = args["batch_size"] * args["world_size"]
    if isinstance(args.get("window_size"), int) and args["window_size"] <= 0:
        args["window_size"] = None
    return args


def _to_convolution(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict with `proj1` as (bottleneck, C, p, p); the linear layout (bottleneck, C*p*p) is reshaped."""
    state, weight = dict(state), state[PROJ1]
    if weight.dim() == 2:
        pixels = weight.shape[1] // 3
        p = round(pixels**0.5)
        if 3 * p * p != weight.shape[1]:
            raise UserError(f"{path}: {PROJ1} has {weight.shape[1]} columns, which is no square patch of 3 channels")
        state[PROJ1] = weight.reshape(-1, 3, p, p)
    return state


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill `module` with `state`; every key and every shape must agree.

    Raises:
        UserError: naming what differs. The module is then unchanged.
    """
    check_fit(module, state, path)
    module.load_state_dict(dict(state))


def check_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise a UserError that names what differs between a module and a state dict, in keys and shapes."""
    own = module.state_dict()
    wrong = [f"{k} is missing" for k in own if k not in state] + [f"{k} is unknown" for k in state if k not in own]
    wrong += [
        f"{k} is {list(state[k].shape)} and the network's is {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        what = "; ".join(wrong[:4]) + "; ..." * (len(wrong) > 4)
        for mark, (thing, flag) in OPTIONAL.items():
            has, wants = (any(mark in k for k in names) for names in (state, own))
            if has != wants:
                with_, without = ("the file", "the network") if has else ("the network", "the file")
                what += f" ({with_} has {thing} and {without} has none: {flag})"
        raise UserError(f"{path} does not fit the network: {what}")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """Fill an AdamW from a checkpoint's state, also one that was written with `proj1` in the linear layout.

    Raises:
        UserError: where groups or shapes do not fit.
    """
    own = [group["params"] for group in optimizer.param_groups]
    fitting = fitting_state(own, state, path)
    slots = {
        slot: {name: v.clone() if isinstance(v, Tensor) else v for name, v in values.items()}
        for slot, values in fitting.items()
    }
    # How our optimizer is executed is ours to say; what it is, is the checkpoint's.
    execution = {k: optimizer.param_groups[0][k] for k in ("fused", "foreach", "capturable", "differentiable")}
    groups = [
        {**ours, **group, **execution}
        for ours, group in zip(
            [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            state["param_groups"],
            strict=True,
        )
    ]
    optimizer.load_state_dict({"state": {k: v for k, v in slots.items() if v}, "param_groups": groups})


def fitting_state(own: list[list[Tensor]], state: Mapping[str, Any], path: Path) -> dict[int, dict[str, Any]]:
    """The state of each parameter in an AdamW's state dict, by its slot there, with the parameter's shape.

    Args:
        own: the parameters of each group; their shapes count.

    Raises:
        UserError: where groups or shapes do not fit.
    """
    theirs = [group["params"] for group in state["param_groups"]]
    if [len(g) for g in own] != [len(g) for g in theirs]:
        raise UserError(
            f"{path}: its optimizer has groups of {[len(g) for g in theirs]} tensors, ours {[len(g) for g in own]}"
        )
    slots, states = {}, state["state"]
    for parameter, slot in zip(chain(*own), chain(*theirs), strict=True):
        values = dict(states.get(slot, {}))
        for name in ("exp_avg", "exp_avg_sq"):
            if name in values and values[name].shape != parameter.shape:
                if values[name].dim() != 2 or values[name].numel() != parameter.numel():
                    raise UserError(
                        f"{path}: the optimizer's {name} is {list(values[name].shape)} where "
                        f"the parameter is {list(parameter.shape)}"
                    )
                values[name] = values[name].reshape(parameter.shape)
        slots[slot] = values
    return slots
