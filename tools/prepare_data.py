"""Prepares images for training, once.

    python -m tools.prepare_data cache --data_path ~/imagenet --img_size 256 --out ~/imagenet-256
    python -m tools.prepare_data latents --vae ~/sd-vae-ft-mse --data_path ~/imagenet --out ~/imagenet-latents
    torchrun --nproc_per_node=8 -m tools.prepare_data latents --vae ...
    python -m tools.prepare_data verify ~/imagenet-256
    python -m tools.prepare_data index --data_path ~/imagenet-shards
    python -m tools.prepare_data measure --data_path ~/imagenet-256 --num_workers 4

`cache` stores the centre crop of every image as raw pixels; `--data_path ~/imagenet-256` then trains on the same
images, in the same order, without decoding a JPEG. `latents` encodes the images with a VAE of diffusers
(docs/latents.md). Interrupted, the same command continues. `verify` compares a cache or latents with their checksums.
`index` scans shards of WebDataset (docs/data.md). `measure` prints how many images a second a loader delivers, as one
JSON line.
"""

import argparse
import atexit
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tools.measure_spectrum import measure as measure_spectrum
from util.data import encode, latents
from util.data.blocks import StoredImages, blocks
from util.data.cache import CACHE, write_cache
from util.data.datasets import DATASETS, build_dataset
from util.data.images import DataError, Images, NoSplitError, data_folder
from util.data.latents import LATENTS, LatentImages
from util.data.loader import GlobalBatchSampler, ImageLoader
from util.data.spectrum_file import save_spectrum
from util.data.vae import load_vae
from util.data.webdataset import ShardImages, read_index
from util.dist.context import find_context, process_group, raise_on_all_ranks
from util.errors import UserError
from util.io import json_hash, provenance

SECONDS = 15.0  # that are measured
SPECTRUM_IMAGES = 50_000  # that the spectrum of latents is measured on
TIMEOUT_MINUTES = 24 * 60.0  # rank 0 reads all checksums while the others wait


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("prepare_data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    add = tasks.add_parser("cache", help="write the crops of images, or what is missing of them").add_argument
    of_files = [name for name, info in DATASETS.items() if not info.in_memory and info.describe is None]
    add("--dataset", choices=of_files, default="imagefolder")
    add("--data_path", required=True, help="as in training")
    add("--img_size", type=int, default=DATASETS["imagefolder"].img_size, help="pixels per side (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder to write")
    add("--num_workers", type=int, help="threads that decode (default: one for each core)")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="skip: note it in the index, and continue")
    add = tasks.add_parser("latents", help="encode a data set with a VAE, or what is missing of it").add_argument
    add("--vae", required=True, help="folder in diffusers' format, or a name on the Hugging Face hub")
    add("--dataset", choices=[name for name in DATASETS if name != "latents"], default="imagefolder")
    add("--data_path", help="as in training: an image folder, or a cache of one")
    add("--labels_file", help="file with the classes to use, as in training")
    add("--img_size", type=int, help="pixels per side (default: the data set's)")
    add("--out", type=Path, required=True, help="folder to write")
    add("--content", choices=latents.CONTENTS, default="moments", help="mean and std, or one sample in half the space")
    add("--dtype", choices=latents.DTYPES, default="float16", help="on the disk (default: %(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirrored images as well (default: the data set's)")
    add("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")
    add("--num_workers", type=int, help="loader processes per rank (default: as in training)")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="skip: note it in the index, and continue")
    add("--device", help="cpu or cuda (default: cuda if available)")
    add = tasks.add_parser("verify", help="compare a cache or latents with their checksums").add_argument
    add("folder", type=Path, help="--out of the command that wrote it")
    add = tasks.add_parser("index", help="scan the shards of --dataset webdataset, also those that were scanned before")
    add.add_argument("--data_path", required=True, help="as in training: the folder of the shards")
    add = tasks.add_parser("measure", help="images per second of a loader").add_argument
    add("--dataset", choices=DATASETS, default="imagefolder")
    add("--data_path", help="as in training")
    add("--img_size", type=int, help="pixels per side (default: as in training)")
    add("--batch_size", type=int, default=128, help="images at once (default: %(default)s)")
    add("--num_workers", type=int, help="loader processes (default: as in training)")
    return parser


def write(args: argparse.Namespace) -> None:
    """Cache the training images, and the validation images where there are any."""
    if CACHE.find(args.data_path):
        raise DataError(f"--data_path {args.data_path} is an image cache already: name the folder it was made from.")
    what = (args.dataset, args.data_path, args.img_size)
    splits = {"train": build_dataset(*what)}
    with suppress(NoSplitError):  # both are opened before hours of work go into the first
        splits["val"] = build_dataset(*what, "val")
    for split, images in splits.items():
        folder = args.out.expanduser() / split
        index = write_cache(images, folder, args.num_workers, args.on_bad_image == "skip")
        bad = f", {len(index['bad'])} of them bad: training needs --on_bad_image skip" if index["bad"] else ""
        print(f"{folder}: {len(images)} images of {args.img_size} pixels{bad}", flush=True)


