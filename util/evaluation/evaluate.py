"""From a denoiser to a report: generate images, store their features batch by batch, compute the metrics of all.

    <folder>/<setting>-seed<s>-n<N>.json                          the report
    <folder>/<setting>-seed<s>-n<N>-<hash>.features/000128.npz    features of the batch whose first image is 128

Shapes: N images in all, B of a batch; images uint8 (B, 3, H, W); features float32 (N, F) of each stream.
"""

import os
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from denoiser import Denoiser
from util import io
from util.build import denoiser_settings
from util.dist.context import DistContext, any_rank, local_range, raise_on_all_ranks, run_on_rank0
from util.dist.preemption import Preempted, requested_on_any_rank
from util.errors import UserError
from util.evaluation.generate import generate, sampling_settings, setting_name
from util.evaluation.images import QUANTISATION, spread_labels, write_numbered
from util.evaluation.metrics import METRICS, MetricSuite, parse_metrics
from util.evaluation.plots import plot_spectra
from util.evaluation.protocols import PROTOCOLS, check_protocol, protocol_reference
from util.evaluation.weights import weights_settings
from util.log import ImageProgress


@dataclass(frozen=True)
class EvalTarget:
    """A denoiser to evaluate, with the weights `config.ema` of a checkpoint after `epoch`, counted from 0."""

    denoiser: Denoiser
    config: Any
    epoch: int
    checkpoint: Path
    at: str = ""  # names the step of a checkpoint within an epoch (Checkpoint.at)
    weights: str | None = None  # weights_hash of the checkpoint when it was read: training may replace the file


def build_suite(config: Any, ctx: DistContext, num_images: int, like: MetricSuite | None = None) -> MetricSuite:
    """Build the metrics; one rank of a node downloads weights. Raises UserError on all ranks if anything is lacking.

    The report names --protocol only if `num_images` is the protocol's; that of a sweep's few images does not. Networks
    are those of the suite `like`, if there is one.
    """
    names, weights = parse_metrics(config.metrics), weights_settings(config)
    if not names:
        raise UserError("--metrics names no metric. Name one, or train with --no-online_eval.")
    reference = raise_on_all_ranks(ctx, lambda: protocol_reference(config))
    files = dict.fromkeys(METRICS[name].extractor.file for name in names)
    raise_on_all_ranks(ctx, lambda: ctx.local_rank or [file.find(weights) for file in files if file])

    def build() -> MetricSuite:
        protocol = PROTOCOLS.get(config.protocol)
        named = config.protocol if protocol and protocol.num_images == num_images else None
        of = names, config.real_images, config.pixels, num_images, ctx.device
        suite = MetricSuite(*of, reference, weights, named, reference_of=protocol and protocol.metrics[0], like=like)
        if named:
            check_protocol(named, suite)
        return suite

    return raise_on_all_ranks(ctx, build)


