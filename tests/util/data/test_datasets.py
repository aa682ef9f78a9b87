"""The data sets and their registry. Shapes: items (3, H, W) uint8."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from tests.util.data.image_files import SIZE, make_folder, noise_image, save_modes
from util.data.crop import center_crop
from util.data.datasets import DATASETS, DataError, DatasetInfo, Digits, ImageFolderImages, build_dataset
from util.data.images import to_float


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


@pytest.mark.parametrize(
    ("path", "match", "split"),
    [
        ("nowhere", "does not exist", "train"),
        ("file", "is not a folder", "train"),
        ("flat", "holds no class folders", "train"),
        ("texts", r"2 of the 3 class folders .* hold no image: bare, texts\. .*\.jpeg", "train"),
        ("set", "no split 'dev'", "dev"),
        ("set", "no validation images", "val"),
        ("other", "b, c", "val"),
    ],
)
def test_folders_that_are_no_image_folder_are_named(tmp_path, path, match, split):
    (tmp_path / "file").write_text("")
    (tmp_path / "flat").mkdir()
    noise_image(8, 8).save(tmp_path / "flat" / "0.png")
    make_folder(tmp_path / "texts", {"bare": 0, "full": 2, ".hidden": 0, "texts": 0})
    (tmp_path / "texts" / "texts" / "notes.txt").write_text("no image by its name")
    make_folder(tmp_path / "set" / "train", {"a": 1, "b": 1})
    make_folder(tmp_path / "other" / "train", {"a": 1, "b": 1})
    make_folder(tmp_path / "other" / "val", {"a": 1, "c": 1})
    with pytest.raises(DataError, match=match) as error:
        ImageFolderImages(tmp_path / path, SIZE, split)
    assert split == "dev" or str(tmp_path / path) in str(error.value)


def test_files_are_listed_as_torchvision_lists_them(tmp_path):
    """Folders in class folders, links, names in any case; but nothing hidden."""
    for name in ("a/1.png", "a/B/2.JPG", "a/b/3.jpeg", "b/0.webp", "b/deep/er/4.bmp", "b/notes.txt"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(8, 8).save(tmp_path / "train" / name) if name[-3:] != "txt" else (tmp_path / "train" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    noise_image(8, 8).save(tmp_path / "elsewhere" / "5.png")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    plain = ImageFolder(tmp_path / "train")
    images = ImageFolderImages(tmp_path, 8)
    assert images.class_names == plain.classes and images.labels.tolist() == plain.targets
    assert [images.path(i) for i in range(len(images))] == [path for path, _ in plain.samples]

    train = tmp_path / "train"
    (train / ".ipynb_checkpoints").mkdir()
    (train / "a" / ".thumbnails").mkdir()
    for hidden in (".ipynb_checkpoints/x.png", "a/.thumbnails/x.png", "a/._1.png"):
        noise_image(8, 8).save(train / hidden)
    again = ImageFolderImages(tmp_path, 8)
    assert again.class_names == images.class_names
    assert [again.path(i) for i in range(len(again))] == [images.path(i) for i in range(len(images))]


def test_files_that_look_like_images_and_are_not_read_are_counted(tmp_path):
    make_folder(tmp_path, {"a": 1})
    assert ImageFolderImages(tmp_path, 8).notes == []
    for name in ("x.jfif", "y.JFIF", "z.avif", "notes.txt"):
        (tmp_path / "a" / name).touch()
    (note,) = ImageFolderImages(tmp_path, 8).notes
    assert "(1 .avif, 2 .jfif)" in note and str(tmp_path) in note


def test_no_data_path_no_size_and_no_such_data_set(tmp_path):
    with pytest.raises(DataError, match=r"--data_path .*DATA_PATH"):
        build_dataset("imagefolder", None, 256)
    with pytest.raises(DataError, match="imagefolder, cifar10, digits"):
        build_dataset("mnist", None, 32)
    with pytest.raises(DataError, match="img_size is 0"):
        ImageFolderImages(make_folder(tmp_path, {"a": 1}), 0)


def test_digits():
    from sklearn.datasets import load_digits

    digits = build_dataset("digits", None, 32)
    assert len(digits) == 1797 and digits.num_classes == 10 and digits.class_names == list("0123456789")
    assert digits.in_memory and digits.name == "digits" and digits.img_size == 32
    image, label = digits[5]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and isinstance(label, int)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    with pytest.raises(DataError, match="1797"):
        Digits(32, "val")

    digits, known = Digits(8), load_digits()  # at their own size
    stack = torch.stack([digits[i][0][0] for i in range(len(digits))]).numpy()  # (N, 8, 8)
    assert np.abs(stack - known.images * 255 / 16).max() <= 0.5 and stack.min() == 0 and stack.max() == 255
    assert np.array_equal(digits.labels, known.target)
    digits[0][0].zero_()  # an item shares no memory with the data set
    assert np.array_equal(digits[0][0][0].numpy(), stack[0])


def test_a_script_can_add_a_data_set(monkeypatch):
    info = DatasetInfo(lambda path, size, split: Digits(size, split), 8, 10, in_memory=True, data_path="/default")
    monkeypatch.setitem(DATASETS, "mine", info)
    assert os.path.isabs(DATASETS["cifar10"].data_path)  # the default is in the repository, not the working directory
    images = build_dataset("mine", None, 8)
    assert (images.name, images.in_memory, len(images)) == ("mine", True, 1797)


def test_to_float():
    x = to_float(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16))
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    back = ((x + 1) / 2 * 255).round().to(torch.uint8)
    assert torch.equal(back[0, 2].flatten(), torch.arange(256, dtype=torch.uint8))
    with pytest.raises(TypeError):
        to_float(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a-0.tar", r"holds tar files: --dataset webdataset"),
        ("train/a-0.tar", r"holds tar files: --dataset webdataset"),
        ("dataset_dict.json", r"was written by Hugging Face's datasets: use --dataset huggingface"),
    ],
)
def test_a_folder_of_another_kind_is_recognised(tmp_path, name, match):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=match):
        build_dataset("imagefolder", tmp_path, 16)
