"""Time a training step of a checkout of the published JiT or Spectral Forcing release, as it is. One JSON line.

    python -m benchmarks.reference DIR --model JiT-B/16 --img_size 256 --batch_size 64

The checkout needs main_jit.get_args_parser, model_jit.py and denoiser.py, whose Denoiser(args) returns the loss of
(images, labels) and has update_ema(). Its arguments are its parser's defaults. What those files do not hold is done as
its engine does: torch's AdamW, bf16 autocast, the loss read at each step. Its modules have the names of ours, so
nothing of ours is imported once its folder is in front.
"""

import argparse
import copy
import importlib
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.common import emit, in_turns


def load(folder: Path, options: argparse.Namespace) -> torch.nn.Module:
    """Return its Denoiser with fresh weights on the GPU."""
    repository = Path(__file__).resolve().parent.parent
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != repository)]
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("util", "denoiser", "model_jit", "main_jit")
    ]:
        del sys.modules[name]
    args = importlib.import_module("main_jit").get_args_parser().parse_args([])
    for name in ("model", "img_size", "batch_size"):
        setattr(args, name, getattr(options, name))
    denoiser = importlib.import_module("denoiser").Denoiser(args).cuda()
    denoiser.ema_params1, denoiser.ema_params2 = (copy.deepcopy(list(denoiser.parameters())) for _ in range(2))
    return denoiser.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="JiT-B/16")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    torch.set_float32_matmul_precision("high")
    denoiser = load(options.folder.resolve(), options)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    shape = options.batch_size, 3, options.img_size, options.img_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8).pin_memory()
    labels = torch.arange(options.batch_size).pin_memory()

    def turn() -> None:
        for _ in range(options.steps):
            x = images.to(device, non_blocking=True).float().div_(255) * 2 - 1
            with torch.amp.autocast("cuda", dtype=torch.bfloat16):
                loss = denoiser(x, labels.to(device, non_blocking=True))
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.cuda.synchronize()
            denoiser.update_ema()

    seconds = in_turns({"reference": turn}, options.repeats, device)["reference"]
    rates = [options.batch_size * options.steps / s for s in (statistics.median(seconds), max(seconds), min(seconds))]
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    content = {"folder": options.folder.name, "model": options.model, "batch_size": options.batch_size}
    emit("reference", device, {**content, "images_per_s": round(rates[0], 2), "range": rates[1:], "peak_gb": peak})


if __name__ == "__main__":
    main()
