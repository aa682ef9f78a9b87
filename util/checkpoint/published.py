"""Checkpoints in the published form: ours load elsewhere, and published ones load here.

A file is a torch.save'd dict: `model`, `model_ema1`, `model_ema2` (state dicts, keys prefixed "net."), `optimizer`
(AdamW; group 0 without and group 1 with weight decay), `epoch` (last finished one), `args` (a Namespace). Ours add
`run`: what the run needs to resume at the same step, as plain numbers and strings.
"""

import os
import zipfile
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from util.checkpoint import files, sharded
from util.errors import UserError
from util.operators import BLOCK_OPERATORS

WEIGHTS = {"model": "model", "ema1": "model_ema1", "ema2": "model_ema2"}  # name in a flag -> name in the file
OPTIONAL = {name: operator.flag for name, operator in BLOCK_OPERATORS.items()}  # module not in each network -> flag
OPTIONAL["schedule_embedder"] = "--t_sampler spectral_instance"
PROJ1 = "net.x_embedder.proj1.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, whose tensors are read from disk when they are used."""

    path: Path  # a file, or the folder of a sharded one
    weights: Mapping[str, Mapping[str, Tensor]]  # "model", "model_ema1", "model_ema2" -> state dict
    optimizer: dict[str, Any] | None  # param_groups, and slot -> tensor for step, exp_avg, exp_avg_sq
    epoch: int  # the last finished one, counted from 0
    args: dict[str, Any]  # the flags it was trained with; disable_dct_patchify is always among them
    sf_source: str  # where that one comes from, for a message
    run: dict[str, Any]  # our additions; empty for a published file
    notes: tuple[str, ...] = ()  # warnings about newer checkpoints that are damaged

    @property
    def at(self) -> str:
        """Part of a file name, "-step000012345", for a checkpoint in the middle of an epoch; else empty."""
        step, length = self.run.get("step"), self.run.get("steps_per_epoch")
        return f"-step{step:09d}" if step and length and step % length else ""

    @property
    def identity(self) -> tuple[str, int, int | None]:
        """What all ranks must have in common that are to use the same checkpoint."""
        return self.path.name, self.epoch, self.run.get("step")


def load(folder: str | os.PathLike, name: str | None = None) -> Checkpoint:
    """Read the newest checkpoint of a run, or the one called `name`, without executing anything in it.

    A damaged newest one is passed over for the one before it, which `notes` says. UserError if none is intact.
    """
    newest, folder, problems = files.find(folder), Path(folder), []
    for path in files.candidates(folder) if newest and name is None else [folder / (name or files.NAME)]:
        try:
            checkpoint = _read(path)
        except UserError as error:
            problems.append(error)
            continue
        instead = f"using {path.name} of step {checkpoint.run.get('step', 'unknown')} instead"
        return replace(checkpoint, notes=tuple(f"{problem} ({instead})" for problem in problems))
    raise problems[0]


def _read(path: Path) -> Checkpoint:
    if not path.exists():
        others = ", ".join(other.name for other in files.candidates(path.parent)) or "no checkpoint"
        there = f"that folder has {others}" if path.parent.is_dir() else "there is no such folder"
        raise UserError(f"No checkpoint {path}: {there}.")
    if path.suffix == ".dcp":
        return _understand(path, sharded.load(path))
    files.verify(path)
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of many kinds: a damaged, foreign or hostile file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = "it is truncated, or holds more than tensors and plain settings"
        raise UserError(f"{path} cannot be read as a checkpoint; {what}: {reason}") from error
    if isinstance(content, dict) and content.get("optimizer") is not None:
        groups, state = content["optimizer"]["param_groups"], content["optimizer"]["state"]
        moments = {key: {slot: values[key] for slot, values in state.items()} for key in ("step", *sharded.MOMENTS)}
        content["optimizer"] = {"param_groups": groups, **moments}
    return _understand(path, content)


