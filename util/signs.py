"""What each process of a job publishes for the watch, and who is missing by what all have published."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """What a process publishes.

    Attributes:
        beat: its number.
        arrivals: at how many places the main thread has arrived; all processes arrive at the same ones.
        place: the last one, as in "step 117".
        clock: time.time() there; it only says for how long a process has been silent.
        over: the process works no more: it has finished, or it is ending.
    """

    host: str
    beat: int
    arrivals: int
    place: str
    clock: float
    over: bool


def describe(signs: dict[int, Sign], silent: set[int], now: float) -> tuple[str, list[int]]:
    """Who is missing, in a sentence, and the ranks that are to print where they are.

    Those are alive and behind the others; or all, where none is behind: one of them may be elsewhere than the rest.

    Args:
        signs: the last ones, of the processes that have ever given one.
        silent: ranks that give none any more.
    """
    ahead = max(signs.values(), key=lambda sign: sign.arrivals)
    others = f"the others wait at {ahead.place}"
    parts = []
    if never := sorted(silent - set(signs)):
        parts.append(f"{_processes(never)} has never answered")
    for (host, place), ranks in _groups(signs, silent & set(signs)).items():
        seconds = max(now - signs[rank].clock for rank in ranks)
        parts.append(f"{_processes(ranks)} on {host} has not answered for {seconds:.0f} s, last heard of at {place}")
    if parts:
        return "; ".join([*parts, others]), []
    working = {rank: sign for rank, sign in signs.items() if not sign.over} or signs
    last = min(sign.arrivals for sign in working.values())
    if last == ahead.arrivals:
        return (
            f"all {len(signs)} processes answer and are at {ahead.place}: the connection between some of them hangs or "
            "was lost, or an operation there takes longer than --dist_timeout"
        ), sorted(working)
    behind = [rank for rank, sign in working.items() if sign.arrivals == last]
    for (host, place), ranks in _groups(signs, behind).items():
        parts.append(f"{_processes(ranks)} on {host} is alive but still at {place}")
    return "; ".join(parts) + f", where {others} (a hanging disk or data loader?)", behind


def _groups(signs: dict[int, Sign], ranks: Iterable[int]) -> dict[tuple[str, str], list[int]]:
    """Ranks by host and place."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank in sorted(ranks):
        groups.setdefault((signs[rank].host, signs[rank].place), []).append(rank)
    return groups


def _processes(ranks: list[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"each of the processes {', '.join(map(str, ranks))}"
