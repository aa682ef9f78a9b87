"""Image files for tests: whole ones in class folders, and damaged ones."""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from util import io

SIZE = 16


def noise_image(width, height, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


def make_folder(root, counts, size=(20, 16)):
    """Make class folders with so many PNG images each; return root."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_image(*size, seed=100 * label + i).save(root / name / f"{i}.png")
    return root


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
BAD = {  # the content of a file, and why it is bad
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

HOLES = {"a/2": "empty", "a/3": "text", "a/5": "truncated jpeg", "c/4": "bomb", "c/0": "floats"}


def damage(folder, holes=HOLES):
    """Replace PNG images in class folders by bad ones; return the folder."""
    for name, kind in holes.items():
        (folder / f"{name}.png").write_bytes(BAD[kind][0])
    return folder


def save_modes(folder):
    """Save one file per mode, each of a constant image; return {file name: expected (r, g, b)}."""
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


@contextmanager
def interrupted_at_rename(monkeypatch: pytest.MonkeyPatch, n: int) -> Iterator[None]:
    """Within the block a KeyboardInterrupt comes before the rename number n of a file, and must come."""
    renames = []

    def replace(*names):
        if len(renames) == n:
            raise KeyboardInterrupt
        renames.append(os.rename(*names))

    with monkeypatch.context() as patch:
        patch.setattr(io.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            yield
