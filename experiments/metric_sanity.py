"""Measure how far each metric moves for known damage to real images, and its value for undamaged ones.

CIFAR-10's test images are cut into two halves of N. The first is the reference; the second, damaged or not, is in the
place of generated images. "Real" against real is what a perfect generator would score with N images.

python experiments/metric_sanity.py --num_images 2000
python experiments/metric_sanity.py --num_images 5000 --inception_weights FILE     FID and IS as well

Shapes: images uint8 (N, 3, 32, 32); features (N, F); spectra (N, K).
"""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch_fidelity import metric_fid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spectral_ops.spectrum import grey_spectrum, spectrum_gap
from util.data.datasets import build_dataset
from util.evaluation.features import EffNetLite0, InceptionV3
from util.evaluation.metrics import PRC, frechet_distance, inception_score, precision_recall
from util.io import REPOSITORY, provenance, write_json

OUT = REPOSITORY / "experiments" / "results" / "metric_sanity.json"
BATCH = 100
COLUMNS = {
    "fd_effnet_lite0": ("FD-EffNet-Lite0", ".1f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "spectrum_gap": ("spectrum gap", ".4f"),
    "fid": ("FID", ".2f"),
    "is_mean": ("IS", ".2f"),
}


def noise(images: Tensor, sigma: float) -> Tensor:
    """Gaussian noise of standard deviation `sigma` levels, rounded and clamped to 0..255."""
    n = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * n).round().clamp(0, 255).to(torch.uint8)


def box_blur(images: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels, borders replicated."""
    return F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1).round().to(torch.uint8)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Through Pillow's JPEG and back (4:2:0 chroma)."""
    out = []
    for image in images.permute(0, 2, 3, 1).numpy():  # (N, H, W, 3)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).contiguous()


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda x: x,
    "noise, sigma 8": lambda x: noise(x, 8),
    "noise, sigma 25": lambda x: noise(x, 25),
    "3 x 3 box blur": box_blur,
    "JPEG, quality 50": lambda x: jpeg(x, 50),
    "JPEG, quality 20": lambda x: jpeg(x, 20),
}


def measure(images: Tensor, extractors: list) -> dict[str, Tensor]:
    """{stream: (N, F)} of all extractors, and the mean grey spectrum (K,)."""
    parts: dict[str, list[Tensor]] = {}
    for batch in images.split(BATCH):
        for extractor in extractors:
            for stream, rows in extractor(batch).items():
                parts.setdefault(stream, []).append(rows)
        parts.setdefault("spectrum", []).append(torch.as_tensor(grey_spectrum(batch)))
    out = {stream: torch.cat(rows) for stream, rows in parts.items()}
    out["spectrum"] = out["spectrum"].double().mean(0)
    return out


def distance(real: Tensor, fake: Tensor) -> float:
    """Return the Fréchet distance between two sets of features."""
    statistics = metric_fid.fid_features_to_statistics(real)
    return frechet_distance(fake, *(np.asarray(statistics[key], np.float64) for key in ("mu", "sigma")))


def compare(real: dict[str, Tensor], fake: dict[str, Tensor]) -> dict[str, float]:
    """Every metric of `fake` against `real`, both as `measure` returns them."""
    a, b = real["effnet_lite0"], fake["effnet_lite0"]
    precision, recall = precision_recall(b, a)
    out = {
        "fd_effnet_lite0": distance(a, b),
        "precision": precision,
        "recall": recall,
        "spectrum_gap": float(spectrum_gap(real["spectrum"], fake["spectrum"])),
    }
    if "inception_2048" in real:
        out["fid"] = distance(real["inception_2048"], fake["inception_2048"])
        out["is_mean"] = inception_score(fake["inception_logits_unbiased"])[0]
    return out


def bias(real: Tensor, fake: Tensor) -> dict[int, float]:
    """The Fréchet distance between real and real for fewer and fewer images: number of images -> distance."""
    sizes = [n for n in (len(real) // 8, len(real) // 4, len(real) // 2, len(real)) if n >= 2]
    return {n: distance(real[:n], fake[:n]) for n in sizes}


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table of conditions x metrics."""
    names = [name for name in COLUMNS if name in table["real"]]
    lines = ["| images | " + " | ".join(COLUMNS[n][0] for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for condition, row in table.items():
        lines.append(f"| {condition} | " + " | ".join(format(row[n], COLUMNS[n][1]) for n in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=2000, help="images in each half, at most 5000")
    parser.add_argument("--data_path", help="folder of CIFAR-10 (default: data/cifar10)")
    parser.add_argument("--inception_weights", help="Inception's weights: adds FID and IS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    args = parser.parse_args()
    n, device = args.num_images, torch.device(args.device)
    if not 16 <= n <= 5000:
        parser.error(f"--num_images {n}: the 10,000 test images make two halves of 16 to 5000")
    extractors = [EffNetLite0(device)]
    if args.inception_weights:
        extractors.append(InceptionV3(device, args.inception_weights))
    dataset = build_dataset("cifar10", args.data_path, 32, "test")
    images = torch.stack([dataset[i][0] for i in range(2 * n)])
    real = measure(images[:n], extractors)
    table, undamaged = {}, None
    for condition, damage in DAMAGE.items():
        fake = measure(damage(images[n:]), extractors)
        undamaged = fake if undamaged is None else undamaged
        table[condition] = compare(real, fake)
        print(condition, {name: round(value, 4) for name, value in table[condition].items()}, flush=True)
    content = {
        "num_images": n,
        "reference": f"CIFAR-10 test images 0 to {n - 1}; the others are {n} to {2 * n - 1}",
        "precision_recall": f"EfficientNet-Lite0 features, {PRC['prc_neighborhood']} neighbours",
        "extractors": [extractor.describe() for extractor in extractors],
        "metrics": table,
        "real_by_num_images": {"fd_effnet_lite0": bias(real["effnet_lite0"], undamaged["effnet_lite0"])},
        **provenance(device),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, content)
    print(f"\n{markdown(table)}\n\nreal against real by number of images: {content['real_by_num_images']}\n{args.out}")


if __name__ == "__main__":
    main()
