"""Arithmetic of a network: the matrix products of a forward pass, 2 operations for a multiplication with its addition.

    tokens n          patches: 2 C p^2 b + 2 b D             last layer: 2 D C_out p^2
    a block           2 n D (3 D + D + 2 m + m) + 4 n^2 D + 12 D^2: linear layers, attention, modulation
    a backward pass   twice the forward pass
    Spectral Forcing  8 C H^2 w: two products with the DCT matrix of a window of w pixels to get there, two to get back

Names as in model_jit.py. Norms, rotations and activations are left out: they cost memory traffic, not arithmetic.
"""

from model_jit import JiT
from spectral_forcing import SpectralForcing

BACKWARD = 2  # forward passes that a backward pass costs


def forward_flop(net: JiT) -> int:
    """Of one image."""
    proj1, proj2 = net.x_embedder.proj1, net.x_embedder.proj2
    tokens, dim = net.pos_embed.shape[1:]
    flop = 2 * tokens * (proj1.weight.numel() + proj2.weight.numel() + net.final_layer.linear.weight.numel())
    flop += 2 * (net.t_embedder.mlp[0].weight.numel() + net.t_embedder.mlp[2].weight.numel())
    flop += 2 * net.final_layer.adaLN_modulation[1].weight.numel()
    for i, block in enumerate(net.blocks):
        n = tokens + (net.in_context_len if i >= net.in_context_start else 0)
        linear = (block.attn.qkv, block.attn.proj, block.mlp.w12, block.mlp.w3)
        flop += 2 * n * sum(layer.weight.numel() for layer in linear) + 4 * n * n * dim
        flop += 2 * block.adaLN_modulation[1].weight.numel()
    return flop


def training_flop(net: JiT) -> int:
    """Of one image: forward and backward pass."""
    return (1 + BACKWARD) * forward_flop(net)


def operator_flop(operator: SpectralForcing, channels: int = 3) -> int:
    """Of one image; it has no backward pass, since nothing before it is trained."""
    return 8 * channels * operator.img_size**2 * operator.window_size
