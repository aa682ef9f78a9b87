"""Reference files from real images: dataset -> extractor -> statistics, features and spectra -> fid_stats/.

    python prepare_ref.py --dataset cifar10 --extractor effnet_lite0
    torchrun --nproc_per_node=8 prepare_ref.py --dataset imagefolder --data_path ~/imagenet --img_size 256

    B  images in a batch, uint8 (B, 3, H, W), unaugmented, with the crop of training
    N  images in all                   F  features of the extractor        K  rings of a spectrum
    mu (F,)    sigma (F, F)            features (M, F) of M of the images  spectra (K,): see util.spectrum

The images are read in index order, in batches that do not depend on the number of processes. Each process takes a
contiguous part of the batches, and rank 0 merges: one process and many compute the same features and the same numbers.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util.data import DATASETS, KNOWN, build_dataset
from util.distributed import (
    World,
    everywhere_or_nowhere,
    find_world,
    gather_by_index,
    process_group,
    rank_from_environment,
    share,
    tell_torchrun,
)
from util.errors import UserError
from util.features import EffNetLite0, InceptionV3, MetricError, ensure_inception_weights
from util.loader import build_loader
from util.metrics import STREAM
from util.provenance import provenance
from util.reference import Moments, default_reference, save_reference
from util.scores import PRC_NEIGHBOURS
from util.spectrum import SpectrumSums

SUBSET_SEED, FEATURES_SEED = 0, 1  # of the permutations that choose the images, and those whose features are stored
FEATURES = 10_000
TIMEOUT_MINUTES = 24 * 60  # a process that has finished waits for the slowest
EXTRACTORS = {"inception": STREAM["fid"], "effnet_lite0": STREAM["fd_effnet"]}  # name -> stream of the statistics
CROP = {
    "imagefolder": "centre crop of ADM (util.data.center_crop)",
    "cifar10": "centre crop of ADM (util.data.center_crop)",
    "digits": "none, resized with bicubic interpolation",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line. Errors in it end with exit code 2, as all errors of this program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, choices=DATASETS)
    add("--data_path", help="folder of the data set")
    add("--img_size", type=int, help="pixels per side; default: 256 for imagefolder, 32 for cifar10 and digits")
    add("--split", default="train", help="part of the data set (default: train)")
    add("--extractor", default="inception", choices=tuple(EXTRACTORS))
    add("--inception_weights", help="file of Inception weights; default: $INCEPTION_WEIGHTS, else a download")
    add("--batch_size", type=int, default=64)
    add("--num_workers", type=int, help="workers that read images, per process; default: by the data set and the cores")
    add("--num_images", type=int, help="use the first so many images of a fixed permutation; default: all")
    add(
        "--num_features",
        type=int,
        default=FEATURES,
        help=f"store the features of so many images, for precision, recall and KID; 0: none (default: {FEATURES})",
    )
    add("--out", type=Path, help="file to write; default: the one that evaluation looks for in fid_stats/")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    return parser


def choose_indices(total: int, num_images: int | None) -> list[int]:
    """The first `num_images` of a fixed permutation of range(total), sorted; all of them for None.

    Raises: MetricError if `num_images` is less than 2 or more than `total`.
    """
    if num_images is None:
        return list(range(total))
    if not 2 <= num_images <= total:
        raise MetricError(f"--num_images must be from 2 to {total}, the number of images in the data set.")
    return sorted(np.random.RandomState(SUBSET_SEED).permutation(total)[:num_images].tolist())


def choose_features(num_images: int, num_features: int) -> list[int]:
    """Which of the positions 0 .. num_images - 1 keep their features: a fixed random subset, sorted.

    Raises: MetricError if `num_features` is negative or too small for precision and recall.
    """
    if num_features and num_features <= PRC_NEIGHBOURS:
        raise MetricError(f"--num_features must be 0 or at least {PRC_NEIGHBOURS + 1}, not {num_features}.")
    return sorted(np.random.RandomState(FEATURES_SEED).permutation(num_images)[:num_features].tolist())


@dataclass
class Part:
    """What has been computed of some of the images."""

    moments: Moments
    spectra: SpectrumSums
    features: Tensor  # (m, F) float32, in index order


def extract(
    dataset,
    indices: Sequence[int],
    kept: Sequence[int],
    extractor,
    stream: str,
    batch_size: int,
    num_workers: int | None,
    world: World,
) -> Part:
    """This process's part of the images `indices` of `dataset`, in that order, with a progress bar on rank 0.

    Args:
        kept: positions in `indices` whose features are kept.
    Raises: MetricError for a non-finite feature; DataError for an image that cannot be read.
    """
    starts = range(0, len(indices), batch_size)
    mine = [starts[i] for i in share(len(starts), world)]
    batches = [list(indices[start : start + batch_size]) for start in mine]
    loader = build_loader(dataset, batches, num_workers, pin_memory=extractor.device.type == "cuda")
    width, keep = extractor.streams[stream], set(kept)
    part = Part(Moments(width), SpectrumSums(dataset.img_size), torch.empty(0, width))
    rows = [part.features]
    with tqdm(total=sum(map(len, batches)), unit="image", desc=stream, disable=not world.main) as bar:
        for start, (images, _) in zip(mine, loader, strict=True):  # (B, 3, H, W)
            images = images.to(extractor.device, non_blocking=True)
            features = extractor(images)[stream]  # (B, F)
            part.moments.update(features)
            part.spectra.update(images)
            rows.append(features[[i for i in range(len(images)) if start + i in keep]])
            bar.update(len(images))
    part.features = torch.cat(rows)
    return part


def merge(part: Part, kept: Sequence[int], num_images: int, batch_size: int, world: World) -> Part | None:
    """The parts of all processes on rank 0, None elsewhere. Each process contributes one row to each gather.

    Raises: MetricError if another process has stopped.
    """
    if world.size == 1:
        return part
    starts = -(-num_images // batch_size)  # batches in all
    ranges = [share(starts, World(rank, world.size)) for rank in range(world.size)]
    counts = [sum(r.start <= i // batch_size < r.stop for i in kept) for r in ranges]
    padded = part.features.new_zeros(1, max(counts), part.features.shape[1])  # (1, longest, F)
    padded[0, : len(part.features)] = part.features
    sent = (torch.from_numpy(part.moments.pack())[None], torch.from_numpy(part.spectra.pack())[None], padded)
    try:
        received = [gather_by_index(rows, world.size, world) for rows in sent]
    except RuntimeError as error:
        time.sleep(5)  # the process that stopped says why, and torchrun ends this one
        raise MetricError("Another process has stopped; its message says why.") from error
    if not world.main:
        return None
    moments, spectra, features = received
    total = Part(Moments(part.features.shape[1]), SpectrumSums(part.spectra.n), torch.empty(0))
    for own_moments, own_spectra in zip(moments.numpy(), spectra.numpy(), strict=True):
        total.moments.merge(part.moments.unpack(own_moments))
        total.spectra.merge(part.spectra.unpack(own_spectra))
    total.features = torch.cat([rows[:count] for rows, count in zip(features, counts, strict=True)])  # (M, F)
    return total


def check_out(path: Path, overwrite: bool) -> None:
    """Refuse, before the work, an output file that could not be written or that would be lost."""
    if path.suffix != ".npz":
        raise MetricError(f"--out must end in .npz: {path}")
    if path.exists() and not overwrite:
        raise MetricError(f"{path} exists already: give --overwrite to replace it, or another --out.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetricError(f"The folder {path.parent} cannot be made ({error.strerror}).") from error
    if not os.access(path.parent, os.W_OK):
        raise MetricError(f"The folder {path.parent} cannot be written to.")


@contextmanager
def same_on_all_processes() -> Iterator[None]:
    """For errors that every process meets alike: rank 0 says it, and torchrun ends the others before they do."""
    try:
        yield
    except UserError:
        if rank_from_environment():
            time.sleep(5)
        raise


def build_extractor(args: argparse.Namespace, world: World):
    """The network on this process's device. Weights that must be fetched are fetched by one process of a node."""
    if args.extractor == "effnet_lite0":
        return EffNetLite0(world.device)
    fetches = world.local_rank == 0
    everywhere_or_nowhere(world, lambda: fetches and ensure_inception_weights(args.inception_weights))
    return InceptionV3(world.device, args.inception_weights)


