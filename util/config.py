"""The configuration: one frozen dataclass whose fields are the flags of main_jit.py.

Each group below is a dataclass; `Config` inherits from all of them, so `config.img_size` is --img_size, and a function
that needs one group alone says so in its signature. Registered operators add their own groups (util/operators.py).
A value is the given one, else the checkpoint's, else the default: `resolve`, once, before any work.
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiser import HYBRID_MODES, PREDICTIONS
from model_jit import JiT_models
from sampler import SOLVERS
from spectral_ops.resolution import GROUP
from spectral_ops.schedule import GRIDS, T_SAMPLERS, VARIANTS
from util.compile import MODES as COMPILE_MODES
from util.data.datasets import DATASETS, part_name
from util.data.images import read_class_names
from util.errors import UserError
from util.evaluation.metrics import METRICS
from util.evaluation.protocols import PROTOCOLS, protocol_settings
from util.flags import (
    LOCKED,
    LOCKED_FOR_TRAINING,
    OVERRIDABLE,
    PER_CALL,
    build_parser,
    check_value,
    flag,
    flags_of,
    recorded,
)
from util.io import json_hash
from util.operators import BLOCK_OPERATORS, INPUT_OPERATORS

WEIGHTS = ("ema1", "ema2", "model")
SNR_FLOOR = 0.03  # of Spectral Forcing's cutoff, where none is given: the best one in docs/results.md
# Flags of the published release that scripts pass; torchrun and the loader settle here what they say.
IGNORED = ("pin_mem", "no_pin_mem", "world_size", "local_rank", "dist_on_itp", "dist_url")


@dataclass(frozen=True)
class TaskConfig:
    """What to do (training, if none is given)"""

    evaluate_gen: bool = flag(False, PER_CALL, "evaluate the checkpoint in --resume")
    sample: bool = flag(False, PER_CALL, "sample --labels from the checkpoint in --resume")
    dry_run: bool = flag(False, PER_CALL, "time a few training steps, print what the run takes, write nothing")
    labels: str | None = flag(None, PER_CALL, "classes to sample, as in 0,1,2 or 0-9 (default: the first ten)")
    num_per_class: int = flag(8, PER_CALL, "images for each of --labels", ge=1, le=1_000_000)


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = flag("JiT-B/16", LOCKED, "name in model_jit.JiT_models")
    img_size: int | None = flag(
        None, LOCKED, "pixels along a side (default: the data set's, 256 for imagefolder)", ge=1
    )
    class_num: int | None = flag(None, LOCKED, "classes (default: the data set's; of folders and shards 1000)", ge=1)
    channels: int = flag(3, LOCKED, "channels: 3 RGB, 1 grey, 4 RGBA; latents have their own", added=True, ge=1)
    input_operator: str = flag(
        "spectral_forcing", LOCKED, "what filters the model's input: none or spectral_forcing", added=True
    )
    attn_dropout: float = flag(
        0.0, LOCKED_FOR_TRAINING, "dropout of attention weights in the middle half of the blocks", ge=0, le=1
    )
    proj_dropout: float = flag(
        0.0, LOCKED_FOR_TRAINING, "dropout of projections in the middle half of the blocks", ge=0, le=1
    )
    attn_fp32: bool = flag(False, OVERRIDABLE, "compute attention in float32 always")
    resolution_schedule: str = flag(
        "off", LOCKED, "compute on smaller images where the spectrum hides the rest", ("off", "spectrum"), added=True
    )
    resolution_delta: float = flag(
        0.05, LOCKED, "SNR from which a frequency is computed, for spectrum", added=True, gt=0, le=1
    )
    resolution_levels: int = flag(1, LOCKED, "how often the image is halved, for spectrum", added=True, ge=1)
    resolution_power: list | None = recorded()  # variances of DCT modes by colour axis and ring, for spectrum
    latents: dict | None = recorded()  # of what the network's images are latents: VAE, pixels, data set; None: of none

    @property
    def levels(self) -> int:
        """Levels of resolution beside the whole image."""
        return 0 if self.resolution_schedule == "off" else self.resolution_levels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of what the network sees: pixels or latents."""
        return self.channels, self.img_size, self.img_size

    @property
    def pixels(self) -> int:
        """Of an image along a side, decoded if the network sees latents."""
        return self.latents["pixels"] if self.latents else self.img_size

    @property
    def real_images(self) -> str:
        """The name of the real images that samples are compared with, part of the name of their statistics."""
        name = self.latents["dataset"] if self.latents else self.dataset
        name = f"{name}-{part_name(self.labels_file, self.classes)}" if self.classes else name
        return f"{name}-grey" if self.channels == 1 and not self.latents else name

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.class_num


