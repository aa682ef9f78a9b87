"""Images for files and for people: quantisation, PNGs, grids with labels.

Shapes: B images, H = W; uint8 images are (B, 3, H, W) in 0..255, float images are in [-1, 1].
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.errors import UserError


class NonFiniteImages(UserError):
    """Sampling gave values that are not finite."""


QUANTISATION = "((x + 1) / 2 * 255).clamp(0, 255).round()"  # as reports say it


def quantise(
    x: Tensor, index: Sequence[int], y: Tensor, seed: int, since: Callable[[], Sequence[str]] | None = None
) -> Tensor:
    """Images in [-1, 1] -> uint8, by ((x + 1) / 2 * 255).clamp(0, 255).round(), on their device.

    Args:
        since: called where values are not finite: a phrase for each image of the batch that says since when.

    Raises:
        NonFiniteImages: values that are not finite, naming image, label and seed.
    """
    finite = x.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        phrases = since() if since else [""] * len(x)
        which = ", ".join(f"image {index[i]} (label {int(y[i])}){phrases[i]}" for i in bad[:5])
        raise NonFiniteImages(
            f"sampling with seed {seed} gave values that are not finite: {which}, {len(bad)} in this batch"
        )
    return ((x + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> PIL."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def labelled_grid(images: Tensor, labels: Sequence[str], columns: int, title: str = "") -> Image.Image:
    """A picture of uint8 images (B, 3, H, W), row by row, each under its label; small images are magnified.

    Args:
        labels: one for each image. Where a row has one label only, it is written once, in front of the row.
    """
    count, size = len(images), images.shape[-1]
    scale = max(1, 64 // size)
    cell, gap = size * scale, 4
    rows = [range(i, min(i + columns, count)) for i in range(0, count, columns)]
    in_front = all(len({labels[i] for i in row}) == 1 for row in rows)
    font = ImageFont.load_default(size=max(11, cell // 6))
    longest = max(font.getlength(label) for label in labels)
    if not in_front and longest > cell:
        font = ImageFont.load_default(size=max(7, int(font.size * cell / longest)))
    line = font.size + 6
    margin = 8 + max(int(font.getlength(label)) for label in labels) if in_front else gap
    top = line if title else gap
    height = cell + gap + (0 if in_front else line)
    width = max(margin + columns * (cell + gap), 2 * gap + int(font.getlength(title)))
    canvas = Image.new("RGB", (width, top + len(rows) * height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, 2), title, fill="black", font=font)
    for r, row in enumerate(rows):
        y = top + r * height
        if in_front:
            pen.text((4, y + (cell - font.size) // 2), labels[row[0]], fill="black", font=font)
        for c, i in enumerate(row):
            x = margin + c * (cell + gap)
            if not in_front:
                pen.text((x, y), labels[i], fill="black", font=font)
            tile = to_pil(images[i]).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(tile, (x, y + (0 if in_front else line)))
    return canvas


def save_png(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_numbered(images: Tensor, first: int, folder: Path) -> None:
    """uint8 images (B, 3, H, W) -> PNGs `<first>.png`, ... with six digits in `folder`; each is whole or not there."""
    for i, image in enumerate(images, start=first):
        path = numbered(folder, i)
        aside = path.with_suffix(".tmp")
        to_pil(image).save(aside, format="png", compress_level=1)  # as exact as the default, and several times faster
        os.replace(aside, path)


def numbered(folder: Path, i: int) -> Path:
    """The PNG of image i in `folder`."""
    return folder / f"{i:06d}.png"
