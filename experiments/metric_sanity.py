"""Measure how far each metric moves for known damage to real images, and its value for undamaged ones.

CIFAR-10's test images are cut into two halves of N. The first is the reference; the second, damaged or not, is in the
place of generated images. "Real" against real is what a perfect generator would score with N images.

python experiments/metric_sanity.py --num_images 2000
python experiments/metric_sanity.py --num_images 5000 --inception_weights FILE     FID and IS as well

Shapes: images uint8 (N, 3, 32, 32); features (N, F).
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spectral_ops.spectrum import grey_spectrum, spectrum_gap
from util.data.datasets import build_dataset
from util.evaluation.features import EffNetLite0, InceptionV3
from util.evaluation.metrics import PRC, frechet_distance, inception_score, precision_recall
from util.io import REPOSITORY, provenance, write_json


def noise(images: Tensor, sigma: float) -> Tensor:  # of standard deviation `sigma` levels
    n = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * n).round().clamp(0, 255).to(torch.uint8)


def box_blur(images: Tensor) -> Tensor:  # the mean of 3 x 3 pixels, borders replicated
    return F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1).round().to(torch.uint8)


def jpeg(images: Tensor, quality: int) -> Tensor:  # Pillow's, 4:2:0 chroma
    files = [io.BytesIO() for _ in images]
    for file, image in zip(files, images.permute(0, 2, 3, 1).numpy(), strict=True):  # (H, W, 3) each
        Image.fromarray(image).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2).contiguous()


DAMAGE = {
    "real": lambda x: x,
    "noise, sigma 8": lambda x: noise(x, 8),
    "noise, sigma 25": lambda x: noise(x, 25),
    "3 x 3 box blur": box_blur,
    "JPEG, quality 50": lambda x: jpeg(x, 50),
    "JPEG, quality 20": lambda x: jpeg(x, 20),
}


def measure(images: Tensor, extractors: list) -> dict[str, Tensor]:
    """Return {stream: (N, F)} of all extractors, and the mean grey spectrum (K,)."""
    parts = [{k: v for e in extractors for k, v in e(batch).items()} for batch in images.split(100)]
    found = {stream: torch.cat([part[stream] for part in parts]) for stream in parts[0]}
    return {**found, "spectrum": torch.as_tensor(grey_spectrum(images)).double().mean(0)}


def distance(real: Tensor, fake: Tensor) -> float:
    """Return the Fréchet distance between two sets of features."""
    return frechet_distance(fake, real.numpy().mean(0), np.cov(real.numpy(), rowvar=False))


def compare(real: dict[str, Tensor], fake: dict[str, Tensor]) -> dict[str, float]:
    """Return every metric of `fake` against `real`, both from `measure`."""
    out = {"fd_effnet_lite0": distance(real["effnet_lite0"], fake["effnet_lite0"])}
    out["precision"], out["recall"] = precision_recall(fake["effnet_lite0"], real["effnet_lite0"])
    out["spectrum_gap"] = float(spectrum_gap(real["spectrum"], fake["spectrum"]))
    if "inception_2048" in real:
        out["fid"] = distance(real["inception_2048"], fake["inception_2048"])
        out["is_mean"] = inception_score(fake["inception_logits_unbiased"])[0]
    return out


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num_images", type=int, default=2000, help="images in each half, 16 to 5000")
parser.add_argument("--data_path", help="folder of CIFAR-10 (default: data/cifar10)")
parser.add_argument("--inception_weights", help="Inception's weights: adds FID and IS")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", type=Path, default=REPOSITORY / "experiments/results/metric_sanity.json")
args = parser.parse_args()
n, device = args.num_images, torch.device(args.device)
if not 16 <= n <= 5000:
    parser.error(f"--num_images {n}: the 10,000 test images make two halves of 16 to 5000")
inception = [InceptionV3(device, args.inception_weights)] if args.inception_weights else []
extractors = [EffNetLite0(device), *inception]
dataset = build_dataset("cifar10", args.data_path, 32, "test")
images = torch.stack([dataset[i][0] for i in range(2 * n)])
real, table, bias = measure(images[:n], extractors), {}, {}
for condition, damage in DAMAGE.items():
    fake = measure(damage(images[n:]), extractors)
    table[condition] = row = compare(real, fake)
    if condition == "real":  # the bias of the Fréchet distance: the fewer images, the larger
        a, b = real["effnet_lite0"], fake["effnet_lite0"]
        bias = {m: distance(a[:m], b[:m]) for m in (n // 8, n // 4, n // 2, n)}
        print(f"| images | {' | '.join(row)} |\n" + "|---" * (len(row) + 1) + "|")
    print(f"| {condition} | {' | '.join(f'{value:.4g}' for value in row.values())} |", flush=True)
content = {
    "num_images": n,
    "reference": f"CIFAR-10 test images 0 to {n - 1}; the others are {n} to {2 * n - 1}",
    "precision_recall": f"EfficientNet-Lite0 features, {PRC['prc_neighborhood']} neighbours",
    "extractors": [extractor.describe() for extractor in extractors],
    "metrics": table,
    "real_by_num_images": {"fd_effnet_lite0": bias},
}
write_json(args.out, {**content, **provenance(device)})
print(f"\nreal against real by number of images: {bias}\n{args.out}")
