"""The data sets, by name: images from disk as uint8 tensors with their labels.

Nothing here is random: the order of an epoch is util/data/loader.py's, and flips and noise are drawn later, on the
device (denoiser.py). A script adds a data set of its own with DATASETS["name"] = DatasetInfo(...).

Shapes: an item is uint8 (3, H, W) in 0..255 with its label, an int in 0..num_classes-1, H = W = img_size; a batch is
(B, 3, H, W) uint8 with labels (B,) int64.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data import cifar10
from util.data.cache import CACHE, CachedImages
from util.data.crop import center_crop, read_crop
from util.data.fashion_mnist import CLASSES, FashionMnist
from util.data.huggingface import HuggingFaceImages
from util.data.images import (
    DataError,
    FileImages,
    Images,
    NoSplitError,
    Subset,
    data_folder,
    read_class_names,
    to_tensor,
)
from util.data.latents import LATENTS, LatentImages
from util.data.webdataset import ShardImages
from util.io import json_hash

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision
UNREAD_EXTENSIONS = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".svg")


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted, without hidden ones; empty when `folder` is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _list_files(folder: Path) -> list[str]:
    """Return the paths of all files below a class folder, in torchvision's order, without hidden files and folders."""
    found = []
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.append((path, sorted(name for name in names if not name.startswith("."))))
    return [os.path.join(path, name) for path, names in sorted(found) for name in names]


def _split_folder(root: Path, split: str) -> Path:
    """The folder that holds the class folders of a split. A folder `train` without folders in it is a class."""
    train = root / "train" if _class_folders(root / "train") else root
    if split == "train":
        return train
    parent = train.parent if train.name == "train" else root
    for folder in (parent / "val", parent / "test"):
        if folder.is_dir():
            return folder
    raise NoSplitError(
        f"no validation images: {parent} holds neither val nor test, with the class folders of the training set."
    )


class ImageFolderImages(FileImages):
    """A folder of class folders of image files, each read, centre-cropped and converted to RGB when it is asked for.

    `data_path` holds `train/` (and `val/` or `test/`), or is the training folder itself; `split` is train or val.
    Labels number the class folders in sorted order, as torchvision's ImageFolder does; hidden files and folders are
    ignored. EXIF orientation is ignored, as in ADM. With four channels the alpha of the files is kept.
    DataError for a missing path, missing or empty class folders, and classes that differ between the splits.
    """

    has_alpha = True

    def __init__(self, data_path: str | os.PathLike | None, img_size: int, split: str = "train"):
        if split not in ("train", "val"):
            raise DataError(f"an image folder has no split {split!r}; expected train or val.")
        root = folder = data_folder(data_path, "the folder that holds train/<class>/<image>, or to a cache of it")
        try:
            folder = _split_folder(root, split)
            classes, train_classes = _class_folders(folder), _class_folders(_split_folder(root, "train"))
            files = [_list_files(folder / name) for name in classes]
        except OSError as e:
            raise DataError(f"cannot list the {split} images in {folder}: {e}. Check permissions.") from None
        if any(root.glob("*.tar")) or any(root.glob("train/*.tar")):
            raise DataError(f"{root} holds tar files: --dataset webdataset (DATASET=webdataset) reads shards.")
        if any((root / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
            raise DataError(f"{root} was written by Hugging Face's datasets: use --dataset huggingface.")
        if classes == ["train"] and not files[0]:  # an empty train/ is no class
            folder, classes = folder / "train", []
        if not classes:
            fault = "holds no class folders" if folder.is_dir() else "does not exist or is not a folder"
            raise DataError(
                f"{folder} {fault}. Expected --data_path to be a folder with train/<class>/<image>, or that train "
                "folder itself; one class is one folder as well."
            )
        if odd := sorted(set(classes) ^ set(train_classes)):
            raise DataError(
                f"the class folders of {folder} are not those of the training set, so labels would differ. "
                f"Only in one of the two: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}. Add or remove them."
            )
        images = [[path for path in paths if path.lower().endswith(EXTENSIONS)] for paths in files]
        if empty := [name for name, paths in zip(classes, images, strict=True) if not paths]:
            raise DataError(
                f"{len(empty)} of the {len(classes)} class folders in {folder} hold no image: {', '.join(empty[:5])}"
                f"{', ...' if empty[5:] else ''}. Fill or remove them; the files must end in {', '.join(EXTENSIONS)}."
            )
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(paths) for paths in images])
        super().__init__(
            img_size, classes, labels, folder, [os.path.relpath(path, folder) for paths in images for path in paths]
        )
        unread = Counter(Path(path).suffix.lower() for paths in files for path in paths)
        unread = {suffix: count for suffix, count in unread.items() if suffix in UNREAD_EXTENSIONS}
        if unread:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
            self.notes.append(f"{folder} also has files that are not read ({counts}): convert them to PNG or JPEG")

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return to_tensor(read_crop(self.path(i), self.img_size, self.channels == 4)), int(self.labels[i])


