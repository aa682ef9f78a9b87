"""Which checkpoint a call starts from, and the settings that follow from it and from the flags."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from util import checkpoint, config
from util.checkpoint import Checkpoint
from util.distributed import World
from util.errors import UserError

ARCHITECTURE = ("model", "img_size", "class_num")


def load_for_inference(given: Mapping[str, Any], what: str) -> tuple[Namespace, Checkpoint]:
    """Settings and checkpoint of an evaluation or of sampling; `what` is the flag that asked for it.

    Raises:
        UserError: no folder named, no checkpoint in it, flags that contradict it.
    """
    folder = given.get("resume") or given.get("output_dir")
    if folder is None:
        raise UserError(f"--{what} needs a trained model: name its folder with --resume (RESUME in the launcher)")
    saved = checkpoint.load(folder, given.get("checkpoint"))
    args = config.resolve(given, saved.args, training=False)
    args.resume, args.output_dir = folder, given.get("output_dir") or folder
    return args, saved


def load_for_training(given: Mapping[str, Any], world: World) -> tuple[Namespace, Checkpoint | None]:
    """Settings and checkpoint of a training run; no checkpoint for a fresh one.

    A checkpoint in the output folder wins, so that a requeued job goes on; --resume only starts a run.

    Raises:
        UserError: a folder to resume without a checkpoint, flags that contradict it.
    """
    resume, output, init = given.get("resume"), given.get("output_dir"), given.get("init_from")
    if "checkpoint" in given:
        raise UserError(
            "--checkpoint chooses what to evaluate or sample; training goes on from the newest one, and to go back, "
            "put another in its place"
        )
    if resume and init:
        raise UserError("--resume goes on with a run and --init_from starts another one: give one of the two")
    saved, bound = None, None
    if output is not None and checkpoint.find(output):
        saved = checkpoint.load(output)
    elif resume is not None and (
        checkpoint.find(resume) or output is None or Path(resume).resolve() != Path(output).resolve()
    ):
        saved = checkpoint.load(resume)
    elif init is not None:
        bound = config.resolve(given, checkpoint.load(init).args, training=False, only=ARCHITECTURE)
    args = bound or config.resolve(given, saved.args if saved else None, training=True)
    config.split_global_batch(args, world.size)
    args.resume, args.output_dir = resume, output or str(Path("output") / config.run_name(args))
    if output is None and checkpoint.find(args.output_dir):
        return load_for_training({**given, "output_dir": args.output_dir}, world)
    if saved and given.get("start_epoch", saved.epoch + 1) != saved.epoch + 1:
        note = f"--start_epoch has no effect on a run that goes on: {saved.path} is of {saved.epoch + 1} epochs"
        saved = replace(saved, notes=(*saved.notes, note))
    args.start_epoch = saved.epoch + 1 if saved else args.start_epoch
    return args, saved


def start_step(saved: Checkpoint | None, start_epoch: int, steps_per_epoch: int) -> int:
    """The step, counted from 0, at which training starts; with a checkpoint of ours perhaps in the middle of an epoch.

    Raises:
        UserError: the steps of an epoch are not those that the checkpoint was made with.
    """
    step = saved.run.get("step") if saved else None
    if step is None:
        return start_epoch * steps_per_epoch
    if step // steps_per_epoch != start_epoch or saved.run.get("steps_per_epoch", steps_per_epoch) != steps_per_epoch:
        raise UserError(
            f"{saved.path} is of step {step} after {start_epoch} whole epochs, and an epoch now has {steps_per_epoch} "
            "steps: the data set is another one than the run was trained on. --init_from starts a new run on it"
        )
    return step


def init_notes(args: Namespace, init: Checkpoint) -> list[str]:
    """What a run that starts from another one's weights computes differently from that one, as warnings."""
    names = ("disable_dct_patchify", "window_size", "pred_param", "noise_scale")
    return [
        f"--init_from: those weights were trained with {name} {init.args[name]}, and this run has {getattr(args, name)}"
        for name in names
        if name in init.args and init.args[name] != getattr(args, name)
    ]
