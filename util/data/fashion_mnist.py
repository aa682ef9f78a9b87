"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 70,000 grey images of clothes, 28 x 28, as four .gz files.

Debian's package dataset-fashion-mnist installs them. Shapes: N images, each uint8 (28, 28).
"""

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util.data.images import DataError, Images

CLASSES = (*"T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split(), "Ankle boot")
SHA256 = {  # of the files without compression; MNIST's have the same names
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PARTS = {"train": "train", "val": "t10k", "test": "t10k"}  # split -> part of the files' names
WIDTH = 28


def _read(folder: Path, name: str) -> bytes:
    content = gzip.decompress((folder / f"{name}.gz").read_bytes())
    if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        raise ValueError(f"{name}.gz is not Fashion-MNIST's (sha256 {found})")
    return content


class FashionMnist(Images):
    """Split train, or val, also called test; grey as RGB, padded with zeros on all sides to `img_size`."""

    def __init__(self, data_path: str | os.PathLike, img_size: int, split: str = "train"):
        folder, part = Path(data_path).expanduser(), PARTS.get(split)
        if part is None:
            raise DataError(f"Fashion-MNIST has no split {split!r}; expected one of {', '.join(PARTS)}.")
        if img_size < WIDTH or img_size % 2:
            raise DataError(f"img_size is {img_size}; Fashion-MNIST is padded to an even one of at least {WIDTH}.")
        try:  # 16 and 8 bytes of header: magic number, then the shape
            images = np.frombuffer(_read(folder, f"{part}-images-idx3-ubyte")[16:], "u1")
            labels = np.frombuffer(_read(folder, f"{part}-labels-idx1-ubyte")[8:], "u1")
            self._images = torch.from_numpy(images.reshape(-1, WIDTH, WIDTH).copy())
            labels = labels.astype(np.int64)
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
