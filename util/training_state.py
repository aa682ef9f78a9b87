"""The state that training changes, fresh or from a checkpoint, in one copy on each process or in shards."""

from argparse import Namespace

import torch

from denoiser import Denoiser
from engine_jit import Training, build_optimizer, parameter_groups
from util import checkpoint as ckpt
from util.acceleration import compile_network, resolve
from util.build import DenoiserConfig
from util.checkpoint import Checkpoint
from util.distributed import World, everywhere_or_nowhere
from util.ema import EMA
from util.errors import UserError
from util.parallel import build_sharded, checkpoint_activations, initialise, wrap
from util.preparation import autocast_dtype
from util.sharded_state import HostShards, load_rows
from util.window import Window


def build_training(
    args: Namespace, shape: DenoiserConfig, saved: Checkpoint | None, init: Checkpoint | None, world: World
) -> tuple[Training, HostShards | None]:
    """The training that goes on from `saved`, or starts from the weights of `init`, or from fresh ones.

    All processes call it, within the process group.

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
    emas, optimizer, window = everywhere_or_nowhere(
        world, lambda: _load(args, denoiser, shards, saved, init, world.device)
    )
    return Training(denoiser, wrap(denoiser, world), optimizer, emas, window), shards


def _build(args: Namespace, shape: DenoiserConfig, fresh: bool, world: World) -> tuple[Denoiser, HostShards | None]:
    """The denoiser, in shards where it is to be: their weights have values only if they are to be `fresh`."""

    def build() -> Denoiser:
        torch.manual_seed(args.seed)
        return shape.build(autocast_dtype(args, world))

    if args.parallel != "fsdp":
        return build(), None
    denoiser = build_sharded(build, world)
    shards = HostShards(denoiser, parameter_groups(denoiser))
    if fresh:
        initialise(denoiser, build, world)
    return denoiser, shards


def _load(args, denoiser, shards, saved, init, device) -> tuple[tuple[EMA, EMA], torch.optim.Optimizer, Window]:
    """Fill the denoiser from a checkpoint, if there is one, and make what belongs to it; no collective."""
    start, name = saved or init, ckpt.CHOICES["model" if saved else args.init_weights]
    if start is not None and shards is not None:
        start = shards.own_part(start, denoiser)
        load_rows(denoiser, start.weights[name])
    elif start is not None:
        ckpt.load_weights(denoiser, start.weights[name], start.path)
    if shards is None:
        denoiser.to(device)
    if args.activation_checkpointing:
        checkpoint_activations(denoiser)
    compile_network(denoiser, resolve(args.compile, device))
    emas = EMA(denoiser, args.ema_decay1), EMA(denoiser, args.ema_decay2)
    optimizer = build_optimizer(denoiser, args.weight_decay)
    window = Window(device, args.skip_nonfinite)
    if saved is not None:
        emas[0].copy_from(start.weights["model_ema1"])
        emas[1].copy_from(start.weights["model_ema2"])
        ckpt.load_optimizer(optimizer, start.optimizer, start.path)
        window.load_state_dict(saved.run.get("window", {}))
    return emas, optimizer, window
