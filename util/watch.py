"""Each process says that it is alive and how far it has come, so that a job in which one is missing ends and names it.

A thread of each process publishes at every beat in the job's TCPStore, over a connection of its own; the main thread
only counts the places at which it arrives. A second thread judges, without any input or output, and ends the job when
for longer than the timeout

    this process has arrived nowhere new: it hangs, or it waits for another one (not in `paused`, nor before it has
        arrived anywhere at all);
    the next process in the ring has published nothing: also where waiting is allowed to last;
    the store has not answered: the node of process 0 is gone.

Then all that the processes have published is read, and those that are silent, or alive and behind, are named. What one
process finds, or the error by which it ends, is left in the store: the others say the same, and end at their next beat.

Time in which this process did not run itself, since the whole job was suspended, does not count.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from util.signs import Sign, describe

LONGEST_BEAT = 5.0  # seconds between two signs of life
WINDOW = 3  # beats in which a process that is alive has published again
ANSWER = 10.0  # seconds that the store has for its answers, beyond the window
CONNECTION = 60.0  # seconds that it has for a connection at least: looking up the name of a host may take several
FINDING = "finding"  # the store's key for what was found first
T = TypeVar("T")


class _Clock:
    """Seconds for which a value has stayed as it is."""

    def __init__(self) -> None:
        self.value, self.seconds = None, 0.0

    def tick(self, value: object, elapsed: float) -> float:
        self.seconds = self.seconds + elapsed if value == self.value else 0.0
        self.value = value
        return self.seconds


def beat_of(timeout: float) -> float:
    return min(timeout / 10, LONGEST_BEAT)


def margin(timeout: float) -> float:
    """Seconds by which a collective's own timeout must exceed the watch's, which then speaks first."""
    return (WINDOW + 3) * beat_of(timeout) + ANSWER


class Watch:
    """The watch of one process over all.

    Args:
        store: a connection that nothing else uses, to a part of the store that no earlier start has used.
        timeout: seconds.
        end: called in a thread with the sentence that was found and the text that this process is to print (nothing
            where others have said all of it); it ends the process, with an exit code that is not 0.
        first_node: host of process 0, where the store is.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: float,
        end: Callable[[str, str], None],
        first_node: str = "localhost",
    ):
        self._store, self._rank, self._size, self._timeout, self._end = store, rank, size, timeout, end
        self._first_node = first_node
        self._beat, self._host = beat_of(timeout), socket.gethostname()
        self._arrived, self._pauses = (0, "the start"), 0
        self._over = threading.Event()
        self._beats = 0
        self._neighbour: Sign | None = None
        self._found = False  # by another process
        self._clocks = {name: _Clock() for name in ("place", "neighbour", "store")}
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._live, self._judge)]
        for thread in self._threads:
            thread.start()

    def arrived(self, place: str) -> None:
        self._arrived = (self._arrived[0] + 1, place)

    @contextmanager
    def paused(self, place: str) -> Iterator[None]:
        self.arrived(place)
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(ANSWER)  # one that still runs while the interpreter ends would abort it
        self._within(ANSWER, self._publish)

    def explain(self, error: BaseException) -> str | None:
        self._over.set()
        if lost_another(error):
            return self._settled(self._seen())[0]
        if not getattr(error, "everywhere", False):
            reason = str(error).strip().partition("\n")[0]
            who = f"process {self._rank} on {self._host} ended at {self._arrived[1]}"
            self._settled((f"{who}: {type(error).__name__}: {reason}", []))
        return None

    # ------------------------------------------------------------------------------------------------- the threads

    def _live(self) -> None:
        """Publish, and look at the next process in the ring; ends when the store is gone, which its clock will say."""
        neighbour = (self._rank + 1) % self._size
        try:
            self._publish()
            while not self._over.wait(self._beat):
                self._publish()
                self._neighbour = self._read([neighbour]).get(neighbour)
                self._found = self._store.check([FINDING])
        except dist.DistError:
            return

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._beat):
            now = time.monotonic()
            late = self._late(min(now - last, 2 * self._beat))
            last = now
            if late:
                seen = self._seen()
                if self._late(0) and not self._over.is_set():
                    self._alarm(*self._settled(seen))
                    return

    def _alarm(self, sentence: str, finder: int, show: list[int]) -> None:
        aloud = [f"error: {sentence}\n"] if finder == self._rank else []
        if self._rank in show:
            stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
            aloud += [f"where process {self._rank} is:\n", *stack]
        self._end(sentence, "".join(aloud))

    def _late(self, elapsed: float) -> bool:
        allowed = self._pauses > 0 or self._arrived[0] == 0
        values = {
            "place": object() if allowed else self._arrived,
            "neighbour": object() if self._neighbour and self._neighbour.over else self._neighbour,
            "store": self._beats,
        }
        return (
            self._found
            or max(clock.tick(values[name], elapsed) for name, clock in self._clocks.items()) > self._timeout
        )

    # --------------------------------------------------------------------------------------------------- the store

    def _publish(self) -> None:
        sign = Sign(self._host, self._beats + 1, *self._arrived, time.time(), self._over.is_set())
        self._store.set(str(self._rank), json.dumps(asdict(sign)))
        self._beats += 1

    def _read(self, ranks: Iterable[int]) -> dict[int, Sign]:
        """The last signs of those that have ever given one."""
        keys = [str(rank) for rank in ranks]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        values = self._store.multi_get(keys) if keys else []
        return {int(key): Sign(**json.loads(value)) for key, value in zip(keys, values, strict=True)}

    def _seen(self) -> tuple[str, list[int]] | None:
        return self._within(WINDOW * self._beat + ANSWER, self._look)

    def _look(self) -> tuple[str, list[int]]:
        """A sentence that says who is missing, and the ranks that are to print where they are."""
        self._publish()
        if self._store.check([FINDING]):
            return "", []
        everyone, end = range(self._size), time.monotonic() + WINDOW * self._beat
        before = self._read(everyone)
        silent = set(everyone)
        while silent and time.monotonic() < end:
            time.sleep(self._beat / 4)
            signs = self._read(everyone)
            silent = {r for r in everyone if r not in signs or (signs[r] == before.get(r) and not signs[r].over)}
        return describe(signs, silent, time.time())

    def _settled(self, seen: tuple[str, list[int]] | None) -> tuple[str, int, list[int]]:
        """What holds for all: what was seen here, if no process was earlier. With the rank that has found it."""
        found = seen and self._within(
            ANSWER, lambda: self._store.compare_set(FINDING, "", json.dumps((seen[0], self._rank, seen[1])))
        )
        gone = f"the node of process 0, {self._first_node}, or torchrun on it does not answer"
        return json.loads(found) if found else (gone, self._rank, [])

    def _within(self, seconds: float, function: Callable[[], T]) -> T | None:
        """What `function` returns, None where the store is gone or does not answer in time."""
        found: list[T] = []

        def call() -> None:
            try:
                found.append(function())
            except dist.DistError:
                return

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(seconds)
        return found[0] if found else None