@dataclass(frozen=True)
class FeatureCache:
    """Features of the images 0 .. N - 1, one file per batch. The folder's name identifies what decides them."""

    folder: Path
    num_images: int
    streams: Sequence[str]
    png_folder: Path | None = None  # for PNGs of the images

    def prepare(self) -> list[int]:
        """Create the folders, remove damaged files and return the missing images. Call it on one rank.

        Raises UserError if a folder cannot be written or has PNGs of another evaluation.
        """
        if self.png_folder and not self.folder.exists() and any(self.png_folder.glob("*.png")):
            raise UserError(f"--save_images {self.png_folder} has PNGs already. Name another folder.")
        io.make_folder(self.folder)
        if self.png_folder:
            io.make_folder(self.png_folder)
        missing = set(range(self.num_images))
        for path in self.folder.glob("*.npz"):
            try:
                missing -= set(self.read(path)["image_index"].tolist())
            except Exception as error:  # damaged bytes raise many types
                print(f"{path} is damaged ({error}); generating its images again", file=sys.stderr, flush=True)
                path.unlink()
        if done := self.num_images - len(missing):
            print(f"continuing: {done} of {self.num_images} images have features", file=sys.stderr, flush=True)
        return sorted(missing)

    def write(self, index: Sequence[int], features: Mapping[str, Tensor], images: Tensor) -> None:
        """Store features {stream: (B, F)} of images uint8 (B, 3, H, W), after their PNGs."""
        if not all(bool(features[stream].isfinite().all()) for stream in self.streams):
            raise UserError(f"Features of the images {index[0]} to {index[-1]} are non-finite; none was kept.")
        try:
            if self.png_folder:
                write_numbered(images, index, self.png_folder)
            with io.replacing(self.folder / f"{index[0]:06d}.npz") as file:
                np.savez(file, image_index=np.asarray(index), **{s: features[s].numpy() for s in self.streams})
        except OSError as error:
            raise UserError(f"Features cannot be written: {error}. All ranks need the same output folder.") from error

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """Return the features {stream: (B, F)} in a file and their "image_index" (B,)."""
        io.check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("image_index", *self.streams)}

    def read_all(self) -> dict[str, Tensor]:
        """Return {stream: (N, F)}; row i is of image i. Waits for files that a network file system shows late."""
        deadline = time.monotonic() + io.SHARED_FILE_SECONDS
        while True:
            files = [self.read(path) for path in self.folder.glob("*.npz")]
            index = np.concatenate([file["image_index"] for file in files])
            images, rows = np.unique(index, return_index=True)  # two evaluations at once may both have made one
            if len(images) == self.num_images:
                break
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self.folder} has {len(images)} of {self.num_images} images. Start the evaluation again."
                )
            time.sleep(1)
        return {s: torch.from_numpy(np.concatenate([file[s] for file in files])[rows]) for s in self.streams}


def weights_hash(checkpoint: Path) -> str:
    """Return a hash that changes with any content of a checkpoint: of a zip file's names, sizes and CRC-32s."""
    path = checkpoint / "checkpoint.json" if checkpoint.is_dir() else checkpoint  # a sharded one lists its checksums
    if not zipfile.is_zipfile(path):
        return io.sha256_file(path)
    with zipfile.ZipFile(path) as archive:
        return io.json_hash(sorted([e.filename.partition("/")[2], e.file_size, e.CRC] for e in archive.infolist()), 64)


def identify(target: EvalTarget, suite: MetricSuite, device: torch.device) -> dict[str, Any]:
    """Return everything that decides the numbers of a report: of the images, their features and the metrics."""
    config = target.config
    described = suite.describe()
    return {
        "images": {
            "num_images": config.num_images,
            **sampling_settings(config),
            "ema": config.ema,
            "epoch": target.epoch,
            "weights": target.weights or weights_hash(target.checkpoint),
            "denoiser": denoiser_settings(config),
            "precision": str(target.denoiser.autocast_dtype or torch.float32).removeprefix("torch."),
            "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
            "device": device.type,
            "torch": torch.__version__,
        },
        "features": {"streams": dict(suite.streams), "extractors": described["extractors"]},
        "metrics": sorted(described["metrics"]),
        "references": {name: reference["sha256"] for name, reference in described["references"].items()},
        **({"protocol": suite.protocol} if suite.protocol else {}),
    }


def report_name(config: Any, epoch: int, at: str = "") -> str:
    return f"{setting_name(config, epoch)}{at}-seed{config.seed}-n{config.num_images}"


def report_exists(folder: Path, config: Any, epoch: int) -> bool:
    """Whether the evaluation during training after `epoch` has a report in `folder`."""
    return (folder / f"{report_name(config, epoch)}.json").is_file()


def find_report(folder: Path, target: EvalTarget, identity: Mapping[str, Any]) -> tuple[dict[str, Any] | None, Path]:
    """Return a finished report and its path, or None and the path for it. Reports of one name differ in their hash."""
    name = report_name(target.config, target.epoch, target.at)
    config_hash = io.json_hash(identity)
    plain, hashed = folder / f"{name}.json", folder / f"{name}-{config_hash}.json"
    for path in (plain, hashed):
        report = io.read_json(path)
        if isinstance(report, dict) and report.get("config_hash") == config_hash:
            return report, path
    return None, hashed if plain.exists() else plain


