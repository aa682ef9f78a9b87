"""Train, evaluate or sample a JiT behind Spectral Forcing. Started by run_jit_multinode.sh, by torchrun, or alone.

python main_jit.py --dataset digits --model JiT-Demo/8 --epochs 32                        train
python main_jit.py --evaluate_gen --resume DIR --num_images 5000                           evaluate
python main_jit.py --evaluate_gen --resume DIR --sweep_cfg 1.0:4.0:0.1 --sweep_ema 1,2     choose, then evaluate
python main_jit.py --sample --resume DIR --labels 0,1,2 --num_per_class 8 --seed 0         sample
"""

import os
import sys
import time
import traceback
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiser import Denoiser, LogitNormal
from engine_jit import Recipe, Training, build_optimizer, train_one_epoch, wrap
from util import checkpoint as ckpt
from util import config, provenance, sweep
from util.build import DenoiserConfig
from util.data import Images, build_dataset
from util.distributed import (
    World,
    agree,
    barrier,
    find_world,
    from_main,
    in_group,
    process_group,
    rank_from_environment,
    tell_torchrun,
)
from util.ema import EMA
from util.errors import NonFiniteError, UserError
from util.evaluation import Subject, evaluate_and_write, loggable, metric_line, precision_of, report_name
from util.flags import build_parser
from util.generation import Sampling, generate_all, setting_name
from util.held_out import hold_out, seen_before
from util.images import labelled_grid, save_png, to_pil
from util.learning_rate import peak_lr
from util.loader import GlobalBatchSampler, build_loader
from util.logger import LOG_NAME, RunLog
from util.metrics import MetricSuite, ensure_inception_weights, parse_metrics
from util.resume import init_notes, load_for_inference, load_for_training

# ---------------------------------------------------------------------------------------------------- preparation


def autocast_dtype(args: Namespace, world: World) -> torch.dtype | None:
    bf16 = args.precision == "bf16" or (args.precision == "auto" and world.device.type == "cuda")
    return torch.bfloat16 if bf16 else None


def open_dataset(args: Namespace) -> Images:
    dataset = build_dataset(args.dataset, args.data_path, args.img_size)
    if dataset.num_classes != args.class_num:
        raise UserError(
            f"{args.data_path or args.dataset} has {dataset.num_classes} classes and --class_num is {args.class_num}"
        )
    return dataset


def build_suite(args: Namespace, world: World, num_images: int) -> MetricSuite:
    """The metrics, with everything they need checked. Weights that must be fetched are fetched by rank 0 first."""
    try:
        names = parse_metrics(args.metrics)
        if not names:
            raise UserError("an evaluation without metrics: name some in --metrics, or train with --no-online_eval")
        if world.main and {"fid", "is"} & set(names):
            ensure_inception_weights(args.inception_weights)
        barrier(world)
        return MetricSuite(
            names, args.dataset, args.img_size, num_images, world.device, args.fid_stats, args.inception_weights
        )
    except UserError as error:
        if args.evaluate_gen:
            raise
        raise UserError(f"{error} (ONLINE_EVAL=0 or --no-online_eval trains without an evaluation)") from error


def class_names(args: Namespace) -> list[str]:
    if args.dataset == "cifar10":
        from util.cifar10 import CLASS_NAMES

        return list(CLASS_NAMES)
    return [str(i) for i in range(args.class_num)]