@dataclass(frozen=True)
class PathConfig:
    """Path between noise and data"""

    pred_param: str = flag("x", LOCKED, "what the network predicts: data, velocity or both", PREDICTIONS)
    hybrid_x_weight_mode: str = flag(
        "one_minus_t", LOCKED, "weight of the predicted data, for hybrid", HYBRID_MODES, added=True
    )
    hybrid_x_weight_power: float = flag(1.0, LOCKED, "exponent of that weight", added=True, gt=0)
    hybrid_x_weight_min: float = flag(0.0, LOCKED, "lower bound of that weight", added=True, ge=0, le=1)
    hybrid_x_weight_max: float = flag(1.0, LOCKED, "upper bound of that weight", added=True, ge=0, le=1)
    noise_scale: float = flag(1.0, LOCKED, "standard deviation of the noise", gt=0, le=1e6)
    t_eps: float = flag(0.05, LOCKED, "lower bound of 1 - t")
    P_mean: float = flag(-0.8, LOCKED, "mean of logit(t) in training")
    P_std: float = flag(0.8, LOCKED, "standard deviation of logit(t) in training", gt=0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedules from a spectrum (arXiv 2603.19222)"""

    t_sampler: str = flag("logit_normal", LOCKED_FOR_TRAINING, "distribution of t in training", T_SAMPLERS, added=True)
    t_uniform_mix: float = flag(
        0.1, LOCKED_FOR_TRAINING, "share of t that is uniform, with a spectral --t_sampler", added=True, ge=0, le=1
    )
    spectral_variant: str = flag(
        "mixed", LOCKED_FOR_TRAINING, "variant of the spectral schedules", VARIANTS, added=True
    )
    spectral_delta: float = flag(0.1, LOCKED_FOR_TRAINING, "Wiener gain neglected at both ends", added=True, gt=0, lt=1)
    sampling_grid: str = flag("uniform", OVERRIDABLE, "times of the sampling steps", GRIDS)
    sample_t_eps: float | None = flag(
        None, OVERRIDABLE, "t_eps in sampling (default: t_eps, or less if the grid needs it)", gt=0, lt=1
    )
    spectrum_file: str | None = flag(None, OVERRIDABLE, "from tools.measure_spectrum (default: in fid_stats/)")
    schedule_delta: float | None = recorded()  # of the schedules that the network is conditioned on; None without
    schedule_level: list[float] | None = recorded()  # mean pixel of each channel, for the same
    spectrum_sha256: str | None = recorded()  # of the spectrum file that training times came from


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    dataset: str = flag("imagefolder", LOCKED_FOR_TRAINING, "data set", DATASETS)
    data_path: str | None = flag(None, OVERRIDABLE, "folder of the data set, or a cache of it (docs/data.md)")
    labels_file: str | None = flag(
        None, LOCKED, "file with the classes to use, a class folder's name on each line", added=True
    )
    classes: list[str] | None = recorded()  # those in --labels_file
    flip: bool | None = flag(None, LOCKED_FOR_TRAINING, "mirror at random (default: the data set's)")
    on_bad_image: str = flag(
        "error", OVERRIDABLE, "an image that cannot be read: stop, or use another one of its class", ("error", "skip")
    )
    num_workers: int | None = flag(
        None, PER_CALL, "loader processes (default: up to 12; 0 for data in memory)", ge=0, le=1024
    )


@dataclass(frozen=True)
class ValidationConfig:
    """Validation loss"""

    val_split: str | None = flag(
        None, LOCKED_FOR_TRAINING, "share of the training images to hold out, or a split: val, test", added=True
    )
    val_images: int = flag(2048, OVERRIDABLE, "images that measure the loss, at most", ge=1)
    val_freq: int = flag(1, OVERRIDABLE, "epochs between measurements", ge=1)
    val_rings: bool = flag(False, OVERRIDABLE, "measure it by frequency, too")


@dataclass(frozen=True)
class TrainConfig:
    """Training"""

    epochs: int = flag(600, OVERRIDABLE, "epochs in all", ge=1, le=1_000_000_000)
    batch_size: int = flag(128, OVERRIDABLE, "images per rank and microbatch", ge=1)
    global_batch: int | None = flag(None, LOCKED_FOR_TRAINING, "images per step; sets gradient accumulation", ge=1)
    lr: float | None = flag(None, LOCKED_FOR_TRAINING, "peak learning rate; wins over --blr", ge=0)
    blr: float = flag(
        5e-5, LOCKED_FOR_TRAINING, "peak learning rate for a global batch of 256; it grows in proportion", ge=0
    )
    lr_schedule: str = flag("constant", LOCKED_FOR_TRAINING, "learning rate after the warm-up", ("constant", "cosine"))
    min_lr: float = flag(0.0, LOCKED_FOR_TRAINING, "learning rate at the end of the cosine", ge=0)
    warmup_epochs: float = flag(5.0, LOCKED_FOR_TRAINING, "epochs in which the learning rate rises from 0", ge=0)
    warmup_steps: int | None = flag(None, LOCKED_FOR_TRAINING, "the same in steps", added=True, ge=0)
    weight_decay: float = flag(0.0, LOCKED_FOR_TRAINING, "of AdamW, on matrices only", ge=0)
    beta1: float = flag(0.9, LOCKED_FOR_TRAINING, "of AdamW", added=True, ge=0, lt=1)
    beta2: float = flag(0.95, LOCKED_FOR_TRAINING, "of AdamW", added=True, ge=0, lt=1)
    grad_clip: float | None = flag(
        None,
        LOCKED_FOR_TRAINING,
        "gradients with a larger norm are scaled down to it (default: none)",
        added=True,
        gt=0,
    )
    ema_decay1: float = flag(0.9999, LOCKED_FOR_TRAINING, "decay of the first EMA", ge=0, le=1)
    ema_decay2: float = flag(0.9996, LOCKED_FOR_TRAINING, "decay of the second EMA", ge=0, le=1)
    label_drop_prob: float = flag(0.1, LOCKED_FOR_TRAINING, "probability that a label becomes 'no class'", ge=0, le=1)
    accum_iter: int | None = flag(None, PER_CALL, "microbatches per step (default: as --global_batch needs)", ge=1)
    seed: int = flag(0, LOCKED_FOR_TRAINING, "seed of weights, order and noise, and of samples", ge=0, lt=2**64)
    start_epoch: int = flag(0, PER_CALL, "first epoch of a run without checkpoint", ge=0)
    init_from: str | None = flag(None, PER_CALL, "run (or file) from whose weights a new run starts")
    init_weights: str = flag("model", PER_CALL, "which weights of --init_from", WEIGHTS)
    skip_nonfinite: int = flag(
        0, OVERRIDABLE, "skip up to so many consecutive steps whose loss or gradient is not finite", ge=0
    )


@dataclass(frozen=True)
class SampleConfig:
    """Sampling"""

    cfg: float = flag(2.9, OVERRIDABLE, "guidance scale; 1 is none", ge=-1e6, le=1e6)
    interval_min: float = flag(0.1, OVERRIDABLE, "guidance acts above this t (0: from the start)", ge=0, le=1)
    interval_max: float = flag(1.0, OVERRIDABLE, "guidance acts below this t", ge=0, le=1)
    sampling_method: str = flag("heun", OVERRIDABLE, "solver", SOLVERS)
    num_sampling_steps: int = flag(50, OVERRIDABLE, "steps of the solver", ge=1, le=100_000)
    gen_bsz: int = flag(128, OVERRIDABLE, "images per rank and batch", ge=1)
    ema: str = flag("ema1", PER_CALL, "weights to sample or evaluate", WEIGHTS)


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation"""

    online_eval: bool = flag(True, OVERRIDABLE, "evaluate during training")
    eval_freq: int = flag(40, OVERRIDABLE, "epochs between sample grids and online evaluations", ge=1)
    metrics: str | None = flag(
        None,
        OVERRIDABLE,
        f"any of {', '.join(name for name in METRICS if METRICS[name].beside is None)} (default: the data set's)",
    )
    num_images: int = flag(50000, OVERRIDABLE, "images to generate, a multiple of the number of classes", ge=1)
    protocol: str = flag(
        "none", PER_CALL, "protocol of published numbers: sets metrics and number of images", ("none", *PROTOCOLS)
    )
    fid_stats: str | None = flag(None, PER_CALL, "reference statistics (default: in fid_stats/)")
    inception_weights: str | None = flag(None, PER_CALL, "file of Inception weights (also: INCEPTION_WEIGHTS)")
    dinov2_weights: str | None = flag(None, PER_CALL, "file of DINOv2 weights, for fd_dinov2")
    clip_weights: str | None = flag(None, PER_CALL, "file of CLIP weights, for kid_clip")
    weights_dir: str | None = flag(
        None, PER_CALL, "folder with weights under their published names; missing ones are downloaded into it"
    )
    save_images: str | None = flag(None, PER_CALL, "folder for PNGs of the images of --evaluate_gen")
    keep_features: bool = flag(False, PER_CALL, "keep the features of the images beside the report")
    vae: str | None = flag(
        None, OVERRIDABLE, "VAE that decodes latents: folder or hub name (default: where they were encoded)"
    )
    vae_tiled: bool = flag(False, OVERRIDABLE, "decode large images in parts")


@dataclass(frozen=True)
class SweepConfig:
    """Sweep, with --evaluate_gen"""

    sweep_cfg: str | None = flag(None, PER_CALL, "guidance scales, as in 1.0:4.0:0.1 or 1.5,2.0 (default: --cfg)")
    sweep_ema: str | None = flag(None, PER_CALL, "of 1, 2 and 0 or model, as in 1,2 (default: --ema)")
    sweep_interval: str | None = flag(None, PER_CALL, "lo:hi pairs, as in 0.1:1.0,0.2:0.8 (default: --interval_*)")
    sweep_images: int | None = flag(None, PER_CALL, "images per setting (default: 8000); the best has --num_images")


@dataclass(frozen=True)
class RunConfig:
    """Run (folders, checkpoints, hardware, logging)"""

    output_dir: str | None = flag(None, PER_CALL, "folder of the run (default: --output_root/<name of the settings>)")
    output_root: str = flag("output", PER_CALL, "folder of runs without --output_dir")
    resume: str | None = flag(None, PER_CALL, "folder of a run to resume, evaluate or sample (default: --output_dir)")
    checkpoint: str | None = flag(None, PER_CALL, "file in that folder to evaluate or sample (default: the newest)")
    save_last_freq: int = flag(5, OVERRIDABLE, "epochs between checkpoints", ge=1)
    save_every_steps: int = flag(0, OVERRIDABLE, "save also this often, in steps (0: never)", ge=0)
    save_every_minutes: float = flag(30.0, OVERRIDABLE, "save also this often, in minutes (0: after each step)", ge=0)
    keep_last: int = flag(2, OVERRIDABLE, "newest checkpoints that stay", ge=1)
    keep_every_epochs: int | None = flag(
        None, OVERRIDABLE, "epochs between checkpoints kept for good (0: none; default: 100 from 200 epochs on)", ge=0
    )
    log_freq: int = flag(100, OVERRIDABLE, "steps between log lines", ge=1)
    device: str | None = flag(None, PER_CALL, "cpu or cuda (default: cuda if there is one)")
    precision: str = flag("auto", OVERRIDABLE, "autocast; auto: bf16 on CUDA, else fp32", ("auto", "bf16", "fp32"))
    compile: str = flag("auto", OVERRIDABLE, "torch.compile; auto: block on CUDA, off on CPU", COMPILE_MODES)
    parallel: str = flag("ddp", OVERRIDABLE, "replicate or shard the model over ranks", ("ddp", "fsdp"))
    activation_checkpointing: bool = flag(False, OVERRIDABLE, "recompute blocks in the backward pass: less memory")
    dist_timeout: float = flag(30.0, PER_CALL, "minutes to wait for another rank", gt=0, le=1e6)
    wandb_project: str = flag("jit", PER_CALL, "Weights & Biases project")
    wandb_entity: str | None = flag(None, PER_CALL, "Weights & Biases user or team")
    wandb_run_name: str | None = flag(None, PER_CALL, "name of the run (default: made from the settings)")
    wandb_mode: str = flag("offline", PER_CALL, "where Weights & Biases logs", ("online", "offline", "disabled"))
    tensorboard: bool = flag(False, PER_CALL, "log to TensorBoard as well, in <run>/tensorboard")
    wandb_num_vis: int = flag(16, PER_CALL, "images in the grids of samples drawn during training", ge=1)


CORE = (TaskConfig, DataConfig, ModelConfig, TrainConfig, SampleConfig, EvaluateConfig, RunConfig, PathConfig)
MORE = (ScheduleConfig, ValidationConfig, SweepConfig)


def groups() -> tuple[type, ...]:
    """Return the groups in the order of --help, those of registered operators included."""
    operators = [entry.settings for entry in (*INPUT_OPERATORS.values(), *BLOCK_OPERATORS.values())]
    return (*CORE, *operators, *MORE)


def config_class() -> type:
    """Return the frozen dataclass that inherits from all groups."""
    return dataclasses.make_dataclass("Config", [], bases=groups(), frozen=True, namespace={"as_dict": as_dict})


def as_dict(config: Any) -> dict[str, Any]:
    """Return all settings, flat: the `args` of a checkpoint and the content of config.json."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def all_flags() -> dict[str, dataclasses.Field]:
    return {name: field for group in groups() for name, field in flags_of(group).items()}


def parse_args(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse a command line. Only what was given is in the result. Raises UserError."""
    parser = build_parser(groups(), "Train, evaluate or sample a JiT behind Spectral Forcing.")
    for name in IGNORED:
        parser.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    ignored = [f"--{name}" for name in IGNORED if name in given]
    if ignored and os.environ.get("RANK", "0") == "0":
        print(f"warning: {', '.join(ignored)}: flags of the published release without effect here", file=sys.stderr)
    given = {name: value for name, value in given.items() if name not in IGNORED}
    for name, field in all_flags().items():
        if name in given:
            check_value(name, field, given[name])
    return given


# -------------------------------------------------------------------------------------------------------- resolving


def resolve(
    given: Mapping[str, Any],
    saved_args: Mapping[str, Any] | None = None,
    training: bool = True,
    only: Collection[str] | None = None,
) -> Any:
    """Return the configuration: what was given, else what the checkpoint has, else the default.

    Args:
        given: from `parse_args`.
        saved_args: `args` of the checkpoint; None without one.
        training: whether training resumes from it; otherwise it is evaluated, sampled or exported.
        only: take these flags alone from the checkpoint.

    Raises:
        UserError: flags that contradict the checkpoint, all of them named, or that are out of range.
    """
    flags, cls = all_flags(), config_class()
    values = dict(given) if saved_args is None else _merge(given, saved_args, training, only)
    if "warmup_epochs" in given and "warmup_steps" in given:
        raise UserError("--warmup_epochs (WARMUP_EPOCHS) and --warmup_steps are mutually exclusive.")
    for name, field in flags.items():
        check_value(name, field, values.get(name, field.default))
    values |= protocol_settings(values.get("protocol", "none"), given)
    config = cls(**values)
    info = DATASETS[config.dataset]
    of_data_set = {"img_size": info.img_size, "class_num": info.class_num, "flip": info.flip, "metrics": info.metrics}
    if info.describe is not None and config.latents is None:
        of_data_set |= info.describe(config.data_path)
    if config.labels_file and info.describe is not None:
        raise UserError("--labels_file goes to `prepare_data latents`: these latents have all of their classes.")
    if config.labels_file and (training or config.classes is None):
        names = sorted(read_class_names(config.labels_file))
        if config.classes not in (None, names):
            raise UserError(
                f"--labels_file {config.labels_file} names other classes than this run was trained on. "
                "Leave it out, or start a new run in another --output_dir."
            )
        of_data_set |= {"classes": names, "class_num": len(names)}
    unset = {name: value for name, value in of_data_set.items() if getattr(config, name, None) in (None, "")}
    if (channels := of_data_set.get("channels")) is not None:
        if given.get("channels", channels) != channels:
            raise UserError(f"--channels {given['channels']}: {config.data_path} has {channels}. Leave the flag out.")
        unset["channels"] = channels
    has_floor = config.sf_schedule in ("power", "snr")
    if has_floor and config.sf_snr_floor is None:
        unset["sf_snr_floor"] = SNR_FLOOR
    elif not has_floor and config.sf_snr_floor == 1.0 and "sf_snr_floor" not in given:
        unset["sf_snr_floor"] = None  # earlier runs record their default
    if config.disable_dct_patchify:
        unset["input_operator"] = "none"
    elif config.input_operator == "none":
        unset["disable_dct_patchify"] = True
    return dataclasses.replace(config, **unset)


def _merge(
    given: Mapping[str, Any], saved_args: Mapping[str, Any], training: bool, only: Collection[str] | None
) -> dict[str, Any]:
    """Return the given values and those of a checkpoint that apply; raise a UserError if they contradict each other."""
    flags = all_flags()
    added = {name: field.default for name, field in flags.items() if field.metadata["added"]}
    saved = added | dict(saved_args) if "model" in saved_args else dict(saved_args)  # else it is of weights alone
    if saved.get("disable_dct_patchify"):  # the published name of --input_operator none
        saved["input_operator"] = "none"
    elif "disable_dct_patchify" in saved:
        saved.setdefault("input_operator", "spectral_forcing")
    values, contradictions, t_sampler = dict(given), [], saved.get("t_sampler", "")
    if only is None:  # what training has recorded
        fields = dataclasses.fields(config_class())
        values |= {field.name: saved.get(field.name) for field in fields if field.metadata["lock"] is None}
    for name in flags if only is None else only:
        lock = flags[name].metadata["lock"]
        if saved.get(name) is None and flags[name].default is not None:
            continue  # the checkpoint does not say
        if name not in saved or lock == PER_CALL:
            continue
        locked = lock == LOCKED or (lock == LOCKED_FOR_TRAINING and training and _is_trained(name, t_sampler))
        if name not in given:
            values[name] = saved[name]
        elif locked and given[name] != saved[name]:
            contradictions.append(f"--{name} {given[name]} (the checkpoint has {saved[name]})")
    if contradictions:
        way_out = "Leave them out"
        way_out += (
            ", or start a new run in another --output_dir (--init_from: from these weights)." if training else "."
        )
        raise UserError(f"Flags contradict the checkpoint: {', '.join(contradictions)}. {way_out}")
    return values


def _is_trained(name: str, t_sampler: str) -> bool:
    """Whether a flag matters to training: these two may be about the grid of samples alone."""
    return name not in ("spectral_variant", "spectral_delta") or t_sampler.startswith("spectral_")


def split_global_batch(config: TrainConfig, world_size: int) -> TrainConfig:
    """Settle `global_batch` and `accum_iter` for this number of ranks.

    Raises:
        UserError: a global batch that is no multiple of batch size times ranks, or contradicts --accum_iter.
    """
    per_microbatch = config.batch_size * world_size
    if config.global_batch is None:
        accum_iter = config.accum_iter or 1
        return dataclasses.replace(config, accum_iter=accum_iter, global_batch=per_microbatch * accum_iter)
    accum_iter = config.accum_iter or config.global_batch // per_microbatch
    if accum_iter * per_microbatch != config.global_batch:
        raise UserError(
            f"--global_batch {config.global_batch} is not --batch_size {config.batch_size} x {world_size} ranks x "
            f"{accum_iter or 1} microbatches. Choose a batch size that divides it, or another global batch."
        )
    return dataclasses.replace(config, accum_iter=accum_iter)


# --------------------------------------------------------------------------------------------------------- checking

# flag -> (predicate of its use, what it needs): a value that differs from the default is reported as without effect
NEEDS = {
    "labels": (lambda c: c.sample, "--sample"),
    "num_per_class": (lambda c: c.sample, "--sample"),
    "keep_features": (lambda c: c.evaluate_gen, "--evaluate_gen"),
    "init_weights": (lambda c: c.init_from, "--init_from"),
    "val_images": (lambda c: c.val_split, "--val_split"),
    "val_freq": (lambda c: c.val_split, "--val_split"),
    "val_rings": (lambda c: c.val_split, "--val_split"),
    "on_bad_image": (lambda c: not DATASETS[c.dataset].in_memory, "images that are read from files"),
    "t_uniform_mix": (lambda c: spectral(c.t_sampler), "a spectral --t_sampler"),
    "spectral_variant": (lambda c: spectral(c.t_sampler, c.sampling_grid), "a spectral --t_sampler or --sampling_grid"),
    "spectral_delta": (lambda c: spectral(c.t_sampler, c.sampling_grid), "a spectral --t_sampler or --sampling_grid"),
    "spectrum_file": (
        lambda c: spectral(c.t_sampler, c.sampling_grid) or c.sf_schedule in ("snr", "budget") or c.levels,
        "a setting that uses a spectrum",
    ),
    "P_mean": (lambda c: c.t_sampler == "logit_normal", "--t_sampler logit_normal"),
    "P_std": (lambda c: c.t_sampler == "logit_normal", "--t_sampler logit_normal"),
    "min_lr": (lambda c: c.lr_schedule == "cosine", "--lr_schedule cosine"),
    "blr": (lambda c: c.lr is None, "a learning rate that it decides: --lr wins"),
    "sample_t_eps": (lambda c: c.pred_param != "v", "--pred_param x or hybrid"),
    **{
        f"hybrid_x_weight_{name}": (lambda c: c.pred_param == "hybrid", "--pred_param hybrid")
        for name in ("mode", "power", "min", "max")
    },
    "sf_alpha": (lambda c: c.sf_schedule == "power", "--sf_schedule power"),
    "sf_snr_floor": (lambda c: c.sf_schedule in ("power", "snr"), "--sf_schedule power or snr"),
    "sf_budget": (lambda c: c.sf_schedule == "budget", "--sf_schedule budget"),
    "dct_fixed_scale": (lambda c: c.disable_dct_scale_schedule, "--disable_dct_scale_schedule"),
    **{
        name: (lambda c: c.input_operator == "spectral_forcing", "Spectral Forcing")
        for name in ("window_size", "sf_schedule", "disable_dct_scale_schedule", "sf_c_min", "sf_c_max", "sf_kappa")
    },
    "vae": (lambda c: c.latents, "latents (--dataset latents)"),
    "vae_tiled": (lambda c: c.latents, "latents (--dataset latents)"),
    "resolution_delta": (lambda c: c.levels, "--resolution_schedule spectrum"),
    "resolution_levels": (lambda c: c.levels, "--resolution_schedule spectrum"),
    "spectral_residual_scale": (lambda c: c.spectral_residual != "off", "--spectral_residual"),
}


def spectral(*choices: str) -> bool:
    """Whether one of the choices of --t_sampler or --sampling_grid is made from a spectrum."""
    return any(choice.startswith("spectral_") for choice in choices)


def check(config: Any, evaluates: bool) -> list[str]:
    """Refuse settings that cannot work together, before anything is built. Return warnings.

    Args:
        evaluates: whether `num_images` images will be generated for metrics.
    """
    if config.model not in JiT_models:
        raise UserError(f"--model {config.model} is unknown; it must be one of {', '.join(JiT_models)}.")
    patch = JiT_models[config.model].keywords["patch_size"]
    if config.img_size % patch:
        raise UserError(f"--img_size {config.img_size} is not divisible by the patch size {patch} of {config.model}.")
    if config.img_size % (patch << config.levels):
        raise UserError(
            f"--resolution_levels {config.levels} needs an --img_size that {patch << config.levels} divides, which is "
            f"the patch size {patch} of {config.model} times 2^{config.levels}, not {config.img_size}."
        )
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard (TENSORBOARD=1) needs the package tensorboard, which is not installed: "
            "`pip install tensorboard`, or leave the flag out."
        )
    table = (config.img_size // patch) ** 2 * JiT_models[config.model].keywords["hidden_size"] * 4  # bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if table > memory:
        raise UserError(
            f"--img_size {config.img_size} with {config.model} needs {table / 1e9:.3g} GB for its position table; "
            f"this machine has {memory / 1e9:.3g} GB. Choose smaller images or larger patches."
        )
    if config.levels and config.batch_size % GROUP and not (config.evaluate_gen or config.sample):
        raise UserError(
            f"--batch_size {config.batch_size} must be a multiple of {GROUP} with --resolution_schedule spectrum: its "
            "levels share each batch."
        )
    if config.input_operator not in ("none", *INPUT_OPERATORS):
        known = ", ".join(("none", *INPUT_OPERATORS))
        raise UserError(
            f"--input_operator {config.input_operator} is unknown; it must be one of {known}. An operator of "
            "your own must be registered first, also for its checkpoints (docs/extending.md)."
        )
    if config.interval_min > config.interval_max:
        raise UserError(
            f"--interval_min {config.interval_min} is above --interval_max {config.interval_max}; "
            "the guidance interval must satisfy 0 <= min <= max <= 1."
        )
    if not 0 <= config.t_eps < 1 or (config.t_eps == 0 and config.pred_param != "v"):
        raise UserError(f"--t_eps {config.t_eps} must be above 0 and below 1, or 0 together with --pred_param v.")
    if config.hybrid_x_weight_min > config.hybrid_x_weight_max:
        raise UserError(
            f"--hybrid_x_weight_min {config.hybrid_x_weight_min} must not exceed --hybrid_x_weight_max "
            f"{config.hybrid_x_weight_max}."
        )
    if evaluates and config.num_images % config.class_num:
        enough = -(-config.num_images // config.class_num) * config.class_num
        raise UserError(
            f"--num_images {config.num_images} is not a multiple of the {config.class_num} classes, of which an "
            f"evaluation needs equally many images; {enough} is."
            + ("" if config.evaluate_gen else " --no-online_eval (ONLINE_EVAL=0) trains without.")
        )
    if spectral(config.sampling_grid) and config.num_sampling_steps < 3:
        raise UserError(
            f"--num_sampling_steps {config.num_sampling_steps} is too few for --sampling_grid {config.sampling_grid}, "
            "which needs at least 3."
        )
    flags, warnings = all_flags(), []
    for name, (used, need) in NEEDS.items():
        if not used(config) and getattr(config, name) != flags[name].default:
            warnings.append(f"--{name} {getattr(config, name)} has no effect without {need}")
    chosen = [] if config.input_operator == "none" else [INPUT_OPERATORS[config.input_operator]]
    for operator in (*chosen, *BLOCK_OPERATORS.values()):
        warnings += operator.check(config)
    return warnings


def parse_labels(text: str | None, class_num: int) -> list[int]:
    """Return the classes in "0,1,2" or "0-9" or a mixture; the first ten by default."""
    labels: list[int] = []
    try:
        for part in (text or f"0-{min(class_num, 10) - 1}").split(","):
            first, _, last = part.strip().partition("-")
            first, last = int(first), int(last or first)
            if not first <= last:
                raise ValueError
            if last >= class_num:
                raise UserError(f"--labels {text} names the class {last}; the classes are 0 to {class_num - 1}.")
            labels += range(first, last + 1)
    except ValueError:
        raise UserError(f"--labels {text!r} must be class numbers such as 0,1,2 or 0-9.") from None
    return labels


# ---------------------------------------------------------------------------------------------------------- telling


def run_name(config: Any) -> str:
    """Return a name that differs wherever two experiments differ: readable parts and a hash of what is locked."""
    locked = {
        name: getattr(config, name)
        for name, field in all_flags().items()
        if field.metadata["lock"] in (LOCKED, LOCKED_FOR_TRAINING)
        and not (field.metadata["added"] and getattr(config, name) == field.default)
        and _is_trained(name, config.t_sampler)
    }
    if config.input_operator in ("none", "spectral_forcing"):
        locked.pop("input_operator", None)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settled = ("sf_power", "resolution_power", "latents", "classes", "schedule_delta", "schedule_level")
    settled = (*settled, "spectrum_sha256")
    locked |= {name: fields[name] for name in settled if fields[name] is not None}
    locked["data_path"] = str(Path(config.data_path).resolve()) if config.data_path else None
    locked |= {"init_from": config.init_from, "init_weights": config.init_weights if config.init_from else None}
    operator = {"none": "base", "spectral_forcing": "sf"}.get(config.input_operator, config.input_operator)
    if operator == "sf" and config.window_size not in (None, config.img_size):
        operator += f"-w{config.window_size}"
    parts = [config.dataset, config.model.replace("/", "-"), str(config.img_size), operator, config.pred_param]
    return "_".join([*parts, json_hash(locked, digits=6)])


def describe(config: Any, given: Collection[str], world_size: int) -> str:
    """Return the settings that differ from their defaults, a line per group.

    Args:
        config: resolved, with its global batch split.
        given: names of the flags on the command line; flags that belong to one call count only if given.
    """
    info = DATASETS[config.dataset]
    usual = {"img_size": info.img_size, "class_num": info.class_num, "flip": info.flip, "metrics": info.metrics}
    usual |= {"global_batch": config.batch_size * world_size, "accum_iter": 1}
    if config.disable_dct_patchify:
        usual["input_operator"] = "none"
    lines = []
    for group in groups():
        changed = [
            f"{name} {getattr(config, name)}"
            for name, field in flags_of(group).items()
            if (field.metadata["lock"] != PER_CALL or name in given)
            and getattr(config, name) != usual.get(name, field.default)
        ]
        if changed:
            lines.append(f"  {group.__doc__.partition(' (')[0].strip()}: " + ", ".join(changed))
    return "\n".join(lines)
