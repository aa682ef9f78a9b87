"""Reads one image, a file or a part of one: ADM's centre crop, in RGB or RGBA.

Shapes: an image is uint8 (H, W, C) of any size; a crop is (size, size, C), with C = 3, or 4 with alpha.
"""

from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from util.data.images import BadImage, DataError

MAX_PIXELS = 2**28  # of an image as read and as enlarged: 16384 x 16384, 1 GiB in PIL, which uses 4 bytes per pixel
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # PIL's own check of the header; its default warns at a third of that


def to_rgb(image: Image.Image, alpha: bool = False) -> Image.Image:
    """Convert to mode RGB, or RGBA with `alpha`. 16-bit grey keeps its upper 8 bits, as PIL does for 16-bit colour."""
    if image.mode == "F":
        raise DataError("floating-point images have no agreed range; expected 8 or 16 bits per channel.")
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip values above 255
        grey = np.asarray(image).clip(0, 65535) >> 8  # (H, W)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGBA" if alpha else "RGB")


def center_crop(image: Image.Image, size: int, alpha: bool = False) -> np.ndarray:
    """Return the centre crop (size, size, C) of a PIL image of any size and mode, as ADM makes it.

    Halve with BOX while the short side is at least 2 * size, resize with BICUBIC to a short side of `size`, cut out
    the centre. An image of the right size comes back unchanged to the bit. DataError for mode F, and for an image so
    narrow that it would be enlarged to more than MAX_PIXELS.
    Source: Dhariwal and Nichol 2021, guided-diffusion, image_datasets.py.
    """
    image = to_rgb(image, alpha)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} pixels are too narrow: with a short side of {size} the image would have "
            f"{width} x {height}; at most {MAX_PIXELS} pixels are made."
        )
    array = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))  # (height, width, C)
    top, left = (height - size) // 2, (width - size) // 2
    return array[top : top + size, left : left + size].copy()  # (size, size, C)


def read_crop(path: str, size: int, alpha: bool = False) -> np.ndarray:
    """Return the centre crop (size, size, C) of an image file, of its first frame where it has several.

    DataError for an error of the file system; BadImage for one of the content, as of `decode_crop`.
    """
    return decode_crop(read_bytes(path), path, size, alpha)


def read_bytes(path: str, offset: int = 0, length: int = -1) -> bytes:
    """Return a file, or `length` bytes of it. DataError if the file system does not deliver them."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as e:
        raise DataError(
            f"cannot read the file {path}: {e.strerror or e}. This is an error of the file system, not a bad image, so "
            "the image is not replaced: check the disk, permissions and limits, and start again."
        ) from None


def decode_crop(content: bytes, name: str, size: int, alpha: bool = False) -> np.ndarray:
    """Return the centre crop (size, size, C) of the content of an image file.

    BadImage for content that is no image, is damaged, has more than MAX_PIXELS, or cannot be converted to RGB.
    """
    try:
        with Image.open(BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}.")
            return center_crop(image, size, alpha)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "PIL knows no such format" if content else "the file is empty"
    except DataError as e:
        reason = str(e).rstrip(".")
    except Exception as e:  # PIL's readers raise OSError, SyntaxError, ValueError, struct.error, ... on bad files
        reason = f"{str(e).rstrip('.')} ({type(e).__name__})"
    raise BadImage.at(name, reason, "Expected a whole image file: replace it or remove it")