def spread_labels(count: int, class_num: int) -> list[int]:
    """`count` labels in order, over all classes: whole rows of a class where `count` is a multiple of them."""
    return [i * class_num // count for i in range(count)]


def grid_columns(labels: list[int]) -> int:
    """Images of a class in a row, where there are equally many of each; else about a square."""
    counts = {labels.count(label) for label in labels}
    per_class = counts.pop() if len(counts) == 1 else 1
    return per_class if per_class > 1 else max(1, round(len(labels) ** 0.5))


# -------------------------------------------------------------------------------------------------------- sampling


def draw_grid(
    denoiser: Denoiser, shape: DenoiserConfig, args: Namespace, labels: list[int], world: World, path: Path, title: str
) -> Tensor | None:
    """Generate images of `labels` and write a labelled grid; returns the images on rank 0, None elsewhere."""
    images = generate_all(denoiser, Sampling.from_args(args), labels, shape.image_shape, shape.null_class, world)
    if world.main:
        names = class_names(args)
        grid = labelled_grid(images, [names[label] for label in labels], grid_columns(labels), title)
        save_png(grid, path)
    return images


def load_denoiser(args: Namespace, saved: ckpt.Checkpoint, world: World):
    """The denoiser with the weights that --ema names, on the device."""
    shape = DenoiserConfig.from_args(args)
    denoiser = shape.build(autocast_dtype(args, world))
    ckpt.load_weights(denoiser, saved.weights[ckpt.CHOICES[args.ema]], saved.path)
    if world.main:
        print(f"{saved.path}: epoch {saved.epoch + 1}, {args.ema}, {args.model} at {args.img_size} px")
        print(f"Spectral Forcing {shape.describe_operator()}: {saved.sf_source}")
    return denoiser.to(world.device).eval(), shape


def run_sample(given: dict[str, Any], world: World) -> str:
    args, saved = load_for_inference(given, "sample")
    warn(config.check(args, evaluates=False), world)
    chosen = config.parse_labels(args.labels, args.class_num)
    labels = [label for label in chosen for _ in range(args.num_per_class)]
    denoiser, shape = load_denoiser(args, saved, world)
    sampling = Sampling.from_args(args)
    what = f"labels{args.labels or 'first'}x{args.num_per_class}".replace(",", "_")
    name = f"{setting_name(saved.epoch, args.ema, sampling)}-seed{args.seed}-{what}"
    folder = Path(args.output_dir) / "samples" / name
    with process_group(world):
        title = f"{args.model}  cfg {args.cfg:g}  {args.sampling_method} {args.num_sampling_steps}  seed {args.seed}"
        images = draw_grid(denoiser, shape, args, labels, world, folder / "grid.png", title)
    if world.main:
        for i, image in enumerate(images):
            save_png(to_pil(image), folder / f"{i:06d}.png")
        settings = {**sampling.describe(), "ema": args.ema, "labels": labels, "checkpoint": str(saved.path)}
        settings |= {"denoiser": asdict(shape), "precision": precision_of(denoiser)}
        provenance.write_json(folder / "settings.json", {**settings, **provenance.provenance(world.device)})
    return f"grid: {folder / 'grid.png'}   images: {folder}/000000.png to {len(labels) - 1:06d}.png"


# ------------------------------------------------------------------------------------------------------ evaluation


def run_evaluate(given: dict[str, Any], world: World) -> str:
    args, saved = load_for_inference(given, "evaluate_gen")
    warn(config.check(args, evaluates=True), world)
    plan, sampling, folder = sweep.Plan.from_args(args), Sampling.from_args(args), Path(args.output_dir)
    save_images = Path(args.save_images) if args.save_images else None
    with process_group(world):
        suites = [build_suite(args, world, n) for n in ([plan.images] if plan else []) + [args.num_images]]
        warn(list(dict.fromkeys(w for suite in suites for w in suite.warnings)), world)
        if plan:
            sweep.criterion(suites[0].names)  # refused before the weights are loaded
        denoiser, shape = load_denoiser(args, saved, world)

        def subject_of(ema: str) -> Subject:
            ckpt.load_weights(denoiser, saved.weights[ckpt.CHOICES[ema]], saved.path)
            return Subject(denoiser, shape, ema, saved.epoch, saved.path)

        if plan:
            report, products = sweep.run_sweep(
                plan, sampling, subject_of, suites, args.num_images, folder, world, save_images, args.keep_features
            )
        else:
            subject = Subject(denoiser, shape, args.ema, saved.epoch, saved.path)
            report, path = evaluate_and_write(
                subject, sampling, args.num_images, suites[0], folder / "eval", world, save_images, args.keep_features
            )
            products = [f"report: {path}"]
    return "   ".join([metric_line(report), *products])


# -------------------------------------------------------------------------------------------------------- training


def run_train(given: dict[str, Any], world: World) -> str:
    args, saved = load_for_training(given, world)
    warn(config.check(args, evaluates=args.online_eval), world)
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
    if args.start_epoch >= args.epochs:
        log.say(
            f"nothing to train: {args.start_epoch} of {args.epochs} epochs are done. EPOCHS raises their number, "
            f"RESUME={folder} EVALUATE_GEN=1 evaluates; what is there is in {folder}/samples and {folder}/eval"
        )
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
                save(training, epoch, args, log)
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


def save(training: Training, epoch: int, args: Namespace, log: RunLog) -> None:
    denoiser, (ema1, ema2) = training.denoiser, training.emas
    content = {
        "model": denoiser.state_dict(),
        "model_ema1": ema1.state_dict(denoiser),
        "model_ema2": ema2.state_dict(denoiser),
        "optimizer": training.optimizer.state_dict(),
        "epoch": epoch,
        "args": args,
        "run": {"commit": provenance.commit(), "versions": provenance.versions()},
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
        settings = {
            "project": args.wandb_project,
            "entity": args.wandb_entity,
            "name": args.wandb_run_name or config.run_name(args),
            "mode": args.wandb_mode,
            "config": vars(args),
        }
        return RunLog(folder, world, settings)
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be written: {error}") from error


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
    name = "config.json" if args.start_epoch == 0 else f"config-from-epoch{args.start_epoch + 1:04d}.json"
    content = {"args": vars(args), "resolved": resolved, **provenance.provenance(world.device)}
    provenance.write_json(folder / name, content)
    log.record("start", args.start_epoch * recipe.steps_per_epoch, resolved)
    log.say(
        f"{args.model} at {args.img_size} px, {parameters:,} parameters, on {world.size} x {world.device.type}"
        f"{f', {source}' if source else ''}\n"
        f"  Spectral Forcing {shape.describe_operator()}\n"
        f"  global batch {args.global_batch} = {args.batch_size} x {world.size} processes x {args.accum_iter} passes, "
        f"learning rate {recipe.peak_lr:.3g}, {recipe.steps_per_epoch} steps an epoch\n"
        f"  epochs {args.start_epoch + 1} to {args.epochs}, in {folder} ({name})\n"
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
                "what it samples is mostly the initial weights"
            )
    return found


def warn(warnings: list[str], world: World) -> None:
    if world.main:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ main


def run(argv: list[str] | None) -> str:
    given = vars(build_parser().parse_args(argv))
    world = find_world(given.get("device"))
    if given.get("evaluate_gen") and given.get("sample"):
        raise UserError("--evaluate_gen and --sample are two things to do: give one of them")
    alone = [f"--{name}" for name in (*sweep.FLAGS, "save_images") if name in given and not given.get("evaluate_gen")]
    if alone:
        raise UserError(f"{', '.join(alone)}: only with --evaluate_gen, which evaluates the checkpoint in --resume")
    if given.get("sample"):
        return run_sample(given, world)
    if given.get("evaluate_gen"):
        return run_evaluate(given, world)
    return run_train(given, world)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for an error that a sentence explains, 1 for one that none explains, 130 after Ctrl-C."""
    rank = rank_from_environment()
    try:
        line = run(argv)
    except UserError as error:
        alone = in_group() and not isinstance(error, NonFiniteError)
        if rank and not alone:
            time.sleep(5)  # every process has this error: rank 0 says it, and torchrun ends the others
        print(f"main_jit.py: error: {error}", file=sys.stderr, flush=True)
        tell_torchrun(str(error))
        return 2
    except Exception as error:
        traceback.print_exc()
        tell_torchrun(f"process {rank}: {type(error).__name__}: {error}")
        return 1
    except KeyboardInterrupt:
        print("interrupted; a run goes on from its last checkpoint when it is started again", file=sys.stderr)
        return 130
    if rank == 0 and line:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    exit_code = main()
    if in_group():  # failed where others may wait for this process: no destructor may wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
