"""Data sets: images from disk as uint8 tensors with their labels.

Nothing here is random. The order of an epoch is util/loader.py's; horizontal flips and the noise are drawn later, on
the device (denoiser.py).

    ImageFolderImages | CachedImages | Cifar10 | Digits  ->  util.loader  ->  to_float

Shapes: B images of a micro-batch, H = W = img_size, channels 3 (red, green, blue). A dataset gives an image as
uint8 (3, H, W) in 0..255 with its label, an int in 0..num_classes-1; a loader gives (B, 3, H, W) uint8 and (B,) int64.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import UserError

if TYPE_CHECKING:
    from util.bad_images import Replaced

MAX_PIXELS = 2**28  # of an image, as read and as enlarged: 16384 x 16384, 1 GiB in PIL, which uses 4 bytes per pixel
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four channels of 16 bits
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # PIL's own check, on the header; its default warns at a third of that

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Known:
    """What is assumed about a dataset before it is opened: img_size in pixels and the number of classes."""

    img_size: int
    class_num: int


KNOWN = {"imagefolder": Known(256, 1000), "cifar10": Known(32, 10), "digits": Known(32, 10)}
DATASETS = tuple(KNOWN)
IN_MEMORY = ("cifar10", "digits")
DEFAULT_DATA_PATH = {"imagefolder": None, "cifar10": str(REPOSITORY / "data" / "cifar10"), "digits": None}


class DataError(UserError):
    """Something is wrong with the data that the user named. The message says what, what was expected, what to do.

    A DataLoader raises a worker's exception again with the worker's whole traceback as its only argument;
    of that, the message is the part kept here.
    """

    def __init__(self, message: str):
        kind = type(self)
        super().__init__(message.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


class NoSplit(DataError):
    """An image folder has no validation images."""


class BadImage(DataError):
    """What one file holds is no image that can be used. reason: why, without the name of the file."""

    reason = ""


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB. Alpha is dropped; 16-bit grey keeps its upper 8 bits, as PIL does for 16-bit colour."""
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip values above 255
        grey = np.asarray(image).clip(0, 65535) >> 8  # (H, W)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "F":
        raise DataError("floating-point images have no agreed range; expected 8 or 16 bits per channel.")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop: (size, size, 3) uint8 from a PIL image of any size and mode.

    Halve with BOX while the short side is at least 2*size, then BICUBIC so that the short side is `size`, then cut
    out the centre. An image that already has the size comes back unchanged to the bit. DataError for mode F, and for
    an image so narrow that the second step would make more than MAX_PIXELS.
    Source: Dhariwal and Nichol 2021, guided-diffusion, image_datasets.py.
    """
    image = _to_rgb(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"with {image.width} x {image.height} pixels it is too narrow: enlarged to a short side of {size} it would "
            f"have {width} x {height}, and at most {MAX_PIXELS} pixels are made."
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    array = np.asarray(image)  # (height, width, 3)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size].copy()  # (size, size, 3)


def read_crop(path: str, size: int) -> np.ndarray:
    """The centre crop (size, size, 3) uint8 of an image file, of the first frame where there are several.

    The whole file is read before PIL sees it, so that errors of the file system are told from those of the content.

    Raises:
        BadImage: the content is no image, a damaged one, one with more than MAX_PIXELS, or not to be had as RGB.
        DataError: the file system did not give the content: a disk that is away, permissions, too many open files.
    """
    try:
        with open(path, "rb") as file:
            too_large = os.fstat(file.fileno()).st_size > MAX_BYTES
            content = b"" if too_large else file.read()
    except OSError as e:
        raise DataError(
            f"cannot read the file {path}: {e.strerror or e}. The file system says so, which is no bad image, and "
            "no other takes its place: check the disk, permissions and limits, and start again."
        ) from None
    try:
        if too_large:
            raise DataError(f"the file has more than {MAX_BYTES} bytes.")
        with Image.open(BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}.")
            return center_crop(image, size)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "PIL knows no such format" if content else "the file is empty"
    except DataError as e:
        reason = str(e).rstrip(".")
    except Exception as e:  # PIL's readers raise OSError, SyntaxError, ValueError, struct.error, ... on bad files
        reason = f"{str(e).rstrip('.')} ({type(e).__name__})"
    error = BadImage(
        f"cannot read image {path}: {reason}. Expected a whole image file; replace it or remove it "
        "(training can also go on without it: --on_bad_image skip)."
    )
    error.reason = reason
    raise error


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (3, H, W), contiguous, not sharing memory with the argument."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) in 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float expects uint8 images, not {images.dtype}")
    return images.to(torch.float32) / 127.5 - 1


class Images(Dataset):
    """Map-style dataset: item i is (image uint8 (3, H, W), label int), always the same for the same i.

    name; img_size in pixels; class_names in label order; labels (N,) int64; in_memory: reading an item opens no file;
    flip: a mirrored image is as good an example of its class; most_workers: more loader processes gain nothing;
    bad: the images that are known to be bad before they are read, each with the reason; replaced: where a loader notes
    the bad images that it replaces, None where a bad image is an error.
    """

    name: str
    in_memory: bool
    flip = True
    most_workers = 12
    bad: Mapping[int, str] = MappingProxyType({})
    replaced: "Replaced | None" = None

    def __init__(self, img_size: int, class_names: list[str], labels: np.ndarray):
        if img_size < 1:
            raise DataError(f"img_size is {img_size}; expected a positive number of pixels.")
        self.img_size, self.class_names, self.labels = img_size, list(class_names), labels
        self.num_classes = len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; empty when `folder` is not a folder."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir()) if folder.is_dir() else []


def _split_folder(root: Path, split: str) -> Path:
    """The folder that holds the class folders of a split. A folder `train` without folders in it is a class."""
    train = root / "train" if _class_folders(root / "train") else root
    if split == "train":
        return train
    candidates = [train.parent / other for other in ("val", "test")] if train.name == "train" else []
    candidates = candidates or [root / "val", root / "test"]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise NoSplit(
        f"no validation images: neither {candidates[0]} nor {candidates[1]} exists. "
        "Create one of them with the class folders of the training set."
    )


class ImageFolderImages(Images):
    """A folder of class folders of image files, each read, centre-cropped and converted to RGB when it is asked for.

    data_path: holds `train/` (and `val/` or `test/`), or is the training folder itself. split: 'train' or 'val'.
    Labels number the class folders in sorted order (torchvision's ImageFolder). What EXIF says about orientation is
    ignored, as ADM does. DataError, naming the path, for a missing path, no class folders, class folders without
    images (all of them), classes that differ between the splits, and, when an item is asked for, for a file that
    cannot be read (`read_crop`).
    """

    name, in_memory = "imagefolder", False

    def __init__(self, data_path: str | os.PathLike | None, img_size: int, split: str = "train"):
        if split not in ("train", "val"):
            raise DataError(f"an image folder has no split {split!r}; expected train or val.")
        if not data_path:
            raise DataError("no data path given; pass --data_path DIR, the folder that holds train/<class>/<image>.")
        root = Path(data_path).expanduser().absolute()
        layout = "Expected a folder with train/<class>/<image>, or the train folder itself"
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise DataError(f"data path {root} {what}. {layout}; check --data_path.")
        try:
            self.folder = _split_folder(root, split)
            if not _class_folders(self.folder):
                what = "holds files but no class folders" if any(self.folder.iterdir()) else "is empty"
                raise DataError(f"{self.folder} {what}. {layout}; one class is one folder as well.")
            listing = ImageFolder(self.folder, allow_empty=True)
        except OSError as e:
            raise DataError(f"cannot list the {split} images below {root}: {e}. Check permissions.") from None
        labels = np.array(listing.targets, dtype=np.int64)
        if hollow := np.flatnonzero(np.bincount(labels, minlength=len(listing.classes)) == 0).tolist():
            raise DataError(
                f"{len(hollow)} of the {len(listing.classes)} class folders in {self.folder} hold no image: "
                f"{', '.join(listing.classes[label] for label in hollow)}. Fill or remove them, and check permissions; "
                f"the files must end in {', '.join(IMG_EXTENSIONS)}."
            )
        super().__init__(img_size, listing.classes, labels)
        if split == "val" and (theirs := _class_folders(_split_folder(root, "train"))) != listing.classes:
            odd = sorted(set(theirs) ^ set(listing.classes))
            raise DataError(
                f"the class folders of {self.folder} are not those of the training set, so labels would "
                f"differ. Only in one of the two: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}."
            )
        # One array of bytes, not a list of strings: workers that only read it do not copy its pages.
        self._paths = np.array([os.fsencode(os.path.relpath(path, self.folder)) for path, _ in listing.samples])

    def path(self, i: int) -> str:
        """The file of image i."""
        return os.path.join(self.folder, os.fsdecode(bytes(self._paths[i])))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return _to_tensor(read_crop(self.path(i), self.img_size)), int(self.labels[i])


class Cifar10(Images):
    """CIFAR-10 as util/cifar10.py wrote it. split: 'train' (50,000 images) or 'val', which is 'test' (10,000).

    Resized with `center_crop` when img_size is not 32. DataError when the files are not there.
    """

    name, in_memory = "cifar10", True

    def __init__(self, data_path: str | os.PathLike | None, img_size: int, split: str = "train"):
        from util import cifar10  # it imports DataError from this file

        images, labels = cifar10.load(data_path or DEFAULT_DATA_PATH["cifar10"], "test" if split == "val" else split)
        super().__init__(img_size, list(cifar10.CLASS_NAMES), labels)
        self._images = images  # (N, 32, 32, 3)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = self._images[i]
        if self.img_size != image.shape[0]:
            image = center_crop(Image.fromarray(image), self.img_size)
        return _to_tensor(image), int(self.labels[i])


class Digits(Images):
    """scikit-learn's 1797 handwritten digits: 8x8 values 0..16, scaled to 0..255, resized with BICUBIC, grey as RGB.

    There is no split but 'train' (DataError).
    """

    name, in_memory, flip = "digits", True, False

    def __init__(self, img_size: int, split: str = "train"):
        if split != "train":
            raise DataError(f"the digits have no split {split!r}; all 1797 of them are train.")
        from sklearn.datasets import load_digits

        digits = load_digits()
        super().__init__(img_size, [str(d) for d in range(10)], digits.target.astype(np.int64))
        small = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        grey = [Image.fromarray(d).resize((img_size, img_size), Image.Resampling.BICUBIC) for d in small]
        self._images = torch.from_numpy(np.stack([np.asarray(g) for g in grey]))  # (N, H, W)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self._images[i].expand(3, -1, -1).clone(), int(self.labels[i])


def build_dataset(name: str, data_path: str | os.PathLike | None, img_size: int, split: str = "train") -> Images:
    """The dataset with a name in DATASETS. data_path None is DEFAULT_DATA_PATH[name]; the digits need none.

    An image folder may be a cache of one (util/image_cache.py).
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}; expected one of {', '.join(DATASETS)}.")
    data_path = data_path or DEFAULT_DATA_PATH[name]
    if name == "imagefolder":
        from util import image_cache  # it imports from this file

        cache = image_cache.find(data_path, split)
        if cache is not None:
            return image_cache.CachedImages(cache, img_size)
        return ImageFolderImages(data_path, img_size, split)
    return Cifar10(data_path, img_size, split) if name == "cifar10" else Digits(img_size, split)
