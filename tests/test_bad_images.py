"""Bad image files: which are read all the same, which are errors, and what takes the place of the others.

Files are made here, byte by byte where PIL would not write them. `seen` says what training reads of them.
"""

import errno
import json
import os
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image, ImageFile

import prepare_ref
from tests.conftest import ONE, read_log, train
from tests.test_data import make_folder, noise_image
from tests.test_reference import Colours
from util import bad_images, data
from util.bad_images import Replaced, Replacement, report, same_class
from util.config import check, resolve
from util.data import BadImage, DataError, ImageFolderImages, read_crop
from util.distributed import World
from util.held_out import Part
from util.loader import GlobalBatchSampler, build_loader
from util.logger import RunLog

SIZE = 16


def encoded(image, kind, **options):
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def claims(width, height):
    """A PNG of a few bytes whose header claims so many pixels."""
    whole = encoded(Image.new("L", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


JPEG = encoded(noise_image(64, 48), "JPEG")
BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html><body>404 Not Found</body></html>\n", "no such format"),
    "header alone": (JPEG[:4], "no such format"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated png": (encoded(noise_image(64, 48), "PNG")[:2000], "truncated"),
    "damaged png": (encoded(noise_image(64, 48), "PNG").replace(b"IDAT", b"IDBT"), "broken PNG|cannot|truncated"),
    "floats": (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "floating-point"),
    "bomb": (claims(60000, 60000), "3600000000"),
    "too large": (claims(17000, 17000), "17000 x 17000"),
    "too narrow": (encoded(Image.new("RGB", (1, 2_000_000)), "TIFF", compression="tiff_deflate"), "16 x 32000000"),
}


@pytest.fixture
def file(tmp_path):
    """Write bytes as photo.JPEG; returns its path."""

    def write(content):
        path = tmp_path / "photo.JPEG"
        path.write_bytes(content)
        return str(path)

    return write


# What is read.


@pytest.mark.filterwarnings("error")
def test_colour_spaces_of_jpeg_and_types_under_a_wrong_name(file):
    """CMYK as Adobe's programs write it (inverted), grey, YCCK's plain brother, and files of another type."""
    cmyk = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in cmyk
    first, second = Image.new("P", (32, 32), 1), Image.new("P", (32, 32), 0)
    for image in (first, second):
        image.putpalette([0, 0, 255, 255, 0, 0])
    expected = {
        cmyk: (255, 0, 0),
        encoded(Image.new("L", (32, 32), 77), "JPEG", quality=100): (77, 77, 77),
        encoded(Image.new("LAB", (32, 32), (255, 128, 128)), "TIFF"): (255, 255, 255),
        encoded(first, "GIF", save_all=True, append_images=[second]): (255, 0, 0),  # the first frame of two
        encoded(Image.new("RGB", (32, 32), (1, 2, 3)), "TIFF", save_all=True, append_images=[second]): (1, 2, 3),
        encoded(Image.new("RGBA", (32, 32), (9, 8, 7, 0)), "WEBP", lossless=True, exact=True): (9, 8, 7),
    }
    for content, colour in expected.items():
        crop = read_crop(file(content), SIZE).astype(int)
        assert crop.shape == (SIZE, SIZE, 3) and np.abs(crop - colour).max() <= 2, (content[:4], crop[0, 0])


def test_orientation_is_ignored(file):
    image, exif = noise_image(16, 16), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    np.testing.assert_array_equal(read_crop(file(encoded(image, "PNG", exif=exif)), SIZE), np.asarray(image))


def test_one_pixel_and_narrow_images_are_enlarged(file):
    pixel = encoded(Image.new("RGB", (1, 1), (1, 20, 200)), "PNG")
    assert (read_crop(file(pixel), 256) == (1, 20, 200)).all()
    narrow = Image.new("L", (1, 5000), 9)
    assert (read_crop(file(encoded(narrow, "PNG")), SIZE) == 9).all()
    with pytest.raises(BadImage, match=r"photo\.JPEG: with 1 x 5000 pixels .* 256 x 1280000"):
        read_crop(file(encoded(narrow, "PNG")), 256)


def test_a_large_photograph_is_read_in_silence(file):
    """Beyond the size at which PIL's default warns; black to the left of the centre, white to the right."""
    large = Image.new("1", (9500, 9500))
    large.paste(1, (4750, 0, 9500, 9500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop = read_crop(file(encoded(large, "PNG")), SIZE)
    assert (crop[:, : SIZE // 2 - 1] < 20).all() and (crop[:, SIZE // 2 + 1 :] > 235).all()


# What is refused.


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_the_reason(file, kind, monkeypatch):
    content, reason = BAD[kind]
    if kind in ("bomb", "too large"):  # refused for its header
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it is decoded"))
    path = file(content)
    with pytest.raises(BadImage, match=reason) as error:
        read_crop(path, SIZE)
    text = str(error.value)
    assert text.startswith(f"cannot read image {path}: ") and error.value.reason in text
    assert path not in error.value.reason and "BytesIO" not in text


def test_a_huge_file_is_not_taken_into_memory(file, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    with pytest.raises(BadImage, match="more than 1000 bytes"):
        read_crop(file(bytes(1001)), SIZE)
    with pytest.raises(BadImage, match="no such format"):
        read_crop(file(bytes(1000)), SIZE)


def test_all_class_folders_without_images_are_named(tmp_path):
    make_folder(tmp_path, {"bare": 0, "full": 2, ".hidden": 0})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image by its name")
    with pytest.raises(DataError, match=r"3 of the 4 .*: \.hidden, bare, texts\. ") as error:
        ImageFolderImages(tmp_path, SIZE)
    assert str(tmp_path) in str(error.value) and ".jpeg" in str(error.value)
    for name in (".hidden", "texts", "full"):
        (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}-{name}")
    with pytest.raises(DataError, match=r"1 of the 1 .*: bare"):
        ImageFolderImages(tmp_path, SIZE)


def test_reference_statistics_never_have_a_replaced_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_ref, "InceptionV3", Colours)
    monkeypatch.setattr(prepare_ref, "ensure_inception_weights", lambda path: None)
    bad = make_folder(tmp_path / "train", {"a": 8}) / "a" / "5.png"
    bad.write_bytes(b"")
    words = ["--dataset", "imagefolder", "--data_path", str(tmp_path), "--img_size", "32", "--num_features", "0"]
    words += ["--device", "cpu", "--num_workers", "0", "--out", str(tmp_path / "out.npz")]
    assert prepare_ref.main(words) == 2 and f"cannot read image {bad}: the file is empty" in capsys.readouterr().err


# What takes the place of a bad image.

COUNTS = {"a": 6, "b": 7, "c": 5}
HOLES = {"a/2": "empty", "a/3": "text", "a/5": "truncated jpeg", "c/4": "bomb", "c/0": "floats"}
STANDS_FOR = {"a/2": "a/4", "a/3": "a/4", "a/5": "a/0", "c/4": "c/1", "c/0": "c/1"}  # the next one, read off by eye


@pytest.fixture
def folder(tmp_path):
    """18 images of noise, 5 of them bad."""
    make_folder(tmp_path / "train", COUNTS, size=(SIZE, SIZE))
    for name, kind in HOLES.items():
        (tmp_path / "train" / f"{name}.png").write_bytes(BAD[kind][0])
    return tmp_path / "train"


def open_skipping(folder):
    images = ImageFolderImages(folder, SIZE)
    images.replaced = Replaced(len(images))
    return images


def name_of(file):
    return f"{Path(file).parent.name}/{Path(file).stem}"


def stands_for(replaced):
    return {name_of(r.file): name_of(r.replaced_by) for r in replaced.here.values()}


def expected(images, i):
    """The pixels of image i, or of what STANDS_FOR it."""
    name = name_of(images.path(i))
    with Image.open(images.folder / f"{STANDS_FOR.get(name, name)}.png") as image:
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def test_order_of_candidates_against_a_walk_around_the_class():
    labels = np.random.default_rng(0).integers(0, 4, 60)  # in no order, as in a part of a data set
    images = data.Images(SIZE, list("abcd"), labels)
    for i in range(60):
        walk = [(i + k) % 60 for k in range(1, 60)]
        assert list(same_class(images, i)) == [j for j in walk if labels[j] == labels[i]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("start_step", [0, 1])
def test_replacements_do_not_depend_on_workers_processes_or_the_start(folder, workers, ranks, start_step):
    met = {}
    for rank in range(ranks):
        images = open_skipping(folder)
        sampler = GlobalBatchSampler(len(images), 6 // ranks, rank, ranks, 1, seed=1)
        loader = build_loader(images, sampler, workers, False)
        sampler.set_epoch(3, start_step)
        wanted = [i for batch in sampler for i in batch]
        batches = list(loader)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert len(x) == (18 - 6 * start_step) // ranks
        assert torch.equal(x, torch.stack([expected(images, i) for i in wanted]))
        assert torch.equal(y, torch.from_numpy(images.labels[wanted]))
        bad = {name_of(images.path(i)) for i in wanted} & set(STANDS_FOR)
        assert stands_for(loader.replaced) == {name: STANDS_FOR[name] for name in bad}
        met |= stands_for(loader.replaced)
    assert met == STANDS_FOR or (start_step and met.items() <= STANDS_FOR.items())


def test_only_what_has_been_given_is_noted(folder):
    """Not what the workers have read ahead."""
    images = open_skipping(folder)
    loader = build_loader(images, [[i] for i in range(18)], 2, False)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    assert stands_for(loader.replaced) == {"a/2": "a/4"}


def test_without_the_flag_the_first_bad_image_is_an_error(folder):
    images = ImageFolderImages(folder, SIZE)
    loader = build_loader(images, [[0, 1], [2, 4]], 0, False)
    with pytest.raises(BadImage, match=r"a/2\.png: the file is empty"):
        list(loader)
    assert loader.replaced is None
    with pytest.raises(BadImage, match=r"a/2\.png"):  # nor is the data set itself ever another one
        open_skipping(folder)[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_readable_images_is_named(folder, workers):
    for file in (folder / "b").iterdir():
        file.write_bytes(b"")
    loader = build_loader(open_skipping(folder), [[0], [7]], workers, False)
    with pytest.raises(DataError, match=r"none of the 7 images of class b .*b/1\.png: the file is empty"):
        list(loader)


def test_a_part_replaces_from_itself(folder):
    """So no held-out image is ever trained on."""
    whole = open_skipping(folder)
    part = Part(whole, np.array([0, 2, 3, 5, 6, 12]))  # a/0 a/2 a/3 a/5 b/0 b/6
    loader = build_loader(part, [[1, 2, 3]], 0, False)
    ((x, y),) = loader
    assert loader.replaced is whole.replaced
    assert stands_for(whole.replaced) == {"a/2": "a/0", "a/3": "a/0", "a/5": "a/0"}
    assert all(torch.equal(image, expected(whole, 0)) for image in x) and y.tolist() == [0, 0, 0]


# Errors of the file system.


def failing(path, code, where):
    """`open` that fails for a path, at once or when the file is read."""

    class Failing(BytesIO):
        def fileno(self):
            return os.open(os.devnull, os.O_RDONLY)

        def read(self, *size):
            raise OSError(code, os.strerror(code))

    def fake(name, *mode):
        if name != path:
            return open(name, *mode)
        if where == "open":
            raise OSError(code, os.strerror(code), name)
        return Failing()

    return fake


@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOTCONN])
def test_errors_of_the_file_system_are_never_skipped(folder, monkeypatch, code, where):
    images = open_skipping(folder)
    for i, at in ((1, [1]), (4, [2])):  # the image itself, and the one in the place of a bad one
        monkeypatch.setattr(data, "open", failing(images.path(i), code, where), raising=False)
        with pytest.raises(DataError, match="cannot read the file") as error:
            list(build_loader(images, [at], 0, False))
        assert images.path(i) in str(error.value) and os.strerror(code) in str(error.value)
        assert not isinstance(error.value, BadImage)


def test_a_file_that_went_away_is_not_skipped(folder):
    images = open_skipping(folder)
    os.remove(images.path(1))
    with pytest.raises(DataError, match=r"cannot read the file .*a/1\.png: No such file"):
        list(build_loader(images, [[0], [1]], 1, False))


# The log.


def replacements(*names):
    return [Replacement(f"/d/{name}.png", "why", f"/d/{name}-other.png") for name in names]


def events(folder):
    return [(line["file"], line["step"]) for line in read_log(folder, "bad_image")]


def test_each_replaced_image_is_reported_once(tmp_path, capsys):
    log, replaced = RunLog(tmp_path, ONE, {"mode": "disabled"}), Replaced(total=10_000)
    report(replaced, ONE, log, 1)
    report(None, ONE, log, 1)
    assert events(tmp_path) == [] and capsys.readouterr().out == ""
    replaced.add(replacements("b", "a", "b"))
    report(replaced, ONE, log, 2)
    replaced.add(replacements("a", *"cdefgh"))
    report(replaced, ONE, log, 3)
    report(replaced, ONE, log, 4)
    assert events(tmp_path) == [(f"/d/{name}.png", 2 if name in "ab" else 3) for name in "abcdefgh"]
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert (line["reason"], line["replaced_by"]) == ("why", "/d/a-other.png")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == bad_images.SHOWN + 1 and all(str(tmp_path) not in text for text in said)
    assert said[0] == "bad image /d/a.png: why; /d/a-other.png takes its place"
    assert said[-1].startswith("3 more bad images, 8 since the start")


@pytest.mark.parametrize("total, most", [(10_000, 100), (100, bad_images.FEW), (12, bad_images.FEW)])
def test_a_broken_copy_of_a_data_set_is_an_error(tmp_path, total, most):
    log, replaced = RunLog(tmp_path, ONE, {"mode": "disabled"}), Replaced(total)
    replaced.add(replacements(*range(most)))
    report(replaced, ONE, log, 1)
    replaced.add(replacements("one more"))
    with pytest.raises(DataError, match=f"{most + 1} of {total} images .*1%") as error:
        report(replaced, ONE, log, 2)
    assert error.value.everywhere and len(events(tmp_path)) == most + 1


def _report_of_one_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2)
    log, replaced = RunLog(folder, world, {"mode": "disabled"}), Replaced(total=200)
    replaced.add(replacements(*("cab", "bd")[rank]))
    report(replaced, world, log, 5)
    if rank == 1:
        replaced.add(replacements("a", *range(bad_images.FEW)))
    with pytest.raises(DataError, match="54 of 200") as error:  # a, b, c, d and FEW more, on both processes
        report(replaced, world, log, 6)
    assert error.value.everywhere
    dist.destroy_process_group()


def test_two_processes_report_what_either_has_met(tmp_path):
    mp.start_processes(_report_of_one_process, (tmp_path,), nprocs=2, start_method="fork")
    assert events(tmp_path)[:4] == [(f"/d/{name}.png", 5) for name in "abcd"]
    assert len(events(tmp_path)) == 4 + bad_images.FEW


# A run.


@pytest.mark.usefixtures("tiny")
def test_a_run_with_bad_images(folder, tmp_path, capsys):
    """It is the run on a folder in which copies take the place of the bad images, and its log names them."""
    settings = {"dataset": "imagefolder", "class_num": 3, "batch_size": 6, "num_workers": 0, "val_split": 0.2}
    run = train(tmp_path / "run", data_path=folder, on_bad_image="skip", **settings)
    found = {name_of(line["file"]): line for line in read_log(run, "bad_image")}
    assert 0 < len(found) <= len(HOLES) == 5
    whole = tmp_path / "whole" / "train"
    whole.parent.mkdir()
    folder.rename(whole)
    assert train(tmp_path / "stopped", code=2, data_path=whole, **settings)
    assert str(whole) in (said := capsys.readouterr().err) and "cannot read image" in said
    for name, line in found.items():
        stand_in = Path(line["replaced_by"].replace(str(folder), str(whole)))
        (whole / f"{name}.png").write_bytes(stand_in.read_bytes())
    again = train(tmp_path / "again", data_path=whole, **settings)
    assert read_log(run) == read_log(again) and len(read_log(run)) == 4


def test_the_flag_has_no_effect_in_memory_and_that_is_said():
    for dataset in data.DATASETS:
        args = resolve({"dataset": dataset, "on_bad_image": "skip"}, None, training=True)
        said = [text for text in check(args, evaluates=False) if "on_bad_image" in text]
        assert len(said) == (dataset != "imagefolder")
        assert not check(resolve({"dataset": dataset}, None, training=True), evaluates=False)
    assert all(
        (kind.name in data.IN_MEMORY) == kind.in_memory for kind in (data.Cifar10, data.Digits, ImageFolderImages)
    )
