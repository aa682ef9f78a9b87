"""From flags and a checkpoint to one resolved set of settings, refused before any work if it cannot be.

What was given on the command line and what the checkpoint says are kept apart until here (util/flags.py says which of
the two holds). The result is written to the run's folder as JSON.
"""

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from model_jit import JiT_models, inner_width
from util import schedules
from util.acceleration import MULTIPLE
from util.data import IN_MEMORY, KNOWN
from util.errors import UserError
from util.flags import ALWAYS, DEFAULTS, FLAGS, OWN, SECTIONS, TRAINING

NEWER = (  # newer than names of runs: at their defaults they are no part of one
    *("val_split", "t_sampler", "t_uniform_mix", "spectral_variant", "spectral_delta"),
    *("sf_schedule", "sf_alpha", "sf_snr_floor", "warmup_steps", "beta1", "beta2", "grad_clip"),
    *("spectral_residual", "spectral_residual_scale"),
)
NEEDED_BY = {
    "sample": ("labels", "num_per_class"),
    "evaluate_gen": ("keep_features",),
    "init_from": ("init_weights",),
}
AT_LEAST = {
    0: (
        *("seed", "start_epoch", "num_workers", "warmup_epochs", "warmup_steps", "weight_decay", "min_lr", "lr", "blr"),
        *("save_every_steps", "save_every_minutes", "keep_every_epochs", "skip_nonfinite"),
    ),
    1: (
        *("epochs", "batch_size", "global_batch", "accum_iter", "class_num", "img_size"),
        *("num_sampling_steps", "num_images", "gen_bsz", "num_per_class", "wandb_num_vis"),
        *("eval_freq", "save_last_freq", "log_freq", "val_images", "val_freq"),
        "keep_last",
    ),
}


def resolve(
    given: Mapping[str, Any], saved: Mapping[str, Any] | None, training: bool, only: tuple[str, ...] | None = None
) -> Namespace:
    """One value for each flag: what was given, else what the checkpoint has, else the default.

    Args:
        given: the flags on the command line.
        saved: `args` of the checkpoint, None without one.
        training: whether training goes on from it (else it is evaluated or sampled).
        only: take these flags alone from the checkpoint.

    Raises:
        UserError: flags that contradict the checkpoint, all of them named; or each other.
    """
    values, contradictions = {**DEFAULTS, **given}, []
    if saved is not None:  # one that is silent on an option is older than it, and was trained without it
        silent = {name: DEFAULTS[name] for name in NEWER if name != "val_split"}  # that is util/held_out.py's to refuse
        saved = {**silent, **saved}
    recorded = saved if saved is not None and only is None else {}
    values |= {name: recorded.get(name) for name in schedules.RECORDED}
    for name, value in (saved or {}).items():
        flag = FLAGS.get(name)
        if flag is None or flag.bound == OWN or (only is not None and name not in only):
            continue
        if name not in given:
            values[name] = value
        elif given[name] != value and (
            flag.bound == ALWAYS or (flag.bound == TRAINING and training and _trains(name, saved["t_sampler"]))
        ):
            contradictions.append(f"--{name} {given[name]} (the checkpoint was trained with {value})")
    if contradictions:
        raise UserError("flags that contradict the checkpoint: " + ", ".join(contradictions) + "; leave them out")
    if "warmup_epochs" in given and "warmup_steps" in given:
        raise UserError("--warmup_epochs (WARMUP_EPOCHS) and --warmup_steps: give one of the two")
    return _complete(Namespace(**values))


def _trains(name: str, t_sampler: str) -> bool:
    """Whether a flag has a part in training: the spectral ones may be about the grid of samples alone."""
    return name not in ("spectral_variant", "spectral_delta") or schedules.spectral(t_sampler)


