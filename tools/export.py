"""Export one set of weights with its configuration, as a file or a folder, or merge a sharded checkpoint into one file.

python -m tools.export --resume DIR --ema ema1 --out digits.safetensors
python -m tools.export --resume DIR --ema ema1 --format hub --out DIR/hub                 with a card (tools/hub.py)
python -m tools.export --resume DIR --format pth --out merged/checkpoint-last.pth

from tools.export import load_denoiser
denoiser, config = load_denoiser("digits.safetensors")
v = denoiser.velocity(z, t, y)              # z (B, 3, H, W), t (B,), y (B,)
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from denoiser import Denoiser
from tools.hub import CARD, CONFIG, SAMPLES, SpectralJiT, hub_settings
from tools.model_card import find_samples, model_card
from util.build import build_denoiser, denoiser_settings, describe_operators
from util.checkpoint import files
from util.checkpoint.published import WEIGHTS, load, load_weights, read_safetensors, whole, write_safetensors
from util.checkpoint.sharded import MOMENTS
from util.config import check, resolve
from util.errors import UserError
from util.io import make_folder, replacing
from util.resume import require_architecture


def export(folder: str | Path, out: str | Path, ema: str = "ema1", name: str | None = None) -> Any:
    """Write the weights `ema` of a run's newest checkpoint, or of the one called `name`. Return the configuration."""
    checkpoint = load(folder, name)
    require_architecture({}, checkpoint)
    config = resolve({}, checkpoint.args, training=False)
    denoiser = build_denoiser(config)
    load_weights(denoiser, checkpoint.state(ema), checkpoint.path)
    about = {"config": json.dumps(denoiser_settings(config)), "weights": ema, "epoch": str(checkpoint.epoch)}
    write_safetensors(out, denoiser.state_dict(), about)
    return config


def export_folder(run: str | Path, out: str | Path, ema: str = "ema1", name: str | None = None) -> Any:
    """Write the weights `ema` of a run's newest checkpoint, or of the one called `name`, as a folder with a model card.

    Files of the folder that have these names are replaced. Returns the configuration.

    Raises:
        UserError: no such checkpoint or weights, or a folder that holds a run.
    """
    run, out = Path(run), Path(out)
    if any(out.glob("checkpoint-*")):
        raise UserError(f"{out} holds checkpoints, and its {CONFIG} would be lost: name another --out.")
    checkpoint = load(run, name)
    require_architecture({}, checkpoint)
    config = resolve({}, checkpoint.args, training=False)
    model = SpectralJiT(hub_settings(config))
    load_weights(model.denoiser, checkpoint.state(ema), checkpoint.path)
    out.mkdir(parents=True, exist_ok=True)
    (out / SAMPLES).unlink(missing_ok=True)
    if grid := find_samples(run, checkpoint, ema):
        shutil.copyfile(grid, out / SAMPLES)
    parameters = sum(p.numel() for p in model.parameters())
    model_card(run, checkpoint, config, ema, parameters, grid).save(out / CARD)
    model.save_pretrained(out)
    return config


def load_denoiser(path: str | Path, device: str | torch.device = "cpu") -> tuple[Denoiser, Any]:
    """Return the denoiser of an exported file, in evaluation mode, and its configuration; UserError for other files."""
    content = read_safetensors(Path(path))
    settings = vars(content["args"])
    if "model" not in settings:
        raise UserError(f"{path} holds weights without settings: it is not an export of this project.")
    config = resolve({}, settings, training=False)
    check(config, evaluates=False)
    denoiser = build_denoiser(config)
    load_weights(denoiser, content["model"], Path(path))
    return denoiser.to(device).eval(), config


def merge(folder: str | Path, out: str | Path, name: str | None = None) -> None:
    """Write a run's checkpoint, sharded or not, as one file in the published form; it is in memory meanwhile."""
    checkpoint = load(folder, name)
    content: dict[str, Any] = {key: whole(state) for key, state in checkpoint.weights.items()}
    if (saved := checkpoint.optimizer) is not None:
        moments = {moment: whole(saved[moment]) for moment in MOMENTS}
        state = {slot: {"step": step, **{m: moments[m][slot] for m in MOMENTS}} for slot, step in saved["step"].items()}
        content["optimizer"] = {"state": state, "param_groups": saved["param_groups"]}
    content |= {"epoch": checkpoint.epoch, "args": argparse.Namespace(**checkpoint.args), "run": checkpoint.run}
    with replacing(out) as file:
        files.write(file, content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="file to write, or folder for hub")
    parser.add_argument("--checkpoint", help="file in the folder of the run (default: the newest)")
    parser.add_argument("--ema", default="ema1", choices=tuple(WEIGHTS), help="which weights, for safetensors and hub")
    parser.add_argument("--format", default="safetensors", choices=("safetensors", "hub", "pth"))
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    args = parser.parse_args()
    try:
        out = Path(args.out)
        empty = args.format == "hub" and out.is_dir() and not any(out.iterdir())
        if out.exists() and not empty and not args.overwrite:
            raise UserError(f"{args.out} exists. --overwrite replaces it, or name another --out.")
        make_folder(out.parent)
        if args.format == "pth":
            merge(args.resume, args.out, args.checkpoint)
            print(args.out)
        else:
            write = export_folder if args.format == "hub" else export
            config = write(args.resume, args.out, args.ema, args.checkpoint)
            print(f"{args.out}: {config.model} at {config.img_size} px, {describe_operators(config)}")
    except (UserError, OSError) as error:
        print(f"tools.export: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
