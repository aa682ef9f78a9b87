"""A run holds its folder: a second one that would write there is refused."""

import fcntl
import json
import os
import platform
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

from util.errors import UserError
from util.io import read_json

NAME = "run.lock"
PATIENCE = 20.0  # seconds: what a killed run leaves behind, its workers, ends within 10


class RunLock:
    """Holds a folder inside the block, by an flock on <folder>/run.lock.

    The kernel frees the lock when this process ends, however it ends; on NFS other nodes see it as well.

    Raises:
        UserError: another process holds the folder, or it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / NAME

    def __enter__(self) -> Self:
        deadline, waited = time.monotonic() + PATIENCE, False
        try:
            while not self._try():
                self._file.close()
                if not waited:
                    print(f"{self.folder} is in use; waiting for up to {PATIENCE:.0f} s", file=sys.stderr, flush=True)
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.folder} is in use by {self._holder()}. Wait for it, stop it, or name another "
                        "--output_dir."
                    )
                waited = True
                time.sleep(0.2)
        except OSError as error:
            raise UserError(f"The output folder {self.folder} cannot be written: {error}.") from error
        return self

    def _try(self) -> bool:
        """Lock the file. Return False while another process holds it, or if that one has just removed it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+")  # noqa: SIM115 (open inside the block)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # such as Lustre mounted without flock
            print(f"warning: {self.path} cannot be locked ({error}): do not start a second run", file=sys.stderr)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                since = datetime.now().isoformat(" ", "seconds")
                self._file.truncate(0)
                self._file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}) + "\n")
                self._file.flush()
                return True
        return False

    def _holder(self) -> str:
        holder = read_json(self.path)
        if not isinstance(holder, dict):
            return "another process"
        return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.folder.rmdir()  # if nothing was written
        self._file.close()