def _complete(args: Namespace) -> Namespace:
    """Choices and ranges checked, and defaults that depend on the data set."""
    for name, flag in FLAGS.items():
        if flag.choices and getattr(args, name) not in flag.choices:
            raise UserError(f"--{name} {getattr(args, name)} must be one of {', '.join(flag.choices)}")
    for name, value in of_data_set(args.dataset).items():
        if getattr(args, name) in (None, ""):
            setattr(args, name, value)
    for lowest, names in AT_LEAST.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not value >= lowest:
                raise UserError(f"--{name} {value} must be at least {lowest}")
    if not 0 < args.dist_timeout < float("inf"):
        raise UserError(f"--dist_timeout {args.dist_timeout} must be a number of minutes above 0")
    if args.seed >= 2**64:
        raise UserError(f"--seed {args.seed} must be below 2^64")
    return args


def of_data_set(name: str) -> dict[str, Any]:
    """The defaults that depend on the data set."""
    known, digits = KNOWN[name], name == "digits"
    sizes = {"img_size": known.img_size, "class_num": known.class_num}
    return {**sizes, "flip": not digits, "metrics": "class_agreement" if digits else "fid,is"}


def check(args: Namespace, evaluates: bool) -> list[str]:
    """Refuse settings that cannot work, before anything is built. Returns warnings.

    Args:
        evaluates: whether `num_images` images will be generated for metrics.
    """
    if args.model not in JiT_models:
        raise UserError(f"unknown model {args.model!r}; known: {', '.join(JiT_models)}")
    patch = JiT_models[args.model].keywords["patch_size"]
    if args.img_size % patch:
        raise UserError(f"--img_size {args.img_size} is not divisible by the patch size {patch} of {args.model}")
    sf = not args.disable_dct_patchify
    if sf and args.window_size is not None and (args.window_size < 2 or args.img_size % args.window_size):
        raise UserError(
            f"--window_size {args.window_size} must be at least 2 and divide the image size {args.img_size}"
        )
    if not 0 < args.spectral_residual_scale < math.inf:
        raise UserError(f"--spectral_residual_scale {args.spectral_residual_scale} must be a positive number")
    for name in ("attn_dropout", "proj_dropout", "label_drop_prob", "ema_decay1", "ema_decay2"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)} must be between 0 and 1")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 0 and below 1")
    if not 0 <= args.interval_min <= args.interval_max <= 1:
        raise UserError(
            f"the guidance interval ({args.interval_min}, {args.interval_max}) must satisfy 0 <= min <= max <= 1"
        )
    if evaluates and args.num_images % args.class_num:
        enough = -(-args.num_images // args.class_num) * args.class_num
        raise UserError(
            f"--num_images {args.num_images} is not a multiple of the {args.class_num} classes: "
            f"an evaluation needs equally many images of each class, as {enough} are "
            "(--no-online_eval, or ONLINE_EVAL=0, trains without)"
        )
    if args.grad_clip is not None and not args.grad_clip > 0:
        raise UserError(f"--grad_clip {args.grad_clip} must be above 0")
    if args.cuda_graph and args.parallel == "fsdp" and not (args.evaluate_gen or args.sample):
        raise UserError("--cuda_graph is for a network that is whole on each process: not with --parallel fsdp")
    warnings = schedules.check(args)
    width = inner_width(JiT_models[args.model].keywords["hidden_size"])
    if args.pad_swiglu and width % MULTIPLE == 0:
        warnings.append(f"--pad_swiglu has no effect on {args.model}, whose inner width {width} is a multiple of 8")
    if not sf and (args.disable_dct_scale_schedule or args.window_size is not None or args.sf_schedule != "linear"):
        warnings.append("Spectral Forcing is off (--disable_dct_patchify): its other flags have no effect")
    if sf and args.dct_fixed_scale != DEFAULTS["dct_fixed_scale"] and not args.disable_dct_scale_schedule:
        warnings.append("--dct_fixed_scale has no effect without --disable_dct_scale_schedule")
    if args.spectral_residual == "off" and args.spectral_residual_scale != DEFAULTS["spectral_residual_scale"]:
        warnings.append("--spectral_residual_scale has no effect without --spectral_residual")
    if args.on_bad_image != DEFAULTS["on_bad_image"] and args.dataset in IN_MEMORY:
        warnings.append(f"--on_bad_image has no effect on {args.dataset}, whose images are not read from files")
    return warnings


def without_effect(given: Mapping[str, Any]) -> list[str]:
    """Warnings about flags that were given, and do nothing without another one that was not."""
    return [
        f"--{name} has no effect without --{needed}"
        for needed, names in NEEDED_BY.items()
        if not given.get(needed)
        for name in names
        if name in given
    ]


def parse_labels(text: str | None, class_num: int) -> list[int]:
    """Classes in "0,1,2" or "0-9" or a mixture; the first ten by default."""
    labels: list[int] = []
    try:
        for part in (text or f"0-{min(class_num, 10) - 1}").split(","):
            first, _, last = part.strip().partition("-")
            labels += range(int(first), int(last or first) + 1)
    except ValueError:
        raise UserError(f"--labels {text!r} must be class numbers such as 0,1,2 or 0-9") from None
    outside = [label for label in labels if label >= class_num]
    if outside or not labels:
        raise UserError(f"--labels {text}: {outside or 'none'} where the classes are 0 to {class_num - 1}")
    return labels


def split_global_batch(args: Namespace, world_size: int) -> None:
    """Settle `global_batch` and `accum_iter` for this number of processes.

    Raises:
        UserError: a global batch that batch size, processes and accumulation do not make.
    """
    one_pass = args.batch_size * world_size
    if args.global_batch is None:
        args.accum_iter = args.accum_iter or 1
        args.global_batch = one_pass * args.accum_iter
        return
    accum_iter = args.accum_iter or args.global_batch // one_pass
    if accum_iter * one_pass != args.global_batch:
        raise UserError(
            f"a global batch of {args.global_batch} is not batch size {args.batch_size} x {world_size} processes x "
            f"{accum_iter or 1} accumulated passes: choose a batch size that divides it, or another global batch"
        )
    args.accum_iter = accum_iter


def run_name(args: Namespace) -> str:
    """A name that differs wherever two experiments differ: readable parts, and a digest of all that is bound."""
    bound = {n: getattr(args, n) for n, flag in FLAGS.items() if flag.bound in (ALWAYS, TRAINING)}
    bound = {n: v for n, v in bound.items() if (n not in NEWER or v != DEFAULTS[n]) and _trains(n, args.t_sampler)}
    bound |= {n: getattr(args, n) for n in schedules.RECORDED if getattr(args, n, None) is not None}
    bound["data_path"] = str(Path(args.data_path).resolve()) if args.data_path else None
    bound |= {"init_from": args.init_from, "init_weights": args.init_weights if args.init_from else None}
    digest = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()[:6]
    if args.disable_dct_patchify:
        operator = "base"
    else:
        operator = "sf" if args.window_size in (None, args.img_size) else f"sf-w{args.window_size}"
    parts = [args.dataset, args.model.replace("/", "-"), str(args.img_size), operator, args.pred_param, digest]
    return "_".join(parts)


def describe(args: Namespace, given: Collection[str], world_size: int) -> str:
    """The settings that differ from their defaults, those of the data set and of the batch included, by section.

    Args:
        args: resolved, with its batches split.
        given: names of the flags on the command line. Those that belong to a call alone (OWN) differ only if given:
            else what they have now was settled.
    """
    batch = {"global_batch": args.batch_size * world_size, "accum_iter": 1}
    defaults = {**DEFAULTS, **of_data_set(args.dataset), **batch}
    lines = []
    for title, flags in SECTIONS.items():
        names = [flag.name for flag in flags if flag.bound != OWN or flag.name in given]
        changed = [f"{name} {getattr(args, name)}" for name in names if getattr(args, name) != defaults[name]]
        if changed:
            lines.append(f"  {title.partition(' (')[0]}: " + ", ".join(changed))
    return "\n".join(lines)
