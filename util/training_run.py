"""A training run: from settings and a checkpoint to epochs with checkpoints, samples and evaluations."""

import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from denoiser import LogitNormal
from engine_jit import Recipe, Training, build_optimizer, train_one_epoch
from util import checkpoint as ckpt
from util import config, provenance
from util.build import DenoiserConfig
from util.distributed import World, agree, barrier, from_main, process_group
from util.ema import EMA
from util.errors import UserError
from util.evaluation import Subject, evaluate_and_write, loggable, metric_line, report_name
from util.generation import Sampling, setting_name
from util.held_out import hold_out, seen_before
from util.learning_rate import peak_lr
from util.loader import GlobalBatchSampler, build_loader
from util.logger import LOG_NAME, RunLog, wandb_settings
from util.parallel import wrap
from util.preparation import autocast_dtype, build_suite, draw_grid, open_dataset, spread_labels, warn
from util.resume import init_notes, load_for_training
from util.shards import appears


def run_train(given: Mapping[str, Any], world: World) -> str:
    args, saved = load_for_training(given, world)
    warn(config.check(args, evaluates=args.online_eval), world)
    idle = [f"--{name}" for name in ("val_images", "val_freq", "val_rings") if name in given and args.val_split is None]
    warn([f"{', '.join(idle)}: no effect without --val_split"] if idle else [], world)
    if saved and args.start_epoch >= args.epochs and not (args.online_eval and evaluation_is_missing(args)):
        run = saved.path.parent
        return (
            f"nothing to train: {args.start_epoch} of {args.epochs} epochs are done in {run}. EPOCHS={args.epochs * 2} "
            f"goes on, RESUME={run} EVALUATE_GEN=1 evaluates; its pictures and numbers are in {run}/samples and "
            f"{run}/eval"
        )
    dataset, held_out = hold_out(open_dataset(args), args, saved.args if saved else None)
    shape = DenoiserConfig.from_args(args)
    torch.manual_seed(args.seed)
    denoiser = shape.build(autocast_dtype(args, world))
    init = ckpt.load(args.init_from) if args.init_from and saved is None else None
    warn(init_notes(args, init) + seen_before(args, init.args) if init else [], world)
    if start := saved or init:
        ckpt.load_weights(denoiser, start.weights[ckpt.CHOICES["model" if saved else args.init_weights]], start.path)
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, world.rank, world.size, args.accum_iter, args.seed)
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory=world.device.type == "cuda")
    recipe = Recipe(
        epochs=args.epochs,
        steps_per_epoch=sampler.steps_per_epoch,
        accum_iter=args.accum_iter,
        peak_lr=peak_lr(args.lr, args.blr, args.global_batch),
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        lr_schedule=args.lr_schedule,
        density=LogitNormal(args.P_mean, args.P_std),
        label_drop_prob=args.label_drop_prob,
        null_class=shape.null_class,
        flip=args.flip,
        dropout=args.attn_dropout > 0 or args.proj_dropout > 0,
        seed=args.seed,
        log_freq=args.log_freq,
    )
    denoiser.to(world.device)
    emas = EMA(denoiser, args.ema_decay1), EMA(denoiser, args.ema_decay2)
    optimizer = build_optimizer(denoiser, args.weight_decay)
    if saved:
        emas[0].copy_from(saved.weights["model_ema1"])
        emas[1].copy_from(saved.weights["model_ema2"])
        if saved.optimizer is None:
            raise UserError(f"{saved.path} has no optimizer state to go on with; --init_from starts from its weights")
        ckpt.load_optimizer(optimizer, saved.optimizer, saved.path)

        if args.lr_schedule == "cosine" and saved.args.get("epochs", args.epochs) != args.epochs:
            warn([f"the cosine now ends at epoch {args.epochs} instead of {saved.args['epochs']}"], world)
    source = f"init from {init.path} ({args.init_weights})" if init else (f"resumed {saved.path}" if saved else "")
    del saved, init  # the file's memory and, once it is replaced, its space on the disk

    folder = Path(args.output_dir)
    with process_group(world):
        agree("run", (config.run_name(args), args.start_epoch, len(dataset), held_out and len(held_out.images)), world)
        suite = build_suite(args, world, args.num_images) if args.online_eval else None
        warn((suite.warnings if suite else []) + ema_warnings(args, recipe), world)
        training = Training(denoiser, wrap(denoiser, world), optimizer, emas)
        log = open_log(folder, args, world)
        write_start(folder, args, shape, recipe, denoiser, world, log, source)
        if suite is not None and not appears(config_file(folder, args)):
            raise UserError(f"{folder} must be a folder that all processes share, or set ONLINE_EVAL=0")
        exit_code = 1
        try:
            products = train(training, loader, sampler, recipe, args, shape, suite, world, log, held_out)
            exit_code = 0
        finally:
            log.close(exit_code)
        del training  # DDP must be gone before its process group is: it may wait for ever otherwise
    return "   ".join(f"{name}: {path}" for name, path in products.items())


