"""JiT, "Just image Transformer" (arXiv 2511.13720): a plain transformer on large pixel patches.

Names, shapes and order of the parameters are those of the published checkpoints.

Shapes: B batch, C channels, H = W image size, p patch, N = (H/p)^2 tokens, D width, h heads, d = D/h,
K in-context tokens, n = K + N, m width of the feed-forward layer.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectral_ops.conditioning import ScheduleEmbedder


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), computed in float32 and returned in the type of x."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def token_positions(side: int, level: int = 0) -> Tensor:
    """Return the middles of `side` tokens, (side,) float64, in tokens of level 0: each is 2^level of those wide."""
    return (torch.arange(side, dtype=torch.float64) + 0.5) * 2**level - 0.5


def sincos_position_embedding(dim: int, side: int, level: int = 0) -> Tensor:
    """Return the fixed 2-D table (1, side*side, D) of arXiv 1706.03762: [sin, cos] of the column, then of the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = token_positions(side, level)[:, None] * omega  # (side, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D/2)
    by_column = axis[None, :, :].expand(side, -1, -1)
    by_row = axis[:, None, :].expand(-1, side, -1)
    return torch.cat([by_column, by_row], dim=-1).reshape(1, side * side, dim).float()


def rope_table(head_dim: int, side: int, level: int = 0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (N, d/2) of RoPE in 2-D (arXiv 2104.09864): d/4 angles of the row, d/4 of the column."""
    theta = 10000.0 ** (-2 * torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 2))
    angle = token_positions(side, level)[:, None] * theta  # (side, d/4)
    by_row = angle[:, None, :].expand(-1, side, -1)
    by_column = angle[None, :, :].expand(side, -1, -1)
    angle = torch.cat([by_row, by_column], dim=-1).reshape(side * side, head_dim // 2)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (a, b) of x (..., d) to (a cos - b sin, b cos + a sin); cos, sin (..., d/2).

    It is a sum over whole pairs because a compiler fuses that with what comes before and after into one kernel.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., d/2, 2)
    pairs = pairs * cos[..., None] + pairs.flip(-1) * torch.stack([-sin, sin], dim=-1)
    return pairs.to(x.dtype).flatten(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaLN (arXiv 2212.09748): x (B, n, D) -> x (1 + scale) + shift, with shift, scale (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D): sinusoid of width 256 on t itself (not rescaled), then a two-layer perceptron."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angle = t.float()[:, None] * frequency  # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (B,) -> (B, D); index `num_classes` stands for "no class"."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class BottleneckPatchEmbed(nn.Module):
    """Image (B, C, H, W) -> tokens (B, N, D), row-major, through a linear bottleneck."""

    def __init__(self, patch_size: int, in_channels: int, bottleneck_dim: int, hidden_size: int):
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck_dim, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck_dim, hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)  # (B, N, D)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys and a 2-D rotary embedding of the image tokens."""

    rotate = staticmethod(rotate)

    def __init__(self, dim: int, num_heads: int, attn_drop: float, proj_drop: float, attn_fp32: bool):
        super().__init__()
        self.num_heads, self.attn_drop, self.attn_fp32 = num_heads, attn_drop, attn_fp32
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (B, n, D) to (B, n, D); cos, sin (n, d/2), with angle 0 for the in-context tokens."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).unbind(2)  # (B, n, h, d) each
        cos, sin = cos[:, None], sin[:, None]  # (n, 1, d/2)
        q = self.rotate(self.q_norm(q), cos, sin)
        k = self.rotate(self.k_norm(k), cos, sin)
        # Heads are in front for attention alone, as a view: its output then has the layout of x, and is not copied.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, h, n, d) each
        drop = self.attn_drop if self.training else 0.0
        if self.attn_fp32:
            with torch.autocast(x.device.type, enabled=False):
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=drop).to(v.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, -1)))  # (B, n, D)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = w12(x) (arXiv 2002.05202); inner width m = int(int(mlp_ratio * D) * 2 / 3)."""

    def __init__(self, dim: int, mlp_ratio: float, drop: float):
        super().__init__()
        inner = int(int(dim * mlp_ratio) * 2 / 3)
        self.w12 = nn.Linear(dim, 2 * inner)
        self.w3 = nn.Linear(inner, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)  # (B, n, m) each
        return self.w3(self.drop(F.silu(a) * b))


