"""Quantisation and pictures: util/images.py.

Shapes: B images, uint8 (B, 3, H, W) or float in [-1, 1].
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from util.errors import UserError
from util.images import labelled_grid, quantise, save_png, to_pil


def batch(*numbers):
    """One image (3, 1, 1) for each number."""
    return torch.tensor(numbers)[:, None, None, None].expand(-1, 3, 1, 1)


def quantised(*numbers):
    out = quantise(batch(*numbers), range(len(numbers)), torch.zeros(len(numbers)), 0)
    assert out.dtype == torch.uint8 and out.shape == (len(numbers), 3, 1, 1)
    return out[:, 0, 0, 0].tolist()


# Quantisation.


def test_every_byte_comes_back():
    assert quantised(*[k / 127.5 - 1 for k in range(256)]) == list(range(256))


def test_quantisation_goes_to_the_nearest_byte():
    assert quantised(*[(k + 0.49) / 127.5 - 1 for k in range(255)]) == list(range(255))
    assert quantised(*[(k + 0.51) / 127.5 - 1 for k in range(255)]) == list(range(1, 256))


def test_values_out_of_range_go_to_the_ends():
    assert quantised(-1.0, -1.001, -5.0, -1e30, 1.0, 1.001, 1.01, 5.0, 1e30) == [0] * 4 + [255] * 5


def test_ties_go_to_the_even_byte():
    """Zero is 127.5 exactly; 0.5 / 255 * 2 - 1 is a tie in real numbers, and numpy says what it is in float32."""
    assert quantised(0.0) == [128]
    x = np.array([(2 * k + 1) / 255 - 1 for k in range(255)], dtype=np.float32)
    expected = np.rint(np.clip((x + np.float32(1)) / np.float32(2) * np.float32(255), 0, 255))
    assert quantised(*x.tolist()) == expected.astype(int).tolist()


def test_quantisation_against_numpy():
    x = 0.8 * np.random.default_rng(0).standard_normal((2, 3, 50, 50)).astype(np.float32)
    out = quantise(torch.from_numpy(x), [0, 1], torch.zeros(2), 0)
    exact = np.clip((x.astype(np.float64) + 1) * 127.5, 0, 255)
    assert np.abs(out.numpy() - exact).max() < 0.5 + 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value):
    x = torch.zeros(4, 3, 2, 2)
    x[2, 1, 0, 1] = value
    with pytest.raises(UserError) as error:
        quantise(x, range(100, 104), torch.tensor([5, 6, 7, 8]), 42)
    message = str(error.value)
    assert "seed 42" in message and "image 102 (label 7)" in message and "1 in this batch" in message
    assert not any(text in message for text in ("image 100", "image 101", "image 103"))


def test_many_values_that_are_not_finite():
    with pytest.raises(UserError) as error:
        quantise(torch.full((8, 3, 2, 2), math.nan), range(8), torch.arange(8), 0)
    assert str(error.value).count("label") == 5 and "8 in this batch" in str(error.value)


# Pictures.


def random_images(count, size, seed=0):
    numbers = np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(numbers)


def test_to_pil():
    image = random_images(1, 6)[0, :, :, :4]
    picture = to_pil(image)
    assert picture.mode == "RGB" and picture.size == (4, 6)
    assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())


def test_save_png(tmp_path):
    picture = to_pil(random_images(1, 5)[0])
    path = save_png(picture, tmp_path / "new" / "folder" / "image.png")
    assert path == tmp_path / "new" / "folder" / "image.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))


COLOURS = [(200, 10 * i, 60) for i in range(20)]


def coloured(count, size):
    return torch.tensor(COLOURS[:count], dtype=torch.uint8)[:, :, None, None].expand(-1, 3, size, size)


def tiles(picture, count):
    """Box (left, top, right, bottom) of each image in a grid of coloured ones, and the rest of the picture."""
    pixels, boxes = np.asarray(picture), []
    rest = pixels.copy()
    for colour in COLOURS[:count]:
        where = (pixels == np.array(colour)).all(-1)
        rows, columns = np.nonzero(where)
        box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert where.sum() == (box[2] - box[0]) * (box[3] - box[1])  # a full rectangle, and nothing written over it
        boxes.append(box)
        rest[where] = 255
    return boxes, rest


@pytest.mark.parametrize(
    ("labels", "columns"),
    [(["cat"] * 3 + ["dog"] * 3, 3), (["a", "b", "c", "d", "e", "f", "g"], 3), (["one", "two"], 1), (["x"] * 4, 5)],
)
@pytest.mark.parametrize(("size", "cell"), [(8, 64), (24, 48), (64, 64), (80, 80)])
@pytest.mark.parametrize("title", ["", "of epoch 3"])
def test_grid_layout(labels, columns, size, cell, title):
    """Row by row, tiles of one size with room between them, all inside the picture, small images magnified."""
    count = len(labels)
    picture = labelled_grid(coloured(count, size), labels, columns, title)
    boxes, rest = tiles(picture, count)
    assert all((right - left, bottom - top) == (cell, cell) for left, top, right, bottom in boxes)
    for i in range(count):
        left, top, right, bottom = boxes[i]
        if i % columns:
            assert left > boxes[i - 1][2] and top == boxes[i - 1][1]
        elif i:
            assert left == boxes[0][0] and top > boxes[i - columns][3]
        assert left > 0 and top > 0 and right < picture.width and bottom < picture.height
    assert (rest < 128).any()  # labels are written


def dark(picture, left, top, right, bottom):
    return bool((np.asarray(picture)[top:bottom, left:right] < 128).any())


def test_labels_in_front_of_rows_of_one_class():
    labels = ["cat"] * 3 + ["dog"] * 2
    picture = labelled_grid(coloured(5, 16), labels, 3)
    boxes, rest = tiles(picture, 5)
    rest = Image.fromarray(rest)
    for first in (0, 3):
        left, top, _, bottom = boxes[first]
        assert dark(rest, 0, top, left, bottom)
    assert not dark(rest, boxes[0][0], 0, picture.width, picture.height)


def test_a_label_above_each_image_otherwise():
    picture = labelled_grid(coloured(4, 16), ["a", "b", "c", "d"], 2)
    boxes, rest = tiles(picture, 4)
    rest, line = Image.fromarray(rest), boxes[0][1]
    for left, top, right, _ in boxes:
        assert dark(rest, left, top - line + 1, right, top)
    assert not dark(rest, 0, boxes[2][3], picture.width, picture.height)


def test_title_is_above_everything_and_fits():
    images, title = coloured(2, 16), "a long title that is wider than two images and their labels are"
    plain, titled = labelled_grid(images, ["a", "b"], 2), labelled_grid(images, ["a", "b"], 2, title)
    assert titled.height > plain.height and titled.width > plain.width
    extra = titled.height - plain.height
    assert dark(titled, 0, 0, titled.width, extra)
    right_margin = np.asarray(titled)[:extra, -4:]
    assert (right_margin == 255).all()


def test_pixels_of_a_grid():
    """Magnified by whole pixels, without interpolation, in the right order and not mirrored."""
    images = random_images(4, 16)
    pixels = np.asarray(labelled_grid(images, list("abcd"), 2))
    boxes, _ = tiles(labelled_grid(coloured(4, 16), list("abcd"), 2), 4)
    for image, (left, top, right, bottom) in zip(images.permute(0, 2, 3, 1).numpy(), boxes, strict=True):
        assert np.array_equal(pixels[top:bottom, left:right], np.kron(image, np.ones((4, 4, 1), np.uint8)))
