"""Another checkout of the JiT family, imported from its folder, behind the two functions that are timed.

It needs `model_jit.py` with JiT_models, and `denoiser.py` with Denoiser(args), whose forward(x, labels) is the loss,
with generate(labels) and update_ema(). Nothing is copied from it. What those files do not hold is written here as such
checkouts have it: the loss is read and the device waited for at each step, AdamW is torch's default. A float32
attention product or decorators of torch.compile are theirs. On a CPU the decorators are taken off while the files are
imported, and autocast("cuda") in them does nothing; bf16 is then an autocast around the whole, which their
autocast(enabled=False) for CUDA does not switch off.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import wait


def _identity(function=None, **options):
    return function if function is not None else lambda f: f


@contextmanager
def _instead_of_ours(folder: Path, decorators: bool) -> Iterator[None]:
    """Within the block modules are found in `folder` first; ours with the same names are put back afterwards."""
    theirs = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}

    def take() -> dict:
        return {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] in theirs}

    ours, compile_ = take(), torch.compile
    sys.path.insert(0, str(folder))
    torch.compile = compile_ if decorators else _identity
    try:
        yield
    finally:
        torch.compile = compile_
        sys.path.remove(str(folder))
        take()
        sys.modules.update(ours)


def load(folder: Path, model: str, img_size: int, class_num: int, device: torch.device, **sampling) -> nn.Module:
    """Its Denoiser with fresh weights; `sampling` as its flags: sampling_method, num_sampling_steps, cfg, ..."""
    missing = [name for name in ("model_jit.py", "denoiser.py") if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"--reference {folder}: it has no {' and no '.join(missing)}")
    args = argparse.Namespace(
        **{"model": model, "img_size": img_size, "class_num": class_num, "attn_dropout": 0.0, "proj_dropout": 0.0},
        **{"label_drop_prob": 0.1, "P_mean": -0.8, "P_std": 0.8, "t_eps": 0.05, "noise_scale": 1.0},
        **{"ema_decay1": 0.9999, "ema_decay2": 0.9996, "pred_param": "x", "device": str(device)},
        **{
            **{"sampling_method": "heun", "num_sampling_steps": 50, "cfg": 2.9},
            **{"interval_min": 0.1, "interval_max": 1.0},
            **sampling,
        },
    )
    with _instead_of_ours(folder.resolve(), decorators=device.type == "cuda"):
        denoiser = importlib.import_module("denoiser").Denoiser(args).to(device)
    for name in ("ema_params1", "ema_params2"):
        setattr(denoiser, name, copy.deepcopy(list(denoiser.parameters())))
    return denoiser


class Steps:
    """Its training: steps(images uint8 (B, 3, H, W), labels (B,))."""

    def __init__(self, denoiser: nn.Module, device: torch.device, dtype: torch.dtype | None, lr: float):
        self.denoiser, self.device, self.dtype = denoiser, device, dtype
        self.optimizer = torch.optim.AdamW(denoiser.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.denoiser.train()
        x = images.to(self.device, non_blocking=True).to(torch.float32).div_(255) * 2 - 1
        labels = labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            loss = self.denoiser(x, labels)
        loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        wait(self.device)
        self.denoiser.update_ema()
