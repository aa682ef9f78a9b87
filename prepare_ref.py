"""Make a reference file from real images: data set -> extractor -> statistics, features and spectrum -> fid_stats/.

    python prepare_ref.py --dataset cifar10 --extractor effnet_lite0
    torchrun --nproc_per_node=8 prepare_ref.py --dataset imagefolder --data_path ~/imagenet --img_size 256
    python prepare_ref.py ... --vae ~/sd-vae --out fid_stats/reconstructions.npz     of what a VAE makes of the images

The images are read in index order, unaugmented, with the crop of training. Each rank takes a contiguous part of the
batches and rank 0 merges them, so one rank and many give the same numbers. Where the data set has a held-out split, the
Fréchet distances of some numbers of its images are stored as well: what perfect samples would score.

Shapes: B images of a batch, uint8 (B, 3, H, W); F features; see util/evaluation/reference.py for what is written.
"""

import argparse
import atexit
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits
from torch import Tensor

from spectral_forcing import num_rings
from spectral_ops.spectrum import grey_spectrum
from util.data.datasets import DATASETS, Images, build_dataset, part_name
from util.data.images import DataError, NoSplitError, quantise, read_class_names
from util.data.loader import ImageLoader
from util.data.vae import Vae, load_vae
from util.dist.context import DistContext, find_context, gather, local_range, process_group, raise_on_all_ranks
from util.errors import UserError
from util.evaluation.features import SPATIAL, Extractor
from util.evaluation.formulas import frechet_of_moments
from util.evaluation.images import rgb
from util.evaluation.metrics import METRICS
from util.evaluation.reference import Moments, default_reference, load_reference, save_reference
from util.evaluation.weights import FLAGS, weights_settings
from util.io import make_folder, provenance
from util.log import progress, warn

SUBSET_SEED, FEATURES_SEED = 0, 1  # of the permutations that choose the images and the features to store
HELDOUT_COUNTS = (500, 1000, 2000, 5000, 10_000, 50_000)
TIMEOUT_MINUTES = 24 * 60.0  # a rank that has finished waits for the slowest
EXTRACTORS = {metric.extractor.name: metric for metric in METRICS.values() if metric.arrays and metric.beside is None}


