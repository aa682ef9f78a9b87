"""From what the network makes to images: rounding, or the VAE whose latents it was trained on."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from util.data.images import quantise
from util.data.vae import Vae, load_vae
from util.errors import UserError

_load = lru_cache(maxsize=1)(load_vae)


class ToImages:
    """x (B, C, h, w) of the network -> images uint8 (B, *shape)."""

    def __init__(self, shape: tuple[int, int, int], vae: Vae | None = None, tiled: bool = False):
        self.shape, self.vae, self.tiled = shape, vae, tiled

    def __call__(self, x: Tensor) -> Tensor:
        return quantise(x) if self.vae is None else self.vae.decode(x, tiled=self.tiled)


def to_images(config: Any, device: torch.device) -> ToImages:
    """Return the decoder of a configuration. A VAE is loaded once.

    Raises:
        UserError: a VAE that cannot be loaded, or another one than the latents were made with.
    """
    if config.latents is None:
        return ToImages(config.image_shape)
    expected = config.latents["vae"]
    try:
        vae = _load(str(config.vae or expected["name"]), device)
    except UserError as error:
        raise UserError(f"{error} --vae names the one that decodes the latents, wherever it is.") from error
    if vae.sha256 != expected["sha256"]:
        raise UserError(
            f"The VAE {vae.name} is not the one that the network's latents were made with, {expected['name']} "
            f"(sha256 {expected['sha256'][:12]}..., not {vae.sha256[:12]}...). Name that one with --vae."
        )
    return ToImages((3, config.pixels, config.pixels), vae, config.vae_tiled)
