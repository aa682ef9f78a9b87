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

import torch

from util.bad_images import ON_BAD_IMAGE
from util.cache_writer import verify, write_cache
from util.data import DATASETS, KNOWN, build_dataset
from util.errors import UserError
from util.loader import GlobalBatchSampler, build_loader
from util.provenance import provenance

SECONDS = 15.0  # that are measured


def build_parser() -> argparse.ArgumentParser:
    """The command line. Errors in it end with exit code 2, as all errors of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    cache = tasks.add_parser("cache", help="write the crops of an image folder, or what is missing of them")
    cache.add_argument("--data_path", required=True, help="folder with train/ (and val/), or train/ itself")
    size = KNOWN["imagefolder"].img_size
    cache.add_argument("--img_size", type=int, default=size, help="pixels along a side (default: %(default)s)")
    cache.add_argument("--out", type=Path, required=True, help="folder to write")
    cache.add_argument("--num_workers", type=int, help="processes that decode (default: one for each core)")
    cache.add_argument(
        "--on_bad_image", choices=ON_BAD_IMAGE, default=ON_BAD_IMAGE[0], help="skip: note it in the index, and go on"
    )
    tasks.add_parser("verify", help="compare a cache with its checksums").add_argument("cache", type=Path)
    speed = tasks.add_parser("measure", help="images a second that a loader gives")
    speed.add_argument("--dataset", choices=DATASETS, default="imagefolder")
    speed.add_argument("--data_path", help="as in training")
    speed.add_argument("--img_size", type=int, default=size, help="pixels along a side (default: %(default)s)")
    speed.add_argument("--batch_size", type=int, default=128, help="images at once (default: %(default)s)")
    speed.add_argument("--num_workers", type=int, help="loader processes (default: as in training)")
    return parser


def run(args: argparse.Namespace) -> list[str]:
    """What was done, a sentence for each split. Raises UserError."""
    if args.task == "verify":
        return verify(args.cache.expanduser().absolute())
    if args.task == "measure":
        return [json.dumps(measure(args))]
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers must be at least 0, not {args.num_workers}.")
    out = args.out.expanduser().absolute()
    return write_cache(args.data_path, args.img_size, out, args.num_workers, args.on_bad_image)


def measure(args: argparse.Namespace) -> dict:
    """Images per second of one loader, in training's order, over epochs until SECONDS have passed."""
    images = build_dataset(args.dataset, args.data_path, args.img_size)
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
    about = {"class": type(images).__name__, "num_images": len(images), "num_workers": loader.num_workers}
    return {"images_per_s": round(rate, 1), **about, **vars(args), **provenance(torch.device("cpu"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 with one sentence on stderr, or 130 after Ctrl-C."""
    try:
        lines = run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