def run(args: argparse.Namespace) -> tuple[Path, str] | None:
    """Make the file that `args` describe; (path, sha256) on rank 0. Raises MetricError, DataError or UserError."""
    with same_on_all_processes():
        least = (("batch_size", args.batch_size, 1), ("num_workers", args.num_workers, 0))
        for flag, value, minimum in (*least, ("num_features", args.num_features, 0)):
            if value is not None and value < minimum:
                raise MetricError(f"--{flag} must be at least {minimum}, not {value}.")
        if args.split != "train" and args.out is None:
            raise MetricError(
                "The file that evaluation looks for is made from the split train: give --out for another."
            )
        img_size = KNOWN[args.dataset].img_size if args.img_size is None else args.img_size
        out = args.out or default_reference(args.dataset, img_size, args.extractor)
        check_out(out, args.overwrite)
        world = find_world(args.device)
        dataset = build_dataset(args.dataset, args.data_path, img_size, args.split)
        indices = choose_indices(len(dataset), args.num_images)
        kept = choose_features(len(indices), args.num_features)
    stream = EXTRACTORS[args.extractor]
    with process_group(world, TIMEOUT_MINUTES):
        try:
            with same_on_all_processes():
                extractor = build_extractor(args, world)
            part = extract(dataset, indices, kept, extractor, stream, args.batch_size, args.num_workers, world)
            part = merge(part, kept, len(indices), args.batch_size, world)
        except UserError as error:
            if world.size > 1:  # leave at once: closing the group may wait for processes that wait for this one
                os._exit(report(error))
            raise
    if part is None:
        return None
    mu, sigma = part.moments.finish()
    more = part.spectra.finish()
    if kept:
        more["features"] = part.features.numpy()
    meta = {
        "dataset": args.dataset,
        "split": args.split,
        "img_size": img_size,
        "crop": CROP[args.dataset],
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "extractor_details": extractor.describe(),
        "num_images": len(indices),
        "subset_seed": None if args.num_images is None else SUBSET_SEED,
        "num_features": len(kept),
        "features_seed": FEATURES_SEED if kept else None,
        "features_rows": "images at the sorted first num_features of numpy's RandomState(features_seed).permutation("
        "num_images)",
        "spectra": "grey_spectrum: grey (.299 .587 .114) in [0, 1]; rapsd: mean over channels of x in [-1, 1]; "
        "rapsd_centred: the same less the mean image. Orthonormal FFT, ring floor(radius), means over the images",
        "batch_size": args.batch_size,
        "processes": world.size,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        **provenance(world.device),
    }
    return out, save_reference(out, mu, sigma, meta, more)


def report(error: UserError) -> int:
    """One sentence on stderr, and for torchrun; the exit code."""
    print(f"prepare_ref.py: {error}", file=sys.stderr, flush=True)
    tell_torchrun(str(error))
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    try:
        done = run(build_parser().parse_args(argv))
    except UserError as error:
        return report(error)
    if done:
        print(f"{done[0]}\nsha256 {done[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
