"""What an attached Spectral Forcing costs in networks that others wrote: a training step with it and without, in turns.

    python -m benchmarks.attach --batch_size 4

One JSON line for each network; weights and images are random.
"""

import argparse
from collections.abc import Callable
from typing import Any

import diffusers
import timm
import torch
from torch import Tensor, nn

from benchmarks.common import emit, in_turns, median_and_range
from model_jit import JiT_models
from spectral_forcing import SpectralForcing
from spectral_ops.attach import attach


class ViT(nn.Module):
    """timm's ViT-B/16 as a denoiser's trunk: (z (B, 3, 256, 256), t) -> tokens."""

    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_base_patch16_224", img_size=256, num_classes=0, global_pool="")

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.vit(z + t[:, None, None, None])


def prx() -> nn.Module:
    sizes = {"hidden_size": 768, "num_heads": 12, "depth": 12, "axes_dim": [32, 32], "bottleneck_size": 128}
    return diffusers.PRXTransformer2DModel(in_channels=3, patch_size=16, context_in_dim=768, **sizes)


def dit() -> nn.Module:
    sizes = {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12, "sample_size": 32, "patch_size": 2}
    return diffusers.DiTTransformer2DModel(in_channels=4, out_channels=4, **sizes)


def unet() -> nn.Module:
    kinds = {
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(sample_size=64, block_out_channels=(128, 256, 256), **kinds)


# Name -> constructor, size of the images, and the other arguments for a batch of B
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], Callable[[int], dict[str, Any]]]] = {
    "JiT-B/16": (lambda: JiT_models["JiT-B/16"](), (3, 256, 256), lambda b: {"y": torch.zeros(b, dtype=torch.long)}),
    "PRX": (prx, (3, 256, 256), lambda b: {"encoder_hidden_states": torch.ones(b, 32, 768), "return_dict": False}),
    "DiT-B/2": (dit, (4, 32, 32), lambda b: {"class_labels": torch.zeros(b, dtype=torch.long), "return_dict": False}),
    "UNet2DModel": (unet, (3, 64, 64), lambda b: {"return_dict": False}),
    "ViT-B/16": (ViT, (3, 256, 256), lambda b: {}),
}


def measure(name: str, batch_size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Return what the benchmark says of a network."""
    build, shape, others = NETWORKS[name]
    network, operator = build().to(device), SpectralForcing().to(device)
    with device:
        z, t, kwargs = torch.randn(batch_size, *shape), torch.full((batch_size,), 0.5), others(batch_size)

    def step() -> None:
        out = network(z, t, **kwargs)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()

    def attached_step() -> None:
        with attach(network, operator, image=0, time=1):
            step()

    seconds = in_turns({"plain": step, "attached": attached_step}, repeats, device)
    alone = in_turns({"operator": lambda: operator(z, t)}, repeats, device)["operator"]
    ratio = [b / a for a, b in zip(seconds["plain"], seconds["attached"], strict=True)]
    return {
        "network": name,
        "batch_size": batch_size,
        "attached_over_plain": median_and_range(ratio, 3),
        "step_ms": median_and_range([1e3 * s for s in seconds["plain"]], 1),
        "operator_ms": median_and_range([1e3 * s for s in alone], 2),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    for name in options.network:
        emit("attach", device, measure(name, options.batch_size, options.repeats, device))


if __name__ == "__main__":
    main()
