"""Which checkpoint a call starts from, and the configuration that follows from it and from the flags."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from util.checkpoint.files import find
from util.checkpoint.published import Checkpoint, load
from util.config import resolve, run_name, split_global_batch
from util.dist.context import DistContext
from util.errors import UserError
from util.flags import LOCKED, flags_of
from util.operators import BLOCK_OPERATORS, INPUT_OPERATORS
from util.schedules import record_spectrum

ARCHITECTURE = ("model", "img_size", "class_num")


def load_for_inference(given: Mapping[str, Any], task: str) -> tuple[Any, Checkpoint]:
    """Return configuration and checkpoint of an evaluation or of sampling; `task` is the flag that asked for it.

    Raises:
        UserError: no folder, no checkpoint in it, flags that contradict it.
    """
    folder = given.get("resume") or given.get("output_dir")
    if folder is None:
        raise UserError(f"--{task} needs a trained model; name its folder with --resume (RESUME in the launcher).")
    checkpoint = load(folder, given.get("checkpoint")).with_operator(given)
    require_architecture(given, checkpoint)
    config = resolve(given, checkpoint.args, training=False)
    if "model" not in checkpoint.args:  # weights alone, of whose training the flags say what matters
        config = record_spectrum(config, None)
    return replace(config, resume=folder, output_dir=given.get("output_dir") or folder), checkpoint


def require_architecture(given: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise a UserError if neither the checkpoint, as one of weights alone, nor the flags say what network it is."""
    if missing := [f"--{name}" for name in ARCHITECTURE if name not in given and name not in checkpoint.args]:
        raise UserError(f"{checkpoint.path} holds weights without settings: give {', '.join(missing)} as well.")


def load_for_training(given: Mapping[str, Any], ctx: DistContext) -> tuple[Any, Checkpoint | None, Checkpoint | None]:
    """Return configuration, checkpoint to resume (or None) and checkpoint to start a new run from (or None).

    A checkpoint in the output folder wins, so that a requeued job resumes; --resume only starts a run.

    Raises:
        UserError: a folder to resume without a checkpoint, flags that contradict it.
    """
    resume, output, init = given.get("resume"), given.get("output_dir"), given.get("init_from")
    if "checkpoint" in given:
        raise UserError(
            "--checkpoint chooses what to evaluate or sample; training resumes from the newest checkpoint. "
            "To go back, put an earlier file in its place."
        )
    if resume and init:
        raise UserError("--resume continues a run and --init_from starts another one; they are mutually exclusive.")
    checkpoint = None
    if output is not None and find(output):
        checkpoint = load(output)
    elif resume is not None:
        own = output is not None and Path(resume).resolve() == Path(output).resolve()
        if find(resume) or not own:  # a new run may name its own folder, which has none yet
            checkpoint = load(resume)
    if checkpoint is not None and ("model" not in checkpoint.args or (checkpoint.epoch < 0 and not checkpoint.run)):
        raise UserError(
            f"{checkpoint.path} cannot be resumed: it lacks its settings or its epoch. --init_from {checkpoint.path} "
            "starts a new run from its weights, in another --output_dir."
        )
    source = None
    if init and checkpoint is None:
        source = load(Path(init).parent, Path(init).name) if Path(init).is_file() else load(init)
        require_architecture(given, source)
    if source is not None:
        config = resolve(given, source.args, training=False, only=(*ARCHITECTURE, *_block_settings(source.args)))
    else:
        config = resolve(given, checkpoint.args if checkpoint else None, training=True)
    config = record_spectrum(split_global_batch(config, ctx.world_size), checkpoint.args if checkpoint else None)
    config = replace(config, resume=resume, output_dir=output or str(Path(config.output_root) / run_name(config)))
    if output is None and find(config.output_dir):
        return load_for_training({**given, "output_dir": config.output_dir}, ctx)
    if checkpoint is not None:
        epochs = checkpoint.epoch + 1
        if given.get("start_epoch", epochs) != epochs:
            note = f"--start_epoch has no effect: {checkpoint.path} has finished {epochs} epochs"
            checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
        config = replace(config, start_epoch=epochs)
    return config, checkpoint, source


def _block_settings(args: Mapping[str, Any]) -> list[str]:
    """Flags of further layers that a model was trained with: a run that starts from it must have them too."""
    names = []
    if args.get("resolution_schedule", "off") != "off":
        names += ["resolution_schedule", "resolution_levels"]
    for entry in BLOCK_OPERATORS.values():
        flags = flags_of(entry.settings)
        if any(args.get(name, field.default) != field.default for name, field in flags.items()):
            names += flags
    return names


def start_step(checkpoint: Checkpoint | None, start_epoch: int, steps_per_epoch: int) -> int:
    """Return the step, counted from 0, at which training starts; it may be in the middle of an epoch.

    Raises:
        UserError: an epoch has another number of steps than the checkpoint was made with.
    """
    step = checkpoint.run.get("step") if checkpoint else None
    if step is None:
        return start_epoch * steps_per_epoch
    saved = checkpoint.run.get("steps_per_epoch", steps_per_epoch)
    if step // steps_per_epoch != start_epoch or saved != steps_per_epoch:
        raise UserError(
            f"{checkpoint.path} is at step {step} after {start_epoch} epochs, but an epoch now has {steps_per_epoch} "
            "steps: the data set has changed. --init_from starts a new run on it."
        )
    return step


def init_warnings(config: Any, source: Checkpoint) -> list[str]:
    """Return warnings on locked settings in which a new run differs from the one whose weights it starts from."""
    names = ["pred_param", "noise_scale", "input_operator"]
    for entry in INPUT_OPERATORS.values():
        names += [name for name, field in flags_of(entry.settings).items() if field.metadata["lock"] == LOCKED]
    return [
        f"--init_from: those weights were trained with {name} {source.args[name]}, this run has {getattr(config, name)}"
        for name in names
        if name in source.args and source.args[name] != getattr(config, name)
    ]
