"""A denoiser and a metric that cost nothing, and an evaluation with them, also on several ranks.

`python -m tests.util.evaluation.toy FOLDER JSON` is one rank of such an evaluation; torchrun's variables are in the
environment. What it measures depends on every pixel of every image and on their order.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from denoiser import Denoiser
from tests.conftest import ONE, TINY_MODEL
from util.config import resolve
from util.dist import preemption
from util.dist.context import find_context, process_group
from util.evaluation import generate
from util.evaluation.evaluate import EvalTarget, FeatureCache, evaluate_and_write

N = 150  # images, of 10 classes
CONFIG = resolve(
    {
        **{"dataset": "digits", "img_size": 16, "disable_dct_patchify": True, "pred_param": "v", "gen_bsz": 64},
        **{"num_sampling_steps": 2, "cfg": 2.0, "seed": 3, "num_images": N, "metrics": "class_agreement"},
    }
)


class Toy(torch.nn.Module):
    """A velocity that depends on z, t and y, element by element; it counts the rows of its calls."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, z, t, y):
        self.rows.append(len(z))
        return torch.tanh(z) + (t + 0.1 * y)[:, None, None, None]


def toy_denoiser():
    return Denoiser(Toy(), pred_param="v")


def network(**settings):
    """A transformer with random weights."""
    torch.manual_seed(0)
    return Denoiser(TINY_MODEL(input_size=16, num_classes=10), **{"pred_param": "v", **settings})


class ToySuite:
    """Stands in for MetricSuite: 12 block means of an image; the metric weights them by position."""

    def __init__(self, names=("class_agreement",), *args, **kwargs):
        self.names, self.warnings, self.details = tuple(names), [], {}
        self.streams, self.sha256 = {"means": 12, "first": 1}, "0"

    def extract(self, images):
        x = torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1).float()
        return {"means": x, "first": images[:, 0, 0, :1].float()}

    def compute(self, features, labels):
        self.features, self.labels = features, labels
        weights = torch.arange(len(labels)).cos().double()
        value = float((features["means"].double().mean(1) * weights).mean() / 255)
        return {"class_agreement": value, "first": float(features["first"].mean())}

    def describe(self):
        extractors = [{"extractor": "toy", "weights_sha256": self.sha256}]
        return {"metrics": list(self.names), "extractors": extractors, "references": {}}

    def plot(self, path):
        return None


class Stop(Exception):
    pass


def stopping(after):
    """A suite that raises when it has seen `after` batches."""
    suite, seen = ToySuite(), []
    extract = suite.extract

    def limited(images):
        if len(seen) == after:
            raise Stop
        seen.append(len(images))
        return extract(images)

    suite.extract = limited
    return suite


def checkpoint(folder: Path, content: int = 0) -> Path:
    """A file whose content stands for the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint-last.pth"
    torch.save({"content": torch.full((3,), content), "other": torch.zeros(2)}, path)
    return path


def target(folder: Path, denoiser=None, epoch: int = 0, **changes) -> EvalTarget:
    changes = {name: str(value) if name == "save_images" else value for name, value in changes.items()}
    path = folder / "checkpoint-last.pth"
    return EvalTarget(denoiser or toy_denoiser(), replace(CONFIG, **changes), epoch, path)


def run(folder: Path, ctx=ONE, suite=None, **changes):
    """(report, its path) of an evaluation of the toy."""
    return evaluate_and_write(target(folder, **changes), suite or ToySuite(), folder / "eval", ctx)


class Recorder:
    """Indices of the images that are generated, batch by batch."""

    def __init__(self, patch):
        self.batches, original = [], generate._sample_batch

        def sample_batch(denoiser, config, index, *rest):
            self.batches.append(list(index))
            return original(denoiser, config, index, *rest)

        patch.setattr(generate, "_sample_batch", sample_batch)

    @property
    def images(self) -> list[int]:
        return [i for batch in self.batches for i in batch]


def launch(module: str, arguments: list, ranks: int) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each rank of `python -m module arguments`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [(p.wait(120), *p.communicate()) for p in started]
    finally:
        for p in started:
            p.kill()


def evaluate_on(ranks: int, folder: Path, **settings) -> list[tuple[int, str, str]]:
    return launch("tests.util.evaluation.toy", [folder, json.dumps(settings)], ranks)


def main(folder: str, text: str) -> None:
    """One rank. `killed`: by SIGKILL when it has written so many batches. `asked`: the rank that gets SIGUSR1 when it
    has written a batch. `slow`: seconds that rank 0's metrics and rank 1's features take, in a default group whose
    collectives end after a fifth of that."""
    settings = json.loads(text)
    torch.set_num_threads(1)
    ctx = find_context("cpu")
    killed, asked, slow = (settings.pop(name, None) for name in ("killed", "asked", "slow"))
    if settings.pop("network", False):
        settings["denoiser"] = network()
    suite = ToySuite()
    if asked is not None:
        preemption.listen()
        killed = 1 if asked == ctx.rank else None
        extract = suite.extract
        suite.extract = lambda images: (time.sleep(0.3), extract(images))[1]
    if killed is not None:
        write, written = FeatureCache.write, []

        def fatal(self, index, *rest):
            write(self, index, *rest)
            written.append(index)
            if len(written) == killed:
                os.kill(os.getpid(), signal.SIGKILL if asked is None else signal.SIGUSR1)

        FeatureCache.write = fatal
    with process_group(ctx):
        if slow:
            dist.barrier()
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=slow / 5))
            method = "compute" if ctx.is_main else "extract"
            original = getattr(suite, method)
            setattr(suite, method, lambda *args: (time.sleep(slow), original(*args))[1])
        report, _ = run(Path(folder), ctx, suite, **settings)
    print(json.dumps(report["metrics"]))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:  # as main_jit.py: no destructor of the group, which others are still in
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
