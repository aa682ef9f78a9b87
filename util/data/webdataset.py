"""Shards: tar files of samples in the format of WebDataset, `key.jpg` (or png, webp) beside `key.cls` (or key.json).

A tar file does not say where its members are, so shards are scanned once, header by header. What is found is the index:

    {train,val,test}.index.npz   samples (N,): name, shard, offset and bytes of the image, label
                                 shards (S,): name, bytes, date

It lies beside the shards, or in the user's cache where nothing can be written there. With it an image is one read at a
known place: training reads images in any order, and resumes, as in an image folder. Shards are opened for each image,
so that loader processes share no file.

Shapes: N samples in S shards, in the order of the names of the shards and within them.
"""

import hashlib
import json
import operator
import os
import re
import tarfile
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from util.data.crop import decode_crop, read_bytes
from util.data.images import DataError, Images, NoSplitError, data_folder, read_class_names, to_tensor
from util.io import json_hash, replacing

IMAGES = ("jpg", "jpeg", "png", "webp")
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}  # words in names of shards and folders
CLASSES = "classes.txt"  # beside the shards: the names of the classes, one on a line
THREADS = 16  # that scan shards, since file systems may be slow to answer


def find_shards(root: Path, split: str) -> list[Path]:
    """Return the shards of a split. What neither its name nor that of its folder assigns to a split, is of train.

    NoSplitError for none (of train DataError), and DataError for a gap in their numbers.
    """
    shards = defaultdict(list)  # split -> shards
    for path in sorted(path for folder in (root, *map(root.joinpath, SPLITS)) for path in folder.glob("[!.]*.tar")):
        words = (*re.findall("[a-z]+", path.name.lower()), path.relative_to(root).parts[0], "train")
        shards[next(SPLITS[word] for word in words if word in SPLITS)].append(path)
    if not shards[split]:
        raise (DataError if split == "train" else NoSplitError)(
            f"{root} holds no shards of the split {split}. Expected --data_path (DATA_PATH) to be a folder of *.tar, "
            "not compressed; train, val or test in their names, or folders of that name, say of which split they are."
        )
    sequences = defaultdict(dict)  # the name around a number -> number -> shard
    for path in shards[split]:
        if match := re.fullmatch(r"(.*?)(\d+)(-of-\d+|\D*)", path.stem):
            sequences[path.parent, match[1], match[3]][int(match[2])] = path
    for (_, before, after), found in sequences.items():
        if 2 * len(found) <= max(found) - min(found):
            continue  # dates, say: no sequence
        for n in sorted(set(range(min(found), max(found))) - found.keys())[:1]:
            first, last = found[min(found)], found[max(found)].name
            missing = f"{before}{n:0{len(first.stem) - len(before) - len(after)}}{after}.tar"
            raise DataError(f"{first.parent} has {first.name} to {last}, but not {missing}: copy it again.")
    return shards[split]


def _scan(shard: Path) -> list[tuple[bytes, int, int, int]]:
    """Return (name, offset, bytes, label) of each image of a shard. DataError for one that is damaged or compressed."""
    samples = defaultdict(dict)  # key -> extension -> member; as in WebDataset, a key ends at the first dot
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if not (member.isreg() and key and extension):
                    continue
                if extension.lower() in samples[folder, key]:
                    raise DataError(f"{shard} has {member.name} twice: each sample needs a key of its own.")
                samples[folder, key][extension.lower()] = member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile ends at a damaged header
                raise tarfile.ReadError("unexpected end of data")
            return [_sample(tar, files) for files in samples.values() if _is_sample(shard, files)]
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot read the shard {shard}: {error}. Copy it again, not compressed.") from None


def _is_sample(shard: Path, files: dict[str, tarfile.TarInfo]) -> bool:
    if dotted := [member.name for extension, member in files.items() if extension.endswith(".cls")]:
        raise DataError(f"{shard} has {dotted[0]}: a key ends at the first dot, so that its name must have one alone.")
    if len(images := files.keys() & {*IMAGES}) > 1:
        raise DataError(f"{shard} has two images with one key: {', '.join(sorted(files[e].name for e in images))}.")
    return bool(images) or "cls" in files


