"""Every flag of main_jit.py: its name, its only default, and how it behaves when a checkpoint has its own value."""

import argparse
import inspect
from dataclasses import dataclass
from typing import Any, NoReturn

from denoiser import Denoiser, LogitNormal
from model_jit import JiT
from sampler import SOLVERS
from spectral_forcing import SCHEDULES, SpectralForcing
from spectral_residual import MODES
from spectral_schedule import GRIDS, T_SAMPLERS, VARIANTS, TightSchedule, TrainingTimes
from util.acceleration import MODES as MODES_OF_COMPILE
from util.bad_images import ON_BAD_IMAGE
from util.data import DATASETS
from util.distributed import process_group
from util.errors import UserError
from util.parallel import PARALLEL

ALWAYS, TRAINING, FREE, OWN = "always", "training", "free", "own"
PRECISIONS = ("auto", "bf16", "fp32")


def _default(function, name: str) -> Any:
    return inspect.signature(function).parameters[name].default


@dataclass(frozen=True)
class Flag:
    """One flag.

    bound: what happens where a checkpoint is loaded and holds another value than the one that was given.
        ALWAYS: refused. TRAINING: refused when training goes on from it, else free.
        FREE: what was given wins, and the checkpoint's value is taken where nothing was given.
        OWN: the checkpoint's value is never taken: it belongs to this call.
    """

    name: str
    default: Any
    kind: Any
    bound: str
    help: str
    choices: tuple | None = None


