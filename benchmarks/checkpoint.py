"""Time for how long a save blocks training, and how long it takes in all. One JSON line.

    python -m benchmarks.checkpoint --model JiT-B/16 --saves 4

The state is that of a run (weights, two EMAs, AdamW's two moments), its values are zeros. The first save allocates
host memory; the later ones copy into it.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.common import emit, median_and_range
from model_jit import JiT_models
from util.checkpoint.writer import CheckpointWriter
from util.dist.context import DistContext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="JiT-Ti/4", choices=JiT_models)
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--saves", type=int, default=4, help="after the first one")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    with torch.device("meta"):
        shapes = JiT_models[options.model](input_size=options.img_size).state_dict()
    names = ("model", "model_ema1", "model_ema2", "exp_avg", "exp_avg_sq")
    content = {name: {key: torch.zeros(v.shape, device=device) for key, v in shapes.items()} for name in names}
    written = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writer = CheckpointWriter(Path(folder), 2, None, 0, DistContext(device=device))
        for step in range(options.saves + 1):
            writer.save(content, step)
            writer.wait()
            written += writer.finished()
        writer.close()
    first, *later = written
    blocked, *limits = median_and_range([save.blocked for save in later], 3)
    content = {
        "model": options.model,
        "gigabytes": first.num_bytes / 1e9,
        "blocked_first_s": round(first.blocked, 3),
        "blocked_s": blocked,
        "blocked_range_s": limits,
        "seconds_in_all": median_and_range([save.seconds for save in later], 3)[0],
    }
    emit("checkpoint", device, content)


if __name__ == "__main__":
    main()
