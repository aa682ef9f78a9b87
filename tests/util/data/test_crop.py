"""The centre crop against an independent formulation, and which files are read or refused.

Shapes: images (H, W, 3) uint8.
"""

import math

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.util.data.image_files import BAD, SIZE, claims, encoded, noise_image
from util.data.crop import center_crop, read_crop
from util.data.images import BadImage


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
    found = center_crop(image, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    # PIL may take the columns first: 13.0.0 does so for an image more than twice as high as wide. Equal either way.
    assert any(np.array_equal(found, reference_crop(image, size, passes)) for passes in ("xy", "yx"))


def test_center_crop_takes_the_centre():
    array = np.zeros((32, 96, 3), dtype=np.uint8)
    array[:, 32:64] = (10, 20, 30)
    np.testing.assert_array_equal(center_crop(Image.fromarray(array), 32), array[:, 32:64])
    image = noise_image(48, 48)
    np.testing.assert_array_equal(center_crop(image, 48), np.asarray(image))  # of the right size: no bit changes


@pytest.fixture
def file(tmp_path):
    """Write bytes as photo.JPEG; returns its path."""

    def write(content):
        path = tmp_path / "photo.JPEG"
        path.write_bytes(content)
        return str(path)

    return write


@pytest.mark.filterwarnings("error")
def test_colour_spaces_of_jpeg_and_types_under_a_wrong_name(file):
    """CMYK as Adobe's programs write it (inverted), grey, LAB, several frames, and files of another type."""
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
        found = read_crop(file(content), SIZE).astype(int)
        assert found.shape == (SIZE, SIZE, 3) and np.abs(found - colour).max() <= 2, (content[:4], found[0, 0])


def test_orientation_is_ignored(file):
    image, exif = noise_image(16, 16), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    np.testing.assert_array_equal(read_crop(file(encoded(image, "PNG", exif=exif)), SIZE), np.asarray(image))


def test_one_pixel_and_narrow_images_are_enlarged(file):
    pixel = encoded(Image.new("RGB", (1, 1), (1, 20, 200)), "PNG")
    assert (read_crop(file(pixel), 256) == (1, 20, 200)).all()
    narrow = encoded(Image.new("L", (1, 5000), 9), "PNG")
    assert (read_crop(file(narrow), SIZE) == 9).all()
    with pytest.raises(BadImage, match=r"photo\.JPEG: 1 x 5000 pixels .* 256 x 1280000"):
        read_crop(file(narrow), 256)


@pytest.mark.filterwarnings("error")
def test_a_large_photograph_is_decoded_without_a_warning(file):
    """Beyond the size at which PIL's default warns; the header is that of such an image, and the pixels are missing."""
    with pytest.raises(BadImage, match=r"truncated|broken"):
        read_crop(file(claims(9500, 9500)), SIZE)


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
