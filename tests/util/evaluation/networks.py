"""Small networks with random weights in the formats of Meta's and OpenAI's files, and Meta's forward pass by hand."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.evaluation.features import DinoV2

WIDTH, HEADS = 384, 6  # of DINOv2's ViT-S/14


class SmallDinoV2(DinoV2):
    """ViT-S/14 with a single block, see `use_one_block`."""

    architecture, streams = "vit_small_patch14_dinov2", {"dinov2_384": WIDTH}


def use_one_block(patch) -> None:
    import timm

    create = timm.create_model
    patch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, depth=1, **kwargs))


def dinov2_state(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a file of Meta's, for images of 518 pixels, with random values that let features vary."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + 37 * 37, WIDTH), "mask_token": (1, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,)}
    for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm"):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for layer, (rows, columns) in layers.items():
        shapes[f"blocks.0.{layer}.weight"] = (rows * WIDTH, columns * WIDTH)
        shapes[f"blocks.0.{layer}.bias"] = (rows * WIDTH,)
    shapes |= {"blocks.0.ls1.gamma": (WIDTH,), "blocks.0.ls2.gamma": (WIDTH,)}
    g = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=g) / math.sqrt(math.prod(shape[1:])) for key, shape in shapes.items()}


class MetasNetwork(nn.Module):
    """The forward pass of the network that torch.hub would load, of images (B, 3, 224, 224), written out."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.linear("blocks.0.attn.qkv", x).chunk(3, dim=-1))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div((WIDTH // HEADS) ** 0.5).softmax(dim=-1)
        return self.linear("blocks.0.attn.proj", torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    def forward(self, images: Tensor) -> Tensor:
        s = self.state
        x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14)
        x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        grid = s["pos_embed"][0, 1:].T.reshape(1, WIDTH, 37, 37)
        factor = float((224 // 14 + 0.1) / math.sqrt(37 * 37))
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        x = x + torch.cat([s["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, WIDTH)], dim=1)
        x = x + s["blocks.0.ls1.gamma"] * self.attention(self.norm("blocks.0.norm1", x))
        hidden = F.gelu(self.linear("blocks.0.mlp.fc1", self.norm("blocks.0.norm2", x)))
        x = x + s["blocks.0.ls2.gamma"] * self.linear("blocks.0.mlp.fc2", hidden)
        return self.norm("norm", x)[:, 0]


class WholeClip(nn.Module):
    """A narrow CLIP for images of `size` pixels, with the names that OpenAI's file has."""

    def __init__(self, size: int = 336, features: int = 768):
        from torch_fidelity.feature_extractor_clip import VisionTransformer

        super().__init__()
        self.visual = VisionTransformer(size, 14, 64, 1, 1, features)
        self.visual.proj.data *= 20  # so that embeddings are as far apart as the kernel is wide
        self.text_projection = nn.Parameter(torch.randn(8, features))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def write_clip(folder: Path, **changes) -> tuple[Path, Path]:
    """Write the same random weights as a TorchScript archive, like OpenAI's, and as a state dict. Return both paths."""
    torch.manual_seed(0)
    network = WholeClip(**changes).eval()
    size = changes.get("size", 336)
    torch.jit.trace(network, torch.zeros(1, 3, size, size)).save(folder / "archive.pt")
    torch.save(network.state_dict(), folder / "state.pth")
    return folder / "archive.pt", folder / "state.pth"
