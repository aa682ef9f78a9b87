"""One set of weights with its configuration in a safetensors file, to use a trained model elsewhere.

python -m util.export --resume DIR --ema ema1 --out digits.safetensors

from util.export import load_denoiser
denoiser, config = load_denoiser("digits.safetensors")
v = denoiser.velocity(z, t, y)              # z (B, 3, H, W), t (B,), y (B,)
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from denoiser import Denoiser
from util import checkpoint, config
from util.build import DenoiserConfig
from util.errors import UserError

CONFIG_KEY = "denoiser"


def export(folder: str | Path, out: str | Path, ema: str = "ema1") -> DenoiserConfig:
    """Write the weights `ema` ("ema1", "ema2" or "model") of the checkpoint in `folder` to `out`."""
    saved = checkpoint.load(folder)
    settings = DenoiserConfig.from_args(config.resolve({}, saved.args, training=False))
    weights = saved.weights[checkpoint.CHOICES[ema]]
    checkpoint.load_weights(settings.build(), weights, saved.path)  # they fit, or it says what does not
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    about = {CONFIG_KEY: json.dumps(settings.settings()), "weights": ema, "epoch": str(saved.epoch)}
    save_file(tensors, str(out), metadata=about)
    return settings


def load_denoiser(path: str | Path, device: str | torch.device = "cpu") -> tuple[Denoiser, DenoiserConfig]:
    """The denoiser of an exported file, in evaluation mode on `device`, and its configuration.

    Raises:
        UserError: not a file that `export` wrote.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            settings = DenoiserConfig(**json.loads((file.metadata() or {})[CONFIG_KEY]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not an export of this project: {error}") from error
    denoiser = settings.build()
    checkpoint.load_weights(denoiser, tensors, Path(path))
    return denoiser.to(device).eval(), settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="file to write, .safetensors")
    parser.add_argument("--ema", default="ema1", choices=tuple(checkpoint.CHOICES), help="which weights")
    args = parser.parse_args()
    try:
        settings = export(args.resume, args.out, args.ema)
    except UserError as error:
        print(f"util.export: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {settings.model} at {settings.img_size} px, Spectral Forcing {settings.describe_operator()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
