"""Draw a photograph on its way from noise to data, and what Spectral Forcing lets the network see of it.

    python experiments/what_the_network_sees.py --out docs/what_the_network_sees.png

The photograph comes with scikit-learn (no download).
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sampler import start_noise
from spectral_forcing import SpectralForcing
from util.data import center_crop, to_float
from util.images import labelled_grid, quantise, save_png

TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)


def main() -> None:
    from sklearn.datasets import load_sample_image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/what_the_network_sees.png"))
    parser.add_argument("--size", type=int, default=120, help="pixels along a side")
    args = parser.parse_args()

    photograph = center_crop(Image.fromarray(load_sample_image("china.jpg")), args.size)
    x = to_float(torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None])  # (1, 3, H, W)
    t = torch.tensor(TIMES)
    e = start_noise(0, [0], tuple(x.shape[1:]))
    z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e  # (B, 3, H, W)
    seen = SpectralForcing(args.size)(z, t)
    images = quantise(torch.cat([z, seen]), range(2 * len(t)), torch.zeros(2 * len(t)), seed=0)
    labels = [f"z,  t = {time}" for time in TIMES] + ["SF(z)"] * len(TIMES)
    print(save_png(labelled_grid(images, labels, len(TIMES)), args.out))


if __name__ == "__main__":
    main()
