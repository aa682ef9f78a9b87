"""The state that training changes, fresh or from a checkpoint, in one copy on each process or in shards."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from denoiser import Denoiser
from engine_jit import Training, build_optimizer, parameter_groups
from util import checkpoint as ckpt
from util.build import DenoiserConfig
from util.checkpoint import Checkpoint
from util.distributed import World
from util.ema import EMA
from util.errors import UserError
from util.parallel import build_sharded, checkpoint_activations, initialise, wrap
from util.preparation import autocast_dtype
from util.sharded_state import HostShards, load_rows
from util.window import Window

ADDED = {  # what a network may have that the one it starts from has not, and what that is at first
    ".spectral_residual.": "--spectral_residual, whose gates start at zero",
    ".schedule_embedder.": "--t_sampler spectral_instance, which starts without effect",
}


def build_training(
    args: Namespace, shape: DenoiserConfig, saved: Checkpoint | None, init: Checkpoint | None, world: World
) -> tuple[Training, HostShards | None, list[str]]:
    """The training that goes on from `saved`, or starts from the weights of `init`, or from fresh ones.

    All processes call it, within the process group. With a phrase on each addition (ADDED) that `init` lacks.

    Raises:
        UserError: on all of them, for a checkpoint that does not fit.
    """
    try:
        return _build(args, shape, saved, init, world)
    except UserError as error:
        error.everywhere = True
        raise


def _build(args, shape, saved, init, world) -> tuple[Training, HostShards | None, list[str]]:
    def build() -> Denoiser:
        torch.manual_seed(args.seed)
        return shape.build(autocast_dtype(args, world))

    if saved is not None and saved.optimizer is None:
        raise UserError(f"{saved.path} has no optimizer state to go on with; --init_from starts from its weights")
    start, name = saved or init, ckpt.CHOICES["model" if saved else args.init_weights]
    shards, notes = None, []
    if args.parallel == "fsdp":
        denoiser = build_sharded(build, world)
        shards = HostShards(denoiser, parameter_groups(denoiser))
        if start is None:
            initialise(denoiser, build, world)
        else:
            if init is start:
                start, notes = _with_added(start, name, denoiser, lambda: build().state_dict())
            start = shards.own_part(start, denoiser)
            load_rows(denoiser, start.weights[name])
    else:
        denoiser = build()
        if start is not None:
            if init is start:
                start, notes = _with_added(start, name, denoiser, denoiser.state_dict)
            ckpt.load_weights(denoiser, start.weights[name], start.path)
        denoiser.to(world.device)
    if args.activation_checkpointing:
        checkpoint_activations(denoiser)
    emas = EMA(denoiser, args.ema_decay1), EMA(denoiser, args.ema_decay2)
    optimizer = build_optimizer(denoiser, args.weight_decay, (args.beta1, args.beta2))
    window = Window(world.device, args.skip_nonfinite)
    if saved is not None:
        emas[0].copy_from(start.weights["model_ema1"])
        emas[1].copy_from(start.weights["model_ema2"])
        ckpt.load_optimizer(optimizer, start.optimizer, start.path)
        window.load_state_dict(saved.run.get("window", {}))
    return Training(denoiser, wrap(denoiser, world), optimizer, emas, window), shards, notes


def _with_added(
    init: Checkpoint, name: str, denoiser: Denoiser, fresh: Callable[[], Mapping[str, Tensor]]
) -> tuple[Checkpoint, list[str]]:
    """The weights `name` of `init`, with fresh values for the additions (ADDED) that it knows nothing of."""
    state, values = init.weights[name], None
    added, notes = {}, []
    for mark, what in ADDED.items():
        names = lacking(denoiser.state_dict(), state, mark)
        if names:
            values = values or fresh()
            added |= {key: values[key].cpu().clone() for key in names}
            notes.append(f"{sum(values[key].numel() for key in names):,} new parameters of {what}")
    return (replace(init, weights={name: {**state, **added}}) if added else init), notes


def lacking(own: Iterable[str], theirs: Iterable[str], mark: str) -> list[str]:
    """The names with `mark` in them among `own`, where `theirs` has none of that kind at all."""
    return [] if any(mark in key for key in theirs) else [key for key in own if mark in key]