class JiTBlock(nn.Module):
    """Pre-norm block; shift, scale and gate of both branches come from c (adaLN-Zero, arXiv 2212.09748).

    Each block operator is a submodule under its registry name. It maps the residual r of the feed-forward branch, of
    the patch tokens alone, and the embeddings of time and label to a correction that is added to the output. If
    `recompute` is set, the backward pass computes the block once more instead of keeping its activations.
    """

    recompute = False

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, attn_drop: float, proj_drop: float, attn_fp32: bool):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, attn_drop, proj_drop, attn_fp32)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, mlp_ratio, proj_drop)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.operator_names: list[str] = []

    def add_operator(self, name: str, operator: nn.Module) -> None:
        self.add_module(name, operator)
        self.operator_names.append(name)

    def forward(
        self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor, t_emb: Tensor, y_emb: Tensor, context: int = 0
    ) -> Tensor:
        """Map x (B, n, D), the first `context` of n in-context tokens; c, t_emb, y_emb (B, D); cos, sin (n, d/2)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, c, cos, sin, t_emb, y_emb, context, use_reentrant=False)
        return self._forward(x, c, cos, sin, t_emb, y_emb, context)

    def _forward(
        self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor, t_emb: Tensor, y_emb: Tensor, context: int
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)  # (B, D) each
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), cos, sin)
        r = gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        x = x + r
        for name in self.operator_names:
            correction = getattr(self, name)(r[:, context:], t_emb, y_emb).to(x.dtype)  # (B, N, D)
            x = x + F.pad(correction, (0, 0, context, 0))
        return x


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> pixels of each patch (B, N, p*p*C_out), ordered (row, column, channel)."""

    def __init__(self, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Level(nn.Module):
    """What a network has of its own for images at a lower level: (B, C, side p, side p), with `side` tokens a side."""

    def __init__(
        self,
        side: int,
        level: int,
        in_channels: int,
        out_channels: int,
        patch: int,
        bottleneck: int,
        dim: int,
        heads: int,
    ):
        super().__init__()
        self.scale = 2.0**level  # of the pixels, beside those of the whole image
        self.x_embedder = BottleneckPatchEmbed(patch, in_channels, bottleneck, dim)
        self.final_layer = FinalLayer(dim, patch, out_channels)
        self.register_buffer("pos_embed", sincos_position_embedding(dim, side, level), persistent=False)
        cos, sin = rope_table(dim // heads, side, level)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @torch.no_grad()
    def copy(self, x_embedder: nn.Module, final_layer: nn.Module) -> None:
        """Start as the layers of the whole image: a patch of one colour is embedded and predicted as in that one."""
        self.x_embedder.load_state_dict(x_embedder.state_dict())
        self.final_layer.load_state_dict(final_layer.state_dict())
        self.x_embedder.proj1.weight /= self.scale
        self.final_layer.linear.weight *= self.scale
        self.final_layer.linear.bias *= self.scale


class JiT(nn.Module):
    """forward(x (B, C, H, W), t (B,), y (B,)) -> (B, C_out, H, W); with `schedule_cond` also logsnr_range (B, 2).

    Args:
        input_size: H = W in pixels, a multiple of `patch_size`.
        bottleneck_dim: inner width of the patch embedding.
        attn_drop, proj_drop: dropout of attention weights and of projections, in the middle half of the blocks only.
        in_context_len: K class tokens, put in front of the sequence before block `in_context_start`; 0 for none.
        attn_fp32: compute the attention product in float32 also under autocast, as the published training code does.
        block_operators: name -> constructor (D, side of the token grid) of a module with `reset_parameters()` and
            forward(r (B, N, D), t_emb (B, D), y_emb (B, D)) -> (B, N, D); see `JiTBlock`.
        schedule_cond: condition on (lambda_0, lambda_1) of each sample's noise schedule; without effect at first.
        levels: take images of H / 2^l pixels as well, for l up to `levels`, with an embedding of patches and a final
            layer for each size, which start as those of the whole image; see spectral_ops/resolution.py.

    Raises:
        ValueError: sizes that do not fit together; in `forward`, an image of another size.
    """

    def __init__(
        self,
        input_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        out_channels: int = 3,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_classes: int = 1000,
        bottleneck_dim: int = 128,
        in_context_len: int = 32,
        in_context_start: int = 4,
        attn_fp32: bool = False,
        block_operators: Mapping[str, Callable[[int, int], nn.Module]] | None = None,
        schedule_cond: bool = False,
        levels: int = 0,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"The image size {input_size} must be a multiple of the patch size {patch_size}.")
        if hidden_size % num_heads or (hidden_size // num_heads) % 4 or hidden_size % 4:
            raise ValueError(f"{num_heads} heads do not fit width {hidden_size}: each must be a multiple of 4 wide.")
        if input_size % (patch_size << levels):
            raise ValueError(
                f"The image size {input_size} must be a multiple of {patch_size << levels}, the patch size "
                f"{patch_size} at level {levels}."
            )
        if in_context_len and not 0 <= in_context_start < depth:
            raise ValueError(f"in_context_start is {in_context_start}; it must be a block, 0 to {depth - 1}.")
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_classes, self.in_context_len, self.in_context_start = num_classes, in_context_len, in_context_start
        side = input_size // patch_size

        if in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, in_context_len, hidden_size))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.x_embedder = BottleneckPatchEmbed(patch_size, in_channels, bottleneck_dim, hidden_size)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            drops = (attn_drop, proj_drop) if depth // 4 <= i < depth // 4 * 3 else (0.0, 0.0)
            self.blocks.append(JiTBlock(hidden_size, num_heads, mlp_ratio, *drops, attn_fp32))
            for name, build in (block_operators or {}).items():
                self.blocks[i].add_operator(name, build(hidden_size, side))
        self.final_layer = FinalLayer(hidden_size, patch_size, out_channels)
        self.schedule_embedder = ScheduleEmbedder(hidden_size) if schedule_cond else None

        self.register_buffer("pos_embed", sincos_position_embedding(hidden_size, side))
        cos, sin = rope_table(hidden_size // num_heads, side)
        self.register_buffer("rope_cos", cos, persistent=False)  # (N, d/2)
        self.register_buffer("rope_sin", sin, persistent=False)
        with torch.random.fork_rng(devices=[]):  # the other parameters are drawn as without levels
            sizes = (in_channels, out_channels, patch_size, bottleneck_dim, hidden_size, num_heads)
            self.levels = nn.ModuleList(Level(side >> level, level, *sizes) for level in range(1, levels + 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values of all parameters, those of the block operators last: the others do not change."""
        operators = [block.get_submodule(name) for block in self.blocks for name in block.operator_names]
        of_operators = {module for part in (*operators, self.levels) for module in part.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in of_operators:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for projection in (self.x_embedder.proj1, self.x_embedder.proj2):
            nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj2.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        if self.in_context_len:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.schedule_embedder is not None:
            nn.init.zeros_(self.schedule_embedder.weight)
        for operator in operators:
            operator.reset_parameters()
        self.reset_levels()

    def reset_levels(self) -> None:
        """Let the layers of all levels start as those of the whole image."""
        for level in self.levels:
            level.copy(self.x_embedder, self.final_layer)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Patches (B, N, p*p*C_out) -> image (B, C_out, H, W)."""
        p, side = self.patch_size, math.isqrt(x.shape[1])
        x = x.view(-1, side, side, p, p, self.out_channels)  # (B, row, column, p, p, C_out)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, logsnr_range: Tensor | None = None) -> Tensor:
        size = x.shape[-1]
        parts = {self.input_size >> level: part for level, part in enumerate((self, *self.levels))}
        if x.shape[-2] != size or size not in parts:
            known = " or ".join(f"{size}x{size}" for size in parts)
            raise ValueError(f"The network was built for {known} images, got {x.shape[-2]}x{x.shape[-1]}.")
        part = parts[size]
        t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)  # (B, D) each
        c = t_emb + y_emb  # (B, D)
        if self.schedule_embedder is not None:
            c = c + self.schedule_embedder(logsnr_range)
        x = part.x_embedder(x) + part.pos_embed  # (B, N, D)
        cos, sin, context = part.rope_cos, part.rope_sin, 0
        for i, block in enumerate(self.blocks):
            if self.in_context_len and i == self.in_context_start:
                # [0]: the gradient of one image then has the strides of the parameter, as DDP wants them.
                x = torch.cat([(y_emb[:, None] + self.in_context_posemb[0]).to(x.dtype), x], dim=1)  # (B, K + N, D)
                cos = F.pad(cos, (0, 0, self.in_context_len, 0), value=1.0)
                sin = F.pad(sin, (0, 0, self.in_context_len, 0), value=0.0)
                context = self.in_context_len
            x = block(x, c, cos, sin, t_emb, y_emb, context)
        return self.unpatchify(part.final_layer(x[:, self.in_context_len :], c))


_FIELDS = ("depth", "hidden_size", "num_heads", "bottleneck_dim", "in_context_len", "in_context_start")
_SIZES = {  # size -> values of _FIELDS, patch sizes; a size with a single name has no patch in it
    "Demo": (6, 128, 4, 48, 4, 2, (8,)),
    "Ti": (8, 192, 4, 48, 8, 2, (1, 2, 4, 8, 16)),
    "S": (12, 384, 6, 96, 16, 4, (2, 4, 8, 16)),
    "B": (12, 768, 12, 128, 32, 4, (2, 4, 8, 16, 32)),
    "L": (24, 1024, 16, 128, 32, 8, (2, 4, 16, 32)),
    "H": (32, 1280, 16, 256, 32, 10, (16, 32)),
    "700M": (36, 1024, 16, 128, 32, 12, (32,)),
    "2B": (27, 2048, 32, 256, 32, 9, (32,)),
    "7B": (24, 4096, 64, 512, 32, 8, (32,)),
}

#: Name -> constructor of a `JiT` with that size, which takes the remaining arguments of `JiT` by name.
JiT_models: dict[str, Callable[..., JiT]] = {}
for _size, (*_values, _patches) in _SIZES.items():
    for _patch in _patches:
        _name = f"JiT-{_size}" if _size in ("700M", "2B", "7B") else f"JiT-{_size}/{_patch}"
        JiT_models[_name] = partial(JiT, patch_size=_patch, **dict(zip(_FIELDS, _values, strict=True)))
