"""Logging of a run: a file of JSON lines and the terminal; Weights & Biases unless disabled, TensorBoard if asked for.

Only rank 0 writes; on the other ranks every call does nothing.
"""

import json
import secrets
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from util.dist.context import DistContext
from util.errors import UserError, printable
from util.io import replacing

LOG_NAME = "log.jsonl"
WANDB_ID_NAME = "wandb_id.txt"
TENSORBOARD_NAME = "tensorboard"
MIN_SECONDS, MAX_SECONDS = 5.0, 60.0  # between two progress lines where there is no terminal


def wandb_settings(config: Any, name: str) -> dict[str, Any]:
    """Return the keyword arguments of wandb.init; `name` is the run's where the flags give none."""
    return {
        "project": config.wandb_project,
        "entity": config.wandb_entity,
        "name": config.wandb_run_name or name,
        "mode": config.wandb_mode,
        "config": config.as_dict(),
    }


def progress(items: Iterable, ctx: DistContext, total: int, desc: str, unit: str) -> Iterable:
    """Wrap `items` in a progress bar on rank 0 of a terminal; return them unchanged elsewhere."""
    show = ctx.is_main and sys.stderr.isatty()
    return tqdm(items, total=total, desc=desc, unit=unit, dynamic_ncols=True, leave=False) if show else items


def warn(messages: Iterable[str], ctx: DistContext) -> None:
    if ctx.is_main:
        for message in messages:
            print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, none without one; a line that is cut off or damaged is left out."""
    path, lines = run / LOG_NAME, []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


class RunLog:
    """The log of one run. A log that exists in the folder is continued, and so is its Weights & Biases run.

    Args:
        folder: the run's output folder.
        wandb: keyword arguments of wandb.init (project, entity, name, mode, config); mode "disabled" turns it off.
        resumed_step: training resumes at this step; lines and points about later steps go, since they are repeated.
        tensorboard: whether to write for TensorBoard too, into its own folder within this one.

    Raises:
        UserError: Weights & Biases was requested and does not start.
    """

    def __init__(
        self,
        folder: Path,
        ctx: DistContext,
        wandb: Mapping[str, Any],
        resumed_step: int | None = None,
        tensorboard: bool = False,
    ):
        self.is_main, self.file, self.wandb_run, self.upload = ctx.is_main, None, None, None
        self.tensorboard = None
        self.path = folder / LOG_NAME
        if not self.is_main:
            return
        if resumed_step is not None and self.path.exists():
            _truncate(self.path, resumed_step)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed in close)
        if tensorboard:
            self.tensorboard = _open_tensorboard(folder / TENSORBOARD_NAME, resumed_step)
        if wandb["mode"] != "disabled":
            self._start_wandb(folder, wandb)

    def _start_wandb(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / WANDB_ID_NAME
        known = id_file.read_bytes().decode(errors="replace").strip() if id_file.exists() else ""
        run_id = known if known.isalnum() else secrets.token_hex(4)  # a damaged file is replaced
        quiet = wandb.Settings(console="off", silent=True)
        try:
            self.wandb_run = wandb.init(**settings, dir=str(folder), id=run_id, resume="allow", settings=quiet)
            self.wandb_run.define_metric("*", step_metric="step")
        except Exception as error:  # wandb raises many types; each of them means that there is no logging
            raise UserError(f"Weights & Biases did not start ({error}). ENABLE_WANDB=0 runs without it.") from error
        if run_id != known:
            with replacing(id_file) as file:
                file.write(f"{run_id}\n".encode())
        if settings["mode"] == "offline":
            self.upload = (
                f"upload to Weights & Biases: wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*-{run_id}"
            )

    def log(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one JSON line; its numbers also go to Weights & Biases and TensorBoard as `event/name`.

        In TensorBoard they stand at the number of finished steps, by which a resumed run cuts it off, and "start" is
        left out: each restart has one.
        """
        if not self.is_main:
            return
        numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        try:
            self.file.write(json.dumps({"time": round(time.time(), 3), "event": event, "step": step, **values}) + "\n")
            if self.tensorboard is not None and event != "start":
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(name, value, finished_steps(event, step))
                self.tensorboard.flush()  # a run that is killed has lost none
        except OSError as error:
            raise UserError(f"The log {self.path} cannot be written: {error}.") from error
        if self.wandb_run is not None:
            self.wandb_run.log({**numbers, "step": step})

    def image(self, name: str, step: int, path: Path) -> None:
        """Send a picture to Weights & Biases and TensorBoard, where they are on."""
        if self.tensorboard is not None:
            self.tensorboard.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")
            self.tensorboard.flush()
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({name: wandb.Image(str(path)), "step": step})

    def info(self, text: str) -> None:
        """Print a line above the progress bar, if there is one."""
        if self.is_main:
            tqdm.write(printable(text), file=sys.stdout)
            sys.stdout.flush()

    def close(self, exit_code: int = 0) -> None:
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=exit_code)
        if self.upload:  # all parts of a run that was resumed
            self.info(self.upload)
        for file in (self.file, self.tensorboard):
            if file is not None:
                with suppress(OSError):  # of a full disk, which `log` has reported
                    file.close()


