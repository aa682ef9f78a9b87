"""A training run: from settings and a checkpoint to everything that the loop needs, and the end of it."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_jit import Recipe
from util import checkpoint as ckpt
from util import config, provenance, watch
from util.acceleration import check_compiler
from util.build import DenoiserConfig
from util.checkpoint_folder import NAME_SHARDED, NEXT, recover
from util.checkpoint_writer import CheckpointWriter
from util.distributed import World, agree, from_main, process_group
from util.dry_run import dry_run
from util.errors import UserError
from util.held_out import hold_out, seen_before
from util.learning_rate import peak_lr
from util.loader import GlobalBatchSampler, build_loader
from util.logger import RunLog, wandb_settings
from util.preemption import Preempted
from util.preparation import build_suite, open_dataset, warn
from util.resume import init_notes, load_for_training, start_step
from util.schedules import training_times
from util.sharded_state import ShardedCheckpointWriter
from util.shards import appears
from util.training_loop import Loop, look_is_missing
from util.training_state import build_training


def run_train(given: Mapping[str, Any], world: World) -> str:
    args, saved = load_for_training(given, world)
    warn(config.check(args, evaluates=args.online_eval) + check_compiler(args.compile, world.device), world)
    warn(list(saved.notes) if saved else [], world)
    idle = [f"--{name}" for name in ("val_images", "val_freq", "val_rings") if name in given and args.val_split is None]
    warn([f"{', '.join(idle)}: no effect without --val_split"] if idle else [], world)
    if saved and args.start_epoch >= args.epochs and not look_is_missing(args, args.start_epoch):
        run = saved.path.parent
        return (
            f"nothing to train: {args.start_epoch} of {args.epochs} epochs are done in {run}. EPOCHS={args.epochs * 2} "
            f"goes on, RESUME={run} EVALUATE_GEN=1 evaluates; its pictures and numbers are in {run}/samples and "
            f"{run}/eval"
        )
    dataset, held_out = hold_out(open_dataset(args), args, saved.args if saved else None)
    shape = DenoiserConfig.from_args(args)
    init = ckpt.load(args.init_from) if args.init_from and saved is None else None
    warn(init_notes(args, init) + seen_before(args, init.args) if init else [], world)
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, world.rank, world.size, args.accum_iter, args.seed)
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory=world.device.type == "cuda")
    recipe = build_recipe(args, sampler.steps_per_epoch, shape, world)
    step = start_step(saved, args.start_epoch, recipe.steps_per_epoch)
    if saved and args.lr_schedule == "cosine" and saved.args.get("epochs", args.epochs) != args.epochs:
        warn([f"the cosine now ends at epoch {args.epochs} instead of {saved.args['epochs']}"], world)
    here = saved is not None and saved.path.parent.resolve() == Path(args.output_dir).resolve()
    whole_last = step if here and saved.path.name in (ckpt.NAME, NAME_SHARDED, NEXT) else None
    source = f"init from {init.path} ({args.init_weights})" if init else (f"resumed {saved.path}" if saved else "")
    folder = Path(args.output_dir)
    with process_group(world, args.dist_timeout, also_alone=args.parallel == "fsdp"):
        agree("run", (config.run_name(args), step, len(dataset), held_out and len(held_out.images)), world)
        suite = build_suite(args, world, args.num_images) if args.online_eval else None
        warn((suite.warnings if suite else []) + ema_warnings(args, recipe), world)
        training, shards, added = build_training(args, shape, saved, init, world)
        source = "; ".join([source, *added])
        del saved, init  # the file's memory and, once it is replaced, its space on the disk
        if args.dry_run:
            sampler.set_epoch(step // recipe.steps_per_epoch, step % recipe.steps_per_epoch)
            said = dry_run(args, training, loader, recipe, world, step)
            del training  # DDP must be gone before its process group is
            return said
        log = open_log(folder, args, world, step)
        from_main(world, lambda: recover(folder, args.keep_last, whole_last))
        write_start(folder, args, given, shape, recipe, training.denoiser, world, log, source, step)
        if suite is not None and not appears(config_file(folder, step)):
            raise UserError(f"{folder} must be a folder that all processes share, or set ONLINE_EVAL=0")
        writer = None
        if shards is not None:
            writer = ShardedCheckpointWriter(folder, args.keep_last, whole_last, step, shards)
        elif world.main:
            writer = CheckpointWriter(folder, args.keep_last, whole_last, step)
        exit_code = 1
        try:
            products = Loop(
                training, dataset, loader, sampler, recipe, args, shape, world, log, writer, suite, held_out
            ).run(step)
            exit_code = 0
        except Preempted:
            exit_code = 0  # for Weights & Biases it has not failed
            raise
        finally:
            with watch.paused("the end of the log"):
                if writer is not None:
                    writer.close()
                log.close(exit_code)
        del training  # DDP must be gone before its process group is: it may wait for ever otherwise
    return "   ".join(f"{name}: {path}" for name, path in products.items())


def build_recipe(args: Namespace, steps_per_epoch: int, shape: DenoiserConfig, world: World) -> Recipe:
    return Recipe(
        epochs=args.epochs,
        steps_per_epoch=steps_per_epoch,
        accum_iter=args.accum_iter,
        peak_lr=peak_lr(args.lr, args.blr, args.global_batch),
        min_lr=args.min_lr,
        warmup_epochs=warmup_epochs(args, steps_per_epoch),
        lr_schedule=args.lr_schedule,
        density=training_times(args, world.device),
        label_drop_prob=args.label_drop_prob,
        null_class=shape.null_class,
        flip=args.flip,
        dropout=args.attn_dropout > 0 or args.proj_dropout > 0,
        seed=args.seed,
        log_freq=args.log_freq,
        grad_clip=args.grad_clip,
    )


def warmup_epochs(args: Namespace, steps_per_epoch: int) -> float:
    """As --warmup_steps says, else --warmup_epochs."""
    return args.warmup_epochs if args.warmup_steps is None else args.warmup_steps / steps_per_epoch


def open_log(folder: Path, args: Namespace, world: World, step: int) -> RunLog:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RunLog(folder, world, wandb_settings(args, config.run_name(args)), redone_from=step)
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be written: {error}") from error


def config_file(folder: Path, step: int) -> Path:
    """The resolved configuration of a start of the run."""
    return folder / ("config.json" if step == 0 else f"config-from-step{step:09d}.json")


def write_start(folder, args, given, shape, recipe, denoiser, world, log, source, step) -> None:
    """The resolved configuration, to a file and to the terminal."""
    if not world.main:
        return
    parameters = sum(p.numel() for p in denoiser.parameters())
    resolved = {
        "peak_lr": recipe.peak_lr,
        "steps_per_epoch": recipe.steps_per_epoch,
        "parameters": parameters,
        "processes": world.size,
        "device": str(world.device),
        "spectral_forcing": shape.describe_operator(),
        "started_from": source or "fresh weights",
    }
    within = step % recipe.steps_per_epoch
    at = f" (from its step {within + 1})" if within else ""
    path = config_file(folder, step)
    content = {"args": vars(args), "resolved": resolved, **provenance.provenance(world.device)}
    provenance.write_json(path, content)
    log.record("start", step, resolved)
    log.say(
        f"{args.model} at {args.img_size} px, {parameters:,} parameters, on {world.size} x {world.device.type}"
        f"{f', {source}' if source else ''}\n"
        f"  Spectral Forcing {shape.describe_operator()}\n"
        f"  global batch {args.global_batch} = {args.batch_size} x {world.size} processes x {args.accum_iter} passes, "
        f"learning rate {recipe.peak_lr:.3g}, {recipe.steps_per_epoch} steps an epoch\n"
        f"  epochs {args.start_epoch + 1}{at} to {args.epochs}, in {folder} ({path.name})\n"
        f"settings that differ from the defaults:\n{config.describe(args, given, world.size)}"
    )


def ema_warnings(args: Namespace, recipe: Recipe) -> list[str]:
    """An average over more steps than the run has is still made of the initial weights."""
    steps = recipe.epochs * recipe.steps_per_epoch
    found = []
    for name in ("ema_decay1", "ema_decay2"):
        decay = getattr(args, name)
        if (1 - decay) * steps < 1:
            horizon = f"{1 / (1 - decay):.0f}" if decay < 1 else "infinitely many"
            found.append(
                f"--{name} {decay} averages over about {horizon} steps and the run has {steps}: "
                "what it samples is mostly the initial weights, grey at first; "
                f"--{name} {max(0.0, 1 - 5 / steps):.3g} would average over a fifth of the run"
            )
    return found
