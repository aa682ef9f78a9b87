"""From a denoiser to a report: images, their features in shards, the metrics of all of them.

Shapes: N images in all, B in a batch; images uint8 (B, 3, H, W); features (N, F) of each stream.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from denoiser import Denoiser
from util import provenance
from util.build import DenoiserConfig
from util.distributed import World, any_of, from_main, requested_of_any
from util.errors import UserError
from util.generation import Sampling, batches_of_noise, make_images, sampling_mode, setting_name, split
from util.images import QUANTISATION
from util.metrics import MetricSuite
from util.preemption import Preempted
from util.progress import ImageProgress
from util.shards import Shards, digest, weights_identity

IMAGES_VERSION = 2  # raise it where a change of the code changes images: features of both are then never mixed


@contextmanager
def all_cores() -> Iterator[None]:
    """Rank 0 computes the metrics while the others wait: with every core, not with torchrun's one thread a process."""
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        with threadpool_limits(cores):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a denoiser that holds the weights `ema` of the checkpoint file of an epoch."""

    denoiser: Denoiser
    shape: DenoiserConfig
    ema: str
    epoch: int
    checkpoint: Path
    at: str = ""  # in the middle of an epoch: at which step (Checkpoint.at)


def evaluate(
    denoiser: Denoiser,
    sampling: Sampling,
    num_images: int,
    image_shape: tuple[int, int, int],
    class_num: int,
    suite: MetricSuite,
    world: World,
    shards: Shards | None = None,
) -> dict[str, Any]:
    """Generate `num_images`, equally many of each class, and measure them. Image i has label i // (images per class).

    Only the blocks that `shards` lacks are made; the processes share them. The shards stay. Without `shards` they are
    in a temporary folder, for the processes of one machine.

    Returns:
        The metrics, settings and times of rank 0, on all processes.
    Raises:
        UserError: images that are not finite; features that cannot be written or read; metrics that are not defined.
        Preempted: on all processes, where any was asked to stop before all features were there.
    """
    if shards is None:
        folder = Path(from_main(world, lambda: tempfile.mkdtemp(prefix="features-")))
        shards = Shards(folder, {"images": None}, num_images, suite.streams)
        try:
            return evaluate(denoiser, sampling, num_images, image_shape, class_num, suite, world, shards)
        finally:
            if world.main:
                shards.remove()
    times = dict.fromkeys(("sampling", "features", "gathering", "metrics"), 0.0)
    labels = [i // (num_images // class_num) for i in range(num_images)]
    missing, notes = from_main(world, shards.prepare)
    if world.main:
        for note in notes:
            print(note, file=sys.stderr, flush=True)
    shards.seen()
    start = time.perf_counter()
    _make_blocks(denoiser, sampling, labels, image_shape, class_num, suite, world, shards, missing, times)
    made = time.perf_counter()
    if any_of(world, requested_of_any(world) is not None):
        raise Preempted(f"stopped; the features so far are in {shards.folder}, and the same command goes on")
    waited = time.perf_counter()
    images_made = sum(len(shards.block(b)) for b in missing)

    def finish() -> dict[str, Any]:
        features = shards.read_all()
        read = time.perf_counter()
        with all_cores():
            metrics = suite.compute(features, torch.tensor(labels))
        times["gathering"] += read - made
        times["metrics"] = time.perf_counter() - read
        details = getattr(suite, "details", None)
        return {
            "metrics": metrics,
            **({"details": details} if details else {}),
            "num_images": num_images,
            **sampling.describe(),
            "measured_with": suite.describe(),
            "seconds": {name: round(seconds, 3) for name, seconds in times.items()},
            "images_made": images_made,  # fewer than num_images where an interrupted evaluation went on
            "images_per_s": round(images_made / (waited - start), 3) if images_made else None,
        }

    return from_main(world, finish)


def _make_blocks(
    denoiser: Denoiser,
    sampling: Sampling,
    labels: list[int],
    image_shape: tuple[int, int, int],
    null_class: int,
    suite: MetricSuite,
    world: World,
    shards: Shards,
    missing: list[int],
    times: dict[str, float],
) -> None:
    """This process's part of the `missing` blocks, every world.size-th. Batches go on from one block into the next.

    Between two batches it ends early where a process was asked to stop.
    """
    blocks = missing[world.rank :: world.size]
    index = [i for b in blocks for i in shards.block(b)]
    batches = split(index, sampling.batch_size)
    noise = batches_of_noise(batches, sampling, image_shape, world.device)
    left = sum(len(shards.block(b)) for b in missing)
    rows: dict[str, Tensor] = {stream: torch.empty(0, width) for stream, width in shards.streams.items()}
    pictures = torch.empty((0, *image_shape), dtype=torch.uint8)
    made = waiting = 0  # images; those whose block is not whole yet
    progress = ImageProgress("evaluating", len(labels), len(labels) - left, world)
    try:
        with sampling_mode(denoiser, sampling.cuda_graph), closing(noise):
            for batch in batches:
                if requested_of_any(world):
                    break
                before = time.perf_counter()
                images = make_images(denoiser, sampling, batch, labels, next(noise), null_class, world.device)
                sampled = time.perf_counter()
                features = suite.extract(images)
                extracted = time.perf_counter()
                rows = {stream: torch.cat([rows[stream], features[stream]]) for stream in rows}
                if shards.images is not None:
                    pictures = torch.cat([pictures, images.cpu()])
                waiting += len(batch)
                while blocks and (n := len(shards.block(blocks[0]))) <= waiting:
                    shards.write(blocks.pop(0), {stream: part[:n] for stream, part in rows.items()}, pictures[:n])
                    rows, pictures = {stream: part[n:] for stream, part in rows.items()}, pictures[n:]
                    waiting -= n
                times["sampling"] += sampled - before
                times["features"] += extracted - sampled
                times["gathering"] += time.perf_counter() - extracted
                made += len(batch)
                progress.update(len(labels) - left + left * made // len(index))
    finally:
        progress.close()


def fingerprint_of(
    subject: Subject, sampling: Sampling, num_images: int, suite: MetricSuite, device: torch.device
) -> dict[str, Any]:
    """All that decides the images, and all that decides their features."""
    described = suite.describe()
    return {
        "images": {
            "weights": weights_identity(subject.checkpoint),
            "epoch": subject.epoch,
            "ema": subject.ema,
            "denoiser": subject.shape.settings(),
            "precision": precision_of(subject.denoiser),
            "device": device.type,
            "version": IMAGES_VERSION,
            "torch": torch.__version__,
            "tf32": tf32(),
            "sampling": sampling.describe(),
            "num_images": num_images,
            "class_num": subject.shape.class_num,
        },
        "features": {"streams": dict(sorted(suite.streams.items())), "extractors": described["extractors"]},
    }


def precision_of(denoiser: Denoiser) -> str:
    return str(denoiser.autocast_dtype or torch.float32).removeprefix("torch.")


def tf32() -> dict[str, bool]:
    return {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}


def report_name(epoch: int, ema: str, sampling: Sampling, num_images: int, at: str = "") -> str:
    return f"{setting_name(epoch, ema, sampling)}{at}-seed{sampling.seed}-n{num_images}"


def decided_by_of(fingerprint: Mapping[str, Any], suite: MetricSuite) -> str:
    """A digest of all that decides the numbers of a report: images, features, metrics and the references' content."""
    described = suite.describe()
    references = {name: reference["sha256"] for name, reference in described.get("references", {}).items()}
    return digest({**fingerprint, "metrics": sorted(described.get("metrics", [])), "references": references})