class Cifar10(Images):
    """CIFAR-10 as util/data/cifar10.py wrote it; split train, or val, also called test. Other sizes: `center_crop`."""

    def __init__(self, data_path: str | os.PathLike | None, img_size: int, split: str = "train"):
        self._images, labels = cifar10.load(data_path or cifar10.FOLDER, "test" if split == "val" else split)
        super().__init__(img_size, list(cifar10.CLASS_NAMES), labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self._images[i]  # (32, 32, 3)
        if self.img_size != image.shape[0]:
            image = center_crop(Image.fromarray(image), self.img_size)
        return to_tensor(image), int(self.labels[i])


class Digits(Images):
    """scikit-learn's 1797 handwritten digits: 8x8 values 0..16, scaled to 0..255, resized with BICUBIC, grey as RGB."""

    def __init__(self, img_size: int, split: str = "train"):
        if split != "train":
            raise NoSplitError(f"the digits have no split {split!r}; all 1797 of them are train.")
        from sklearn.datasets import load_digits

        digits = load_digits()
        super().__init__(img_size, [str(d) for d in range(10)], digits.target.astype(np.int64))
        small = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        grey = [Image.fromarray(d).resize((img_size, img_size), Image.Resampling.BICUBIC) for d in small]
        self._images = torch.from_numpy(np.stack([np.asarray(g) for g in grey]))  # (N, H, W)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self._images[i].expand(3, -1, -1).clone(), int(self.labels[i])


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set by its name, before it is opened; most are defaults of the flags of that name."""

    build: Callable[[str | os.PathLike | None, int, str], Images]  # (data_path, img_size, split) -> the images
    img_size: int
    class_num: int
    flip: bool = True  # a mirrored image is as good an example of its class
    metrics: str = "fid,is"
    data_path: str | None = None
    in_memory: bool = False  # reading an item opens no file
    class_names: tuple[str, ...] | None = None  # for the labels of pictures; None: the numbers of the classes
    crop: str = "centre crop of ADM (util.data.center_crop)"  # recorded in reference statistics
    describe: Callable[[str | os.PathLike | None], dict] | None = None  # data_path -> what the data say of these


def _image_folder(data_path: str | os.PathLike | None, img_size: int, split: str) -> Images:
    """Open an image folder, or a cache of one (util/data/cache.py)."""
    folder = CACHE.find(data_path, split)
    return CachedImages(folder, img_size) if folder else ImageFolderImages(data_path, img_size, split)


def _latents(data_path: str | os.PathLike | None, img_size: int, split: str) -> Images:
    folder = LATENTS.find(data_path, split)
    if folder is None:
        raise DataError(
            f"{data_path or 'no data path'} holds no latents: set --data_path (DATA_PATH) to what was --out of "
            "`python -m tools.prepare_data latents`."
        )
    images = LatentImages(folder)
    if images.img_size != img_size:
        raise DataError(f"the latents {folder} are {images.img_size} wide, and --img_size is {img_size}.")
    return images


def _describe_latents(data_path: str | os.PathLike | None) -> dict:
    """Return what the index of latents says. Raises DataError if there is none."""
    folder = LATENTS.find(data_path)
    if folder is None:
        _latents(data_path, 0, "train")
    index = LATENTS.read_index(folder)
    known = {"vae": index["vae"], "pixels": index["img_size"], "dataset": index["dataset"]}
    sizes = {"img_size": index["size"], "channels": index["channels"], "class_num": index["class_num"]}
    return {**sizes, "flip": index["views"] == 2, "latents": known}


DATASETS = {
    "imagefolder": DatasetInfo(_image_folder, 256, 1000),
    "cifar10": DatasetInfo(
        Cifar10, 32, 10, data_path=str(cifar10.FOLDER), in_memory=True, class_names=cifar10.CLASS_NAMES
    ),
    "digits": DatasetInfo(
        lambda data_path, img_size, split: Digits(img_size, split),
        img_size=32,
        class_num=10,
        flip=False,
        metrics="class_agreement",
        in_memory=True,
        crop="none, resized with bicubic interpolation",
    ),
    "fashion_mnist": DatasetInfo(
        FashionMnist,
        img_size=32,
        class_num=10,
        flip=False,  # all shoes point to the left
        data_path="/usr/share/datasets/fashion-mnist",
        in_memory=True,
        class_names=CLASSES,
        crop="none, padded with zeros",
    ),
    "webdataset": DatasetInfo(ShardImages, 256, 1000),
    "huggingface": DatasetInfo(HuggingFaceImages, 256, 1000),
    "latents": DatasetInfo(_latents, 32, 1000, describe=_describe_latents),
}


def of_classes(images: Images, labels_file: str | os.PathLike) -> Subset:
    """Return the images of the classes in a file; their labels number these classes in the order of the data set."""
    names = read_class_names(labels_file)
    if unknown := sorted(set(names) - set(images.class_names)):
        raise DataError(f"--labels_file {labels_file} names {unknown[0]}, which is no class of the data set.")
    chosen = [name for name in images.class_names if name in set(names)]
    of_chosen = np.isin(images.labels, [images.class_names.index(name) for name in chosen])
    subset = Subset(images, of_chosen.nonzero()[0], chosen)
    subset.part = part_name(labels_file, chosen)
    return subset


def part_name(labels_file: str | os.PathLike, classes: Sequence[str]) -> str:
    """Return a name for a part of the classes, another one for other classes in a file of the same name."""
    return f"{Path(labels_file).stem}-{json_hash(sorted(classes), digits=6)}"


def build_dataset(
    name: str,
    data_path: str | os.PathLike | None,
    img_size: int,
    split: str = "train",
    channels: int | None = None,
    labels_file: str | os.PathLike | None = None,
) -> Images:
    """Open the data set `name` of DATASETS, or the classes of it that a file names.

    data_path None: the data set's own default; channels None: its own. Raises DataError for data that cannot be opened,
    that do not have these channels, or these classes.
    """
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}; expected one of {', '.join(DATASETS)}.")
    info = DATASETS[name]
    images = info.build(data_path or info.data_path, img_size, split)
    images.name, images.in_memory = name, info.in_memory
    channels = images.channels if channels is None else channels
    possible = {
        images.channels,
        1 if images.channels == 3 else images.channels,
        4 if images.has_alpha else images.channels,
    }
    if channels not in possible:
        raise DataError(
            f"{data_path or name} has {images.channels} channels, and --channels is {channels}; possible are "
            f"{', '.join(map(str, sorted(possible)))}."
        )
    images.channels = channels
    return images if labels_file is None else of_classes(images, labels_file)