def _sample(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> tuple[bytes, int, int, int]:
    image = next((files[extension] for extension in IMAGES if extension in files), None)
    if image is None:
        raise DataError(f"{tar.name}/{files['cls'].name} is the label of no image ({', '.join(IMAGES)}).")
    try:
        content = tar.extractfile(files.get("cls") or files["json"]).read()
        label = int(content) if "cls" in files else operator.index(json.loads(content)["label"])
    except (KeyError, ValueError, TypeError):
        label = -1
    if not 0 <= label < 2**31:
        raise DataError(
            f"{tar.name}/{image.name} has no label: expected the number of a class, from 0, in a file of the same key "
            'that ends in .cls, or as "label" in one that ends in .json.'
        )
    return os.fsencode(image.name), image.offset_data, image.size, label


def read_index(root: Path, split: str, anew: bool = False) -> dict[str, np.ndarray]:
    """Return the index of a split, made where there is none, or `anew`.

    DataError if it is of other shards; and if it was to be made anew and can be written nowhere.
    """
    paths = find_shards(root, split)
    about = [(str(path.relative_to(root)), s.st_size, int(s.st_mtime)) for path in paths for s in [path.stat()]]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "spectral-jit", json_hash(str(root))).expanduser()
    places = [folder / f"{split}.index.npz" for folder in (root, cache)]
    if not anew and (place := max(filter(Path.is_file, places), key=os.path.getmtime, default=None)):
        try:
            with np.load(place, allow_pickle=False) as file:
                index = {name: file[name] for name in ("samples", "shards")}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot read the index {place}: {error}. Remove it; it is made again.") from None
        if changed := set(about) ^ set(index["shards"].tolist()):
            raise DataError(
                f"{root / min(changed)[0]} is missing, new or changed since {place} was made. Copy it again; if all is "
                f"as it should be, `python -m tools.prepare_data index --data_path {root}` makes the index again."
            )
        return index
    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(tqdm(pool.map(_scan, paths), f"index {split}", len(paths), unit="shard", disable=None))
    rows = [(name, shard, *where) for shard, part in enumerate(parts) for name, *where in part]
    if not rows:
        raise DataError(f"the shards of {split} in {root} hold no images ({', '.join(IMAGES)}).")
    index = {"samples": _table(rows, "name,shard,offset,bytes,label"), "shards": _table(about, "name,bytes,date")}
    for place in places:
        with suppress(OSError):  # it cannot be written
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as file:
                np.savez(file, **index)
            return index
    if anew:
        raise DataError(f"the index can be written neither to {places[0]} nor to {places[1]}.")
    return index  # without a place for it, each start scans


def _table(rows: list[tuple], names: str) -> np.recarray:
    return np.rec.fromarrays([np.array(column) for column in zip(*rows, strict=True)], names=names)


class ShardImages(Images):
    """The images of one split, each read from its shard, centre-cropped and converted to RGB when it is asked for.

    Classes have the names in classes.txt, or else are the numbers from 0 to the largest label of the training images.
    """

    has_alpha = True

    def __init__(self, data_path: str | os.PathLike | None, img_size: int, split: str = "train"):
        root = self._root = data_folder(data_path, "the folder of the shards (*.tar)")
        index = read_index(root, split)
        self._samples, self._shards = index["samples"], index["shards"]["name"]
        self.source = f"{root} {split} {hashlib.sha256(self._samples.tobytes()).hexdigest()[:16]}"
        labels = self._samples["label"].astype(np.int64)
        if (root / CLASSES).is_file():
            names = read_class_names(root / CLASSES)
        else:
            train = index if split == "train" else read_index(root, "train")
            names = [str(k) for k in range(train["samples"]["label"].max() + 1)]
        super().__init__(img_size, names, labels)
        for i in (labels >= len(names)).nonzero()[0][:1]:
            raise DataError(
                f"{self.path(i)} has the label {labels[i]}; expected 0 to {len(names) - 1}, the lines of "
                f"{root / CLASSES}, or where there is no such file the labels of the training images."
            )

    def path(self, i: int) -> str:
        """Return the shard and in it the name of an image."""
        return os.path.join(self._shard(i), os.fsdecode(self._samples["name"][i]))

    def _shard(self, i: int) -> str:
        return os.path.join(self._root, self._shards[self._samples["shard"][i]])

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        offset, count = int(self._samples["offset"][i]), int(self._samples["bytes"][i])
        content = read_bytes(self._shard(i), offset, count)
        if len(content) < count:
            raise DataError(f"the shard of {self.path(i)} ends within it: it was changed while in use.")
        return to_tensor(decode_crop(content, self.path(i), self.img_size, self.channels == 4)), int(self.labels[i])
