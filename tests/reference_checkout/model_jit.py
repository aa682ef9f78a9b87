"""A straightforward JiT, as a stand-in for another checkout in tests and timings of benchmarks/reference.py.

It computes what model_jit.py of this repository computes, in the plain way: the attention product in float32, with the
matrix of weights in memory, norms and rotations operation by operation, a compiled block where compiling is left on.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        kind = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * x).to(kind)


class Rotary(nn.Module):
    def __init__(self, head_dim, side, extra):
        super().__init__()
        theta = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        angle = (torch.arange(side).float()[:, None] * theta).repeat_interleave(2, dim=-1)
        rows = angle[:, None].expand(side, side, -1)
        columns = angle[None].expand(side, side, -1)
        angle = torch.cat([rows, columns], dim=-1).reshape(side * side, head_dim)
        angle = torch.cat([torch.zeros(extra, head_dim), angle])
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.cos + torch.stack([-b, a], dim=-1).flatten(-2) * self.sin


def attention(q, k, v):
    with torch.autocast("cuda", enabled=False):
        weight = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))
    return weight.softmax(dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, rope):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        return self.proj(attention(q, k, v.to(q.dtype)).transpose(1, 2).reshape(b, n, d))


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        inner = int(int(dim * 4.0) * 2 / 3)
        self.w12, self.w3 = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn, self.mlp = Attention(dim, heads), SwiGLU(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    @torch.compile
    def forward(self, x, c, rope):
        a, b, c_, d, e, f = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + c_ * self.attn(self.norm1(x) * (1 + b) + a, rope)
        return x + f * self.mlp(self.norm2(x) * (1 + e) + d)


class JiT(nn.Module):
    def __init__(self, size, input_size, in_channels, num_classes, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        depth, dim, heads, bottleneck, context, start, patch = size
        self.patch, self.side, self.context, self.start = patch, input_size // patch, context, start
        self.proj1 = nn.Conv2d(in_channels, bottleneck, patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, dim, 1)
        self.t_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.classes = nn.Embedding(num_classes + 1, dim)
        self.position = nn.Parameter(torch.randn(1, self.side**2, dim) * 0.02, requires_grad=False)
        self.in_context = nn.Parameter(torch.randn(1, context, dim) * 0.02)
        self.rope, self.rope_context = (Rotary(dim // heads, self.side, extra) for extra in (0, context))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.last = RMSNorm(dim), nn.Linear(dim, patch * patch * in_channels)
        self.last_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, t, y):
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t[:, None].float() * frequency
        label = self.classes(y)
        c = self.t_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1)) + label
        x = self.proj2(self.proj1(x)).flatten(2).transpose(1, 2) + self.position
        for i, block in enumerate(self.blocks):
            if i == self.start:
                x = torch.cat([label[:, None] + self.in_context, x], dim=1)
            x = block(x, c, self.rope if i < self.start else self.rope_context)
        shift, scale = self.last_modulation(c)[:, None].chunk(2, dim=-1)
        x = self.last(self.norm(x[:, self.context :]) * (1 + scale) + shift)
        x = x.reshape(-1, self.side, self.side, self.patch, self.patch, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 3, self.side * self.patch, -1)


def _model(*size):
    return lambda **options: JiT(size, **options)


JiT_models = {
    "JiT-Demo/8": _model(6, 128, 4, 48, 4, 2, 8),
    "JiT-Ti/4": _model(8, 192, 4, 48, 8, 2, 4),
    "JiT-S/16": _model(12, 384, 6, 96, 16, 4, 16),
    "JiT-B/16": _model(12, 768, 12, 128, 32, 4, 16),
    "JiT-B/32": _model(12, 768, 12, 128, 32, 4, 32),
}