SECTIONS: dict[str, list[Flag]] = {
    "what to do (training, if none is given)": [
        Flag("evaluate_gen", False, "store_true", OWN, "evaluate the checkpoint in --resume"),
        Flag("sample", False, "store_true", OWN, "sample --labels from the checkpoint in --resume"),
        Flag(
            "dry_run", False, "store_true", OWN, "time a few steps of training, say what the run takes, write nothing"
        ),
        Flag("labels", None, str, OWN, "classes to sample, as in 0,1,2 or 0-9 (default: the first ten)"),
        Flag("num_per_class", 8, int, OWN, "images for each of --labels"),
    ],
    "network": [
        Flag("model", "JiT-B/16", str, ALWAYS, "name in model_jit.JiT_models"),
        Flag("img_size", None, int, ALWAYS, "pixels along a side (default: 256, and 32 for cifar10 and digits)"),
        Flag("class_num", None, int, ALWAYS, "classes (default: 1000, and 10 for cifar10 and digits)"),
        Flag("attn_dropout", 0.0, float, TRAINING, "dropout of attention weights, in the middle half of the blocks"),
        Flag("proj_dropout", 0.0, float, TRAINING, "dropout of projections, in the middle half of the blocks"),
    ],
    "Spectral Forcing": [
        Flag("disable_dct_patchify", False, "store_true", ALWAYS, "plain JiT, without Spectral Forcing"),
        Flag("window_size", _default(SpectralForcing, "window_size"), int, ALWAYS, "window (default: the whole image)"),
        Flag("disable_dct_scale_schedule", False, "store_true", ALWAYS, "a mask that does not depend on time"),
        Flag("dct_fixed_scale", 1.0, float, ALWAYS, "its constant f, with --disable_dct_scale_schedule"),
        Flag("sf_c_min", _default(SpectralForcing, "c_min"), float, ALWAYS, "cutoff at t = 0"),
        Flag("sf_c_max", _default(SpectralForcing, "c_max"), float, ALWAYS, "cutoff at t = 1"),
        Flag("sf_kappa", _default(SpectralForcing, "kappa"), float, ALWAYS, "steepness of the mask"),
        Flag("sf_schedule", SCHEDULES[0], str, ALWAYS, "of the cutoff; snr: from --spectrum_file", SCHEDULES),
        Flag("sf_alpha", _default(SpectralForcing, "alpha"), float, ALWAYS, "exponent of the spectrum, for power"),
        Flag("sf_snr_floor", _default(SpectralForcing, "snr_floor"), float, ALWAYS, "data-to-noise ratio at it"),
    ],
    "spectral residual (SpectralDiT)": [
        Flag("spectral_residual", _default(JiT, "spectral_residual"), str, ALWAYS, "what its gates depend on", MODES),
        Flag("spectral_residual_scale", _default(JiT, "spectral_residual_scale"), float, ALWAYS, "bound of its gates"),
    ],
    "path": [
        Flag("pred_param", _default(Denoiser, "pred_param"), str, ALWAYS, "what the network predicts", ("x", "v")),
        Flag("noise_scale", _default(Denoiser, "noise_scale"), float, ALWAYS, "standard deviation of the noise"),
        Flag("t_eps", _default(Denoiser, "t_eps"), float, ALWAYS, "lower bound of 1 - t"),
        Flag("P_mean", LogitNormal.P_mean, float, ALWAYS, "mean of logit(t) in training"),
        Flag("P_std", LogitNormal.P_std, float, ALWAYS, "standard deviation of logit(t) in training"),
    ],
    "noise schedules from a spectrum (spectral_schedule.py)": [
        Flag("t_sampler", T_SAMPLERS[0], str, TRAINING, "density of t in training", T_SAMPLERS),
        Flag("t_uniform_mix", TrainingTimes.uniform_mix, float, TRAINING, "part of uniform t in the spectral ones"),
        Flag("sampling_grid", GRIDS[0], str, FREE, "times of the sampling steps", GRIDS),
        Flag("sample_t_eps", None, float, FREE, "t_eps in sampling (default: t_eps; less where the grid needs it)"),
        Flag("spectral_variant", _default(TightSchedule, "variant"), str, TRAINING, "of schedules", VARIANTS),
        Flag("spectral_delta", _default(TightSchedule, "delta"), float, TRAINING, "Wiener gain left out at both ends"),
        Flag("spectrum_file", None, str, FREE, "of util.measure_spectrum (default: by data set, from fid_stats/)"),
    ],
    "data": [
        Flag("dataset", "imagefolder", str, TRAINING, "what to learn", DATASETS),
        Flag("data_path", None, str, FREE, "folder with train/, train/ itself, or a cache (prepare_data.py)"),
        Flag("flip", None, argparse.BooleanOptionalAction, TRAINING, "mirror at random (default: but for digits)"),
        Flag("on_bad_image", "error", str, FREE, "skip: another image of its class, and a log line", ON_BAD_IMAGE),
        Flag("num_workers", None, int, OWN, "loader processes (default: up to 12; none for data in memory)"),
    ],
    "held-out loss (util/held_out.py)": [
        Flag("val_split", None, str, TRAINING, "a fraction of the training images to hold out, or a split: val, test"),
        Flag("val_images", 2048, int, FREE, "held-out images that measure the loss, at most"),
        Flag("val_freq", 1, int, FREE, "epochs between measurements"),
        Flag("val_rings", False, argparse.BooleanOptionalAction, FREE, "also by frequency"),
    ],
    "training": [
        Flag("epochs", 600, int, FREE, "epochs in all"),
        Flag("warmup_epochs", 5.0, float, TRAINING, "epochs of linear warm-up"),
        Flag("warmup_steps", None, int, TRAINING, "steps of linear warm-up, in the place of epochs"),
        Flag("batch_size", 128, int, FREE, "images per process and forward pass"),
        Flag("global_batch", None, int, TRAINING, "images per step; accumulation follows from it"),
        Flag("accum_iter", None, int, OWN, "forward passes per step (default: 1, or as --global_batch needs)"),
        Flag("lr", None, float, TRAINING, "learning rate; wins over --blr"),
        Flag("blr", 5e-5, float, TRAINING, "learning rate for a global batch of 256, scaled with it"),
        Flag("min_lr", 0.0, float, TRAINING, "where the cosine ends"),
        Flag("lr_schedule", "constant", str, TRAINING, "after the warm-up", ("constant", "cosine")),
        Flag("weight_decay", 0.0, float, TRAINING, "AdamW's, on matrices only"),
        Flag("beta1", 0.9, float, TRAINING, "AdamW's"),
        Flag("beta2", 0.95, float, TRAINING, "AdamW's"),
        Flag("grad_clip", None, float, TRAINING, "largest norm of the gradient (default: any)"),
        Flag("ema_decay1", 0.9999, float, TRAINING, "decay of the first average of the weights"),
        Flag("ema_decay2", 0.9996, float, TRAINING, "decay of the second"),
        Flag("label_drop_prob", 0.1, float, TRAINING, "probability that a label becomes 'no class'"),
        Flag("seed", 0, int, TRAINING, "of weights, order, noise; and of what is sampled"),
        Flag("start_epoch", 0, int, OWN, "first epoch of a run without checkpoint"),
        Flag("init_from", None, str, OWN, "folder of another run, whose weights a new run starts from"),
        Flag("init_weights", "model", str, OWN, "which of its weights", ("model", "ema1", "ema2")),
    ],
    "sampling": [
        Flag("sampling_method", "heun", str, FREE, "solver", SOLVERS),
        Flag("num_sampling_steps", 50, int, FREE, "steps of the solver"),
        Flag("cfg", 2.9, float, FREE, "guidance scale; 1 is none"),
        Flag("interval_min", 0.1, float, FREE, "guidance only above this t (0: from the start)"),
        Flag("interval_max", 1.0, float, FREE, "guidance only below this t"),
        Flag("ema", "ema1", str, OWN, "weights that sample", ("ema1", "ema2", "model")),
    ],
    "evaluation": [
        Flag("online_eval", True, argparse.BooleanOptionalAction, FREE, "evaluate during training"),
        Flag("eval_freq", 40, int, FREE, "epochs between sample grids and online evaluations"),
        Flag("metrics", None, str, FREE, "of fid, is, fd_effnet, class_agreement (default: fid,is; digits: the last)"),
        Flag("num_images", 50000, int, FREE, "images of an evaluation, a multiple of the number of classes"),
        Flag("gen_bsz", 128, int, FREE, "images per process and sampling pass"),
        Flag("fid_stats", None, str, OWN, "reference statistics (default: by data set and size, from fid_stats/)"),
        Flag("inception_weights", None, str, OWN, "file of Inception weights (also: INCEPTION_WEIGHTS)"),
        Flag("save_images", None, str, OWN, "folder for PNGs of the images that --evaluate_gen makes"),
        Flag("keep_features", False, "store_true", OWN, "leave the features of the images beside the report"),
    ],
    "sweep, with --evaluate_gen": [
        Flag("sweep_cfg", None, str, OWN, "guidance scales, as in 1.0:4.0:0.1 or 1.5,2.0 (default: --cfg)"),
        Flag("sweep_ema", None, str, OWN, "of 1, 2 and 0 or model, as in 1,2 (default: --ema)"),
        Flag("sweep_interval", None, str, OWN, "lo:hi pairs, as in 0.1:1.0,0.2:0.8 (default: --interval_min and _max)"),
        Flag("sweep_images", None, int, OWN, "images of each setting (default: 8000); the best one has --num_images"),
    ],
    "run": [
        Flag("output_dir", None, str, OWN, "folder of the run (default: output/<name made from the settings>)"),
        Flag("resume", None, str, OWN, "folder of a run to go on from, evaluate or sample (default: --output_dir)"),
        Flag("checkpoint", None, str, OWN, "file in it to evaluate or sample (default: the newest)"),
        Flag("save_last_freq", 5, int, FREE, "epochs between checkpoints"),
        Flag("save_every_steps", None, int, FREE, "also this often, in steps (0: not)"),
        Flag("save_every_minutes", 30.0, float, FREE, "also this often, in minutes"),
        Flag("keep_last", 2, int, FREE, "newest checkpoints that stay"),
        Flag("keep_every_epochs", None, int, FREE, "keep a checkpoint for good, this often (0: none)"),
        Flag("skip_nonfinite", 0, int, FREE, "steps in a row that may be not finite, and are skipped"),
        Flag("parallel", "ddp", str, FREE, "a copy of the network on each process, or shards of it", PARALLEL),
        Flag("activation_checkpointing", False, argparse.BooleanOptionalAction, FREE, "recompute blocks: less memory"),
        Flag("log_freq", 100, int, FREE, "steps between log lines"),
        Flag("dist_timeout", _default(process_group, "timeout_minutes"), float, OWN, "minutes for a missing process"),
        Flag("device", None, str, OWN, "cpu or cuda (default: cuda where there is one)"),
        Flag("precision", "auto", str, FREE, "autocast; auto: bf16 on CUDA, else fp32 (on CUDA: TF32)", PRECISIONS),
        Flag("compile", "auto", str, FREE, "torch.compile; auto: block on CUDA, off on CPU", MODES_OF_COMPILE),
        Flag("pad_swiglu", False, argparse.BooleanOptionalAction, FREE, "feed-forward products at multiples of 8"),
        Flag("cuda_graph", False, argparse.BooleanOptionalAction, OWN, "sample with a CUDA graph of the network"),
        Flag("attn_fp32", False, argparse.BooleanOptionalAction, FREE, "attention product always in float32"),
        Flag("wandb_project", "jit", str, OWN, "Weights & Biases project"),
        Flag("wandb_entity", None, str, OWN, "its user or team"),
        Flag("wandb_run_name", None, str, OWN, "name of the run (default: made from the settings)"),
        Flag("wandb_mode", "offline", str, OWN, "where to log", ("online", "offline", "disabled")),
        Flag("wandb_num_vis", 16, int, OWN, "images in the grid of samples drawn during training"),
    ],
}

FLAGS: dict[str, Flag] = {flag.name: flag for flags in SECTIONS.values() for flag in flags}
DEFAULTS: dict[str, Any] = {name: flag.default for name, flag in FLAGS.items()}


class _Parser(argparse.ArgumentParser):
    """Errors are a sentence, which torchrun repeats at its end, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python main_jit.py --help lists the flags)")


def build_parser() -> argparse.ArgumentParser:
    """A parser whose Namespace holds only what was given; what it refuses is a UserError."""
    parser = _Parser(
        description="Train, evaluate or sample a JiT behind Spectral Forcing.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, flags in SECTIONS.items():
        section = parser.add_argument_group(title)
        for flag in flags:
            text = flag.help
            if flag.default is not None and flag.kind != "store_true":
                text += f" (default: {flag.default})"
            kwargs: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
            if isinstance(flag.kind, str) or flag.kind is argparse.BooleanOptionalAction:
                kwargs["action"] = flag.kind
            else:
                kwargs |= {"type": flag.kind, "choices": flag.choices}
            section.add_argument(f"--{flag.name}", **kwargs)
    return parser
