"""How far each metric moves for known damage to real images: CIFAR-10's test images, 2,000 against 2,000 others.

    python -m experiments.metric_sanity       the table of docs/metrics.md, and experiments/results/metric_sanity.json

The first ones are the reference; the others, damaged or not, are in the place of generated images. Real against real is
what a perfect generator would score with as many images. Features are those of EfficientNet-Lite0.

Shapes: images uint8 (N, 3, 32, 32); features (N, F).
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.results import table
from experiments.run import RESULTS
from experiments.samples import extractor, features_of
from spectral_ops.spectrum import grey_spectrum, spectrum_gap
from util.data.datasets import build_dataset
from util.evaluation.formulas import DENSITY, PRC, density_coverage, frechet_distance, precision_recall
from util.io import provenance, write_json


def noise(images: Tensor, sigma: float) -> Tensor:
    """Add noise of a standard deviation of `sigma` levels."""
    n = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * n).round().clamp(0, 255).to(torch.uint8)


def box_blur(images: Tensor) -> Tensor:
    """Take the mean of 3 x 3 pixels, with replicated borders."""
    return F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1).round().to(torch.uint8)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Write and read JPEG files of Pillow's, with 4:2:0 chroma."""
    files = [io.BytesIO() for _ in images]
    for file, image in zip(files, images.permute(0, 2, 3, 1).numpy(), strict=True):  # (H, W, 3) each
        Image.fromarray(image).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2).contiguous()


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda x: x,
    "noise, sigma 8": lambda x: noise(x, 8),
    "noise, sigma 25": lambda x: noise(x, 25),
    "3 x 3 box blur": box_blur,
    "JPEG, quality 50": lambda x: jpeg(x, 50),
    "JPEG, quality 20": lambda x: jpeg(x, 20),
}


def distance(real: Tensor, fake: Tensor) -> float:
    return frechet_distance(fake, real.numpy().mean(0), np.cov(real.numpy(), rowvar=False))


def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Return every metric of images `fake` against images `real`."""
    a, b = features_of(real), features_of(fake)
    precision, recall = precision_recall(b, a)
    density, coverage = density_coverage(b, a)
    gap = spectrum_gap(*(grey_spectrum(images).double().mean(0) for images in (real, fake)))
    values = {"precision": precision, "recall": recall, "density": density, "coverage": coverage, "spectrum_gap": gap}
    return {"fd_effnet_lite0": distance(a, b), **{name: float(value) for name, value in values.items()}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.metric_sanity", description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=2000, help="on each side, 16 to 5000 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "metric_sanity.json")
    args = parser.parse_args(argv)
    if not 16 <= (n := args.num_images) <= 5000:
        parser.error(f"--num_images {n}: the 10,000 test images make two halves of 16 to 5000")
    dataset = build_dataset("cifar10", None, 32, "test")
    images = torch.stack([dataset[i][0] for i in range(2 * n)])
    real, others = images.split(n)

    metrics = {name: compare(real, damage(others)) for name, damage in DAMAGE.items()}
    a, b = features_of(real), features_of(others)  # the fewer images, the larger the distance of real ones
    bias = {m: distance(a[:m], b[:m]) for m in (n // 8, n // 4, n // 2, n)}
    content = {
        "num_images": n,
        "reference": f"CIFAR-10 test images 0 to {n - 1}; the others are {n} to {2 * n - 1}",
        "neighbours": {**PRC, **DENSITY},
        "extractor": extractor().describe(),
        "metrics": metrics,
        "real_by_num_images": {"fd_effnet_lite0": bias},
    }
    write_json(args.out, {**content, **provenance(torch.device("cpu"))})
    rows = [[name, *(f"{value:.4g}" for value in row.values())] for name, row in metrics.items()]
    print(table(["images", *metrics["real"]], rows))
    print(f"real against real by number of images: {bias}\n{args.out}")


if __name__ == "__main__":
    main()