def train(training, loader, sampler, recipe, args, shape, suite, world, log, held_out) -> dict[str, Path]:
    """All epochs that are left. Returns what was written: name -> path."""
    folder = Path(args.output_dir)
    products = {"checkpoint": folder / ckpt.NAME, "log": folder / LOG_NAME}
    if suite is not None and from_main(world, lambda: evaluation_is_missing(args)):
        log.say(f"the evaluation after epoch {args.start_epoch} was due and has no report: it is completed first")
        products |= look(training, args.start_epoch - 1, recipe, args, shape, suite, world, log)
    for epoch in range(args.start_epoch, args.epochs):
        start = time.perf_counter()
        sampler.set_epoch(epoch)
        train_one_epoch(training, loader, epoch, recipe, world, log)
        last = epoch + 1 == args.epochs
        log.say(f"epoch {epoch + 1}/{args.epochs} done in {time.perf_counter() - start:.1f} s")
        looks = look_is_due(epoch, args)
        # An evaluation needs the checkpoint too: with it, it can be completed after an interruption.
        if last or (epoch + 1) % args.save_last_freq == 0 or (looks and suite is not None):
            if world.main:
                save(training, epoch, (epoch + 1) * recipe.steps_per_epoch, args, log)
            barrier(world)
        if held_out and (last or (epoch + 1) % args.val_freq == 0):
            held_out.record(training, epoch, recipe, world, log)
        if looks:
            products |= look(training, epoch, recipe, args, shape, suite, world, log)
    return products


def look_is_due(epoch: int, args: Namespace) -> bool:
    return epoch + 1 == args.epochs or (epoch + 1) % args.eval_freq == 0


def evaluation_is_missing(args: Namespace) -> bool:
    """Whether the run was interrupted between the checkpoint that it goes on from and that epoch's report."""
    epoch, folder = args.start_epoch - 1, Path(args.output_dir)
    if epoch < 0 or not look_is_due(epoch, args) or not ckpt.find(folder):
        return False
    name = report_name(epoch, args.ema, Sampling.from_args(args), args.num_images)
    return not (folder / "eval" / f"{name}.json").is_file()


def save(training: Training, epoch: int, step: int, args: Namespace, log: RunLog) -> None:
    denoiser, (ema1, ema2) = training.denoiser, training.emas
    content = {
        "model": denoiser.state_dict(),
        "model_ema1": ema1.state_dict(denoiser),
        "model_ema2": ema2.state_dict(denoiser),
        "optimizer": training.optimizer.state_dict(),
        "epoch": epoch,
        "args": args,
        "run": {"step": step, "commit": provenance.commit(), "versions": provenance.versions()},
    }
    path = ckpt.save(args.output_dir, content)
    log.say(f"saved {path} (epoch {epoch + 1})")


def look(training, epoch, recipe, args, shape, suite, world, log) -> dict[str, Path]:
    """A grid of samples and, with --online_eval, the metrics, of the weights that --ema names."""
    denoiser, folder, step = training.denoiser, Path(args.output_dir), (epoch + 1) * recipe.steps_per_epoch
    averages = {"ema1": training.emas[0], "ema2": training.emas[1]}.get(args.ema)
    sampling = Sampling.from_args(args)
    grid = folder / "samples" / f"{setting_name(epoch, args.ema, sampling)}.png"
    products = {"samples": grid}
    with averages.applied_to(denoiser) if averages else nullcontext():
        labels = spread_labels(args.wandb_num_vis, args.class_num)
        draw_grid(denoiser, shape, args, labels, world, grid, f"{args.model}  epoch {epoch + 1}  cfg {args.cfg:g}")
        log.image("samples", step, grid)
        if suite is not None:
            subject = Subject(denoiser, shape, args.ema, epoch, folder / ckpt.NAME)
            report, products["metrics"] = evaluate_and_write(
                subject, sampling, args.num_images, suite, folder / "eval", world, keep_features=args.keep_features
            )
            log.record("eval", step, loggable(report))
            log.say(f"epoch {epoch + 1}: {metric_line(report)}  ({args.num_images} images)")
    return products


def open_log(folder: Path, args: Namespace, world: World) -> RunLog:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RunLog(folder, world, wandb_settings(args, config.run_name(args)))
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be written: {error}") from error


def config_file(folder: Path, args: Namespace) -> Path:
    """The resolved configuration of a start of the run."""
    return folder / ("config.json" if args.start_epoch == 0 else f"config-from-epoch{args.start_epoch + 1:04d}.json")


def write_start(folder, args, shape, recipe, denoiser, world, log, source) -> None:
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
    path = config_file(folder, args)
    content = {"args": vars(args), "resolved": resolved, **provenance.provenance(world.device)}
    provenance.write_json(path, content)
    log.record("start", args.start_epoch * recipe.steps_per_epoch, resolved)
    log.say(
        f"{args.model} at {args.img_size} px, {parameters:,} parameters, on {world.size} x {world.device.type}"
        f"{f', {source}' if source else ''}\n"
        f"  Spectral Forcing {shape.describe_operator()}\n"
        f"  global batch {args.global_batch} = {args.batch_size} x {world.size} processes x {args.accum_iter} passes, "
        f"learning rate {recipe.peak_lr:.3g}, {recipe.steps_per_epoch} steps an epoch\n"
        f"  epochs {args.start_epoch + 1} to {args.epochs}, in {folder} ({path.name})\n"
        f"settings that differ from the defaults:\n{config.describe(args)}"
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
