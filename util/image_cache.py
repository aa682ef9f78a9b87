"""An image folder after its crop, in a few large files: read instead of decoded, and the same pixels to the bit.

    CACHE/train/cache.json        what the cache is made of: an `Index`
    CACHE/train/files.json        {class: names of its files, below the folder of the class}, in the order of the images
    CACHE/train/shard-00000.bin   uint8 (n, 3, H, W) and nothing else; n = images_per_shard, in the last one less
    CACHE/val/...                 the same, where the image folder has val/ or test/

Image i is number i % images_per_shard of shard i // images_per_shard. Only whole shards have their names, and only they
are in the index: a cache that is not finished lacks some. prepare_data.py writes it (util/cache_writer.py).

Shapes: an image is uint8 (3, H, W), H = W = img_size: no byte has to be moved to make the tensor that training reads.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.data import BadImage, DataError, Images
from util.files import replacing

INDEX, FILES = "cache.json", "files.json"
VERSION = 1  # of the layout of files and index
MAKE_AGAIN = "start `python prepare_data.py cache` again with its --data_path and --out: it makes what is missing"


@dataclass
class Index:
    """What cache.json holds.

    source: the folder of class folders that was read. files_sha256: of files.json. made: date, command, commit,
    versions; the first command where there were several. shards: by file name, those that are whole, each with its
    "sha256" and with "bad", {number of the image: why it could not be read}: zeros are in the place of those.
    """

    img_size: int
    images_per_shard: int
    num_images: int
    class_names: list[str]
    source: str
    files_sha256: str
    made: dict[str, Any]
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = VERSION

    @property
    def image_bytes(self) -> int:
        return 3 * self.img_size**2

    def names(self) -> list[str]:
        """File names of all shards, made or not."""
        return [f"shard-{k:05d}.bin" for k in range(-(-self.num_images // self.images_per_shard))]

    def images(self, k: int) -> range:
        """Numbers of the images in shard k."""
        first = k * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_images))

    def bad(self) -> dict[int, str]:
        return {int(i): reason for shard in self.shards.values() for i, reason in shard["bad"].items()}

    def faults(self, folder: Path) -> dict[int, str]:
        """Numbers of the shards that are missing or not of their size, each with a sentence."""
        found = {}
        for k, name in enumerate(self.names()):
            path, expected = folder / name, len(self.images(k)) * self.image_bytes
            if name not in self.shards:
                found[k] = f"{path} has not been written yet"
            elif not path.is_file():
                found[k] = f"{path} is missing"
            elif (size := path.stat().st_size) != expected:
                found[k] = f"{path} has {size} bytes instead of {expected}"
        return found

    def save(self, folder: Path) -> None:
        with replacing(folder / INDEX) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """Raises DataError: no cache.json that this code can read."""
        path = folder / INDEX
        try:
            content = json.loads(path.read_bytes())
        except OSError as e:
            raise _refused(path, e) from None
        except ValueError as e:
            raise DataError(
                f"the index of the image cache, {path}, is damaged and cannot be read: {e}. Copy it again, or remove "
                f"{folder} and make the cache again."
            ) from None
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION or content.keys() != {f.name for f in fields(cls)}:
            raise DataError(
                f"{path} is no index of an image cache that this code reads (its version is {version}, expected "
                f"{VERSION}). Name another folder, or make the cache with this code's prepare_data.py."
            )
        return cls(**content)


def _refused(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}. Check the disk and permissions.")


def find(data_path: str | os.PathLike | None, split: str = "train") -> Path | None:
    """The folder of a split where data_path is a cache, or the train folder of one; None where it is none.

    Raises:
        DataError: the file system does not let one look.
    """
    root = Path(data_path).expanduser().absolute() if data_path else None
    try:
        if root is None or not any((folder / INDEX).is_file() for folder in (root, root / "train")):
            return None
    except OSError as e:
        raise _refused(Path(e.filename).parent, e) from None
    train = root if (root / INDEX).is_file() else root / "train"
    return train if split == "train" else train.parent / split


def write_files(folder: Path, files: dict[str, list[str]]) -> None:
    with replacing(folder / FILES) as file:
        file.write(_encoded(files))


def files_sha256(files: dict[str, list[str]]) -> str:
    return hashlib.sha256(_encoded(files)).hexdigest()


def _encoded(files: dict[str, list[str]]) -> bytes:
    return (json.dumps(files, indent=0) + "\n").encode()  # names that are not UTF-8 are escaped, and come back


def read_files(folder: Path, index: Index) -> dict[str, list[str]]:
    """files.json, held against its checksum. Raises DataError."""
    try:
        content = (folder / FILES).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{folder / FILES} of the image cache is missing. Copy it again, or {MAKE_AGAIN}.") from None
    except OSError as e:
        raise _refused(folder / FILES, e) from None
    if hashlib.sha256(content).hexdigest() != index.files_sha256:
        raise DataError(
            f"the image cache {folder} is damaged: {FILES} is not the one that {INDEX} was written for. Copy it again, "
            f"or remove {FILES} and {MAKE_AGAIN}."
        )
    return json.loads(content)


class CachedImages(Images):
    """One split of a cache, in the place of the ImageFolderImages that it was made from: same items, order and paths.

    An image that could not be read when the cache was made is a BadImage here too, and known from the start (`bad`).
    The sizes of all files are checked now; checksums of shards only by `prepare_data.py verify`.

    Raises:
        DataError: no such split, a cache that is not finished, damaged, of another size or of other code; when an item
            is asked for, a file that the file system does not give.
    """

    name, in_memory = "imagefolder", False
    most_workers = 4  # one would do, some 4,500 images a second at 256 pixels, but for disks that let it wait

    def __init__(self, folder: Path, img_size: int):
        if not (folder / INDEX).is_file():
            raise DataError(
                f"the image cache {folder.parent} has no {folder.name} images: there is no {folder / INDEX}. A cache "
                "has train, and val where the folder that it was made from had val/ or test/."
            )
        index = Index.load(folder)
        if index.img_size != img_size:
            raise DataError(
                f"the image cache {folder} holds images of {index.img_size} pixels and --img_size is {img_size}. "
                f"Make another one with `python prepare_data.py cache --img_size {img_size}`, or train at "
                f"{index.img_size}."
            )
        if faults := list(index.faults(folder).values()):
            raise DataError(
                f"the image cache {folder} is not whole: {faults[0]}"
                f"{f', and {len(faults) - 1} more of {len(index.names())}' if faults[1:] else ''}. Copy it again, or "
                f"{MAKE_AGAIN}."
            )
        files = read_files(folder, index)
        labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(names) for names in files.values()])
        if list(files) != index.class_names or len(labels) != index.num_images:
            raise DataError(f"the image cache {folder} is damaged: {FILES} and {INDEX} contradict each other.")
        super().__init__(img_size, index.class_names, labels)
        self.folder, self.index, self.bad = folder, index, index.bad()
        # One array of bytes, not a list of strings: workers that only read it do not copy its pages.
        self._paths = np.array([os.fsencode(f"{name}/{file}") for name, names in files.items() for file in names])
        try:
            self._shards = [open(folder / name, "rb", buffering=0) for name in index.names()]  # noqa: SIM115
        except OSError as e:
            raise DataError(
                f"the image cache {folder} cannot be opened: {e}. Check permissions and `ulimit -n`."
            ) from e

    def path(self, i: int) -> str:
        """The file that image i was read from when the cache was made."""
        return os.path.join(self.index.source, os.fsdecode(bytes(self._paths[i])))

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        i = range(len(self))[i]
        if i in self.bad:
            raise self._bad_image(i)
        shard, number = divmod(i, self.index.images_per_shard)
        image = torch.empty(3, self.img_size, self.img_size, dtype=torch.uint8)
        file = self._shards[shard]
        # Not through a memory map: there an error of the file system would be a signal that ends the process.
        try:
            size = os.preadv(file.fileno(), [image.numpy()], number * image.nbytes)
        except OSError as e:
            raise DataError(
                f"cannot read the file {file.name}: {e.strerror}. Check the disk, and start again."
            ) from None
        if size != image.nbytes:
            raise DataError(f"{file.name} ends within image {i}: it was changed while in use. Start again.")
        return image, int(self.labels[i])

    def _bad_image(self, i: int) -> BadImage:
        """The error for image i, one of `bad`."""
        error = BadImage(
            f"cannot read image {self.path(i)}: {self.bad[i]}. So it was when the cache {self.folder} was made: "
            "replace it and start `python prepare_data.py cache` again, which makes its shard anew "
            "(training can also go on without it: --on_bad_image skip)."
        )
        error.reason = self.bad[i]
        return error
