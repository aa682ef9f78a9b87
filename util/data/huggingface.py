"""A folder that Hugging Face's library `datasets` wrote (`save_to_disk`), with a column of images and one of labels.

The library is optional (`pip install datasets`) and imported here alone. It maps the files into memory, so that loader
processes share their pages and a row is found at once; the library does not decode, so that the pixels are those of the
same files in an image folder.
"""

import os

from torch import Tensor

from util.data.crop import decode_crop
from util.data.images import DataError, Images, NoSplitError, data_folder, to_tensor

SPLITS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}  # split -> its names


class HuggingFaceImages(Images):
    """A Dataset, whose rows are the training images, or a DatasetDict with train and perhaps validation and test.

    Columns are found by their type, datasets.Image and datasets.ClassLabel; classes have the names that the latter
    gives them. DataError for a folder that is none, other splits, missing or ambiguous columns, and rows without label.
    """

    has_alpha = True

    def __init__(self, data_path: str | os.PathLike | None, img_size: int, split: str = "train"):
        try:
            import datasets
        except ImportError:
            raise DataError("DATASET=huggingface needs the package datasets: `pip install datasets`.") from None
        path = data_folder(data_path, "the folder that save_to_disk wrote")
        try:
            rows = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).rstrip(".")
            raise DataError(
                f"cannot open {path} as a data set of Hugging Face: {reason}. Expected a whole folder that a Dataset "
                "or DatasetDict wrote with save_to_disk."
            ) from None
        splits = dict(rows) if isinstance(rows, datasets.DatasetDict) else {"train": rows}
        name = next((name for name in SPLITS.get(split, (split,)) if name in splits), None)
        if name is None:
            raise (DataError if split == "train" else NoSplitError)(
                f"{path} has no split {split}; it has {', '.join(splits)}."
            )
        rows, self._where = splits[name], f"{path}, {name}"
        self.source = f"{self._where} {rows._fingerprint}"  # of its content, where there is no public name for it
        self._column = self._find(rows, datasets.Image)
        column = self._find(rows, datasets.ClassLabel)
        labels = rows.select_columns([column]).with_format("arrow")[:][column].fill_null(-1).to_numpy()
        super().__init__(img_size, rows.features[column].names, labels)
        for i in (labels < 0).nonzero()[0][:1]:
            raise DataError(f"{self.path(i)} has no label: save a data set without such rows (Dataset.filter).")
        undecoded = datasets.Image(decode=False)
        self._rows = rows.select_columns([self._column]).cast_column(self._column, undecoded)

    def _find(self, rows, kind: type) -> str:
        names = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        if len(names) != 1:
            raise DataError(
                f"{self._where} has {len(names)} columns of type {kind.__name__} ({', '.join(names) or 'none'}); "
                "expected one: use cast_column or remove_columns, and save it again."
            )
        return names[0]

    def path(self, i: int) -> str:
        return f"{self._where}, row {i}"

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self._rows[i][self._column] or {}
        crop = decode_crop(image.get("bytes") or b"", self.path(i), self.img_size, self.channels == 4)
        return to_tensor(crop), int(self.labels[i])
