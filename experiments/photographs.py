"""Small pictures cut out of the seven photographs that come with scikit-image and scikit-learn.

The right third of each photograph is held out. A picture is a square of random place and side, log-uniform in 64 to 150
pixels, resized as images of training are (util.data.crop). Seven photographs have the spectrum of photographs; they are
no data set to learn to generate.
"""

from functools import cache
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image

from util.data.crop import center_crop
from util.data.images import DataError

OF_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
OF_SKLEARN = ("china.jpg", "flower.jpg")
SMALLEST, LARGEST = 64, 150  # pixels per side; the right third of the smallest photograph is 150 wide


@cache
def photographs() -> list[np.ndarray]:
    """Return the photographs, uint8 (H, W, 3). Raises DataError without scikit-image."""
    try:
        import skimage.data
    except ImportError as error:
        raise DataError("The photographs need scikit-image: pip install -r requirements-dev.txt") from error
    folders = {
        Path(skimage.data.__file__).parent: OF_SKIMAGE,
        Path(sklearn.datasets.__file__).parent / "images": OF_SKLEARN,
    }
    paths = [folder / name for folder, names in folders.items() for name in names]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def cut(split: str, count: int, size: int) -> np.ndarray:
    """Return pictures uint8 (count, 3, size, size), equally many of each photograph; the same ones each time."""
    rng, pictures = np.random.RandomState(("train", "test").index(split)), []
    for i in range(count):
        whole = photographs()[i % len(photographs())]
        border = 2 * whole.shape[1] // 3
        part = whole[:, :border] if split == "train" else whole[:, border:]
        side = int(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
        top, left = (rng.randint(length - side + 1) for length in part.shape[:2])
        picture = Image.fromarray(part[top : top + side, left : left + side])
        pictures.append(np.asarray(center_crop(picture, size)).transpose(2, 0, 1))
    return np.stack(pictures)
