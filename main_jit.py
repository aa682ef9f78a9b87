"""Train, evaluate or sample a JiT behind Spectral Forcing. Started by run_jit_multinode.sh, by torchrun, or alone.

python main_jit.py --dataset digits --model JiT-Demo/8 --epochs 32                        train
python main_jit.py --evaluate_gen --resume DIR --num_images 5000                           evaluate
python main_jit.py --evaluate_gen --resume DIR --sweep_cfg 1.0:4.0:0.1 --sweep_ema 1,2     sweep, then evaluate
python main_jit.py --sample --resume DIR --labels 0,1,2 --num_per_class 8 --seed 0         sample
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import engine_jit
from denoiser import Denoiser
from util.build import autocast_dtype, build_denoiser, denoiser_settings, describe_operators
from util.checkpoint.published import Checkpoint, load_weights
from util.compile import check_compiler, compile_denoiser, prepare_device
from util.config import SweepConfig, check, parse_args, parse_labels
from util.cpu_layers import speed_up_on_cpu
from util.dist.context import (
    DistContext,
    assert_same_across_ranks,
    find_context,
    process_group,
    raise_on_all_ranks,
    run_on_rank0,
)
from util.dist.worker import run_main
from util.errors import UserError
from util.evaluation.evaluate import EvalTarget, build_suite, evaluate_and_write, loggable, metric_line, weights_hash
from util.evaluation.generate import sample_grid, sampling_settings, setting_name
from util.evaluation.images import save_png, to_pil
from util.evaluation.metrics import MetricSuite
from util.evaluation.sweep import plan_sweep, run_sweep
from util.io import json_hash, make_folder, provenance, write_json
from util.log import WANDB_ID_NAME, RunLog, wandb_settings, warn
from util.resume import load_for_inference
from util.schedules import spectrum_warnings

LONGEST = 60  # text of --labels in the name of a folder; a longer one is hashed


def load_denoiser(config: Any, checkpoint: Checkpoint, ctx: DistContext) -> Denoiser:
    """Return the denoiser with the weights that --ema names, on the device."""
    denoiser = build_denoiser(config, autocast_dtype(config, ctx.device))
    load_weights(denoiser, checkpoint.state(config.ema), checkpoint.path)
    if ctx.is_main:
        at = f"step {checkpoint.run['step']}, in epoch {checkpoint.epoch + 2}" if checkpoint.at else ""
        at = at or f"epoch {checkpoint.epoch + 1}"
        print(f"{checkpoint.path}: {at}, {config.ema}, {config.model} at {config.img_size} px")
        print(f"{describe_operators(config)} ({checkpoint.sf_source})")
    denoiser.to(ctx.device).eval()
    if ctx.device.type == "cpu":
        speed_up_on_cpu(denoiser)
    if config.evaluate_gen:  # a few samples are done sooner than a compilation
        compile_denoiser(denoiser, config.compile, ctx.device)
    return denoiser


def run_sample(given: Mapping[str, Any], ctx: DistContext) -> str:
    """Sample --labels; write a labelled grid and a PNG per image."""
    config, checkpoint = load_for_inference(given, "sample")
    warn([*checkpoint.notes, *check(config, evaluates=False), *spectrum_warnings(config)], ctx)
    labels = [k for k in parse_labels(config.labels, config.class_num) for _ in range(config.num_per_class)]
    denoiser = load_denoiser(config, checkpoint, ctx)
    what = (config.labels or "first").replace(",", "_")
    what = f"labels{what if len(what) <= LONGEST else json_hash(labels)}x{config.num_per_class}"
    name = f"{setting_name(config, checkpoint.epoch)}{checkpoint.at}-seed{config.seed}-{what}"
    folder = Path(config.output_dir) / "samples" / name
    title = f"{config.model}  cfg {config.cfg:g}  {config.sampling_method} {config.num_sampling_steps}"
    with process_group(ctx, config.dist_timeout):
        assert_same_across_ranks("checkpoint", checkpoint.identity, ctx)
        run_on_rank0(ctx, lambda: make_folder(folder.parent))
        try:
            images = sample_grid(denoiser, config, labels, ctx, folder / "grid.png", f"{title}  seed {config.seed}")
            if ctx.is_main:
                for i, image in enumerate(images):
                    save_png(to_pil(image), folder / f"{i:06d}.png")
                settings = {**sampling_settings(config), "ema": config.ema, "labels": labels}
                settings |= {"checkpoint": str(checkpoint.path), "denoiser": denoiser_settings(config)}
                settings["precision"] = str(denoiser.autocast_dtype or "float32").removeprefix("torch.")
                write_json(folder / "settings.json", {**settings, **provenance(ctx.device)})
        except OSError as error:
            raise UserError(f"The samples cannot be written to {folder}: {error}.") from error
    return f"grid: {folder / 'grid.png'}   images: {folder}/000000.png to {len(labels) - 1:06d}.png"


def run_evaluate(given: Mapping[str, Any], ctx: DistContext) -> str:
    """Evaluate a checkpoint, after a sweep over guidance and EMA where one is asked for."""
    config, checkpoint = load_for_inference(given, "evaluate_gen")
    warn([*checkpoint.notes, *check(config, evaluates=True), *spectrum_warnings(config)], ctx)
    warn(check_compiler(config.compile, ctx.device), ctx)
    points, folder, weights = plan_sweep(config), Path(config.output_dir), weights_hash(checkpoint.path)
    with process_group(ctx, config.dist_timeout):
        counts = [points[0].num_images, config.num_images] if points else [config.num_images]
        suites: list[MetricSuite] = []
        for count in counts:
            suites.append(build_suite(config, ctx, count, *suites))
        warn(dict.fromkeys(warning for suite in suites for warning in suite.warnings), ctx)
        assert_same_across_ranks("checkpoint", checkpoint.identity, ctx)
        denoiser = raise_on_all_ranks(ctx, lambda: load_denoiser(config, checkpoint, ctx))

        def target_of(settings: Any) -> EvalTarget:
            load_weights(denoiser, checkpoint.state(settings.ema), checkpoint.path)
            return EvalTarget(denoiser, settings, checkpoint.epoch, checkpoint.path, checkpoint.at, weights)

        if points:
            report, products = run_sweep(points, config, target_of, suites, folder, ctx)
        else:
            report, path = evaluate_and_write(target_of(config), suites[0], folder / "eval", ctx)
            products = [f"report: {path}"]
    tracked = (folder / WANDB_ID_NAME).exists() and config.wandb_mode != "disabled"
    if ctx.is_main and (tracked or config.tensorboard):
        try:  # continues the training run's
            wandb = wandb_settings(config, folder.name) if tracked else {"mode": "disabled"}
            log = RunLog(folder, ctx, wandb, tensorboard=config.tensorboard)
            log.log("eval", checkpoint.run.get("step", checkpoint.epoch + 1), loggable(report))
            log.close()
        except UserError as error:  # the report exists all the same
            warn([f"the evaluation is not logged: {error}"], ctx)
    return "   ".join([metric_line(report), *products])


def check_tasks(given: Mapping[str, Any]) -> None:
    """Refuse flags of two tasks at once, and flags of an evaluation without one."""
    if given.get("evaluate_gen") and given.get("sample"):
        raise UserError("--evaluate_gen and --sample are mutually exclusive.")
    only_evaluating = [*(field.name for field in dataclasses.fields(SweepConfig)), "save_images"]
    alone = [f"--{name}" for name in only_evaluating if name in given and not given.get("evaluate_gen")]
    if alone:
        raise UserError(f"{', '.join(alone)} requires --evaluate_gen, which evaluates the checkpoint in --resume.")


def check_start(given: Mapping[str, Any], ctx: DistContext) -> None:
    """Check what a start with these flags would, before it computes: settings, files, data. Raises UserError."""
    check_tasks(given)
    if given.get("sample") or given.get("evaluate_gen"):
        task = "sample" if given.get("sample") else "evaluate_gen"
        config, _ = load_for_inference(given, task)
        warn(check(config, evaluates=task == "evaluate_gen"), ctx)
        parse_labels(config.labels, config.class_num)
        plan_sweep(config)
        if task == "evaluate_gen":
            warn(build_suite(config, dataclasses.replace(ctx, world_size=1), config.num_images).warnings, ctx)
    else:
        config, *_ = engine_jit.open_run(given, ctx)
        if config.online_eval:
            engine_jit.build_online_suite(config, dataclasses.replace(ctx, world_size=1))


def run(argv: Sequence[str] | None = None) -> str:
    """Do what the flags ask for. Return the last line to print."""
    given = parse_args(argv)
    ctx = find_context(given.get("device"))
    prepare_device(ctx.device)
    check_tasks(given)
    if given.get("sample"):
        return run_sample(given, ctx)
    if given.get("evaluate_gen"):
        return run_evaluate(given, ctx)
    return engine_jit.train(given, ctx)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 0, 2 for an error that a sentence explains, 1 for any other, 130 after a second
    Ctrl-C, 75 if asked to stop (the same command resumes).
    """
    return run_main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
