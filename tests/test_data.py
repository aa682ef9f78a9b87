"""Datasets, global batches and the loader: util/data.py.

Shapes: images (H, W, 3) as arrays, (3, H, W) as items, (B, 3, H, W) as batches; all uint8 before `to_float`.
"""

import gc
import math
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util import data, loader
from util.data import DataError, Digits, ImageFolderImages, build_dataset
from util.loader import GlobalBatchSampler, build_loader


def noise_image(width, height, mode="RGB", seed=0):
    channels = {"RGB": 3, "L": 1, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), array.tobytes())


def make_folder(root, counts, size=(20, 16)):
    """Class folders with so many PNG images each; returns root."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_image(*size, seed=100 * label + i).save(root / name / f"{i}.png")
    return root


# Centre crop.


def reference_crop(image, size, passes):
    """The crop by another route, for sides that halve evenly: the number of halvings in closed form, each of them as
    means of neighbours in two passes ('xy': along rows first), each rounded half up as 8-bit BOX is, and Image.crop."""
    array = np.asarray(image).astype(np.int64)  # (h, w, 3)
    for _ in range(max(0, math.floor(math.log2(min(array.shape[:2]) / size)))):
        for axis in passes:
            even, odd = (array[:, 0::2], array[:, 1::2]) if axis == "x" else (array[0::2], array[1::2])
            array = (even + odd + 1) // 2
    small = Image.fromarray(array.astype(np.uint8))
    short = min(small.size)
    wide = small.resize((round(small.width * size / short), round(small.height * size / short)), Image.BICUBIC)
    left, top = (wide.width - size) // 2, (wide.height - size) // 2
    return np.asarray(wide.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(
    "width, height, size",
    [(128, 96, 32), (96, 200, 24), (64, 64, 32), (40, 44, 32), (63, 90, 32), (20, 17, 32), (512, 64, 16)],
)
def test_center_crop_against_independent_formulation(width, height, size):
    image = noise_image(width, height)
    crop = data.center_crop(image, size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    # PIL may take the columns first: 13.0.0 does so for an image more than twice as high as wide. Equal either way.
    assert any(np.array_equal(crop, reference_crop(image, size, passes)) for passes in ("xy", "yx"))


def test_center_crop_takes_the_centre():
    array = np.zeros((32, 96, 3), dtype=np.uint8)
    array[:, 32:64] = (10, 20, 30)
    np.testing.assert_array_equal(data.center_crop(Image.fromarray(array), 32), array[:, 32:64])


def test_center_crop_at_size_changes_no_bit():
    image = noise_image(48, 48)
    np.testing.assert_array_equal(data.center_crop(image, 48), np.asarray(image))


def test_center_crop_upscales_a_constant_to_itself():
    crop = data.center_crop(Image.new("RGB", (7, 5), (200, 100, 3)), 33)
    assert crop.shape == (33, 33, 3) and (crop == (200, 100, 3)).all()


# Modes.


def save_modes(folder):
    """One file per mode, each of a constant image; returns {file name: expected (r, g, b)}."""
    folder.mkdir(parents=True)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 11, 22, 33])
    images = {
        "grey.png": (Image.new("L", (9, 9), 77), (77, 77, 77)),
        "grey_alpha.png": (Image.new("LA", (9, 9), (77, 5)), (77, 77, 77)),
        "binary.png": (Image.new("1", (9, 9), 1), (255, 255, 255)),
        "palette.png": (palette, (11, 22, 33)),
        "rgba.png": (Image.new("RGBA", (9, 9), (1, 2, 3, 40)), (1, 2, 3)),
        "cmyk.tif": (Image.new("CMYK", (9, 9), (255, 0, 0, 0)), (0, 255, 255)),
        "sixteen.png": (Image.fromarray(np.full((9, 9), 0xABCD, dtype=np.uint16)), (0xAB,) * 3),
        "sixteen.tif": (Image.fromarray(np.full((9, 9), 0xABCD, dtype=np.uint16)), (0xAB,) * 3),
    }
    for name, (image, _) in images.items():
        image.save(folder / name)
    palette.save(folder / "transparent.png", transparency=bytes([0, 128]))
    return {name: colour for name, (_, colour) in images.items()} | {"transparent.png": (11, 22, 33)}


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


def test_floating_point_images_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("F", (9, 9), 0.5).save(tmp_path / "a" / "f.tif")
    with pytest.raises(DataError, match=r"f\.tif.*floating-point"):
        ImageFolderImages(tmp_path, 8)[0]


# Image folders.


def test_image_folder_layouts_and_attributes(tmp_path):
    make_folder(tmp_path / "train", {"b": 2, "a": 3})
    make_folder(tmp_path / "val", {"a": 1, "b": 1})
    above, itself = ImageFolderImages(tmp_path, 16), build_dataset("imagefolder", tmp_path / "train", 16)
    for images in (above, itself):
        assert images.class_names == ["a", "b"] and images.num_classes == 2 and images.img_size == 16
        assert len(images) == 5 and [images[i][1] for i in range(5)] == [0, 0, 0, 1, 1] == images.labels.tolist()
        assert images.name == "imagefolder" and images.flip and not images.in_memory
    assert torch.equal(above[3][0], itself[3][0])
    with Image.open(tmp_path / "train" / "b" / "0.png") as first_b:
        np.testing.assert_array_equal(above[3][0].permute(1, 2, 0).numpy(), data.center_crop(first_b, 16))
    assert len(ImageFolderImages(tmp_path, 16, "val")) == len(ImageFolderImages(tmp_path / "train", 16, "val")) == 2
    (tmp_path / "val").rename(tmp_path / "test")
    assert len(ImageFolderImages(tmp_path, 16, "val")) == 2


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path, {"boat": 1, "train": 2})
    assert ImageFolderImages(tmp_path, 16).class_names == ["boat", "train"]


def refuse(match, *args):
    with pytest.raises(DataError, match=match) as e:
        ImageFolderImages(*args)
    return str(e.value)


def test_image_folder_errors_name_the_path(tmp_path):
    refuse("--data_path", None, 16)
    assert str(tmp_path / "nowhere") in refuse("does not exist", tmp_path / "nowhere", 16)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refuse("is not a folder", tmp_path / "file", 16)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refuse("is empty", tmp_path / "empty", 16)
    (tmp_path / "flat").mkdir()
    noise_image(8, 8).save(tmp_path / "flat" / "0.png")
    assert str(tmp_path / "flat") in refuse("no class folders", tmp_path / "flat", 16)
    make_folder(tmp_path / "hollow", {"full": 1, "hollow_class": 0})
    assert str(tmp_path / "hollow") in refuse("hollow_class", tmp_path / "hollow", 16)
    make_folder(tmp_path / "set" / "train", {"a": 1, "b": 1})
    assert str(tmp_path / "set" / "val") in refuse("no validation images", tmp_path / "set", 16, "val")
    make_folder(tmp_path / "set" / "val", {"a": 1, "c": 1})
    refuse("b, c", tmp_path / "set", 16, "val")
    refuse("no split 'dev'", tmp_path / "set", 16, "dev")
    refuse("img_size is 0", tmp_path / "set", 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", ["truncated.png", "garbage.jpg", "empty.png"])
def test_unreadable_image_is_named(tmp_path, workers, bad):
    path = make_folder(tmp_path / "train", {"a": 3}, size=(64, 64)) / "a" / bad
    whole = (tmp_path / "train" / "a" / "0.png").read_bytes()
    path.write_bytes({"truncated.png": whole[: len(whole) // 2], "garbage.jpg": b"no image", "empty.png": b""}[bad])
    images = ImageFolderImages(tmp_path, 16)
    loader = build_loader(images, GlobalBatchSampler(4, 1, 0, 1, 1, 0), workers, False)
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as e:
        list(loader)
    assert str(path) in str(e.value)
    assert str(e.value).startswith("cannot read image") and "Traceback" not in str(e.value)
    assert set(multiprocessing.active_children()) <= before  # none of the workers is left


def test_loader_works_again_after_a_failure(tmp_path):
    images = ImageFolderImages(make_folder(tmp_path, {"a": 4}), 16)
    loader = build_loader(images, GlobalBatchSampler(4, 1, 0, 1, 1, 0), 2, False)
    path = Path(images.path(2))
    whole = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(DataError):
        list(loader)
    path.write_bytes(whole)
    assert len(list(loader)) == 4
    for _ in loader:
        break  # leaving early and coming back starts the epoch over
    assert len(list(loader)) == 4


def test_workers_end_with_a_loader_that_the_garbage_collector_finds(tmp_path):
    """As one is in the frames of an exception. torch came too late to end them: they stayed, and so did pytest."""
    images = ImageFolderImages(make_folder(tmp_path, {"a": 4}), 16)
    loader = build_loader(images, GlobalBatchSampler(4, 1, 0, 1, 1, 0), 2, False)
    before = set(multiprocessing.active_children())
    assert len(list(loader)) == 4
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    cycle = [loader]
    cycle.append(cycle)
    del loader, cycle
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)


# Digits and the table of datasets.


def test_digits():
    digits = build_dataset("digits", None, 32)
    assert len(digits) == 1797 and digits.num_classes == 10 and digits.class_names == list("0123456789")
    assert digits.in_memory and not digits.flip and digits.name == "digits" and digits.img_size == 32
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


def test_items_do_not_share_memory_with_the_dataset():
    digits = Digits(8)
    before = digits[0][0].clone()
    digits[0][0].zero_()
    assert torch.equal(digits[0][0], before)


def test_build_dataset_refuses_unknown_names_and_missing_cifar10(tmp_path):
    with pytest.raises(DataError, match="imagefolder, cifar10, digits"):
        build_dataset("mnist", None, 32)
    with pytest.raises(DataError, match="make cifar10"):
        build_dataset("cifar10", tmp_path, 32)
    with pytest.raises(DataError, match="--data_path"):
        build_dataset("imagefolder", None, 256)


def test_default_path_does_not_depend_on_the_working_directory():
    assert data.DEFAULT_DATA_PATH["cifar10"] == os.path.join(os.path.dirname(os.path.dirname(__file__)), "data/cifar10")
    assert data.KNOWN["imagefolder"] == data.Known(img_size=256, class_num=1000)
    assert set(data.DATASETS) == set(data.KNOWN) == set(data.DEFAULT_DATA_PATH)


# Order.


def global_batches(num_images, batch_size, world_size, accum_iter, seed=3, epoch=0, start_step=0):
    """(steps, global batch) indices in the order of the positions that `positions` gives."""
    lists = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(num_images, batch_size, rank, world_size, accum_iter, seed)
        sampler.set_epoch(epoch, start_step)
        lists.append(list(sampler))
        assert len(lists[-1]) == len(sampler)
    steps = len(lists[0]) // accum_iter
    out = np.full((steps, batch_size * world_size * accum_iter), -1)
    for rank in range(world_size):
        for k, indices in enumerate(lists[rank]):
            step, micro = divmod(k, accum_iter)
            out[step, list(loader.positions(rank, world_size, micro, batch_size))] = indices
    assert (out >= 0).all()
    return out


def test_an_epoch_is_a_permutation_and_epochs_differ():
    first, second = global_batches(60, 12, 1, 1), global_batches(60, 12, 1, 1, epoch=1)
    assert sorted(first.ravel().tolist()) == sorted(second.ravel().tolist()) == list(range(60))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, global_batches(60, 12, 1, 1, seed=4))
    np.testing.assert_array_equal(first, global_batches(60, 12, 1, 1))


@pytest.mark.parametrize("world_size, accum_iter", [(2, 1), (1, 2), (2, 2), (4, 3)])
def test_global_batches_do_not_depend_on_processes_or_accumulation(world_size, accum_iter):
    one = global_batches(100, 12, 1, 1, epoch=2)
    split = global_batches(100, 12 // (world_size * accum_iter), world_size, accum_iter, epoch=2)
    assert one.shape == (8, 12)  # 4 of the 100 are dropped
    np.testing.assert_array_equal(one, split)


def test_start_step_continues_the_epoch():
    np.testing.assert_array_equal(global_batches(50, 3, 2, 2, start_step=2), global_batches(50, 3, 2, 2)[2:])
    sampler = GlobalBatchSampler(50, 3, 0, 2, 2, 3)
    assert sampler.steps_per_epoch == 4 and len(sampler) == 8
    sampler.set_epoch(0, 4)
    assert len(sampler) == 0 and list(sampler) == []
    with pytest.raises(ValueError, match="start_step 5"):
        sampler.set_epoch(0, 5)


def test_too_few_images_says_the_numbers():
    said = r"23 images.*24 = 4 .*3 .*2 .*--batch_size \(BATCH_SIZE\) or --global_batch \(GLOBAL_BATCH\)"
    with pytest.raises(DataError, match=said):
        GlobalBatchSampler(23, 4, 0, 3, 2, 0)
    assert GlobalBatchSampler(24, 4, 0, 3, 2, 0).steps_per_epoch == 1
    with pytest.raises(ValueError, match="rank=3"):
        GlobalBatchSampler(24, 4, 3, 3, 2, 0)


# Loader.


def test_loader_order_does_not_depend_on_workers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    runs = []
    for workers in (0, 2):
        sampler = GlobalBatchSampler(1797, 100, 0, 1, 1, 0)
        loader = build_loader(Digits(8), sampler, workers, False)
        runs.append([])
        for epoch in range(2):
            sampler.set_epoch(epoch, 10)
            runs[-1] += list(loader)
    assert len(runs[0]) == len(runs[1]) == 14
    for (x0, y0), (x1, y1) in zip(*runs, strict=True):
        assert x0.shape == (100, 3, 8, 8) and x0.dtype == torch.uint8 and y0.dtype == torch.int64
        assert torch.equal(x0, x1) and torch.equal(y0, y1)
    assert torch.equal(torch.get_rng_state(), state)  # the global random state is left alone


class WorkerState(torch.utils.data.Dataset):
    in_memory, replaced = False, None

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.get_num_threads(), int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)


def test_workers_use_one_thread_and_ignore_sigint():
    threads, ignored = next(iter(build_loader(WorkerState(), GlobalBatchSampler(2, 2, 0, 1, 1, 0), 1, False)))
    assert threads.tolist() == [1, 1] and ignored.tolist() == [1, 1]


@pytest.mark.parametrize("cores, local, expected", [(64, 8, 8), (4, 8, 1), (64, 1, 12), (2, 1, 2)])
def test_default_workers(monkeypatch, tmp_path, cores, local, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert loader.default_workers(ImageFolderImages(make_folder(tmp_path, {"a": 1}), 8)) == expected
    assert loader.default_workers(Digits(8)) == 0


def test_to_float():
    x = data.to_float(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16))
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    back = ((x + 1) / 2 * 255).round().to(torch.uint8)
    assert torch.equal(back[0, 2].flatten(), torch.arange(256, dtype=torch.uint8))
    with pytest.raises(TypeError):
        data.to_float(torch.zeros(1, 3, 2, 2))
