"""A denoiser and a metric that cost nothing, and an evaluation with them, also in processes of its own.

`python -m tests.toy_evaluation FOLDER JSON` is one process of such an evaluation; torchrun's variables are in the
environment. What it measures depends on every pixel of every image and on their order.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import util.evaluation
from denoiser import Denoiser
from tests.golden_inputs import small_denoiser
from util import preemption
from util.build import DenoiserConfig
from util.distributed import World, find_world, process_group
from util.evaluation import Subject, evaluate_and_write
from util.generation import Sampling
from util.shards import Shards

N = 150  # three blocks: 64, 64, 22
CONFIG = DenoiserConfig("toy", 32, 10, "v", 0.05, 1.0, False, None, 0.05, 1.0, 30.0, None)


class Toy(torch.nn.Module):
    """A velocity that depends on z, t and y, element by element; it counts the rows of its calls."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, z, t, y):
        self.rows.append(len(z))
        return torch.tanh(z) + (t + 0.1 * y)[:, None, None, None]


class ToySuite:
    """In the place of util.metrics.MetricSuite: 12 block means of an image; the metric weights them by position."""

    def __init__(self, names=("class_agreement",), *args, **kwargs):
        self.names, self.warnings, self.streams = tuple(names), [], {"means": 12, "first": 1}
        self.sha256 = "0"

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


def checkpoint(folder: Path, content: int = 0) -> Path:
    """A file whose identity stands for the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint-last.pth"
    torch.save({"content": torch.full((3,), content), "other": torch.zeros(2)}, path)
    return path


def run(
    folder: Path,
    world: World = World(),  # noqa: B008 (frozen)
    denoiser: Denoiser | None = None,
    suite: ToySuite | None = None,
    num_images: int = N,
    ema: str = "ema1",
    epoch: int = 0,
    save_images: Path | None = None,
    keep_features: bool = False,
    **changes,
):
    """(report, its path) of an evaluation of the toy."""
    settings = {"solver": "heun", "steps": 2, "cfg": 2.0, "interval": (0.1, 1.0), "seed": 3, "batch_size": 64}
    path = folder / "checkpoint-last.pth"
    subject = Subject(denoiser or Denoiser(Toy(), pred_param="v"), CONFIG, ema, epoch, path)
    sampling = Sampling(**{**settings, **changes})
    suite = suite or ToySuite()
    return evaluate_and_write(subject, sampling, num_images, suite, folder / "eval", world, save_images, keep_features)


class Recorder:
    """Indices of the images that are made, in the place of util.evaluation.make_images."""

    def __init__(self, patch):
        self.batches, original = [], util.evaluation.make_images

        def make_images(denoiser, sampling, index, *rest):
            self.batches.append(list(index))
            return original(denoiser, sampling, index, *rest)

        patch.setattr(util.evaluation, "make_images", make_images)

    @property
    def images(self) -> list[int]:
        return [i for batch in self.batches for i in batch]


def start(module: str, arguments: list, processes: int, **environment) -> list[subprocess.Popen]:
    """`python -m module arguments` as `processes` processes that find each other."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    common |= {"WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    root = Path(__file__).parent.parent
    return [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        return [(p.wait(120), *p.communicate()) for p in processes]
    finally:
        for p in processes:
            p.kill()


def main(folder: str, text: str) -> None:
    """One process. `die_after`: killed when it has written so many blocks. `slow`: seconds that rank 0's metrics and
    rank 1's features take, in a default group whose collectives end after a fifth of that. `refused`: a folder for
    images that rank 0 refuses afterwards. `asked`: the rank that gets SIGUSR1 when it has written a block; a batch then
    takes `batch_seconds`."""
    settings = json.loads(text)
    torch.set_num_threads(1)
    world = find_world("cpu")
    die_after, slow, refused = (settings.pop(name, None) for name in ("die_after", "slow", "refused"))
    if settings.pop("network", False):
        settings["denoiser"] = small_denoiser()
    if "save_images" in settings:
        settings["save_images"] = Path(settings["save_images"])
    asked, batch_seconds = settings.pop("asked", None), settings.pop("batch_seconds", 0)
    number = signal.SIGUSR1 if asked == world.rank else signal.SIGKILL
    if asked is not None:
        preemption.listen()
        die_after = 1 if asked == world.rank else None
    if die_after is not None:
        write, written = Shards.write, []

        def fatal(self, b, *rest):
            write(self, b, *rest)
            written.append(b)
            if len(written) == die_after:
                os.kill(os.getpid(), number)

        Shards.write = fatal
    suite = settings["suite"] = ToySuite()
    if batch_seconds:
        extract = suite.extract
        suite.extract = lambda images: (time.sleep(batch_seconds), extract(images))[1]
    with process_group(world):
        if slow:
            dist.barrier()
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=slow / 5))
            method = "compute" if world.main else "extract"
            original = getattr(suite, method)
            setattr(suite, method, lambda *args: (time.sleep(slow), original(*args))[1])
        report, _ = run(Path(folder), world, **settings)
        if refused:
            run(Path(folder), world, **settings, save_images=Path(refused))
    print(json.dumps(report["metrics"]))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:  # as main_jit.py: no destructor of the group, which others are still in
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