def write_latents(args: argparse.Namespace) -> None:
    """Encode the training images, and the validation images where there are any; under torchrun on all ranks."""
    ctx, info = find_context(args.device), DATASETS[args.dataset]
    img_size, flip = args.img_size or info.img_size, info.flip if args.flip is None else args.flip

    def open_splits() -> dict[str, Images]:
        if args.batch_size < 1 or (args.num_workers or 0) < 0:
            raise DataError("--batch_size must be at least 1, and --num_workers at least 0.")
        kind = {"labels_file": args.labels_file}
        splits = {"train": build_dataset(args.dataset, args.data_path, img_size, **kind)}
        with suppress(NoSplitError):
            splits["val"] = build_dataset(args.dataset, args.data_path, img_size, "val", **kind)
        return splits

    with process_group(ctx, TIMEOUT_MINUTES):
        splits = raise_on_all_ranks(ctx, open_splits)
        vae = raise_on_all_ranks(ctx, lambda: load_vae(args.vae, ctx.device))
        for split, images in splits.items():
            index, rate = encode.write_latents(
                images,
                vae,
                args.out.expanduser() / split,
                ctx,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                content=args.content,
                dtype=args.dtype,
                flip=flip,
                skip_bad=args.on_bad_image == "skip",
            )
            if ctx.is_main:
                bad = f", {len(index['bad'])} of them bad: training needs --on_bad_image skip" if index["bad"] else ""
                text = f"latents {latents.shape(index)} of {len(images)} images of {img_size} pixels{bad}"
                print(f"{args.out.expanduser() / split}: {text}; {rate:.1f} images/s", flush=True)
    if ctx.is_main:
        measure_latents(args.out.expanduser(), args.num_workers)


def measure_latents(folder: Path, num_workers: int | None) -> None:
    """Measure the spectrum of SPECTRUM_IMAGES training latents, where there is none of them yet."""
    path = folder / "spectrum.npz"
    digests = json_hash(LATENTS.read_index(folder / "train")["sha256"])
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            if json.loads(str(file["meta"])).get("latents") == digests:
                return
    images = LatentImages(folder / "train")
    images.name = "latents"
    good = np.setdiff1d(np.arange(len(images)), list(images.bad))
    index = np.sort(np.random.RandomState(0).permutation(good)[:SPECTRUM_IMAGES])
    try:
        spectrum = measure_spectrum(images, index, num_workers=num_workers)
    except UserError as error:
        print(f"{path} was not written: {error}", file=sys.stderr, flush=True)
        return
    spectrum.meta.update(split="train", data_path=str(folder), latents=digests, **provenance(torch.device("cpu")))
    save_spectrum(spectrum, path)
    print(f"{path}: spectrum of {len(index)} latents", flush=True)


def verify(args: argparse.Namespace) -> None:
    """Compare all pixels of a cache, or all latents, with their checksums."""
    layout = LATENTS if LATENTS.find(args.folder) else CACHE
    if not (train := layout.find(args.folder)):
        raise DataError(
            f"{args.folder} holds no image cache and no latents: name the folder that was --out of `prepare_data`."
        )
    for folder in (train, train.parent / "val"):
        if (folder / layout.index).exists():
            index = layout.read_index(folder)
            StoredImages(layout, folder)  # checks everything except the content
            if damaged := layout.damaged_blocks(folder, index):
                raise DataError(
                    f"{folder}: {len(damaged)} of {len(blocks(index))} blocks do not have their checksums. Copy "
                    f"the folder again, or {layout.again}: it writes those blocks."
                )
            print(f"{folder}: all {index['num_images']} images have their checksums", flush=True)


def index_shards(args: argparse.Namespace) -> None:
    """Scan the shards of all splits anew, and write their indexes."""
    for split in ("train", "val", "test"):
        with suppress(NoSplitError):
            read_index(data_folder(args.data_path, "the folder of the shards"), split, anew=True)
            images = ShardImages(args.data_path, 1, split)
            print(f"{args.data_path}, {split}: {len(images)} images of {images.num_classes} classes", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Print images per second of one loader, in the order of an epoch of training, measured for SECONDS."""
    if args.batch_size < 1:
        raise UserError("--batch_size must be at least 1.")
    info = DATASETS[args.dataset]
    img_size = args.img_size or (info.describe(args.data_path)["img_size"] if info.describe else info.img_size)
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
        tasks = {"cache": write, "latents": write_latents, "verify": verify, "index": index_shards, "measure": measure}
        tasks[args.task](args)
    except (UserError, OSError) as error:
        if dist.is_initialized():
            atexit.register(os._exit, 2)  # no destructor may wait for the other ranks
        if not getattr(error, "on_all_ranks", False) or not dist.is_initialized() or dist.get_rank() == 0:
            print(f"prepare_data: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