def finished_report(folder: Path, name: str, decided_by: str) -> tuple[dict[str, Any], Path] | None:
    """(report, path) of an evaluation with this name that was decided by the same, if there is one."""
    for path in sorted(folder.glob(f"{name}*.json")):
        try:
            report = json.loads(path.read_text())
            if report.get("decided_by") == decided_by:
                return report, path
        except (OSError, ValueError, AttributeError):
            continue
    return None


def report_path(folder: Path, name: str, decided_by: str) -> Path:
    """Where a report goes: one of the same name with other metrics, reference or precision stays beside it."""
    path = folder / f"{name}.json"
    try:
        same = json.loads(path.read_text()).get("decided_by") == decided_by
    except FileNotFoundError:
        return path
    except (OSError, ValueError, AttributeError):
        same = False
    return path if same else folder / f"{name}-{decided_by}.json"


def evaluate_and_write(
    subject: Subject,
    sampling: Sampling,
    num_images: int,
    suite: MetricSuite,
    folder: Path,
    world: World,
    save_images: Path | None = None,
    keep_features: bool = False,
    about: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluate, and write the report into `folder`. The features are there until it is written, and then removed.

    Args:
        save_images: folder for PNGs of the images.
        keep_features: leave the features beside the report.
        about: put into the report as well.

    Returns:
        (report, its path), on all processes.
    """
    shape = subject.shape
    fingerprint = from_main(world, lambda: fingerprint_of(subject, sampling, num_images, suite, world.device))
    mark = digest(fingerprint)
    name = report_name(subject.epoch, subject.ema, sampling, num_images, subject.at)
    shards = Shards(folder / f"{name}-{mark}.features", fingerprint, num_images, suite.streams, save_images)
    report = evaluate(subject.denoiser, sampling, num_images, shape.image_shape, shape.class_num, suite, world, shards)
    described = report["measured_with"]
    decided_by = decided_by_of(fingerprint, suite)
    path = from_main(world, lambda: report_path(folder, name, decided_by))
    report |= {
        "ema": subject.ema,
        "epoch": subject.epoch,
        "checkpoint": str(subject.checkpoint),
        "weights": fingerprint["images"]["weights"],
        "fingerprint": mark,
        "decided_by": decided_by,
        "denoiser": shape.settings(),
        "reference": described.get("references", {}),
        "tf32": tf32(),
        "precision": precision_of(subject.denoiser),
        "quantisation": QUANTISATION,
        "processes": world.size,
        "batch_size": sampling.batch_size,
        **({"images": str(save_images)} if save_images else {}),
        **(about or {}),
    }

    def write() -> None:
        try:
            provenance.write_json(path, report)
        except OSError as error:
            raise UserError(f"the report {path} cannot be written: {error}") from error
        if not keep_features:
            shards.remove()
        try:
            suite.plot(path.with_suffix(".png"))
        except OSError as error:
            print(f"warning: {path.with_suffix('.png')} cannot be drawn: {error}", file=sys.stderr, flush=True)

    report |= provenance.provenance(world.device)
    from_main(world, write)
    return report, path


def loggable(report: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a report for a log, without nesting."""
    numbers = {name: report[name] for name in ("epoch", "num_images", "cfg", "seed", "images_per_s", "processes")}
    seconds = {f"seconds_{name}": value for name, value in report["seconds"].items()}
    return {**report["metrics"], **numbers, **seconds}


def metric_line(report: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in report["metrics"].items())
