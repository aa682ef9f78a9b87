"""From what the network makes to images: rounding, or the VAE whose latents it was trained on."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from util.data.images import quantise
from util.data.vae import load_vae
from util.errors import UserError

_load = lru_cache(maxsize=1)(load_vae)


def decoder(config: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from x (B, C, h, w) of the network to images, uint8. A VAE is loaded once.

    Raises:
        UserError: a VAE that cannot be loaded, or another one than the latents were made with.
    """
    if config.latents is None:
        return quantise
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
    return partial(vae.decode, tiled=config.vae_tiled)
