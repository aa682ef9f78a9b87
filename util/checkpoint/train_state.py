"""The state that training changes, as the content of a checkpoint (published.py) and back."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer

from denoiser import Denoiser
from util.checkpoint.published import (
    OPTIONAL,
    Checkpoint,
    check_finite,
    check_fit,
    copy_into,
    load_optimizer,
    load_weights,
)
from util.dist.parallel import is_sharded
from util.errors import UserError
from util.optim import EMA

EMAs = tuple[EMA, EMA]


def train_state(
    denoiser: Denoiser, optimizer: Optimizer, emas: EMAs, step: int, steps_per_epoch: int, args: Mapping, run: Mapping
) -> dict[str, Any]:
    """Return the content of a checkpoint after `step` steps, with tensors that training goes on to change.

    Those of a sharded run are DTensors, and its optimizer's state has the names of parameters for slots.
    """
    return {
        "model": dict(denoiser.state_dict()),
        "model_ema1": emas[0].state_dict(),
        "model_ema2": emas[1].state_dict(),
        "optimizer": get_optimizer_state_dict(denoiser, optimizer) if is_sharded(denoiser) else optimizer.state_dict(),
        "epoch": step // steps_per_epoch - 1,
        "args": Namespace(**args),
        "run": {"step": step, "steps_per_epoch": steps_per_epoch, **run},
    }


def load_train_state(checkpoint: Checkpoint, denoiser: Denoiser, optimizer: Optimizer, emas: EMAs) -> None:
    """Fill denoiser, optimizer and EMAs, sharded or not, from a checkpoint; UserError if they do not fit."""
    if checkpoint.optimizer is None:
        raise UserError(f"{checkpoint.path} has no optimizer state; --init_from starts a run from its weights.")
    load_weights(denoiser, checkpoint.state("model"), checkpoint.path)
    for ema, state in zip(emas, (checkpoint.state("ema1"), checkpoint.state("ema2")), strict=True):
        check_fit(ema.state_dict(), state, checkpoint.path)
        copy_into(ema.shadow, state)
        check_finite(ema.shadow, checkpoint.path)
    load_optimizer(optimizer, checkpoint.optimizer, checkpoint.path)


def load_initial_weights(checkpoint: Checkpoint, which: str, denoiser: Denoiser) -> list[str]:
    """Fill an initialised denoiser with the weights `which` ("model", "ema1" or "ema2") of a checkpoint.

    Modules in OPTIONAL that the checkpoint does not have keep their initial values, but for levels of resolution, which
    start from the layers of the whole image; a note is returned on each.
    """
    state, own, notes, fresh = checkpoint.state(which), denoiser.state_dict(), [], set()
    for name, flag in OPTIONAL.items():
        added = [key for key in own if f".{name}." in key]
        if added and not any(f".{name}." in key for key in state):
            fresh.update(added)
            notes.append(f"{sum(own[key].numel() for key in added):,} new parameters of {flag}")
    load_weights(denoiser, state, checkpoint.path, keep=fresh)
    if any(".levels." in key for key in fresh):
        denoiser.net.reset_levels()
    return notes
