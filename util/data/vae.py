"""The autoencoder of latent diffusion, from diffusers: images -> mean and std of their latents, and latents -> images.

    z = (latent - shift_factor) * scaling_factor                                          (arXiv 2112.10752, D.1)

diffusers is optional (`pip install .[diffusers]`) and imported here alone. AutoencoderKL is a Gaussian in the latents;
AutoencoderDC has no noise, its std is 0. A folder has config.json and *.safetensors, as `save_pretrained` writes them.

Shapes: B images uint8 (B, 3, H, W); latents float32 (B, C, h, w), h = H / f, w = W / f with the factor f.
"""

import hashlib
import inspect
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.data.images import quantise, to_float
from util.errors import UserError

CLASSES = ("AutoencoderKL", "AutoencoderDC")


@dataclass(frozen=True)
class Vae:
    """A network of diffusers, on its device, and what is known about it.

    sha256 depends on weights and configuration alone: it is the same after a copy, and in another version of diffusers.
    """

    model: nn.Module
    name: str  # folder or name on the hub
    sha256: str
    channels: int  # C
    factor: int  # f, pixels per latent along a side
    scaling_factor: float
    shift_factor: float

    def describe(self) -> dict[str, Any]:
        """Return what is written beside latents, ready for JSON."""
        return {k: v for k, v in vars(self).items() if k != "model"}

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of z (B, C, h, w) for images uint8 (B, 3, H, W), in float32 on the device of the VAE."""
        output = self.model.encode(to_float(images.to(self.model.device)))
        if hasattr(output, "latent"):
            mean, std = output.latent, torch.zeros_like(output.latent)
        else:
            mean, std = output.latent_dist.mean, output.latent_dist.std
        return (mean - self.shift_factor) * self.scaling_factor, std * self.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor, batch_size: int = 16, tiled: bool = False) -> Tensor:
        """Return images uint8 (B, 3, H, W) of z (B, C, h, w), on the device of the VAE: in bf16 on a GPU.

        Few are decoded at once. `tiled` also cuts large images into parts that overlap, which changes them a little.
        """
        self.model.use_tiling = tiled
        device, images = self.model.device, []
        for part in z.split(batch_size):
            latent = part.to(device, torch.float32) / self.scaling_factor + self.shift_factor
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x = self.model.decode(latent).sample
            images.append(quantise(x.float()))
        self.model.use_tiling = False
        return torch.cat(images)


def load_vae(path: str | os.PathLike, device: torch.device) -> Vae:
    """Load a VAE in float32 from a folder in diffusers' format, or by its name (owner/name) from the Hugging Face hub.

    Raises:
        UserError: no diffusers, no such folder or name, no VAE in it, another class, no scaling factor, or weights that
            are damaged, incomplete or not safetensors.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError("A VAE needs diffusers, which is not installed: `pip install diffusers`.") from None
    path = os.fspath(path)
    if (folder := Path(path).expanduser()).is_dir():
        path = str(folder.absolute())
    elif folder.parent.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise UserError(f"The VAE {path} is no folder, and no name on the Hugging Face hub (owner/name).")
    try:
        kind = diffusers.AutoencoderKL.load_config(path).get("_class_name")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no VAE in diffusers' format ({_first_line(error)}). Name the folder with its config.json; "
            "in a whole pipeline that is the folder vae."
        ) from None
    if kind not in CLASSES:
        raise UserError(f"{path} holds a {kind}; expected one of {', '.join(CLASSES)}.")
    try:
        model, found = getattr(diffusers, kind).from_pretrained(
            path,
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # of many types, and each of them means that there are no such weights
        raise UserError(f"The weights of the VAE {path} cannot be read: {_first_line(error)}.") from None
    if found["missing_keys"]:
        raise UserError(f"The weights of the VAE {path} lack {found['missing_keys'][0]}, among others: copy it again.")
    config = model.config
    if not config.scaling_factor:
        raise UserError(
            f"The VAE {path} has no scaling_factor: set it in config.json, to 1 / the standard deviation of latents."
        )
    if config.get("latents_mean") is not None:
        raise UserError(f"The VAE {path} scales each channel by itself (latents_mean), which is not supported.")
    return Vae(
        model.requires_grad_(False).eval().to(device),
        path,
        _digest(model),
        config.latent_channels,
        2 ** (len(config.get("block_out_channels") or config.encoder_block_out_channels) - 1),
        float(config.scaling_factor),
        float(config.get("shift_factor") or 0.0),
    )


def _digest(model: nn.Module) -> str:
    """The SHA-256 of the class, the settings that are not its defaults, the scale, and all weights by name."""
    known = inspect.signature(type(model).__init__).parameters
    settings = {k: v for k, v in model.config.items() if k in known and json.dumps(v) != json.dumps(known[k].default)}
    settings.pop("sample_size", None)  # of the images that it was trained on: it changes no latent
    scale = [type(model).__name__, model.config.scaling_factor, model.config.get("shift_factor")]
    digest = hashlib.sha256(json.dumps([scale, settings], sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