def lost_another(error: BaseException) -> bool:
    """Whether the error says no more than that a collective could not be finished."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


# ------------------------------------------------------------------------------------------- the watch of this process

_watch: Watch | None = None


def start(rank: int, size: int, timeout: float, end: Callable[[str, str], None]) -> None:
    """Watch from now on, through the store that torchrun or process 0 holds. See Watch for the arguments."""
    global _watch
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(timeout, CONNECTION)))
    start_number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _watch = Watch(dist.PrefixStore(f"watch/{start_number}", store), rank, size, timeout, end, host)


def stop() -> None:
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None


def arrived(place: str) -> None:
    """The main thread is at a place at which all processes arrive, each as often as the others, as in "step 117"."""
    if _watch is not None:
        _watch.arrived(place)


@contextmanager
def paused(place: str) -> Iterator[None]:
    """A place where the processes may stay for as long as they like, and then wait for each other.

    A process that is silent there for longer than the timeout ends the job all the same.
    """
    with _watch.paused(place) if _watch is not None else nullcontext():
        yield


def explain(error: BaseException) -> str | None:
    """Tell the others that this process ends by `error`; where that says only that another one is lost: which one.

    Takes some seconds then, while the others may still give a sign. None where nothing can be added.
    """
    return _watch.explain(error) if _watch is not None else None
