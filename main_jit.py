"""Train, evaluate or sample a JiT behind Spectral Forcing. Started by run_jit_multinode.sh, by torchrun, or alone.

python main_jit.py --dataset digits --model JiT-Demo/8 --epochs 32                        train
python main_jit.py --evaluate_gen --resume DIR --num_images 5000                           evaluate
python main_jit.py --evaluate_gen --resume DIR --sweep_cfg 1.0:4.0:0.1 --sweep_ema 1,2     choose, then evaluate
python main_jit.py --sample --resume DIR --labels 0,1,2 --num_per_class 8 --seed 0         sample
"""

import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from denoiser import Denoiser
from util import checkpoint as ckpt
from util import config, preemption, provenance, sweep, watch
from util.acceleration import check_compiler, compile_network, pad_swiglu, prepare_device, resolve
from util.build import DenoiserConfig
from util.distributed import (
    World,
    agree,
    everywhere_or_nowhere,
    find_world,
    in_group,
    launched_by_torchrun,
    process_group,
    rank_from_environment,
    tell_torchrun,
)
from util.errors import UserError
from util.evaluation import Subject, evaluate_and_write, loggable, metric_line, precision_of
from util.flags import build_parser
from util.generation import Sampling, setting_name
from util.images import save_png, to_pil
from util.logger import WANDB_ID_NAME, RunLog, wandb_settings
from util.preparation import autocast_dtype, build_suite, draw_grid, warn
from util.resume import load_for_inference
from util.training_run import run_train

INTERRUPTED = (
    "interrupted; the same command goes on: training from its last checkpoint (--save_last_freq), if there is one yet, "
    "an evaluation with the images that it lacks"
)


def load_denoiser(args: Namespace, saved: ckpt.Checkpoint, world: World) -> tuple[Denoiser, DenoiserConfig]:
    """The denoiser with the weights that --ema names, on the device."""
    shape = DenoiserConfig.from_args(args)
    denoiser = shape.build(autocast_dtype(args, world))
    ckpt.load_weights(denoiser, saved.weights[ckpt.CHOICES[args.ema]], saved.path)
    if world.main:
        when = f"step {saved.run['step']}, in epoch {saved.epoch + 2}" if saved.at else f"epoch {saved.epoch + 1}"
        print(f"{saved.path}: {when}, {args.ema}, {args.model} at {args.img_size} px")
        print(f"Spectral Forcing {shape.describe_operator()}: {saved.sf_source}")
    pad_swiglu(denoiser, args.pad_swiglu)
    if args.evaluate_gen:  # a few samples are there before a compiler is
        compile_network(denoiser, resolve(args.compile, world.device))
    return denoiser.to(world.device).eval(), shape


def run_sample(given: Mapping[str, Any], world: World) -> str:
    args, saved = load_for_inference(given, "sample")
    warn([*saved.notes, *config.check(args, evaluates=False)], world)
    chosen = config.parse_labels(args.labels, args.class_num)
    labels = [label for label in chosen for _ in range(args.num_per_class)]
    denoiser, shape = load_denoiser(args, saved, world)
    sampling = Sampling.from_args(args)
    what = f"labels{args.labels or 'first'}x{args.num_per_class}".replace(",", "_")
    name = f"{setting_name(saved.epoch, args.ema, sampling)}{saved.at}-seed{args.seed}-{what}"
    folder = Path(args.output_dir) / "samples" / name
    with process_group(world, args.dist_timeout):
        agree("checkpoint", (saved.path.name, saved.epoch, saved.run.get("step")), world)
        title = f"{args.model}  cfg {args.cfg:g}  {args.sampling_method} {args.num_sampling_steps}  seed {args.seed}"
        images = draw_grid(denoiser, shape, args, labels, world, folder / "grid.png", title, may_stop=True)
    if world.main:
        for i, image in enumerate(images):
            save_png(to_pil(image), folder / f"{i:06d}.png")
        settings = {**sampling.describe(), "ema": args.ema, "labels": labels, "checkpoint": str(saved.path)}
        settings |= {"denoiser": shape.settings(), "precision": precision_of(denoiser)}
        provenance.write_json(folder / "settings.json", {**settings, **provenance.provenance(world.device)})
    return f"grid: {folder / 'grid.png'}   images: {folder}/000000.png to {len(labels) - 1:06d}.png"


# ------------------------------------------------------------------------------------------------------ evaluation


