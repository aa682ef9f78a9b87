"""Prepares images for training, once.

    python -m tools.prepare_data cache --data_path ~/imagenet --img_size 256 --out ~/imagenet-256
    python -m tools.prepare_data verify ~/imagenet-256
    python -m tools.prepare_data measure --data_path ~/imagenet-256 --num_workers 4

`cache` stores the centre crop of every image as raw pixels; `--data_path ~/imagenet-256` then trains on the same
images, in the same order, without decoding a JPEG. Interrupted, the same command continues. `verify` compares a cache
with its checksums. `measure` prints how many images a second a loader delivers, as one JSON line.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from util.data import cache
from util.data.datasets import DATASETS, ImageFolderImages, build_dataset
from util.data.images import DataError, NoSplitError
from util.data.loader import GlobalBatchSampler, ImageLoader
from util.errors import UserError
from util.io import provenance

SECONDS = 15.0  # that are measured


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("prepare_data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    add = tasks.add_parser("cache", help="write the crops of an image folder, or what is missing of them").add_argument
    add("--data_path", required=True, help="folder with train/ (and val/), or train/ itself")
    add("--img_size", type=int, default=DATASETS["imagefolder"].img_size, help="pixels per side (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder to write")
    add("--num_workers", type=int, help="threads that decode (default: one for each core)")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="skip: note it in the index, and continue")
    tasks.add_parser("verify", help="compare a cache with its checksums").add_argument("cache", type=Path)
    add = tasks.add_parser("measure", help="images per second of a loader").add_argument
    add("--dataset", choices=DATASETS, default="imagefolder")
    add("--data_path", help="as in training")
    add("--img_size", type=int, help="pixels per side (default: as in training)")
    add("--batch_size", type=int, default=128, help="images at once (default: %(default)s)")
    add("--num_workers", type=int, help="loader processes (default: as in training)")
    return parser


def write(args: argparse.Namespace) -> None:
    """Cache the training images, and the validation images where there are any."""
    if cache.find(args.data_path):
        raise DataError(f"--data_path {args.data_path} is an image cache already: name the folder it was made from.")
    splits = {"train": ImageFolderImages(args.data_path, args.img_size)}
    with suppress(NoSplitError):  # both are opened before hours of work go into the first
        splits["val"] = ImageFolderImages(args.data_path, args.img_size, "val")
    for split, images in splits.items():
        folder = args.out.expanduser() / split
        index = cache.write_cache(images, folder, args.num_workers, args.on_bad_image == "skip")
        bad = f", {len(index['bad'])} of them bad: training needs --on_bad_image skip" if index["bad"] else ""
        print(f"{folder}: {len(images)} images of {args.img_size} pixels{bad}", flush=True)


def verify(args: argparse.Namespace) -> None:
    """Compare all pixels of a cache with their checksums."""
    if not (train := cache.find(args.cache)):
        raise DataError(f"{args.cache} holds no image cache: name the folder that was --out of `prepare_data cache`.")
    for folder in (train, train.parent / "val"):
        if (folder / cache.INDEX).exists():
            index = cache.read_index(folder)
            cache.CachedImages(folder, index["img_size"])  # checks everything except the pixels
            if damaged := cache.damaged_blocks(folder, index):
                raise DataError(
                    f"{folder}: {len(damaged)} of {len(cache.blocks(index))} blocks do not have their checksums. Copy "
                    f"the cache again, or {cache.AGAIN}: it writes those blocks."
                )
            print(f"{folder}: all {index['num_images']} images have their checksums", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Print images per second of one loader, in the order of an epoch of training, measured for SECONDS."""
    img_size = args.img_size or DATASETS[args.dataset].img_size
    images = build_dataset(args.dataset, args.data_path, img_size)
    args.batch_size = min(args.batch_size, len(images))
    sampler = GlobalBatchSampler(len(images), args.batch_size, 0, 1, 1, seed=0)
    loader = ImageLoader(images, sampler, args.num_workers, pin_memory=False)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    next(batches)  # the workers have started
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        count += len(next(batches)[0])
    rate = round(count / seconds, 1)
    chosen = {"img_size": img_size, "num_workers": loader.num_workers}
    about = {"class": type(images).__name__, "num_images": len(images), **provenance(torch.device("cpu"))}
    print(json.dumps({"images_per_s": rate, **vars(args), **chosen, **about}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a task; return exit code 0, 2 with one sentence on stderr, or 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        {"cache": write, "verify": verify, "measure": measure}[args.task](args)
    except (UserError, OSError) as error:
        print(f"prepare_data: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues a cache", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
