"""Images per second that one core reads, from each source: one JSON line.

    python -m benchmarks.loader --sources digits files
    python -m benchmarks.loader --sources imagefolder --data_path /data/imagenet --img_size 256

"files" is an image folder of generated photographs, JPEGs of 500 x 375 as in ImageNet; what is measured is decoding and
cropping in this process, with the operating system's cache warm.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import emit, parser
from benchmarks.turns import Variants, short
from util.data import DATASETS, build_dataset

IMAGES = 16  # that are generated


def generate(folder: Path) -> None:
    """JPEGs that are as hard to decode as photographs: smooth, with noise; about 100 kB each."""
    g = np.random.default_rng(0)
    (folder / "train" / "a").mkdir(parents=True)
    for i in range(IMAGES):
        coarse = Image.fromarray(g.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(coarse).astype(np.int16) + g.normal(0, 12, (375, 500, 3)).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "train" / "a" / f"{i}.jpg", quality=90)


def order(images: int, turn: int) -> list[int]:
    """Which images a turn reads."""
    return np.random.default_rng(0).integers(0, images, turn).tolist()


def main(argv: list[str] | None = None) -> None:
    found = parser(__doc__, repeats=5, device=False)
    found.add_argument("--sources", nargs="+", default=["digits", "files"], choices=(*DATASETS, "files"))
    found.add_argument("--data_path", help="of imagefolder or cifar10")
    found.add_argument("--img_size", type=int, help="pixels (default: 256 for files, 32 for the others)")
    found.add_argument("--images", type=int, default=64, help="images of a turn")
    options = found.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        variants, sizes = Variants(torch.device("cpu"), options.clock), {}
        for source in options.sources:
            path, name = options.data_path, source
            if source == "files":
                path, name = folder, "imagefolder"
                generate(Path(folder))
            sizes[source] = options.img_size or (256 if name == "imagefolder" else 32)
            variants.add(
                lambda name=name, path=path, source=source: build_dataset(name, path, sizes[source]),
                {source: lambda images: torch.stack([images[i][0] for i in order(len(images), options.images)])},
            )
        turns = variants.take_turns(options.repeats)
    results = {}
    for source in options.sources:
        rate = short(options.images / turns.median(source))
        results[source] = turns.of(source) | {"img_size": sizes[source], "images_per_s_and_core": rate}
    emit("loader", options, {"results": results})


if __name__ == "__main__":
    main()