def run_evaluate(given: Mapping[str, Any], world: World) -> str:
    args, saved = load_for_inference(given, "evaluate_gen")
    warn([*saved.notes, *config.check(args, True), *check_compiler(args.compile, world.device)], world)
    plan, sampling, folder = sweep.Plan.from_args(args), Sampling.from_args(args), Path(args.output_dir)
    save_images = Path(args.save_images) if args.save_images else None
    with process_group(world, args.dist_timeout):
        suites = [build_suite(args, world, n) for n in ([plan.images] if plan else []) + [args.num_images]]
        warn(list(dict.fromkeys(w for suite in suites for w in suite.warnings)), world)
        if plan:
            sweep.criterion(suites[0].names)  # refused before the weights are loaded
        agree("checkpoint", (saved.path.name, saved.epoch, saved.run.get("step")), world)
        denoiser, shape = everywhere_or_nowhere(world, lambda: load_denoiser(args, saved, world))

        def subject_of(ema: str) -> Subject:
            ckpt.load_weights(denoiser, saved.weights[ckpt.CHOICES[ema]], saved.path)
            return Subject(denoiser, shape, ema, saved.epoch, saved.path, saved.at)

        if plan:
            report, products = sweep.run_sweep(
                plan, sampling, subject_of, suites, args.num_images, folder, world, save_images, args.keep_features
            )
        else:
            subject = Subject(denoiser, shape, args.ema, saved.epoch, saved.path, saved.at)
            report, path = evaluate_and_write(
                subject, sampling, args.num_images, suites[0], folder / "eval", world, save_images, args.keep_features
            )
            products = [f"report: {path}"]
    if world.main and (folder / WANDB_ID_NAME).exists() and args.wandb_mode != "disabled":
        log = RunLog(folder, world, wandb_settings(args, folder.name))  # the run's own, which goes on
        log.record("eval", saved.run.get("step", saved.epoch + 1), loggable(report))
        log.close()
    return "   ".join([metric_line(report), *products])


def run(argv: list[str] | None) -> str:
    given = vars(build_parser().parse_args(argv))
    world = find_world(given.get("device"))
    prepare_device(world.device)
    if given.get("cuda_graph") and world.device.type != "cuda":
        raise UserError("--cuda_graph is for CUDA devices, and this is the CPU")
    if given.get("evaluate_gen") and given.get("sample"):
        raise UserError("--evaluate_gen and --sample are two things to do: give one of them")
    alone = [f"--{name}" for name in (*sweep.FLAGS, "save_images") if name in given and not given.get("evaluate_gen")]
    if alone:
        raise UserError(f"{', '.join(alone)}: only with --evaluate_gen, which evaluates the checkpoint in --resume")
    warn(config.without_effect(given), world)
    if given.get("sample"):
        return run_sample(given, world)
    if given.get("evaluate_gen"):
        return run_evaluate(given, world)
    return run_train(given, world)


def main(argv: list[str] | None = None) -> int:
    """The exit code for who has started this process: 0, 2 for an error that a sentence explains, 1 for one that none
    explains, 130 after a second Ctrl-C, 75 when asked to stop (`util.preemption`, which tells the launcher).
    """
    rank = rank_from_environment()
    alone = not launched_by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1
    preemption.listen()
    try:
        line = run(argv)
        if rank == 0 and line:
            print(line, flush=True)
        return preemption.end_process(0, alike=True)
    except preemption.Preempted as stop:
        if rank == 0:
            print(f"main_jit.py: {stop}", file=sys.stderr, flush=True)
        if code := preemption.end_process(preemption.EXIT_CODE, alike=True):
            tell_torchrun(str(stop))
        return code
    except UserError as error:
        watch.explain(error)
        code = preemption.end_process(2, alike=error.everywhere or alone)
        if code and rank and (error.everywhere or not in_group()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # every process has this error: rank 0 says it, and torchrun ends the others
        if code or rank == 0:
            print(f"main_jit.py: error: {error}", file=sys.stderr, flush=True)
        if code:
            tell_torchrun(str(error))
        return code
    except Exception as error:
        traceback.print_exc()
        lost = watch.explain(error)  # which process, where the error says no more than that one is lost
        if lost:
            print(f"main_jit.py: process {rank} ends: {lost}", file=sys.stderr, flush=True)
        tell_torchrun(lost or f"process {rank}: {type(error).__name__}: {error}")
        return preemption.end_process(1, alike=False)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return preemption.end_process(130, alike=False)
    finally:
        preemption.stop_listening()


if __name__ == "__main__":
    exit_code = main()
    if in_group():  # failed where others may wait for this process: no destructor may wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
