"""Measure the spectrum of a data set for noise schedules and Spectral Forcing: one pass, one file, one picture.

    python -m util.measure_spectrum --dataset cifar10
    python -m util.measure_spectrum --dataset imagefolder --data_path ~/imagenet --img_size 256 --num_images 50000

Images as in training, without mirroring, which changes no spectrum. The picture is beside the file, as .png.

Shapes: N images, B of a batch, K rings, C classes; FIT as in spectral_schedule.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from spectral_schedule import FIT, noise_bounds
from util.data import DATASETS, KNOWN, Images, build_dataset
from util.errors import UserError
from util.loader import build_loader
from util.provenance import provenance
from util.spectrum import NO_POWER, SpectrumSums, rings
from util.spectrum_file import DataSpectrum, default_spectrum_file, image_fits, save_spectrum

DELTA = 0.1  # of the bounds in the metadata and in the picture; a run has its own
SUBSET_SEED = 0
QUANTILES = (0.01, 0.99)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m util.measure_spectrum", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, choices=DATASETS)
    add("--data_path", help="folder of the data set")
    add("--img_size", type=int, help="pixels per side; default: 256 for imagefolder, 32 for cifar10 and digits")
    add("--split", default="train", help="part of the data set (default: train)")
    add("--num_images", type=int, help="use the first so many images of a fixed permutation; default: all")
    add("--batch_size", type=int, default=256)
    add("--num_workers", type=int, help="workers that read images; default: by the data set and the cores")
    add("--out", type=Path, help="npz file to write; default: fid_stats/<dataset>_<img_size>_spectrum.npz")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add("--device", default="cpu", help="where the transforms run (default: cpu)")
    return parser


def choose_indices(total: int, num_images: int | None) -> np.ndarray:
    """The first `num_images` of a fixed permutation of range(total), sorted; all of them for None."""
    if num_images is None:
        return np.arange(total)
    if not 1 <= num_images <= total:
        raise UserError(f"--num_images must be from 1 to {total}, the number of images in the data set")
    return np.sort(np.random.RandomState(SUBSET_SEED).permutation(total)[:num_images])


def measure(
    dataset: Images,
    indices: np.ndarray,
    batch_size: int = 256,
    num_workers: int | None = None,
    device: str = "cpu",
    bar: bool = False,
) -> DataSpectrum:
    """The spectrum of the images `indices` (N,), with the metadata that follows from the images.

    Raises: UserError where a class has no image among them, or all images are the same.
    """
    n = dataset.img_size
    labels = np.asarray(dataset.labels)[indices]  # (N,)
    absent = np.setdiff1d(np.arange(dataset.num_classes), labels)
    if len(absent):
        raise UserError(f"class {absent[0]} has no image among the {len(indices)} that are measured: take more")
    batches = [indices[i : i + batch_size].tolist() for i in range(0, len(indices), batch_size)]
    sums, powers, levels = SpectrumSums(n), [], []
    loader = build_loader(dataset, batches, num_workers, False)
    for images, _ in tqdm(loader, unit="batch", disable=None if bar else True):  # None: only where there is a terminal
        images = images.to(device)  # uint8 (B, 3, H, W)
        powers.append(sums.update(images).float().cpu())  # (B, K)
        levels.append((images.double().mean((2, 3)) / 127.5 - 1).cpu())  # (B, 3)
    level = torch.cat(levels)  # (N, 3)
    fits = torch.cat(
        [image_fits(p, own, level.mean(0), n) for p, own in zip(powers, levels, strict=True)]
    ).numpy()  # (N, 4)
    spectra = sums.finish()
    if spectra["rapsd_centred"].min() <= NO_POWER:
        raise UserError("the images do not differ in every ring of frequency: a spectrum needs more, or other images")
    return DataSpectrum(
        power=spectra["rapsd"],
        centred=spectra["rapsd_centred"],
        counts=rings(n)[1].numpy(),
        level=level.mean(0).numpy(),
        fits=fits.astype(np.float32),
        labels=labels.astype(np.int32),
        index=np.asarray(indices, dtype=np.int64),
        **class_statistics(fits, labels, dataset.num_classes),
        meta={
            "dataset": dataset.name,
            "img_size": n,
            "class_num": dataset.num_classes,
            "num_images": len(indices),
            "fit": "(a, alpha, ln P^c_0, ln P_min), ln P_k = a - alpha ln k over k >= 1 with weights 1 / k",
            **summary(spectra, fits),
        },
    )


def class_statistics(fits: np.ndarray, labels: np.ndarray, class_num: int) -> dict[str, np.ndarray]:
    """mean (C, 4), covariance (C, 4, 4), low and high (C, 4) of the fits (N, 4) of each class."""
    groups = [fits[labels == c] for c in range(class_num)]
    return {
        "mean": np.stack([rows.mean(0) for rows in groups]),
        "covariance": np.stack([np.cov(rows.T, bias=True) for rows in groups]),
        "low": np.stack([np.quantile(rows, QUANTILES[0], axis=0) for rows in groups]),
        "high": np.stack([np.quantile(rows, QUANTILES[1], axis=0) for rows in groups]),
    }


def summary(spectra: dict[str, np.ndarray], fits: np.ndarray) -> dict:
    """The numbers that people look for: bounds at DELTA and noise of 1, mean and spread of the fits."""
    largest, smallest = spectra["rapsd_centred"].max(), spectra["rapsd"][1:].min()
    low, high = noise_bounds(torch.tensor(largest), torch.tensor(smallest), DELTA)
    bounds = {"delta": DELTA, "nu_min": float(low), "nu_max": float(high)}
    bounds |= {"lambda_0": -float(high.log()), "lambda_1": -float(low.log())}
    spread = {name: [float(fits[:, i].mean()), float(fits[:, i].std())] for i, name in enumerate(FIT)}
    return {"bounds": bounds, "fit_mean_and_std": spread, "corr_a_alpha": float(np.corrcoef(fits[:, :2].T)[0, 1])}


def plot(spectrum: DataSpectrum, path: Path) -> Path:
    """Write a PNG: spectrum, mean power law and bounds; and how alpha is distributed over the images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    meta, k = spectrum.meta, np.arange(1, len(spectrum.power))
    (a, _), (alpha, spread) = meta["fit_mean_and_std"]["a"], meta["fit_mean_and_std"]["alpha"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.plot(k, spectrum.power[1:], color="black", label="$P_k$")
    left.plot(k, np.exp(a - alpha * np.log(k)), linestyle="--", label=f"mean fit, alpha {alpha:.2f}")
    left.axhline(meta["bounds"]["nu_min"], color="grey", linewidth=0.8, linestyle=":", label="$\\nu_{min}$")
    left.set(xscale="log", yscale="log", xlabel="ring k (cycles per image)", ylabel="power; white noise has 1")
    left.set_title(f"{meta['dataset']}, {meta['img_size']} px, {meta['num_images']:,} images")
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    right.hist(spectrum.fits[:, 1], bins=60, color="grey")
    right.set(xlabel="alpha", ylabel="images", title=f"{alpha:.2f} +- {spread:.2f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def run(args: argparse.Namespace) -> tuple[Path, Path, DataSpectrum]:
    """Measure what `args` say; (file, picture, content). Raises UserError."""
    img_size = KNOWN[args.dataset].img_size if args.img_size is None else args.img_size
    out = args.out or default_spectrum_file(args.dataset, img_size)
    if out.suffix != ".npz":
        raise UserError(f"--out must end in .npz: {out}")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists already: give --overwrite to replace it, or another --out")
    if args.batch_size < 1 or (args.num_workers or 0) < 0:
        raise UserError("--batch_size must be at least 1 and --num_workers at least 0")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: there is no CUDA device; leave it out to measure on the CPU")
    dataset = build_dataset(args.dataset, args.data_path, img_size, args.split)
    indices = choose_indices(len(dataset), args.num_images)
    spectrum = measure(dataset, indices, args.batch_size, args.num_workers, args.device, bar=True)
    spectrum.meta.update(split=args.split, data_path=args.data_path, **provenance(torch.device(args.device)))
    save_spectrum(spectrum, out)
    return out, plot(spectrum, out.with_suffix(".png")), spectrum


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    try:
        out, picture, spectrum = run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"measure_spectrum: {error}", file=sys.stderr, flush=True)
        return 2
    bounds, (alpha, spread) = spectrum.meta["bounds"], spectrum.meta["fit_mean_and_std"]["alpha"]
    print(f"{out}\n{picture}")
    print(
        f"{spectrum.meta['num_images']} images, alpha {alpha:.3f} +- {spread:.3f}; with delta {DELTA} "
        f"lambda from {bounds['lambda_0']:.3f} to {bounds['lambda_1']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