def evaluate_and_write(
    target: EvalTarget, suite: MetricSuite, folder: Path, ctx: DistContext, extra: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Path]:
    """Generate config.num_images, equally many of each class, and write a report, to which `extra` is added.

    Image i has label i // (num_images / class_num). Features stay until the report is written, or for good with
    config.keep_features; config.save_images names a folder for PNGs. Returns (report, its path) on all ranks.

    Raises:
        UserError: non-finite images or features, files that cannot be written or read, undefined metrics.
        Preempted: on all ranks, if one was asked to stop before all features existed.
    """
    config = target.config
    labels = spread_labels(config.num_images, config.class_num)
    identity = run_on_rank0(ctx, lambda: identify(target, suite, ctx.device))
    features_hash = io.json_hash([identity["images"], identity["features"], config.save_images])
    name = f"{report_name(config, target.epoch, target.at)}-{features_hash}.features"
    pngs = Path(config.save_images) if config.save_images else None
    cache = FeatureCache(folder / name, config.num_images, tuple(suite.streams), pngs)
    missing = run_on_rank0(ctx, cache.prepare)
    start = time.perf_counter()
    seconds = _compute_features(target, suite, cache, missing, labels, ctx)
    if any_rank(ctx, requested_on_any_rank(ctx) is not None):
        raise Preempted(f"Stopped; the features so far are in {cache.folder}, and the same command continues.")
    elapsed = time.perf_counter() - start

    def finish() -> tuple[dict[str, Any], Path]:
        start = time.perf_counter()
        with threadpool_limits(len(os.sched_getaffinity(0))):  # torchrun gives a rank one thread, and the others wait
            metrics, details = suite.compute(cache.read_all(), torch.tensor(labels))
        seconds["metrics"] = time.perf_counter() - start
        report = {
            "metrics": metrics,
            **({"details": details} if details else {}),
            **identity["images"],
            "checkpoint": str(target.checkpoint),
            "measured_with": suite.describe(),
            "quantisation": QUANTISATION,
            "config_hash": io.json_hash(identity),
            "seconds": {part: round(value, 3) for part, value in seconds.items()},
            "images_made": len(missing),  # fewer than num_images if an evaluation was continued
            "images_per_s": round(len(missing) / elapsed, 3) if missing else None,
            "ranks": ctx.world_size,
            "batch_size": config.gen_bsz,
            **(extra or {}),
            **io.provenance(ctx.device),
        }
        path = find_report(folder, target, identity)[1]
        try:
            io.write_json(path, report)
            if "spectrum_gap" in metrics:
                plot_spectra(details["grey_spectrum_real"], details["grey_spectrum"], path.with_suffix(".png"))
        except OSError as error:
            raise UserError(f"The report {path} cannot be written: {error}.") from error
        if not config.keep_features:
            shutil.rmtree(cache.folder, ignore_errors=True)
        return report, path

    return run_on_rank0(ctx, finish)


def _compute_features(
    target: EvalTarget, suite: MetricSuite, cache: FeatureCache, missing: list[int], labels: list[int], ctx: DistContext
) -> dict[str, float]:
    """Store the features of this rank's part of the missing images; return the seconds that it took, by task."""
    index = [missing[i] for i in local_range(len(missing), ctx)]
    found = len(labels) - len(missing)
    done, features_seconds = 0, 0.0
    start = time.perf_counter()
    progress = ImageProgress("evaluating", len(labels), found, ctx)
    with closing(progress), closing(generate(target.denoiser, target.config, index, labels, ctx)) as batches:
        for batch, images in batches:
            sampled = time.perf_counter()
            cache.write(batch, suite.extract(images), images)
            features_seconds += time.perf_counter() - sampled
            done += len(batch)
            progress.update(found + len(missing) * done // len(index))
    return {"sampling": time.perf_counter() - start - features_seconds, "features": features_seconds}


def loggable(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a report for a log, without nesting."""
    numbers = {name: report[name] for name in ("epoch", "num_images", "cfg", "seed", "images_per_s", "ranks")}
    return {**report["metrics"], **numbers, **{f"seconds_{part}": s for part, s in report["seconds"].items()}}


def metric_line(report: Mapping[str, Any]) -> str:
    """Return the numbers with what they can be compared with: as many images, and the protocol; and what is missing."""
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in report["metrics"].items())
    protocol = report["measured_with"].get("protocol")
    missing = ", ".join(report["measured_with"].get("not_computed", ()))
    missing = f"; the report says why there is no {missing}" if missing else ""
    return f"{numbers}  ({report['num_images']} images{f', {protocol}' if protocol else ''}{missing})"
