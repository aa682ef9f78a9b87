"""What training, evaluation and sampling prepare alike: data, metrics, grids of samples, warnings."""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from denoiser import Denoiser
from util.bad_images import Replaced
from util.build import DenoiserConfig
from util.data import Images, build_dataset
from util.distributed import World, everywhere_or_nowhere
from util.errors import UserError
from util.generation import Sampling, generate_all
from util.images import labelled_grid, save_png
from util.metrics import MetricSuite, ensure_inception_weights, parse_metrics


def autocast_dtype(args: Namespace, world: World) -> torch.dtype | None:
    bf16 = args.precision == "bf16" or (args.precision == "auto" and world.device.type == "cuda")
    return torch.bfloat16 if bf16 else None


def open_dataset(args: Namespace) -> Images:
    """The training images. With --on_bad_image skip, loaders replace bad ones, and note it in their `replaced`."""
    dataset = build_dataset(args.dataset, args.data_path, args.img_size)
    if dataset.num_classes != args.class_num:
        raise UserError(
            f"{args.data_path or args.dataset} has {dataset.num_classes} classes and --class_num is {args.class_num}; "
            f"--class_num {dataset.num_classes} is for a new run on it"
        )
    skips = args.on_bad_image == "skip" and not dataset.in_memory
    dataset.replaced = Replaced(len(dataset)) if skips else None
    return dataset


def build_suite(args: Namespace, world: World, num_images: int) -> MetricSuite:
    """The metrics, with everything they need checked. One process of a node fetches weights that must be fetched."""
    try:
        names = parse_metrics(args.metrics)
        if not names:
            raise UserError("an evaluation without metrics: name some in --metrics, or train with --no-online_eval")
        if {"fid", "is"} & set(names):
            fetches = world.local_rank == 0
            everywhere_or_nowhere(world, lambda: fetches and ensure_inception_weights(args.inception_weights))
        files = args.fid_stats, args.inception_weights
        return everywhere_or_nowhere(
            world, lambda: MetricSuite(names, args.dataset, args.img_size, num_images, world.device, *files)
        )
    except UserError as error:
        if args.evaluate_gen:
            raise
        hinted = UserError(f"{error} (ONLINE_EVAL=0 or --no-online_eval trains without an evaluation)")
        hinted.everywhere = error.everywhere
        raise hinted from error


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


def draw_grid(
    denoiser: Denoiser,
    shape: DenoiserConfig,
    args: Namespace,
    labels: list[int],
    world: World,
    path: Path,
    title: str,
    may_stop: bool = False,
) -> Tensor | None:
    """Generate images of `labels` and write a labelled grid; returns the images on rank 0, None elsewhere.

    Raises:
        Preempted: with `may_stop`, where any process was asked to stop.
    """
    sampling = Sampling.from_args(args)
    images = generate_all(denoiser, sampling, labels, shape.image_shape, shape.null_class, world, may_stop)
    if world.main:
        names = class_names(args)
        grid = labelled_grid(images, [names[label] for label in labels], grid_columns(labels), title)
        save_png(grid, path)
    return images


def warn(warnings: list[str], world: World) -> None:
    if world.main:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
