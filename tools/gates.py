"""Draw the gates that the spectral residual has learned: g_lo and g_hi of every block over time.

python -m tools.gates output/ti1-residual --ema ema1

It writes <run>/gates.png and an event `gates` into <run>/log.jsonl, as training does with each grid of samples.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from util.build import build_denoiser
from util.checkpoint.published import WEIGHTS, load, load_weights
from util.config import resolve
from util.dist.context import DistContext
from util.errors import UserError
from util.evaluation import gates
from util.log import RunLog


def draw(folder: Path, ema: str, name: str | None) -> str:
    """Draw the gates of a run's checkpoint. Return a line that names the files written. Raises UserError."""
    checkpoint, ctx = load(folder, name), DistContext()
    config = dataclasses.replace(resolve({}, checkpoint.args, training=False), ema=ema)
    if config.spectral_residual == "off":
        raise UserError(f"{checkpoint.path} has no gates: it was trained without --spectral_residual.")
    denoiser = build_denoiser(config)
    load_weights(denoiser, checkpoint.state(ema), checkpoint.path)
    log = RunLog(folder, ctx, {"mode": "disabled"})
    step = checkpoint.run.get("step", checkpoint.epoch + 1)
    path = gates.record(denoiser.net, config, checkpoint.epoch, step, folder, ctx, log)["gates"]
    log.close()
    return f"gates: {path}   log: {log.path}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for an error that a sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m tools.gates", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--ema", default="ema1", choices=tuple(WEIGHTS), help="which weights")
    parser.add_argument("--checkpoint", help="file in the folder (default: the newest)")
    args = parser.parse_args(argv)
    try:
        print(draw(args.run, args.ema, args.checkpoint))
    except UserError as error:
        print(f"tools.gates: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
