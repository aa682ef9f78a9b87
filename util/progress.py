"""How far a long job is: a bar where there is a terminal, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

from util.distributed import World

TENTH_AFTER, LINE_AFTER = 5.0, 60.0  # seconds: a line for each tenth, but not more often; one a minute in any case


class ImageProgress:
    """Images done out of `total`, with images per second and the time left. Only rank 0 shows anything, on stderr.

    Args:
        done: images that were there before; they do not count as speed.
    """

    def __init__(self, what: str, total: int, done: int, world: World):
        self.what, self.total, self.first, self.done = what, total, done, done
        self.start = self.said_at = time.perf_counter()
        self.said = done
        self.main, self.bar = world.main, None
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(desc=what, total=total, initial=done, unit="image", dynamic_ncols=True, leave=False)

    def update(self, done: int) -> None:
        """`done` images of all are there now."""
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done = done
        now = time.perf_counter()
        waited = now - self.said_at
        tenth = done - self.said >= self.total / 10 and waited >= TENTH_AFTER
        if self.main and self.bar is None and done < self.total and (tenth or waited >= LINE_AFTER):
            rate = max(done - self.first, 1) / (now - self.start)
            print(
                f"{self.what}: {done}/{self.total} images ({100 * done / self.total:.0f}%), {rate:.3g} images/s, "
                f"{_duration((self.total - done) / rate)} left",
                file=sys.stderr,
                flush=True,
            )
            self.said, self.said_at = done, now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
