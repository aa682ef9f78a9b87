"""Draw a photograph on its way from noise to data, and what Spectral Forcing lets the network see of it.

    python -m experiments.what_the_network_sees

The photograph comes with scikit-learn (no download). The README's picture is made with
--out docs/what_the_network_sees.png.
"""

import argparse
from pathlib import Path

import torch

from spectral_forcing import SpectralForcing
from tools.explorer.plane import TIMES, photograph, rows
from util.data.images import quantise
from util.evaluation.images import labelled_grid, save_png

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("output/what_the_network_sees.png"))
parser.add_argument("--size", type=int, default=120, help="pixels along a side")
args = parser.parse_args()
found = rows(photograph(args.size), SpectralForcing(args.size))
images = quantise(torch.cat([found["z"], found["SF(z)"]]))  # (2 T, 3, H, W)
labels = [f"z,  t = {time}" for time in TIMES] + ["SF(z)"] * len(TIMES)
print(save_png(labelled_grid(images, labels, len(TIMES)), args.out))
