"""A checkpoint in shards as the single file that others read, and back; both to the bit, and without a GPU.

    python -m util.merge output/7b                checkpoint-last.dcp -> merged/checkpoint-last.pth
    python -m util.merge output/7b --split        checkpoint-last.pth -> split/checkpoint-last.dcp

The result is not put among the run's own checkpoints, which the run goes on from, and replaces. The first holds the
whole checkpoint in memory (146 GB for JiT-7B), the second a fifth of it.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from engine_jit import parameter_groups
from util import checkpoint, checkpoint_folder, config, sharded_checkpoint, sharded_content
from util.build import DenoiserConfig
from util.checkpoint_folder import NAME, NAME_SHARDED
from util.errors import UserError


def merge(source: Path, out: Path) -> None:
    """Write the checkpoint in shards `source` to the file `out`.

    Raises:
        UserError: it is damaged, or cannot be written.
    """
    content = dict(sharded_content.merged(source, sharded_checkpoint.verify(source)))
    if content["optimizer"] is not None:
        content["optimizer"] = dict(content["optimizer"])
    aside = out.with_suffix(".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint_folder.write(aside, content)
        os.replace(aside, out)
        sharded_checkpoint.flush_folder(out.parent)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the checkpoint cannot be written to {out}: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def split(source: Path, out: Path) -> None:
    """Write the checkpoint file `source` to the folder `out`, as one process of a run in shards would.

    Raises:
        UserError: it is damaged or does not fit its network, or cannot be written.
    """
    saved = checkpoint.load(source.parent, source.name)
    shape = DenoiserConfig.from_args(config.resolve({}, saved.args, training=False))
    with torch.device("meta"):
        denoiser = shape.build()
    content = {name: saved.weights[name] for name in sharded_content.WEIGHTS}
    for state in content.values():
        checkpoint.check_fit(denoiser, state, source)
    groups, optimizer = parameter_groups(denoiser), saved.optimizer
    if optimizer is not None:
        parameters = dict(denoiser.named_parameters())
        state = checkpoint.fitting_state([[parameters[n] for n in names] for names in groups], optimizer, source)
        optimizer = {**optimizer, "state": state}
    content |= {"optimizer": optimizer, "epoch": saved.epoch, "args": argparse.Namespace(**saved.args)}
    tensors, about = sharded_content.flatten(content | {"run": saved.run}, groups)
    aside = out.with_suffix(".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sharded_checkpoint.write(aside, tensors, about, group=None)
        os.rename(aside, out)
        sharded_checkpoint.flush_folder(out.parent)
    except OSError as error:
        raise UserError(f"the checkpoint cannot be written to {out}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def run(argv: list[str] | None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--split", action="store_true", help="from the file to shards")
    parser.add_argument("--checkpoint", help=f"which in the folder (default: {NAME_SHARDED}; --split: {NAME})")
    parser.add_argument(
        "--out", type=Path, help="folder for the result (default: merged, with --split split, in that of the run)"
    )
    args = parser.parse_args(argv)
    source = args.run / (args.checkpoint or (NAME if args.split else NAME_SHARDED))
    out = (
        args.out or args.run / ("split" if args.split else "merged")
    ) / f"{source.stem}{'.dcp' if args.split else '.pth'}"
    if not source.exists() or source.suffix == out.suffix:
        raise UserError(f"{source} is not there, or not of the kind that becomes {out.name}")
    if out.exists():
        raise UserError(f"{out} is there already: remove it first, or name another folder with --out")
    (split if args.split else merge)(source, out)
    return str(out)


def main(argv: list[str] | None = None) -> int:
    try:
        print(run(argv))
    except UserError as error:
        print(f"util.merge: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
