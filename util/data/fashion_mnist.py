"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 70,000 grey images of clothes, 28 x 28, as four .gz files.

Debian's package dataset-fashion-mnist installs them. Shapes: N images, each uint8 (28, 28).
"""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.images import DataError, Images

CLASSES = (*"T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split(), "Ankle boot")
COUNTS = {"train": 60_000, "t10k": 10_000}
WIDTH = 28


class FashionMnist(Images):
    """Split train, or val, also called test; grey as RGB, padded with zeros on all sides to `img_size`."""

    def __init__(self, data_path: str | os.PathLike, img_size: int, split: str = "train"):
        folder, part = Path(data_path).expanduser(), "train" if split == "train" else "t10k"
        if img_size < WIDTH or img_size % 2:
            raise DataError(f"img_size is {img_size}; Fashion-MNIST is padded to an even one of at least {WIDTH}.")
        try:  # 16 and 8 bytes of header: magic number, then the shape
            images = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:], "u1")
            labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:], "u1")
            self._images = torch.from_numpy(images.reshape(COUNTS[part], WIDTH, WIDTH).copy())
            labels = labels.reshape(COUNTS[part]).astype(np.int64)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(
                f"no complete Fashion-MNIST in {folder}: {error}. On Debian and Ubuntu `apt install "
                "dataset-fashion-mnist` installs it; else set --data_path to a folder with its four .gz files."
            ) from None
        super().__init__(img_size, list(CLASSES), labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pad = (self.img_size - WIDTH) // 2
        image = torch.nn.functional.pad(self._images[i], (pad,) * 4)  # (H, W)
        return image.expand(3, -1, -1).clone(), int(self.labels[i])