@dataclass
class Statistics:
    """What is measured of some images."""

    moments: dict[str, Moments]  # suffix of their names in a file -> moments
    grey: Tensor  # (K,) sum of the grey spectra, float64
    features: Tensor  # (m, F) those to store, float32, in index order

    def merge(self, other: "Statistics") -> None:
        """Add the statistics of other images, which follow in index order."""
        for suffix, moments in other.moments.items():
            self.moments[suffix].merge(moments)
        self.grey += other.grey
        self.features = torch.cat([self.features, other.features])

    def finish_moments(self) -> dict[str, Tensor]:
        """Return mu (F,), sigma (F, F) and, for sFID, mu_s and sigma_s."""
        return {f"{name}{suffix}": array for suffix, m in self.moments.items() for name, array in m.finish().items()}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, choices=[name for name, info in DATASETS.items() if info.describe is None])
    add("--data_path", help="folder of the data set")
    add("--labels_file", help="file with the classes to use, as in training")
    add("--channels", type=int, choices=(1, 3), help="1: of grey images, as for CHANNELS=1")
    add("--img_size", type=int, help="pixels per side (default: the data set's)")
    add("--split", default="train", help="part of the data set (default: train)")
    add("--extractor", default="inception", choices=EXTRACTORS)
    for flag in FLAGS:
        add(f"--{flag}", help="as in evaluation (fid_stats/README.md)")
    add("--batch_size", type=int, default=64)
    add("--num_workers", type=int, help="workers per rank that read images; default: by the data set and the cores")
    add("--num_images", type=int, help="use the first so many images of a fixed permutation; default: all")
    add("--num_features", type=int, default=10_000, help="store those of so many images, for precision, recall and KID")
    add("--heldout_split", help="part whose distances are stored, or none; default: the data set's val or test, if any")
    add("--heldout_counts", type=int, nargs="+", metavar="N", help="of so many of its images; default: 500 to 50000")
    add("--vae", help="encode and decode the images first: folder in diffusers' format, or hub name; needs --out")
    add("--out", type=Path, help="file to write; default: the one that evaluation looks for in fid_stats/")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add("--device", help="cpu or cuda; default: cuda if available")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse, before the work, wrong flags and a file that could not be written or that would be lost."""
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}.")
    if args.num_workers is not None and args.num_workers < 0:
        raise UserError(f"--num_workers must be at least 0, not {args.num_workers}.")
    least = METRICS["precision_recall"].least
    if args.num_features != 0 and args.num_features < least:
        raise UserError(f"--num_features must be 0 or at least {least}, not {args.num_features}.")
    if args.heldout_counts and min(args.heldout_counts) < 2:
        raise UserError(f"--heldout_counts must be at least 2, not {min(args.heldout_counts)}.")
    asked = args.heldout_counts or args.heldout_split not in (None, "none")
    if asked and (flag := without_heldout(args)):
        raise UserError(
            f"{flag} stores no distances of held-out images. Leave it out, or --heldout_counts and --heldout_split."
        )
    if args.heldout_split == args.split:
        raise UserError(f"--heldout_split {args.split} is --split: these images would not be held out.")
    if args.out is None and args.vae:
        raise UserError("--vae needs --out: these are not the statistics of real images, which evaluation looks for.")
    if args.out is None and args.split != "train":
        raise UserError(f"--split {args.split} needs --out: evaluation expects files of the split train in fid_stats/.")
    args.out = args.out or default_reference(real_images(args), args.img_size, args.extractor)
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists. Give --overwrite to replace it, or name another --out.")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name a file in it.")
    make_folder(args.out.parent)


def real_images(args: argparse.Namespace) -> str:
    """Return the name of the images, as Config.real_images does."""
    name = args.dataset
    if args.labels_file:
        name += f"-{part_name(args.labels_file, read_class_names(args.labels_file))}"
    return f"{name}-grey" if args.channels == 1 else name


def choose_indices(total: int, num_images: int | None) -> list[int]:
    """Return the first `num_images` of a fixed permutation of range(total), sorted; all of them for None."""
    num_images = total if num_images is None else num_images
    if not 2 <= num_images <= total:
        raise UserError(f"--num_images {num_images} must be from 2 to {total}, the number of images in the data set.")
    return sorted(np.random.RandomState(SUBSET_SEED).permutation(total)[:num_images].tolist())


def without_heldout(args: argparse.Namespace) -> str | None:
    """Return the flag because of which no distances of held-out images are stored; None if there is none."""
    if args.heldout_split == "none":
        return "--heldout_split none"
    if args.split != "train":  # val and test may be the same images
        return f"--split {args.split}"
    if args.vae:
        return "--vae"
    return f"--extractor {args.extractor}" if EXTRACTORS[args.extractor].table is None else None


def open_heldout(args: argparse.Namespace, ctx: DistContext) -> tuple[Images | None, list[int]]:
    """Return the held-out images and of how many of them distances are stored, as far as there are images.

    What cannot be opened is an error if it was asked for, otherwise a warning, and nothing is stored.
    """
    if without_heldout(args):
        return None, []
    split = args.heldout_split or "val"
    try:
        images = build_dataset(args.dataset, args.data_path, args.img_size, split, args.channels, args.labels_file)
    except DataError as error:
        if args.heldout_split or args.heldout_counts:
            raise
        warn([] if isinstance(error, NoSplitError) else [f"no distances of held-out images: {error}"], ctx)
        return None, []
    counts = sorted(set(args.heldout_counts or HELDOUT_COUNTS))
    if args.heldout_counts and counts[-1] > len(images):
        raise UserError(f"--heldout_counts {counts[-1]}: the split {split} has {len(images)} images.")
    return images, [count for count in counts if count <= len(images)]


def choose_features(num_images: int, num_features: int) -> list[int]:
    """Return the positions in 0 .. num_images - 1 whose features are stored: a fixed random subset, sorted."""
    return sorted(np.random.RandomState(FEATURES_SEED).permutation(num_images)[:num_features].tolist())


def compute(
    images: Images,
    indices: Sequence[int],
    stored: Sequence[int] | None,
    extractor: Extractor,
    args: Any,
    ctx: DistContext,
    vae: Vae | None = None,
) -> Statistics:
    """Compute this rank's part of the statistics of the images `indices`, in that order, or of their reconstructions.

    Features are returned of the positions `stored` in `indices`; None leaves out these and the spectrum. Raises
    UserError for an unreadable image.
    """
    starts = [i * args.batch_size for i in local_range(-(-len(indices) // args.batch_size), ctx)]
    batches = [list(indices[start : start + args.batch_size]) for start in starts]
    loader = ImageLoader(images, batches, args.num_workers, pin_memory=extractor.device.type == "cuda")
    stream = EXTRACTORS[args.extractor].stream
    streams = {"": stream} | ({"_s": SPATIAL} if SPATIAL in extractor.streams else {})
    moments = {suffix: Moments(extractor.streams[name]) for suffix, name in streams.items()}
    grey = torch.zeros(num_rings(images.img_size), dtype=torch.float64)
    rows = [torch.empty(0, extractor.streams[stream])]
    keep = set(stored or ())
    for start, (x, _) in zip(starts, progress(loader, ctx, len(batches), stream, "batch"), strict=True):
        x = x.to(extractor.device, non_blocking=True)  # (B, 3, H, W)
        if images.channels == 1:
            x = rgb(quantise(images.prepare(x)))
        x = x if vae is None else vae.decode(vae.encode(x)[0])  # of the mean, without noise
        features = extractor(x)  # {stream: (B, F)}
        for suffix, name in streams.items():
            moments[suffix].update(features[name])
        if stored is not None:
            grey += grey_spectrum(x).sum(0).cpu()
        rows.append(features[stream][[i for i in range(len(x)) if start + i in keep]])
    return Statistics(moments, grey, torch.cat(rows))


def merge(part: Statistics, ctx: DistContext) -> Statistics | None:
    """Merge the parts of all ranks on rank 0; return None on the others."""
    parts = gather(part, ctx)
    if parts is None:
        return None
    for other in parts[1:]:
        part.merge(other)
    return part


def heldout_tables(
    counts: Sequence[int], measure: Callable[[int, int], Statistics | None], real: dict[str, Tensor] | None
) -> dict[str, np.ndarray]:
    """Return heldout (R, 2) and, for sFID, heldout_s: each number of images and their Fréchet distance to `real`.

    `measure(a, b)` returns on rank 0 the statistics of the held-out images a to b - 1 of a fixed permutation.
    """
    total, rows = None, {}
    for start, end in itertools.pairwise((0, *counts)):
        part = measure(start, end)
        if part is None:
            continue
        if total is None:
            total = part
        else:
            total.merge(part)
        found = total.finish_moments()
        for suffix in total.moments:
            pair = (arrays[f"{name}{suffix}"] for arrays in (found, real) for name in ("mu", "sigma"))
            with threadpool_limits(len(os.sched_getaffinity(0))):  # torchrun gives a rank one thread
                rows.setdefault(f"heldout{suffix}", []).append((end, frechet_of_moments(*pair)))
    return {name: np.array(table, dtype=np.float64) for name, table in rows.items()}


def run(args: argparse.Namespace) -> str | None:
    """Make the file that `args` describe. Return a line with its path and sha256 on rank 0. Raises UserError."""
    info = DATASETS[args.dataset]
    kind = EXTRACTORS[args.extractor].extractor
    args.img_size = info.img_size if args.img_size is None else args.img_size
    ctx = find_context(args.device)
    with process_group(ctx, TIMEOUT_MINUTES):

        def prepare() -> tuple[Images, list[int], list[int], Images | None, list[int]]:
            check(args)
            images = build_dataset(
                args.dataset, args.data_path, args.img_size, args.split, args.channels, args.labels_file
            )
            indices = choose_indices(len(images), args.num_images)
            if kind.file is not None and ctx.local_rank == 0:
                kind.file.find(weights_settings(args))  # the other ranks of the node find the file
            return images, indices, choose_features(len(indices), args.num_features), *open_heldout(args, ctx)

        images, indices, stored, heldout, counts = raise_on_all_ranks(ctx, prepare)
        extractor = raise_on_all_ranks(ctx, lambda: kind(ctx.device, weights_settings(args), args.img_size))
        vae = raise_on_all_ranks(ctx, lambda: load_vae(args.vae, ctx.device) if args.vae else None)

        def measure(images: Images, indices: Sequence[int], stored: Sequence[int] | None = None) -> Statistics | None:
            part = raise_on_all_ranks(ctx, lambda: compute(images, indices, stored, extractor, args, ctx, vae))
            return merge(part, ctx)

        total = measure(images, indices, stored)
        real = None if total is None else total.finish_moments()
        order = np.random.RandomState(SUBSET_SEED).permutation(len(heldout or ())).tolist()
        tables = heldout_tables(counts, lambda a, b: measure(heldout, sorted(order[a:b])), real)
    if total is None:
        return None
    arrays = {**real, **tables, "grey_spectrum": total.grey / len(indices)}
    arrays |= {"features": total.features} if stored else {}
    meta = {
        "dataset": real_images(args),
        "split": args.split,
        "img_size": args.img_size,
        "crop": info.crop,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "extractor_details": extractor.describe(),
        "num_images": len(indices),
        "subset_seed": None if args.num_images is None else SUBSET_SEED,
        "num_features": len(stored),
        "features_seed": FEATURES_SEED if stored else None,
        "heldout_split": None if heldout is None else args.heldout_split or "val",
        "heldout_images": len(heldout or ()),
        "heldout_counts": counts,
        "batch_size": args.batch_size,
        "processes": ctx.world_size,
        **({} if vae is None else {"reconstructed_by": vae.describe()}),
        "tf32": {"matmul": False, "cudnn": torch.backends.cudnn.allow_tf32},
        **provenance(ctx.device),
    }
    line = f"{args.out}\nsha256 {save_reference(args.out, arrays, meta)}"
    real = default_reference(real_images(args), args.img_size, args.extractor)
    if vae is None or not real.exists():
        return line
    mu, sigma = (load_reference(real, real_images(args), args.img_size).arrays[name] for name in ("mu", "sigma"))
    distance = frechet_of_moments(arrays["mu"], arrays["sigma"], mu, sigma)
    return f"{line}\nFréchet distance of the reconstructions to {real}: {distance:.4f}, about the least for samples"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 2 after an error that one sentence on stderr explains, or 130 after Ctrl-C."""
    try:
        if line := run(build_parser().parse_args(argv)):
            print(line)
    except UserError as error:
        if dist.is_initialized():
            atexit.register(os._exit, 2)  # no destructor may wait for the other ranks
        if not error.on_all_ranks or dist.get_rank() == 0:
            print(f"prepare_ref.py: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("prepare_ref.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
