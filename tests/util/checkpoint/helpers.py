"""A tiny network, its training state, and checkpoints in the published form, written without the code under test."""

import argparse
import copy
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.conftest import TINY
from util.build import build_denoiser
from util.checkpoint.files import NAME
from util.checkpoint.published import PROJ1
from util.checkpoint.train_state import train_state
from util.config import resolve
from util.optim import EMA, build_optimizer

KEYS = ("model", "model_ema1", "model_ema2")
PATH = Path("x.pth")  # for messages


def configuration(**changes):
    return resolve({"model": TINY, "dataset": "digits", "img_size": 16, **changes})


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return build_denoiser(configuration(**changes))


def steps(denoiser, optimizer, count, seed=0):
    """Do optimizer steps with gradients that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(count):
        for parameter in denoiser.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def training():
    """Denoiser, optimizer and EMAs after three steps, all of them different."""
    denoiser = build()
    optimizer = build_optimizer(denoiser, 0.1, (0.9, 0.95))
    emas = EMA(denoiser, 0.9), EMA(denoiser, 0.5)
    for seed in range(3):
        steps(denoiser, optimizer, 1, seed)
        for ema in emas:
            ema.update()
    return denoiser, optimizer, emas


def content_of(denoiser, optimizer, emas, step=70, **run):
    return train_state(denoiser, optimizer, emas, step, 10, vars(configuration()), run)


def plain_adamw(denoiser, weight_decay=0.1, **kwargs):
    """AdamW as published runs have it: two groups, vectors and biases first."""
    vectors = [p for n, p in denoiser.named_parameters() if p.dim() == 1 or n.endswith(".bias")]
    rest = [p for n, p in denoiser.named_parameters() if not (p.dim() == 1 or n.endswith(".bias"))]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": rest, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **kwargs)


def published(linear=False, said=None, fused=False):
    """The content of a checkpoint as the published code writes it after two steps, the denoiser and the optimizer.

    linear: PROJ1 is a matrix. said: what its settings say about disable_dct_patchify; None: nothing.
    """
    denoiser = build()
    optimizer = plain_adamw(denoiser, fused=fused, foreach=False)
    steps(denoiser, optimizer, 2)
    args = argparse.Namespace(model=TINY, img_size=16, class_num=10, lr=1e-3, epochs=600, dist_url="env://")
    if said is not None:
        args.disable_dct_patchify = said
    states = {key: {k: v.clone() + 0.01 * i for k, v in denoiser.state_dict().items()} for i, key in enumerate(KEYS)}
    content = {**states, "optimizer": copy.deepcopy(optimizer.state_dict()), "epoch": 3, "args": args}
    if linear:
        for state in states.values():
            state[PROJ1] = state[PROJ1].flatten(1)
        vectors = sum(p.dim() == 1 or n.endswith(".bias") for n, p in denoiser.named_parameters())
        names = [n for n, p in denoiser.named_parameters() if not (p.dim() == 1 or n.endswith(".bias"))]
        slot = content["optimizer"]["state"][vectors + names.index(PROJ1)]
        for moment in ("exp_avg", "exp_avg_sq"):
            slot[moment] = slot[moment].flatten(1)
    return content, denoiser, optimizer


def write(folder, content):
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / NAME)
    return folder


DISK_FULL = OSError(28, "No space left on device")