def _understand(path: Path, content: Any) -> Checkpoint:
    """Check the entries of a checkpoint, and bring them to the current form."""
    foreign, keys = f"{path} is not a JiT checkpoint", (*WEIGHTS.values(), "epoch", "args")
    if missing := [key for key in keys if not isinstance(content, dict) or key not in content]:
        raise UserError(f"{foreign}: it lacks {', '.join(missing)}.")
    states, args, run = {key: content[key] for key in WEIGHTS.values()}, content["args"], content.get("run")
    for state in states.values():
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()) or PROJ1 not in state:
            raise UserError(f"{foreign}: {', '.join(states)} must be state dicts with {PROJ1}.")
    if not isinstance(args, Namespace) or not isinstance(content["epoch"], int):
        raise UserError(f"{foreign}: args must be a Namespace and epoch an integer.")
    args, source, linear = dict(vars(args)), "its settings say so", states["model"][PROJ1].dim() == 2
    if "disable_dct_patchify" not in args:
        args["disable_dct_patchify"] = not linear
        source = f"its settings do not say, and its patch projection is {'linear' if linear else 'a convolution'}"
    if isinstance(args.get("batch_size"), int) and isinstance(args.get("world_size"), int):
        args.setdefault("global_batch", args["batch_size"] * args["world_size"])  # published runs do not record it
    if isinstance(args.get("window_size"), int) and args["window_size"] <= 0:
        args["window_size"] = None  # the whole image
    for key, state in states.items():  # linear (bottleneck, C*p*p) -> convolution (bottleneck, C, p, p)
        p = round((state[PROJ1][0].numel() / 3) ** 0.5)
        if 3 * p * p != state[PROJ1][0].numel():
            raise UserError(f"{foreign}: {PROJ1} is {list(state[PROJ1].shape)}, not for square patches of 3 channels.")
        if state[PROJ1].dim() == 2:
            states[key] = {**state, PROJ1: state[PROJ1].reshape(-1, 3, p, p)}
    run = dict(run) if isinstance(run, dict) else {}
    if "window" in run:  # earlier names
        run["metrics"] = {{"in_a_row": "consecutive"}.get(name, name): v for name, v in run.pop("window").items()}
    return Checkpoint(path, states, content.get("optimizer"), content["epoch"], args, source, run)


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path, keep: Collection[str] = ()) -> None:
    """Fill a module, sharded or not, with a state dict; the tensors named in `keep` stay as they are.

    All other keys and shapes must agree: UserError names what differs, and the module is then unchanged.
    """
    own = {name: value for name, value in module.state_dict().items() if name not in keep}
    check_fit(own, state, path)
    copy_into(own, state)


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Raise a UserError that names the keys and shapes in which a checkpoint's state dict differs from `own`."""
    wrong = [f"{k} is missing" for k in own if k not in state] + [f"{k} is unknown" for k in state if k not in own]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            wrong.append(f"{key} is {list(state[key].shape)} and the network's is {list(own[key].shape)}")
    if wrong:
        what = "; ".join(wrong[:4]) + "; ..." * (len(wrong) > 4)
        for name, flag in OPTIONAL.items():
            has, wants = (any(f".{name}." in key for key in keys) for keys in (state, own))
            what += f" (only {'the file' if has else 'the network'} has a {name}: {flag})" if has != wants else ""
        raise UserError(f"{path} does not fit the network: {what}.")


@torch.no_grad()
def copy_into(targets: Mapping[Any, Tensor], state: Mapping[Any, Tensor]) -> None:
    """Fill tensors, sharded or not, from the unsharded ones of a checkpoint."""
    if isinstance(state, sharded.Section):
        return state.copy_to(targets)
    for key, target in targets.items():
        value = state[key].reshape(target.shape)  # AdamW's moments of PROJ1 may be in the linear layout
        if isinstance(target, DTensor):  # sharded by rows: no more than this rank's are read from the file
            rows, rank = value.chunk(target.device_mesh.size()), target.device_mesh.get_local_rank()
            target, value = target.to_local(), rows[rank] if rank < len(rows) else value[:0]
        target.copy_(value)


def whole(state: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return a checkpoint's state dict with unsharded tensors in host memory."""
    tensors = {key: torch.empty_like(value, device="cpu") for key, value in state.items()}
    copy_into(tensors, state)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: Path) -> None:
    """Fill an AdamW, sharded or not, from a checkpoint's `optimizer`; UserError if groups or shapes differ."""
    own, theirs = optimizer.param_groups, state["param_groups"]
    values = {slot: {"step": torch.as_tensor(step).clone()} for slot, step in state["step"].items()}
    # The checkpoint says what the optimizer computes; how it is executed is for this process to say.
    execution = {key: own[0][key] for key in ("fused", "foreach", "capturable", "differentiable")}
    slots, parameters = (chain(*(group["params"] for group in groups)) for groups in (theirs, own))
    try:
        parameters = dict(zip(slots, parameters, strict=True))
        for moment in sharded.MOMENTS:
            targets = {slot: torch.zeros_like(parameters[slot], requires_grad=False) for slot in values}
            copy_into(targets, state[moment])
            for slot, target in targets.items():
                values[slot][moment] = target
        optimizer.load_state_dict({"state": values, "param_groups": [{**group, **execution} for group in theirs]})
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer does not fit the network: {error}") from error
