"""Images of files after their crop, in one large file: read instead of decoded, and the same pixels to the bit.

    CACHE/train/images.npy   uint8 (N, 3, H, W)
    CACHE/train/files.json   which files they are
    CACHE/train/cache.json   the index (blocks.py), with img_size, the pixels per side, and `decoder`, the versions of
                             the libraries that decide the pixels of a file
    CACHE/val/...            the same, where there are validation images

Shapes: N images, each uint8 (3, H, W), H = W = img_size.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import features

from util.data.blocks import Block, Index, Layout, Readable, StoredImages, source_of, write_blocks
from util.data.images import DataError, Images
from util.dist.context import DistContext
from util.io import provenance

BLOCK_BYTES = 2**27  # 682 images at 256 x 256
CACHE = Layout(
    task="cache",
    what="image cache",
    index="cache.json",
    array="images.npy",
    version=2,
    item=lambda index: (np.uint8, (3, index["img_size"], index["img_size"])),
)


class CachedImages(StoredImages):
    """One split of a cache. DataError as of StoredImages, and for another size."""

    def __init__(self, folder: Path, img_size: int):
        super().__init__(CACHE, folder)
        if self.img_size != img_size:
            raise DataError(
                f"the image cache {folder} holds images of {self.img_size} pixels, not of {img_size}. Make another "
                "cache, with that --img_size."
            )


def write_cache(images: Images, folder: Path, num_threads: int | None = None, skip_bad: bool = False) -> Index:
    """Write what a cache of images lacks: missing, damaged and bad images. Return its index.

    num_threads decode; None: one for each core. skip_bad: note bad images in the index; False: raise at the first one.
    DataError for a file that cannot be read or written, a disk that is too small, and a folder that holds something
    else.
    """
    decoder = {name: features.version(name) for name in ("pil", "libjpeg_turbo", "zlib")}
    expected = {"img_size": images.img_size, "decoder": decoder}
    if images.source:
        expected["source"] = source_of(images)

    def crops(todo: list[range], advance: Callable[[int], None]) -> Iterator[Block]:
        for block in todo:
            x, reasons = zip(*pool.map(Readable(images, skip_bad).__getitem__, block), strict=True)
            advance(len(block))
            yield torch.stack(x), reasons, {}

    new = {"made": provenance(torch.device("cpu"))}
    with ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0))) as pool:
        return write_blocks(CACHE, images, folder, expected, new, BLOCK_BYTES, crops, DistContext())[0]
