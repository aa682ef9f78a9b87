"""The state that training changes, fresh or from a checkpoint, in one copy on each process or in shards."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from denoiser import Denoiser
from engine_jit import Training, build_optimizer, parameter_groups
from util import checkpoint as ckpt
from util.acceleration import compile_network, pad_swiglu, resolve
from util.build import DenoiserConfig
from util.checkpoint import Checkpoint
from util.distributed import World, everywhere_or_nowhere
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
    if saved is not None and saved.optimizer is None:
        error = UserError(f"{saved.path} has no optimizer state to go on with; --init_from starts from its weights")
        error.everywhere = True
        raise error
    try:
        denoiser, shards = _build(args, shape, saved is None and init is None, world)
    except UserError as error:  # about the flags, which are the same on all processes
        error.everywhere = True
        raise
    # In between no process waits for another: one alone may fail to read.
    emas, optimizer, window, added = everywhere_or_nowhere(
        world, lambda: _load(args, shape, denoiser, shards, saved, init, world)
    )
    return Training(denoiser, wrap(denoiser, world), optimizer, emas, window), shards, added


def _fresh(args: Namespace, shape: DenoiserConfig, world: World) -> Denoiser:
    """The denoiser with the initial weights of the seed."""
    torch.manual_seed(args.seed)
    return shape.build(autocast_dtype(args, world))


def _build(args: Namespace, shape: DenoiserConfig, fresh: bool, world: World) -> tuple[Denoiser, HostShards | None]:
    """The denoiser, in shards where it is to be: their weights have values only if they are to be `fresh`."""

    def build() -> Denoiser:
        return _fresh(args, shape, world)

    if args.parallel != "fsdp":
        return build(), None
    denoiser = build_sharded(build, world)
    shards = HostShards(denoiser, parameter_groups(denoiser))
    if fresh:
        initialise(denoiser, build, world)
    return denoiser, shards


def _load(
    args, shape, denoiser, shards, saved, init, world
) -> tuple[tuple[EMA, EMA], torch.optim.Optimizer, Window, list[str]]:
    """Fill the denoiser from a checkpoint, if there is one, and make what belongs to it; no collective."""
    start, name = saved or init, ckpt.CHOICES["model" if saved else args.init_weights]
    added: list[str] = []
    if start is not None and start is init:
        start, added = _with_added(start, name, denoiser, lambda: _fresh(args, shape, world).state_dict())
    if start is not None and shards is not None:
        start = shards.own_part(start, denoiser)
        load_rows(denoiser, start.weights[name])
    elif start is not None:
        ckpt.load_weights(denoiser, start.weights[name], start.path)
    if shards is None:
        denoiser.to(world.device)
    if args.activation_checkpointing:
        checkpoint_activations(denoiser)
    pad_swiglu(denoiser, args.pad_swiglu)
    compile_network(denoiser, resolve(args.compile, world.device))
    emas = EMA(denoiser, args.ema_decay1), EMA(denoiser, args.ema_decay2)
    optimizer = build_optimizer(denoiser, args.weight_decay, (args.beta1, args.beta2))
    window = Window(world.device, args.skip_nonfinite)
    if saved is not None:
        emas[0].copy_from(start.weights["model_ema1"])
        emas[1].copy_from(start.weights["model_ema2"])
        ckpt.load_optimizer(optimizer, start.optimizer, start.path)
        window.load_state_dict(saved.run.get("window", {}))
    return emas, optimizer, window, added


def _with_added(
    init: Checkpoint, name: str, denoiser: Denoiser, fresh: Callable[[], Mapping[str, Tensor]]
) -> tuple[Checkpoint, list[str]]:
    """The weights `name` of `init`, with fresh values for the additions (ADDED) that it knows nothing of.

    Args:
        fresh: gives them; called where there are any.
    """
    state, own, values = init.weights[name], list(denoiser.state_dict()), None
    added, notes = {}, []
    for mark, what in ADDED.items():
        if names := lacking(own, state, mark):
            values = values or fresh()
            added |= {key: values[key] for key in names}
            notes.append(f"{sum(values[key].numel() for key in names):,} new parameters of {what}")
    return (replace(init, weights={name: {**state, **added}}) if added else init), notes


def lacking(own: Iterable[str], theirs: Iterable[str], mark: str) -> list[str]:
    """The names with `mark` in them among `own`, where `theirs` has none of that kind at all."""
    return [] if any(mark in key for key in theirs) else [key for key in own if mark in key]
