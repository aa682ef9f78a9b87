"""Loss, averages and sampler of the stand-in, the plain way: loops over tensors, two forward passes for guidance."""

import torch
from model_jit import JiT_models
from torch import nn


class Denoiser(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.net = JiT_models[args.model](
            input_size=args.img_size,
            in_channels=3,
            num_classes=args.class_num,
            attn_drop=args.attn_dropout,
            proj_drop=args.proj_dropout,
        )
        self.args = args
        self.ema_params1 = self.ema_params2 = None

    def forward(self, x, labels):
        args = self.args
        drop = torch.rand(len(labels), device=labels.device) < args.label_drop_prob
        labels = torch.where(drop, args.class_num, labels)
        t = torch.sigmoid(torch.randn(len(x), device=x.device) * args.P_std + args.P_mean).view(-1, 1, 1, 1)
        e = torch.randn_like(x) * args.noise_scale
        z = t * x + (1 - t) * e
        v = (x - z) / (1 - t).clamp_min(args.t_eps)
        v_pred = (self.net(z, t.flatten(), labels) - z) / (1 - t).clamp_min(args.t_eps)
        return ((v - v_pred) ** 2).mean()

    def velocity(self, z, t, labels):
        args = self.args
        v_c = (self.net(z, t.flatten(), labels) - z) / (1 - t).clamp_min(args.t_eps)
        null = torch.full_like(labels, args.class_num)
        v_u = (self.net(z, t.flatten(), null) - z) / (1 - t).clamp_min(args.t_eps)
        inside = (t < args.interval_max) & ((args.interval_min == 0) | (t > args.interval_min))
        return v_u + torch.where(inside, args.cfg, 1.0) * (v_c - v_u)

    @torch.no_grad()
    def generate(self, labels):
        args, b = self.args, len(labels)
        z = args.noise_scale * torch.randn(b, 3, args.img_size, args.img_size, device=labels.device)
        times = torch.linspace(0, 1, args.num_sampling_steps + 1, device=labels.device)
        times = times.view(-1, 1, 1, 1, 1).expand(-1, b, -1, -1, -1)
        for i in range(args.num_sampling_steps):
            t, h = times[i], times[i + 1] - times[i]
            v = self.velocity(z, t, labels)
            if args.sampling_method == "heun" and i < args.num_sampling_steps - 1:
                v = 0.5 * (v + self.velocity(z + h * v, times[i + 1], labels))
            z = z + h * v
        return z

    @torch.no_grad()
    def update_ema(self):
        source = list(self.parameters())
        for target, p in zip(self.ema_params1, source, strict=True):
            target.detach().mul_(self.args.ema_decay1).add_(p, alpha=1 - self.args.ema_decay1)
        for target, p in zip(self.ema_params2, source, strict=True):
            target.detach().mul_(self.args.ema_decay2).add_(p, alpha=1 - self.args.ema_decay2)
