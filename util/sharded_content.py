"""What is in a checkpoint in shards: tensors with names, and a plain rest.

Tensors are called <section>.<name>, as in "exp_avg.net.blocks.0.attn.qkv.weight", with the published names.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError
from util.sharded_checkpoint import MOMENTS, STEP, WEIGHTS, empty_like, read


def flatten(content: Mapping[str, Any], groups: list[list[str]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and all the rest, ready for JSON.

    Args:
        content: as util/checkpoint.py describes it; of sharded tensors, this process's rows.
        groups: the names of the parameters in each group of the optimizer, in its order.

    Raises:
        UserError: settings that are not plain, an optimizer that has not seen all parameters.
    """
    tensors = {f"{section}.{key}": value for section in WEIGHTS for key, value in content[section].items()}
    optimizer = None
    if content["optimizer"] is not None:
        state, theirs = content["optimizer"]["state"], content["optimizer"]["param_groups"]
        slots = [slot for group in theirs for slot in group["params"]]
        if [len(group["params"]) for group in theirs] != [len(names) for names in groups] or any(
            slot not in state for slot in slots
        ):
            raise UserError("the optimizer's state does not belong to all parameters of the network")
        for slot, name in zip(slots, (name for names in groups for name in names), strict=True):
            tensors |= {f"{moment}.{name}": state[slot][moment] for moment in MOMENTS}
        tensors[STEP] = torch.stack([torch.as_tensor(state[slot]["step"], dtype=torch.float32) for slot in slots])
        optimizer = [{**group, "params": names} for group, names in zip(theirs, groups, strict=True)]
    about = {
        "epoch": content["epoch"],
        "args": vars(content["args"]),
        "run": content.get("run", {}),
        "weights": list(content["model"]),
        "optimizer": optimizer,
    }
    try:
        json.dumps(about)
    except TypeError as error:
        raise UserError(f"the settings of the checkpoint are not plain numbers and strings: {error}") from error
    return tensors, about


class Lazy(Mapping):
    """A mapping whose values are made when they are asked for, each time anew."""

    def __init__(self, make: Mapping[str, Callable[[], Any]]):
        self._make = dict(make)

    def __getitem__(self, name: str) -> Any:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def merged(path: Path, about: dict[str, Any]) -> Lazy:
    """The content of a checkpoint as util/checkpoint.py describes it; tensors are read, whole, when asked for.

    Args:
        about: its settings, from `verify`.
    """
    shapes = empty_like(path, about)
    content: dict[str, Callable[[], Any]] = {
        "model": lambda: _section(path, about, "model", about["weights"], shapes),
        "model_ema1": lambda: _section(path, about, "model_ema1", about["weights"], shapes),
        "model_ema2": lambda: _section(path, about, "model_ema2", about["weights"], shapes),
        "optimizer": lambda: _optimizer(path, about, shapes),
        "epoch": lambda: about["epoch"],
        "args": lambda: argparse.Namespace(**about["args"]),
        "run": lambda: about["run"],
    }
    return Lazy(content)


def _section(path: Path, about, section: str, names: list[str], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"{section}.{name}": _like(path, f"{section}.{name}", shapes) for name in names}
    read(path, tensors, about)
    return {name: tensors[f"{section}.{name}"] for name in names}


def _optimizer(path: Path, about: dict[str, Any], shapes: Mapping[str, Tensor]) -> Lazy | None:
    groups = about["optimizer"]
    if groups is None:
        return None
    names = [name for group in groups for name in group["params"]]
    slots = iter(range(len(names)))
    numbered = [
        {**group, "betas": tuple(group["betas"]), "params": [next(slots) for _ in group["params"]]} for group in groups
    ]

    def state() -> dict[int, dict[str, Tensor]]:
        step = {STEP: _like(path, STEP, shapes)}
        read(path, step, about)
        moments = {moment: _section(path, about, moment, names, shapes) for moment in MOMENTS}
        return {
            slot: {"step": step[STEP][slot].clone(), **{moment: moments[moment][name] for moment in MOMENTS}}
            for slot, name in enumerate(names)
        }

    return Lazy({"state": state, "param_groups": lambda: numbered})


def _like(path: Path, name: str, shapes: Mapping[str, Tensor]) -> Tensor:
    if name not in shapes:
        raise UserError(f"{path} is not a JiT checkpoint: it has no {name}")
    return torch.empty_like(shapes[name], device="cpu")
