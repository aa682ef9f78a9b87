"""Weights and inputs of the golden numbers: everything is regenerated from names and seeds (golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from denoiser import Denoiser
from model_jit import JiT
from spectral_forcing import SpectralForcing

FOLDER = Path(__file__).parent / "golden"
GOLDEN = dict(np.load(FOLDER / "golden.npz"))
CIFAR10_SPECTRUM = json.loads((FOLDER / "cifar10_spectrum.json").read_text())
SHAPES = json.loads((FOLDER / "state_dict_shapes.json").read_text())
SMALL = {
    **{"input_size": 32, "patch_size": 8, "hidden_size": 64, "depth": 4, "num_heads": 4},
    **{"num_classes": 10, "bottleneck_dim": 16, "in_context_len": 4, "in_context_start": 2},
}


def normals(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32))


def golden_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    a = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape, np.float64)
    a = a.astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        a = 1 + np.float32(0.1) * a
    elif a.ndim > 1:
        a = a / np.float32(np.sqrt(np.prod(shape[1:])))
    else:
        a = np.float32(0.1) * a
    return torch.from_numpy(a.astype(np.float32))


def fill(net: torch.nn.Module) -> torch.nn.Module:
    """Overwrite every entry but `pos_embed` with its golden values."""
    state = net.state_dict()
    net.load_state_dict({n: p if n == "pos_embed" else golden_weight(n, tuple(p.shape)) for n, p in state.items()})
    return net


def small_denoiser(sf: bool = True, **kwargs) -> Denoiser:
    return Denoiser(fill(JiT(**SMALL)), SpectralForcing(32) if sf else None, **kwargs).eval()
