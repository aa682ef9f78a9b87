"""Images as patches: for operators before networks that are given patches, of one image or of many in one sequence.

Shapes: images (..., C, H, W); patches (..., N, p p C), row by row on a grid of (h, w) = (H / p, W / p), N = h w.
`order` is that of the numbers in a patch: "hwc" row, column, channel, or "chw".
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor


def patches_to_image(tokens: Tensor, grid: tuple[int, int], channels: int = 3, order: str = "hwc") -> Tensor:
    """Return the image (..., C, h p, w p) of patches (..., h w, p p C).

    Raises ValueError for patches that are not square, and for a grid that is not that of N tokens.
    """
    (h, w), n, width = grid, *tokens.shape[-2:]
    p = math.isqrt(width // channels)
    if h * w != n:
        raise ValueError(f"A grid of {h} x {w} has {h * w} tokens, not {n}.")
    if p * p * channels != width:
        raise ValueError(f"A token of {width} numbers is no square patch of {channels} channels.")
    if order not in ("hwc", "chw"):
        raise ValueError(f"The order {order!r} of the numbers in a patch must be 'hwc' or 'chw'.")
    parts = tokens.unflatten(-2, (h, w)).unflatten(-1, (p, p, channels) if order == "hwc" else (channels, p, p))
    if order == "hwc":
        parts = parts.movedim(-1, -3)  # (..., h, w, C, p, p)
    return parts.movedim(-3, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2)


def image_to_patches(image: Tensor, patch: int, order: str = "hwc") -> Tensor:
    """Return the patches (..., N, p p C) of an image (..., C, H, W): the inverse of `patches_to_image`."""
    parts = image.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch)).transpose(-3, -2)  # (..., C, h, w, p, p)
    parts = parts.movedim(-5, -1 if order == "hwc" else -3)
    return parts.flatten(-3).flatten(-3, -2)


def filter_patches(
    operator: Callable[[Tensor, Tensor], Tensor],
    tokens: Tensor,
    t: Tensor | float,
    grids: tuple[int, int] | Sequence[tuple[int, int]] | Tensor,
    channels: int = 3,
    order: str = "hwc",
) -> Tensor:
    """Apply operator(z, t), such as a SpectralForcing, to whole images that are given as patches.

    `grids` is one grid (h, w) for tokens (B, h w, p p C), with times t (B,); or a list of them for images of several
    sizes in one sequence (..., sum h w, p p C), with one time each. One time for all may be a number.

    Raises ValueError for grids or times that are not those of the tokens.
    """
    grids = grids.tolist() if isinstance(grids, Tensor) else grids
    if len(grids) and isinstance(grids[0], Integral):
        if tokens.ndim < 3:
            raise ValueError(f"tokens has the shape {tuple(tokens.shape)}; (B, N, p p C) was expected.")
        return _filter_grid(operator, tokens, t, grids, channels, order)
    lengths = [h * w for h, w in grids]
    if sum(lengths) != tokens.shape[-2]:
        raise ValueError(f"The grids {list(grids)} have {sum(lengths)} tokens, not {tokens.shape[-2]}.")
    t = torch.as_tensor(t, device=None if isinstance(t, Tensor) else tokens.device).reshape(-1)
    if len(t) not in (1, len(grids)):
        raise ValueError(f"{len(t)} times were given; one for each of {len(grids)} grids was expected.")
    parts = zip(tokens.split(lengths, dim=-2), t.expand(len(grids)).split(1), grids, strict=True)
    return torch.cat([_filter_grid(operator, *part, channels, order) for part in parts], dim=-2)


def _filter_grid(
    operator, tokens: Tensor, t: Tensor | float, grid: tuple[int, int], channels: int, order: str
) -> Tensor:
    image = operator(patches_to_image(tokens, grid, channels, order), t)
    return image_to_patches(image, image.shape[-1] // grid[1], order)
