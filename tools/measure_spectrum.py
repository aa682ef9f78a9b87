"""Measure the spectrum of a data set, for noise schedules and Spectral Forcing: one pass over the images, one file.

    python -m tools.measure_spectrum --dataset cifar10
    python -m tools.measure_spectrum --dataset imagefolder --data_path ~/imagenet --img_size 256 --num_images 50000

Shapes: N images x as in training, without mirroring, which changes no spectrum; B of a batch, C channels, K rings of
frequency.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from spectral_forcing import rings
from spectral_ops.schedule import FIT, noise_bounds
from spectral_ops.spectrum import NO_POWER, DCTSums, image_fits, rapsd
from util.data.datasets import DATASETS, Images, build_dataset
from util.data.loader import ImageLoader
from util.data.spectrum_file import DataSpectrum, default_spectrum_file, save_spectrum
from util.errors import UserError
from util.io import provenance
from util.rng import CounterRNG

DELTA = 0.1  # of the noise bounds in the metadata; a run has its own


def measure(images: Images, index: np.ndarray, batch_size=256, num_workers=None, device="cpu") -> DataSpectrum:
    """Return the spectrum of the images `index` (N,); UserError if they lack a class or a ring of frequency."""
    n, labels = images.img_size, np.asarray(images.labels)[index]  # (N,)
    if len(absent := np.setdiff1d(np.arange(images.num_classes), labels)):
        raise UserError(f"Class {absent[0]} has no image among the {len(index)} measured ones. Measure more.")
    batches = [index[i : i + batch_size].tolist() for i in range(0, len(index), batch_size)]
    dct_sums, powers, levels, total = DCTSums(n, images.channels), [], [], 0.0
    loader = ImageLoader(images, batches, num_workers, pin_memory=False)
    for batch, (x, _) in zip(batches, tqdm(loader, unit="batch", disable=None), strict=True):
        rng = CounterRNG(0, 0, torch.tensor(batch, device=device))  # latents are drawn
        x = images.prepare(x.to(device), rng).double()  # (B, C, n, n)
        powers.append(rapsd(x).cpu())  # (B, K)
        dct_sums.update(x)
        levels.append(x.mean((2, 3)).cpu())  # (B, C)
        total = total + x.sum(0).cpu()
    level, powers = torch.cat(levels), torch.cat(powers)
    power = powers.mean(0)
    centred = power - rapsd(total[None] / len(index))[0]  # mean_i P_k(x_i - m) = mean_i P_k(x_i) - P_k(m)
    if centred.min() <= NO_POWER:
        raise UserError("The images do not differ in every ring of frequency. Measure more, or other images.")
    fits = image_fits(powers, level, level.mean(0), n).numpy()  # (N, 4)
    of_classes = [fits[labels == c] for c in range(images.num_classes)]
    return DataSpectrum(
        dct_power=dct_sums.finish().numpy(),
        power=power.numpy(),
        centred=centred.numpy(),
        counts=rings(n)[1].numpy(),
        level=level.mean(0).numpy(),
        fits=fits.astype(np.float32),
        labels=labels.astype(np.int32),
        index=index.astype(np.int64),
        mean=np.stack([rows.mean(0) for rows in of_classes]),
        covariance=np.stack([np.cov(rows.T, bias=True) for rows in of_classes]),
        low=np.stack([np.quantile(rows, 0.01, axis=0) for rows in of_classes]),
        high=np.stack([np.quantile(rows, 0.99, axis=0) for rows in of_classes]),
        meta=summary(power, centred, fits) | {"dataset": images.name, "img_size": n, "class_num": images.num_classes},
    )


def summary(power: torch.Tensor, centred: torch.Tensor, fits: np.ndarray) -> dict:
    """Return the noise bounds at DELTA, and mean and spread of the fits (N, 4)."""
    nu_min, nu_max = map(float, noise_bounds(centred.max(), power[1:].min(), DELTA))
    bounds = {"delta": DELTA, "nu_min": nu_min, "nu_max": nu_max}
    return {
        "num_images": len(fits),
        "fit": "(a, alpha, ln P^c_0, ln P_min), ln P_k = a - alpha ln k over k >= 1 with weights 1 / k",
        "bounds": bounds | {"lambda_0": -np.log(nu_max), "lambda_1": -np.log(nu_min)},
        "fit_mean_and_std": {name: [float(x.mean()), float(x.std())] for name, x in zip(FIT, fits.T, strict=True)},
        "corr_a_alpha": float(np.corrcoef(fits[:, :2].T)[0, 1]),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, write and print; return exit code 0, or 2 (130 after Ctrl-C) with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tools.measure_spectrum", description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--data_path", help="folder of the data set")
    parser.add_argument("--img_size", type=int, help="pixels per side (default: the data set's)")
    parser.add_argument("--labels_file", help="file with the classes to use, as in training; needs --out")
    parser.add_argument("--channels", type=int, help="1 for grey, 4 for RGBA (default: the data set's)")
    parser.add_argument("--split", default="train", help="part of the data set (default: train)")
    parser.add_argument("--num_images", type=int, help="measure a fixed random subset of this size (default: all)")
    parser.add_argument("--batch_size", type=int, default=256, help="default: 256")
    parser.add_argument("--num_workers", type=int, help="loader processes (default: by the data set and the cores)")
    parser.add_argument("--out", type=Path, help="npz file (default: in fid_stats/, or beside latents)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--device", default="cpu", help="where the transforms run (default: cpu)")
    args = parser.parse_args(argv)
    try:
        info = DATASETS[args.dataset]
        if (args.labels_file or args.channels) and not args.out:
            raise UserError("--labels_file and --channels need --out: the default file is that of the whole data set.")
        known = info.describe(args.data_path) if info.describe else {"img_size": info.img_size}
        img_size = known["img_size"] if args.img_size is None else args.img_size
        if img_size < 4 or args.batch_size < 1:
            raise UserError("--img_size must be at least 4, for a spectrum with a slope, and --batch_size at least 1.")
        out = args.out or default_spectrum_file(args.dataset, img_size, args.data_path)
        if out.is_dir():
            raise UserError(f"--out {out} is a folder: name a file in it.")
        if out.exists() and not args.overwrite:
            raise UserError(f"{out} exists. --overwrite replaces it; --out names another file.")
        images = build_dataset(args.dataset, args.data_path, img_size, args.split, args.channels, args.labels_file)
        if args.num_images is not None and not 1 <= args.num_images <= len(images):
            raise UserError(f"--num_images must be from 1 to {len(images)}, the number of images in the data set.")
        index = np.sort(np.random.RandomState(0).permutation(len(images))[: args.num_images])
        spectrum = measure(images, index, args.batch_size, args.num_workers, args.device)
        spectrum.meta.update(split=args.split, data_path=args.data_path, **provenance(torch.device(args.device)))
        save_spectrum(spectrum, out)
    except UserError as error:
        print(f"measure_spectrum: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("measure_spectrum: interrupted; nothing was written", file=sys.stderr)
        return 130
    bounds, (alpha, spread) = spectrum.meta["bounds"], spectrum.meta["fit_mean_and_std"]["alpha"]
    bounds = f"lambda from {bounds['lambda_0']:.3f} to {bounds['lambda_1']:.3f} with delta {DELTA}"
    print(f"{out}: {len(index)} images, alpha {alpha:.3f} +- {spread:.3f}, {bounds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
