"""Draw a photograph on its way from noise to data, and what Spectral Forcing lets the network see of it.

    python experiments/what_the_network_sees.py

The photograph comes with scikit-learn (no download). The README's picture is made with
--out docs/what_the_network_sees.png.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spectral_forcing import SpectralForcing
from util.data.crop import center_crop
from util.data.images import quantise, to_float
from util.evaluation.images import labelled_grid, save_png
from util.rng import CounterRNG

TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("output/what_the_network_sees.png"))
parser.add_argument("--size", type=int, default=120, help="pixels along a side")
args = parser.parse_args()
photograph = center_crop(Image.fromarray(load_sample_image("china.jpg")), args.size)
x = to_float(torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None])  # (1, 3, H, W)
t = torch.tensor(TIMES)
e = CounterRNG(0, 0, torch.tensor([0])).normal("start_noise", x.numel()).view_as(x)
z = t[:, None, None, None] * x + (1 - t[:, None, None, None]) * e  # (B, 3, H, W)
images = quantise(torch.cat([z, SpectralForcing(args.size)(z, t)]))
labels = [f"z,  t = {time}" for time in TIMES] + ["SF(z)"] * len(TIMES)
print(save_png(labelled_grid(images, labels, len(TIMES)), args.out))
