"""Images for files and for people: quantisation, PNGs and labelled grids.

Shapes: B images, H = W; float images (B, C, H, W) in [-1, 1]; uint8 images (B, C, H, W) in 0..255; C = 1 grey, 3 RGB,
4 RGBA.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

QUANTISATION = "((x + 1) / 2 * 255).clamp(0, 255).round()"  # as it is written into reports


def rgb(images: Tensor) -> Tensor:
    """Return uint8 images (B, 3, H, W): grey three times, and no alpha."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def to_pil(image: Tensor) -> Image.Image:
    """Convert a uint8 image (C, H, W)."""
    array = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def spread_labels(count: int, class_num: int) -> list[int]:
    """Return `count` labels in order over all classes: whole rows of a class if `count` is a multiple of them."""
    return [i * class_num // count for i in range(count)]


def labelled_grid(images: Tensor, labels: Sequence[str], columns: int, title: str = "") -> Image.Image:
    """Draw uint8 images (B, C, H, W) row by row with their labels; images below 64 pixels are magnified.

    A row in which all labels are equal has its label in front, if that holds for every row; otherwise each image has
    its own above it.
    """
    scale = max(1, 64 // images.shape[-1])
    cell, gap = images.shape[-1] * scale, 4
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    in_front = all(len({labels[i] for i in row}) == 1 for row in rows)
    font = ImageFont.load_default(size=max(11, cell // 6))
    longest = max(font.getlength(label) for label in labels)
    if not in_front and longest > cell:
        font = ImageFont.load_default(size=max(7, int(font.size * cell / longest)))
    line = font.size + 6
    left = 8 + int(longest) if in_front else gap
    top = line if title else gap
    above = 0 if in_front else line  # height of the label above each image
    height = cell + gap + above
    width = max(left + columns * (cell + gap), 2 * gap + int(font.getlength(title)))
    canvas = Image.new("RGB", (width, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 2), title, fill="black", font=font)
    for r, row in enumerate(rows):
        y = top + r * height
        if in_front:
            draw.text((gap, y + (cell - font.size) // 2), labels[row[0]], fill="black", font=font)
        for c, i in enumerate(row):
            x = left + c * (cell + gap)
            if not in_front:
                draw.text((x, y), labels[i], fill="black", font=font)
            image = to_pil(images[i]).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(image, (x, y + above), image if image.mode == "RGBA" else None)  # alpha: over white
    return canvas


def save_png(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_numbered(images: Tensor, index: Sequence[int], folder: Path) -> None:
    """Write uint8 images (B, C, H, W) as the PNGs `index` in a folder that exists."""
    for i, image in zip(index, images, strict=True):
        to_pil(image).save(folder / f"{i:06d}.png", compress_level=1)  # lossless too, and several times faster
