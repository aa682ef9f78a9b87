"""Quantisation, PNGs and grids: util/evaluation/images.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.images import quantise
from util.evaluation.images import labelled_grid, save_png, spread_labels, to_pil, write_numbered


def quantised(*numbers):
    """Bytes of images of one pixel each."""
    out = quantise(torch.tensor(numbers)[:, None, None, None].expand(-1, 3, 1, 1))
    assert out.dtype == torch.uint8 and out.shape == (len(numbers), 3, 1, 1)
    return out[:, 0, 0, 0].tolist()


def test_quantisation_rounds_to_the_nearest_byte_and_clamps():
    assert quantised(*[k / 127.5 - 1 for k in range(256)]) == list(range(256))
    assert quantised(*[(k + 0.49) / 127.5 - 1 for k in range(255)]) == list(range(255))
    assert quantised(*[(k + 0.51) / 127.5 - 1 for k in range(255)]) == list(range(1, 256))
    assert quantised(-1.0, -1.001, -5.0, -1e30, 1.0, 1.001, 1.01, 5.0, 1e30) == [0] * 4 + [255] * 5


def test_ties_round_to_even_as_in_numpy():
    assert quantised(0.0) == [128]
    x = np.array([(2 * k + 1) / 255 - 1 for k in range(255)], dtype=np.float32)
    expected = np.rint(np.clip((x + np.float32(1)) / np.float32(2) * np.float32(255), 0, 255))
    assert quantised(*x.tolist()) == expected.astype(int).tolist()


def random_images(count, size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def test_pngs_hold_the_pixels(tmp_path):
    image = random_images(1, 6)[0, :, :, :4]  # (3, 6, 4)
    path = save_png(to_pil(image), tmp_path / "new" / "folder" / "image.png")
    assert np.array_equal(np.asarray(Image.open(path)), image.permute(1, 2, 0).numpy())
    images, names = random_images(3, 8), ["000007.png", "000008.png", "1000000.png"]
    write_numbered(images, [7, 8, 1000000], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), image.permute(1, 2, 0).numpy())


# --- grids -----------------------------------------------------------------------------------------------------------

COLOURS = [(200, 10 * i, 60) for i in range(20)]


def test_labels_are_spread_over_all_classes():
    assert spread_labels(6, 3) == [0, 0, 1, 1, 2, 2] and spread_labels(3, 1000) == [0, 333, 666]


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
    return boxes, Image.fromarray(rest)


def dark(picture, left, top, right, bottom):
    return bool((np.asarray(picture)[top:bottom, left:right] < 128).any())


@pytest.mark.parametrize(
    ("labels", "columns", "size", "cell"),
    [
        (["cat"] * 3 + ["dog"] * 3, 3, 8, 64),
        (["a", "b", "c", "d", "e", "f", "g"], 3, 24, 48),
        (["one", "two"], 1, 80, 80),
        (["x"] * 4, 5, 24, 48),
    ],
)
def test_tiles_are_in_rows_of_one_size_inside_the_picture(labels, columns, size, cell):
    count = len(labels)
    picture = labelled_grid(coloured(count, size), labels, columns, "of epoch 3")
    boxes, _ = tiles(picture, count)
    assert all((right - left, bottom - top) == (cell, cell) for left, top, right, bottom in boxes)
    for i in range(count):
        left, top, right, bottom = boxes[i]
        if i % columns:
            assert left > boxes[i - 1][2] and top == boxes[i - 1][1]
        elif i:
            assert left == boxes[0][0] and top > boxes[i - columns][3]
        assert left > 0 and top > 0 and right < picture.width and bottom < picture.height


def test_labels_stand_in_front_of_rows_of_one_class_and_otherwise_above_each_image():
    picture = labelled_grid(coloured(5, 16), ["cat"] * 3 + ["dog"] * 2, 3)
    boxes, rest = tiles(picture, 5)
    assert all(dark(rest, 0, top, left, bottom) for left, top, _, bottom in (boxes[0], boxes[3]))
    assert not dark(rest, boxes[0][0], 0, picture.width, picture.height)
    picture = labelled_grid(coloured(4, 16), ["a", "b", "c", "d"], 2)
    boxes, rest = tiles(picture, 4)
    assert all(dark(rest, left, top - boxes[0][1] + 1, right, top) for left, top, right, _ in boxes)
    assert not dark(rest, 0, boxes[2][3], picture.width, picture.height)
