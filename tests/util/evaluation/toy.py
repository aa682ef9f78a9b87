"""A denoiser and a metric that cost nothing, and an evaluation with them, also on several ranks.

The metric depends on every pixel of every image and on their order.
"""

import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed import TCPStore

from denoiser import Denoiser
from tests.conftest import ONE, TINY_MODEL, as_torchrun
from util.config import resolve
from util.dist import preemption
from util.dist.context import find_context, process_group
from util.evaluation import generate
from util.evaluation.evaluate import EvalTarget, evaluate_and_write

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


def transformer(**settings):
    """A transformer with random weights."""
    torch.manual_seed(0)
    return Denoiser(TINY_MODEL(input_size=16, num_classes=10), **{"pred_param": "v", **settings})


class Stop(Exception):
    pass


class ToySuite:
    """Stands in for MetricSuite: 12 block means of an image; the metric weights them by position.

    `stop_after`: it raises Stop once it has seen so many batches.
    """

    def __init__(self, names=("class_agreement",), stop_after=None):
        self.names, self.stop_after, self.batches = tuple(names), stop_after, 0
        self.streams, self.sha256, self.protocol = {"means": 12, "first": 1}, "0", None

    def extract(self, images):
        if self.batches == self.stop_after:
            raise Stop
        self.batches += 1
        x = torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1).float()
        return {"means": x, "first": images[:, 0, 0, :1].float()}

    def compute(self, features, labels):
        self.features, self.labels = features, labels
        weights = torch.arange(len(labels)).cos().double()
        value = float((features["means"].double().mean(1) * weights).mean() / 255)
        return {"class_agreement": value, "first": float(features["first"].mean())}, {}

    def describe(self):
        extractors = [{"extractor": "toy", "weights_sha256": self.sha256}]
        return {"metrics": list(self.names), "extractors": extractors, "references": {}}


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
    """The indices of the images that are generated, batch by batch."""

    def __init__(self, patch):
        self.batches, original = [], generate.sample_batch
        patch.setattr(generate, "sample_batch", lambda *args: self.batches.append(list(args[2])) or original(*args))

    @property
    def images(self) -> list[int]:
        return [i for batch in self.batches for i in batch]


def fork_ranks(ranks: int, folder: Path, main) -> list[tuple[int, str]]:
    """(exit code, output) of `main()`, which returns the code, on each rank, with the environment that torchrun sets.

    Forked: a new interpreter would import torch for seconds. A fork may inherit a lock that another thread of this
    process held, and hang before it says a word: if all ranks do, they are started once more.
    """
    done, hung = _fork_ranks(ranks, folder, main)
    return _fork_ranks(ranks, folder, main)[0] if hung == ranks and not any(said for _, said in done) else done


def _fork_ranks(ranks: int, folder: Path, main) -> tuple[list[tuple[int, str]], int]:
    """Return the same, and how many ranks did not end in time."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def rank_main(rank: int) -> None:
        sys.stdout = sys.stderr = open(folder / f"{rank}.txt", "w")  # noqa: SIM115
        as_torchrun(rank, ranks, store.port)
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # OpenMP threads would wait forever after a fork
        code = 1
        try:
            code = main()
        except Exception:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # as main_jit.py after an error: no destructor of the group, which others are still in

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=rank_main, args=(rank,)) for rank in range(ranks)]
    for process in started:
        process.start()
    deadline = time.monotonic() + 120
    hung = 0
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
        hung += process.is_alive()
        process.kill()
        process.join()
    return [(process.exitcode, (folder / f"{rank}.txt").read_text()) for rank, process in enumerate(started)], hung


def on_ranks(ranks: int, folder: Path, work) -> list[tuple[int, str]]:
    """(exit code, output) of `work(ctx)` on each rank of a process group."""

    def main() -> int:
        with preemption.listening(), process_group(ctx := find_context("cpu")):
            work(ctx)
        return 0

    return fork_ranks(ranks, folder, main)
