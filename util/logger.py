"""Where a run's numbers go: always to a file of JSON lines, to Weights & Biases where that is on, and to the terminal.

Only rank 0 writes; on the other ranks every call does nothing.
"""

import json
import os
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from util.distributed import World
from util.errors import UserError

LOG_NAME = "log.jsonl"
WANDB_ID_NAME = "wandb_id.txt"


def wandb_settings(args: Namespace, name: str) -> dict[str, Any]:
    """Keyword arguments of wandb.init from the flags; `name` is the run's where none was given."""
    return {
        "project": args.wandb_project,
        "entity": args.wandb_entity,
        "name": args.wandb_run_name or name,
        "mode": args.wandb_mode,
        "config": vars(args),
    }


def progress(items: Iterable, world: World, total: int, what: str, unit: str):
    """tqdm's bar over `items` where there is a terminal, the bare items elsewhere."""
    show = world.main and sys.stderr.isatty()
    return tqdm(items, total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False) if show else items


def _cut(path: Path, step: int) -> None:
    """Take out what is written about steps from `step` on (counted from 0), and a line that was not written to its end.

    A line about training is of the step it ends with, any other of the number of steps before it.
    """
    kept = []
    for text in path.read_text().splitlines(keepends=True):
        try:
            line = json.loads(text)
            redone = line["event"] != "start" and line["step"] + (line["event"] == "train") > step
        except (ValueError, KeyError, TypeError):
            continue
        if not redone and text.endswith("\n"):
            kept.append(text)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(kept))
    os.replace(aside, path)


class RunLog:
    """Log of one run.

    Args:
        folder: of the run; a log in it is continued, and so is its run at Weights & Biases.
        wandb: keyword arguments of wandb.init (project, entity, name, mode, config); mode "disabled" is off.
        redone_from: training goes on at this step: lines about later ones, which will be written again, are taken out.

    Raises:
        UserError: Weights & Biases was asked for and cannot start.
    """

    def __init__(self, folder: Path, world: World, wandb: Mapping[str, Any], redone_from: int | None = None):
        self.main, self.file, self.wandb_run = world.main, None, None
        if not self.main:
            return
        self.path = folder / LOG_NAME
        if redone_from is not None and self.path.exists():
            _cut(self.path, redone_from)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (closed in close)
        if wandb["mode"] != "disabled":
            self._start_wandb(folder, wandb)

    def _start_wandb(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        remembered = folder / WANDB_ID_NAME
        run_id = remembered.read_text().strip() if remembered.exists() else secrets.token_hex(4)
        try:
            self.wandb_run = wandb.init(
                **settings,
                dir=str(folder),
                id=run_id,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
            self.wandb_run.define_metric("*", step_metric="step")
        except Exception as error:  # of many kinds, and all mean the same to the user
            raise UserError(f"Weights & Biases did not start ({error}); ENABLE_WANDB=0 does without it") from error
        remembered.write_text(run_id + "\n")

    def record(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers also go to Weights & Biases as `event/name`."""
        if not self.main:
            return
        line = {"time": round(time.time(), 3), "event": event, "step": step, **values}
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"the log {self.path} cannot be written: {error}") from error
        if self.wandb_run is not None:
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
            self.wandb_run.log({**numbers, "step": step})

    def image(self, name: str, step: int, path: Path) -> None:
        if self.wandb_run is not None:
            import wandb

            self.wandb_run.log({name: wandb.Image(str(path)), "step": step})

    def say(self, text: str) -> None:
        """A line for people, above a progress bar if there is one."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self, exit_code: int = 0) -> None:
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=exit_code)
        if self.file is not None:
            self.file.close()
