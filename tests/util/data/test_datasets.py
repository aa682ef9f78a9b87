"""The data sets and their registry. Shapes: items (3, H, W) uint8."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.util.data.image_files import SIZE, make_folder, noise_image, save_modes
from util.data import cifar10
from util.data.crop import center_crop
from util.data.datasets import DATASETS, DataError, DatasetInfo, Digits, ImageFolderImages, build_dataset, to_float


@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(tmp_path):
    expected = save_modes(tmp_path / "train" / "a")
    images = ImageFolderImages(tmp_path, 8)
    assert len(images) == len(expected)
    for i in range(len(images)):
        image, label = images[i]
        assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and label == 0
        assert tuple(image[:, 4, 4].tolist()) == expected[os.path.basename(images.path(i))], images.path(i)
        assert (image == image[:, :1, :1]).all()


def test_image_folder_layouts_and_attributes(tmp_path):
    make_folder(tmp_path / "train", {"b": 2, "a": 3})
    make_folder(tmp_path / "val", {"a": 1, "b": 1})
    above, itself = ImageFolderImages(tmp_path, 16), build_dataset("imagefolder", tmp_path / "train", 16)
    for images in (above, itself):
        assert images.class_names == ["a", "b"] and images.num_classes == 2 and images.img_size == 16
        assert len(images) == 5 and [images[i][1] for i in range(5)] == [0, 0, 0, 1, 1] == images.labels.tolist()
        assert images.labels.dtype == np.int64 and not images.in_memory
    assert torch.equal(above[3][0], itself[3][0])
    with Image.open(tmp_path / "train" / "b" / "0.png") as first_b:
        np.testing.assert_array_equal(above[3][0].permute(1, 2, 0).numpy(), center_crop(first_b, 16))
    assert len(ImageFolderImages(tmp_path, 16, "val")) == len(ImageFolderImages(tmp_path / "train", 16, "val")) == 2
    (tmp_path / "val").rename(tmp_path / "test")
    assert len(ImageFolderImages(tmp_path, 16, "val")) == 2
    make_folder(tmp_path / "boats", {"boat": 1, "train": 2})  # a class may be called train
    assert ImageFolderImages(tmp_path / "boats", 16).class_names == ["boat", "train"]


def refuse(match, *args):
    with pytest.raises(DataError, match=match) as e:
        ImageFolderImages(*args)
    return str(e.value)


def test_image_folder_errors_name_the_path(tmp_path):
    refuse("--data_path", None, 16)
    assert str(tmp_path / "nowhere") in refuse("does not exist", tmp_path / "nowhere", 16)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refuse("is not a folder", tmp_path / "file", 16)
    (tmp_path / "flat").mkdir()
    assert str(tmp_path / "flat") in refuse("no class folders", tmp_path / "flat", 16)
    noise_image(8, 8).save(tmp_path / "flat" / "0.png")
    refuse("no class folders", tmp_path / "flat", 16)
    make_folder(tmp_path / "set" / "train", {"a": 1, "b": 1})
    assert str(tmp_path / "set") in refuse("no validation images", tmp_path / "set", 16, "val")
    make_folder(tmp_path / "set" / "val", {"a": 1, "c": 1})
    assert str(tmp_path / "set" / "val") in refuse("b, c", tmp_path / "set", 16, "val")
    refuse("no split 'dev'", tmp_path / "set", 16, "dev")
    refuse("img_size is 0", tmp_path / "set", 0)


def test_all_class_folders_without_images_are_named(tmp_path):
    make_folder(tmp_path, {"bare": 0, "full": 2, ".hidden": 0})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image by its name")
    with pytest.raises(DataError, match=r"3 of the 4 .*: \.hidden, bare, texts\. ") as error:
        ImageFolderImages(tmp_path, SIZE)
    assert str(tmp_path) in str(error.value) and ".jpeg" in str(error.value)


def test_a_folder_that_may_not_be_listed_is_a_sentence(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list the train images .*Permission denied"):
        build_dataset("imagefolder", make_folder(tmp_path, {"a": 1}), SIZE)


def test_digits():
    digits = build_dataset("digits", None, 32)
    assert len(digits) == 1797 and digits.num_classes == 10 and digits.class_names == list("0123456789")
    assert digits.in_memory and digits.name == "digits" and digits.img_size == 32
    image, label = digits[5]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and isinstance(label, int)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert sorted(set(digits.labels.tolist())) == list(range(10)) and np.bincount(digits.labels).min() > 150
    with pytest.raises(DataError, match="1797"):
        Digits(32, "val")


def test_digits_values_at_their_own_size():
    from sklearn.datasets import load_digits

    digits, values = Digits(8), load_digits().images
    stack = torch.stack([digits[i][0][0] for i in range(len(digits))]).numpy()  # (N, 8, 8)
    assert np.abs(stack - values * 255 / 16).max() <= 0.5
    assert stack.min() == 0 and stack.max() == 255
    digits[0][0].zero_()  # an item shares no memory with the data set
    assert np.array_equal(digits[0][0][0].numpy(), stack[0])


def test_build_dataset_refuses_unknown_names_and_missing_data(tmp_path):
    with pytest.raises(DataError, match="imagefolder, cifar10, digits"):
        build_dataset("mnist", None, 32)
    with pytest.raises(DataError, match="make cifar10"):
        build_dataset("cifar10", tmp_path, 32)
    with pytest.raises(DataError, match="--data_path"):
        build_dataset("imagefolder", None, 256)


def test_what_the_registry_says_about_each_data_set():
    folder, cifar, digits = (DATASETS[name] for name in ("imagefolder", "cifar10", "digits"))
    assert [(info.img_size, info.class_num) for info in (folder, cifar, digits)] == [(256, 1000), (32, 10), (32, 10)]
    assert [info.flip for info in (folder, cifar, digits)] == [True, True, False]
    assert [info.metrics for info in (folder, cifar, digits)] == ["fid,is", "fid,is", "class_agreement"]
    assert cifar.class_names == cifar10.CLASS_NAMES and folder.class_names is digits.class_names is None
    assert cifar.data_path == str(Path(__file__).resolve().parents[3] / "data" / "cifar10")  # not the working directory


def test_a_script_can_add_a_data_set(monkeypatch):
    info = DatasetInfo(lambda path, size, split: Digits(size, split), 8, 10, in_memory=True, data_path="/default")
    monkeypatch.setitem(DATASETS, "mine", info)
    images = build_dataset("mine", None, 8)
    assert (images.name, images.in_memory, len(images)) == ("mine", True, 1797)


def test_to_float():
    x = to_float(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16))
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    back = ((x + 1) / 2 * 255).round().to(torch.uint8)
    assert torch.equal(back[0, 2].flatten(), torch.arange(256, dtype=torch.uint8))
    with pytest.raises(TypeError):
        to_float(torch.zeros(1, 3, 2, 2))
