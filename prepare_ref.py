"""Reference statistics from real images: dataset -> extractor -> mean and covariance -> fid_stats/.

    python prepare_ref.py --dataset cifar10 --extractor effnet_lite0
    python prepare_ref.py --dataset imagefolder --data_path ~/imagenet --img_size 256 --device cuda

    B  images in a batch, uint8 (B, 3, H, W), unaugmented, with the crop of training
    F  features of the extractor       mu (F,)       sigma (F, F)

The images are read in index order. `extract_moments` covers any list of indices and its results merge, so the
work can be divided between processes; `main` takes all indices in one.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from util.data import DATASETS, KNOWN, build_dataset
from util.errors import UserError
from util.features import EffNetLite0, InceptionV3, MetricError
from util.loader import build_loader
from util.metrics import STREAM
from util.provenance import provenance
from util.reference import Moments, default_reference, save_reference

SUBSET_SEED = 0
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
    add("--num_workers", type=int, help="processes that read images; default: by the data set and the cores")
    add("--num_images", type=int, help="use the first so many images of a fixed permutation; default: all")
    add("--out", type=Path, help="file to write; default: the one that evaluation looks for in fid_stats/")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
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


def extract_moments(
    dataset, indices: Sequence[int], extractor, stream: str, batch_size: int, num_workers: int | None = None
) -> Moments:
    """Moments of one feature stream over the images `indices` of `dataset`, in that order, with a progress bar.

    Raises: MetricError for a non-finite feature; DataError for an image that cannot be read.
    """
    batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    loader = build_loader(dataset, batches, num_workers, pin_memory=extractor.device.type == "cuda")
    moments = Moments(extractor.streams[stream])
    with tqdm(total=len(indices), unit="image", desc=stream) as bar:
        for images, _ in loader:  # (B, 3, H, W)
            moments.update(extractor(images)[stream])
            bar.update(len(images))
    return moments


def check_device(name: str) -> torch.device:
    """Raises MetricError for a device that this machine or this torch does not have."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MetricError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


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


def run(args: argparse.Namespace) -> tuple[Path, str]:
    """Make the file that `args` describe; (path, sha256). Raises MetricError or DataError."""
    for flag, value, least in (("batch_size", args.batch_size, 1), ("num_workers", args.num_workers, 0)):
        if value is not None and value < least:
            raise MetricError(f"--{flag} must be at least {least}, not {value}.")
    if args.split != "train" and args.out is None:
        raise MetricError("The file that evaluation looks for is made from the split train: give --out for another.")
    img_size = KNOWN[args.dataset].img_size if args.img_size is None else args.img_size
    out = args.out or default_reference(args.dataset, img_size, args.extractor)
    check_out(out, args.overwrite)
    device = check_device(args.device)
    dataset = build_dataset(args.dataset, args.data_path, img_size, args.split)
    indices = choose_indices(len(dataset), args.num_images)
    if args.extractor == "inception":
        extractor = InceptionV3(device, args.inception_weights)
    else:
        extractor = EffNetLite0(device)

    stream = EXTRACTORS[args.extractor]
    mu, sigma = extract_moments(dataset, indices, extractor, stream, args.batch_size, args.num_workers).finish()
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
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        **provenance(device),
    }
    return out, save_reference(out, mu, sigma, meta)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    try:
        out, sha256 = run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"prepare_ref.py: {error}", file=sys.stderr)
        return 2
    print(f"{out}\nsha256 {sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
