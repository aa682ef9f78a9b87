"""For how long a save stops training, and how long it takes in all: one JSON line.

    python benchmarks/checkpoint.py --model JiT-B/16 --saves 4

The state is that of a run (weights, two averages, AdamW's two moments), its values are zeros. The first save allocates
host memory; the later ones copy into it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model_jit import JiT_models
from util import provenance
from util.checkpoint_writer import CheckpointWriter


def state(model: str, device: torch.device) -> dict:
    """The tensors of a run's checkpoint, zeros, in the shapes of `model` at 256 px."""
    with torch.device("meta"):
        shapes = JiT_models[model](input_size=256).state_dict()
    zeros = [{name: torch.zeros(v.shape, device=device) for name, v in shapes.items()} for _ in range(5)]
    names = ("model", "model_ema1", "model_ema2", "exp_avg", "exp_avg_sq")
    return dict(zip(names, zeros, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="JiT-B/16")
    parser.add_argument("--saves", type=int, default=4, help="after the first one")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    content = state(args.model, torch.device(args.device))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        writer = CheckpointWriter(Path(folder), keep_last=2, last_step=None)
        written = []
        for step in range(args.saves + 1):
            writer.save(content, step)
            writer.wait()
            written += writer.finished()
            time.sleep(0.1)
        writer.close()
    blocked = [w.blocked for w in written]
    print(
        json.dumps(
            {
                "benchmark": "checkpoint",
                "model": args.model,
                "gigabytes": round(written[-1].num_bytes / 1e9, 3),
                "blocked_first_s": round(blocked[0], 3),
                "blocked_s": round(statistics.median(blocked[1:]), 3),
                "blocked_range_s": [round(min(blocked[1:]), 3), round(max(blocked[1:]), 3)],
                "seconds_in_all": round(statistics.median(w.seconds for w in written[1:]), 3),
                **provenance.provenance(torch.device(args.device)),
            }
        )
    )


if __name__ == "__main__":
    main()