def finished_steps(event: str, step: int) -> int:
    """Return the number of finished steps of a line: "train" has that of its last step, counted from 0."""
    return step + (event == "train")


def _truncate(path: Path, step: int) -> None:
    """Remove the lines about steps from `step` on, and a last line that was cut off."""
    kept = []
    for text in path.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text)
            repeated = line["event"] != "start" and finished_steps(line["event"], line["step"]) > step
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if not repeated and text.endswith(b"\n"):
            kept.append(text)
    with replacing(path) as file:
        file.write(b"".join(kept))


def _open_tensorboard(folder: Path, resumed_step: int | None) -> Any:
    """Return a SummaryWriter. Points after the step that is resumed are removed from the files.

    `purge_step` removes them from a TensorBoard that is running; its fast loader shows them until they are done again.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import SummaryWriter

    if resumed_step is None:
        return SummaryWriter(str(folder))
    for path in folder.glob("events.out.tfevents.*"):
        events = list(LegacyEventFileLoader(str(path)).Load())
        if any(event.step > resumed_step for event in events):
            with replacing(path) as file:
                writer = RecordWriter(file)
                for event in events:
                    if event.step <= resumed_step:
                        writer.write(event.SerializeToString())
    return SummaryWriter(str(folder), purge_step=resumed_step + 1)


class ImageProgress:
    """Progress over images: a bar in a terminal; elsewhere a line for each tenth, or at least once a minute.

    Args:
        done: images that existed before; they do not count towards images per second.
    """

    def __init__(self, desc: str, total: int, done: int, ctx: DistContext):
        self.desc, self.total, self.first, self.done, self.printed = desc, total, done, done, done
        self.start = self.printed_at = time.perf_counter()
        self.is_main = ctx.is_main
        show = self.is_main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=desc, unit="image", leave=False) if show else None

    def update(self, done: int) -> None:
        """Report that `done` images of the total exist now."""
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done = done
        now = time.perf_counter()
        waited = now - self.printed_at
        due = waited >= MAX_SECONDS or (waited >= MIN_SECONDS and done - self.printed >= self.total / 10)
        if self.is_main and self.bar is None and done < self.total and due:
            rate = max(done - self.first, 1) / (now - self.start)
            text = f"{self.desc}: {done}/{self.total} images ({100 * done / self.total:.0f}%), {rate:.3g} images/s"
            print(f"{text}, {duration((self.total - done) / rate)} left", file=sys.stderr, flush=True)
            self.printed, self.printed_at = done, now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Format a duration with two units at most: 40 s, 12 min, 2 h 5 min, 3 days 4 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    days = minutes // 1440
    return f"{days} day{'s' * (days > 1)} {minutes % 1440 // 60} h"
