"""A small autoencoder for latent diffusion on two cores: f = 4, 4 channels, 234,000 parameters, in diffusers' format.

    python -m experiments.tiny_vae --dataset cifar10 --out output/tiny_vae
    python -m tools.prepare_data latents --vae output/tiny_vae --dataset cifar10 --out output/cifar10_latents

Loss: mean of |x - x_hat| + 1e-3 KL per latent, with x_hat decoded from a sample. There is no perceptual and no
adversarial loss, so details are blurred. It prints the PSNR of images that it did not learn from.

Shapes: B images uint8 (B, 3, 32, 32), x their float32 in [-1, 1]; latents (B, 4, 8, 8).
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from util.data.datasets import build_dataset
from util.data.images import to_float
from util.data.vae import load_vae
from util.errors import UserError
from util.io import make_folder, provenance

CPU = torch.device("cpu")
HELD_OUT, BATCH, LR, KL_WEIGHT = 500, 32, 2e-3, 1e-3


def load_images(dataset: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return images to learn from and HELD_OUT others, uint8 (N, 3, 32, 32), in the random order of the seed."""
    images = build_dataset(dataset, None, 32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    images = torch.stack([images[i][0] for i in order])
    return images[HELD_OUT:], images[:HELD_OUT]


def train(images: Tensor, steps: int, seed: int) -> torch.nn.Module:
    """Train an AutoencoderKL whose scaling_factor is 1 / the std of its latents; the rate falls to 0 along a cosine."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    optimizer, generator = torch.optim.AdamW(model.parameters(), LR), torch.Generator().manual_seed(seed)
    for step in trange(steps, unit="step", disable=None):
        x = to_float(images[torch.randint(len(images), (BATCH,), generator=generator)])  # (B, 3, 32, 32)
        latents = model.encode(x).latent_dist
        x_hat = model.decode(latents.sample(generator)).sample
        loss = (x - x_hat).abs().mean() + KL_WEIGHT * latents.kl().mean() / latents.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        std = model.encode(to_float(images[:500])).latent_dist.sample(generator).std()
    model.register_to_config(scaling_factor=round(1 / float(std), 5))
    return model


def psnr(images: Tensor, decoded: Tensor) -> float:
    """Return 10 log10(255^2 / mean squared error) in dB, of all images uint8 together."""
    return 10 * math.log10(255**2 / float((images.float() - decoded.float()).square().mean()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tiny_vae",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        make_folder(args.out)
        images, held_out = load_images(args.dataset, args.seed)
        start = time.perf_counter()
        train(images, args.steps, args.seed).save_pretrained(args.out)
        vae = load_vae(args.out, CPU)
        seconds = round(time.perf_counter() - start)
    except UserError as error:
        print(f"experiments.tiny_vae: error: {error}", file=sys.stderr)
        return 2
    quality = round(psnr(held_out, vae.decode(vae.encode(held_out)[0])), 2)
    about = {"steps": args.steps, "seed": args.seed, "seconds": seconds, **vae.describe(), **provenance(CPU)}
    print(json.dumps({"psnr": quality, "dataset": args.dataset, **about}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
