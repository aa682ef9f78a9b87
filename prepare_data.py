"""Prepares images for training, once.

    python prepare_data.py cache --data_path ~/imagenet --img_size 256 --out ~/imagenet-256
    python prepare_data.py verify ~/imagenet-256
    python prepare_data.py measure --data_path ~/imagenet-256 --num_workers 4

`cache` stores the centre crop of every image as raw pixels; `--data_path ~/imagenet-256` then trains on the same
images, in the same order, without decoding a JPEG. Interrupted, the same command goes on. `verify` reads a cache and
compares it with its checksums. What is written: util/image_cache.py. `measure` prints how many images a second training
would get from any data set, with nothing else to do: one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from util.bad_images import ON_BAD_IMAGE
from util.cache_writer import verify, write_cache
from util.data import DATASETS, KNOWN, build_dataset
from util.errors import UserError
from util.loader import GlobalBatchSampler, build_loader
from util.provenance import provenance

SECONDS = 15.0  # that are measured
AT_LEAST = {"img_size": 1, "batch_size": 1, "num_workers": 0}


class _Parser(argparse.ArgumentParser):
    """What it refuses is a UserError, with the flags that there are."""

    def parse_known_args(self, args=None, namespace=None):
        """Refuses what is unknown, which argparse leaves to the parser of all tasks: that one names no flag."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {' '.join(self.format_usage().split())}")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty and must name a folder")
    return Path(text).expanduser().absolute()


def build_parser() -> argparse.ArgumentParser:
    """The command line; what it refuses is a UserError."""
    parser = _Parser("prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    cache = tasks.add_parser("cache", help="write the crops of an image folder, or what is missing of them")
    cache.add_argument("--data_path", required=True, help="folder with train/ (and val/), or train/ itself")
    size = KNOWN["imagefolder"].img_size
    cache.add_argument("--img_size", type=int, default=size, help="pixels along a side (default: %(default)s)")
    cache.add_argument("--out", type=_folder, required=True, help="folder to write")
    cache.add_argument("--num_workers", type=int, help="processes that decode (default: one for each core)")
    cache.add_argument(
        "--on_bad_image", choices=ON_BAD_IMAGE, default=ON_BAD_IMAGE[0], help="skip: note it in the index, and go on"
    )
    tasks.add_parser("verify", help="compare a cache with its checksums").add_argument("cache", type=_folder)
    speed = tasks.add_parser("measure", help="images a second that a loader gives")
    speed.add_argument("--dataset", choices=DATASETS, default="imagefolder")
    speed.add_argument("--data_path", help="as in training")
    speed.add_argument("--img_size", type=int, help="pixels along a side (default: as in training)")
    speed.add_argument("--batch_size", type=int, default=128, help="images at once (default: %(default)s)")
    speed.add_argument("--num_workers", type=int, help="loader processes (default: as in training)")
    return parser


def run(args: argparse.Namespace) -> list[str]:
    """What was done, a sentence for each split. Raises UserError."""
    for name, lowest in AT_LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < lowest:
            raise UserError(f"--{name} {value} must be at least {lowest}.")
    if args.task == "verify":
        return verify(args.cache)
    if args.task == "measure":
        return [json.dumps(measure(args))]
    return write_cache(args.data_path, args.img_size, args.out, args.num_workers, args.on_bad_image)


def measure(args: argparse.Namespace) -> dict:
    """Images per second of one loader, in training's order, over epochs until SECONDS have passed."""
    img_size = args.img_size or KNOWN[args.dataset].img_size
    images = build_dataset(args.dataset, args.data_path, img_size)
    if args.batch_size > len(images):
        raise UserError(f"--batch_size {args.batch_size} must be at most {len(images)}, the number of images.")
    sampler = GlobalBatchSampler(len(images), args.batch_size, 0, 1, 1, seed=0)
    loader = build_loader(images, sampler, args.num_workers, pin_memory=False)
    next(iter(loader))  # workers have started and have their modules
    count, epoch, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        sampler.set_epoch(epoch := epoch + 1)
        for x, _ in loader:
            count += len(x)
            if time.perf_counter() - start >= SECONDS:
                break
    rate = count / (time.perf_counter() - start)
    about = {**vars(args), "class": type(images).__name__, "num_images": len(images)}
    about |= {"img_size": img_size, "num_workers": loader.num_workers}
    return {"images_per_s": round(rate, 1), **about, **provenance(torch.device("cpu"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 with one sentence on stderr, or 130 after Ctrl-C."""
    try:
        lines = run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; where it writes a cache, the same command goes on with what is missing", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
