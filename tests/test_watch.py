"""util/watch.py with three processes over gloo, one of which is killed, stopped, late or in error: the others say so.

Each story is told by processes of its own, all of them at the same time, since they do little but wait.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from tests.conftest import as_torchrun
from util import watch
from util.distributed import find_world, process_group, wait_for_all
from util.signs import Sign, describe

SIZE, TIMEOUT = 3, 10.0
LONG = 120  # seconds that a slow machine has for a story
BAD = 1  # the process to which things happen
LEFT_BEHIND = ("killed", "stopped", "stopped in a pause")  # stories in which that process says nothing
STORIES = (
    *LEFT_BEHIND,
    "late",
    "in error",
    "in error in a pause",
    "store stopped",
    "store killed",
    "slow",
    "suspended",
)
PROCESSES = multiprocessing.get_context("forkserver")


# --- what the processes do ------------------------------------------------------------------------------------------


def load(late: bool) -> None:
    if late:
        time.sleep(10 * LONG)


def step(number: int, late: bool = False) -> None:
    """The data of a step, the arrival, and what all processes do together."""
    load(late)
    watch.arrived(f"step {number}")
    dist.all_reduce(torch.ones(3))


def tell(story: str, bad: bool) -> None:
    world = find_world("cpu")
    if story == "slow":  # as in tasks that have no steps: longer than the timeout, and allowed
        time.sleep(1.4 * TIMEOUT * bad)
        wait_for_all(world)
    for number in range(5):
        step(number)
    if bad and story == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if bad and story == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if bad and "in error" in story:
        raise ValueError("no memory left\nand more")
    if story == "slow":
        time.sleep(0.4 * TIMEOUT * bad)
        step(5)
        with watch.paused("an evaluation"):
            time.sleep(1.4 * TIMEOUT * bad)
            wait_for_all(world)
    if story == "in error in a pause":
        with watch.paused("an evaluation"):
            time.sleep(10 * LONG)
    if story == "stopped in a pause":
        with watch.paused("an evaluation"):
            if bad:
                time.sleep(2)  # so that it is heard of there
                os.kill(os.getpid(), signal.SIGSTOP)
            wait_for_all(world)
    number = 5
    while story in ("suspended", "store stopped", "store killed") and not Path("enough").exists():
        time.sleep(0.05)
        step(number)
        number += 1
        dist.barrier()
    step(number, late=bad and story == "late")


def work(story: str, rank: int, port: int, folder: Path) -> None:
    """A process as main_jit.py is one, with its output in <folder>/<rank>."""
    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(os.open(str(rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    as_torchrun(rank, SIZE, port)
    try:
        with process_group(find_world("cpu"), TIMEOUT / 60):
            Path(f"{rank} is there").touch()
            tell(story, rank == BAD)
    except Exception as error:
        print(f"{type(error).__name__}: {error}\nexplained: {watch.explain(error)}", flush=True)
        os._exit(1)


def hold_store(pipe) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(10 * LONG)


# --- what is left of them -------------------------------------------------------------------------------------------


@dataclass
class End:
    """What became of the processes of a story, and after how many seconds those had ended that end by themselves."""

    codes: list[int | None]
    said: list[str]
    seconds: float


def play(story: str, folder: Path) -> End:
    started = []

    def start(function, *args):
        started.append(PROCESSES.Process(target=function, args=args, daemon=True))
        started[-1].start()
        return started[-1]

    here, there = PROCESSES.Pipe()
    store = start(hold_store, there)
    port, begin = here.recv(), time.monotonic()
    workers = [start(work, story, rank, port, folder) for rank in range(SIZE)]
    if story in ("store stopped", "store killed", "suspended"):
        while len(list(folder.glob("* is there"))) < SIZE and time.monotonic() < begin + LONG:
            time.sleep(0.1)
        time.sleep(1)
        for process in workers if story == "suspended" else [store]:
            os.kill(process.pid, signal.SIGKILL if story == "store killed" else signal.SIGSTOP)
    if story == "suspended":
        time.sleep(1.6 * TIMEOUT)
        for process in workers:
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.4 * TIMEOUT)
        (folder / "enough").touch()
    for rank, process in enumerate(workers):
        if rank != BAD or story not in LEFT_BEHIND:
            process.join(max(0.0, begin + LONG - time.monotonic()))
    seconds, codes = time.monotonic() - begin, [process.exitcode for process in workers]
    for process in started:
        process.kill()
    return End(codes, [(folder / str(rank)).read_text() for rank in range(SIZE)], seconds)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    PROCESSES.set_forkserver_preload(["tests.test_watch"])
    folders = [tmp_path_factory.mktemp("story") for _ in STORIES]
    with ThreadPoolExecutor(len(STORIES)) as pool:
        return dict(zip(STORIES, pool.map(play, STORIES, folders), strict=True))


def sentence(end: End) -> str:
    """What the processes have said, each on its own or as its explanation: all the same."""
    said = {line for text in end.said for line in re.findall(r"^(?:error|explained): (.*)", text, re.MULTILINE)}
    assert len(said) == 1, said
    return said.pop()


@pytest.mark.slow  # real waiting, which a busy machine makes longer
def test_a_killed_process_is_named_by_those_that_lose_the_connection(ends):
    end = ends["killed"]
    assert end.codes[0] == end.codes[2] == 1
    assert re.fullmatch(
        r"process 1 on \S+ has not answered for \d+ s, last heard of at (the start|step \d); the others wait at step 5",
        sentence(end),
    )
    assert all("gloo/transport" in end.said[rank] for rank in (0, 2))


@pytest.mark.slow  # real waiting, which a busy machine makes longer
def test_a_stopped_process_is_named_within_the_timeout(ends):
    end = ends["stopped"]
    assert end.codes[0] == end.codes[2] == 1
    assert re.fullmatch(
        r"process 1 on \S+ has not answered for \d+ s, last heard of .*; the others wait at step 5", sentence(end)
    )
    assert TIMEOUT < end.seconds < 60


@pytest.mark.slow  # real waiting, which a busy machine makes longer
def test_a_process_that_waits_for_its_data_is_named_and_shows_where(ends):
    end = ends["late"]
    assert end.codes == [1, 1, 1]
    assert re.match(
        r"process 1 on \S+ is alive but still at step 4, where the others wait at step 5 \(a hang", sentence(end)
    )
    assert "where process 1 is:" in end.said[1] and "in load" in end.said[1]
    assert not any("where process" in end.said[rank] for rank in (0, 2))
    assert TIMEOUT < end.seconds < 60


@pytest.mark.slow  # real waiting, which a busy machine makes longer
def test_an_error_of_one_is_told_by_all(ends):
    end = ends["in error"]
    assert end.codes == [1, 1, 1]
    assert end.said[BAD].endswith("and more\nexplained: None\n")
    told = [text.partition("explained: ")[2] for rank, text in enumerate(end.said) if rank != BAD]
    assert told[0] == told[1]
    assert re.fullmatch(r"process 1 on \S+ ended at step 4: ValueError: no memory left\n", told[0])
    assert end.seconds < 60


@pytest.mark.slow  # real waiting, which a busy machine makes longer
def test_an_error_of_one_ends_those_that_do_not_need_it_now(ends):
    end = ends["in error in a pause"]
    assert end.codes == [1, 1, 1]
    assert not end.said[0] and not end.said[2]  # the one that has the error has said it
    assert end.seconds < 60


@pytest.mark.slow  # real waiting, which a busy machine makes longer
def test_a_pause_does_not_hide_that_a_process_is_silent(ends):
    end = ends["stopped in a pause"]
    assert end.codes[0] == end.codes[2] == 1
    assert re.match(r"process 1 on \S+ has not answered for \d+ s, last heard of at an evaluation; ", sentence(end))


@pytest.mark.slow  # real waiting, which a busy machine makes longer
@pytest.mark.parametrize("story", ["store stopped", "store killed"])
def test_a_store_that_is_gone_is_named(ends, story):
    """The processes themselves go on well: without torchrun nobody would learn of their end."""
    end = ends[story]
    assert end.codes == [1, 1, 1]
    assert sentence(end) == "the node of process 0, 127.0.0.1, or torchrun on it does not answer"
    assert TIMEOUT < end.seconds < 90


@pytest.mark.slow  # real waiting, which a busy machine makes longer
@pytest.mark.parametrize("story", ["slow", "suspended"])
def test_no_false_alarm(ends, story):
    """Slow, but within the timeout or where it is allowed; and all stopped for longer than that, and started again."""
    end = ends[story]
    said = [line for text in end.said for line in text.splitlines() if not line.startswith("[W")]  # torch's warnings
    assert end.codes == [0, 0, 0] and said == []
    assert end.seconds > 2 * TIMEOUT


# --- with torchrun, without processes -------------------------------------------------------------------------------


def test_torchrun_ends_all_and_repeats_the_reason(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(
        "import time, torch\n"
        "from util import distributed, watch\n"
        "world = distributed.find_world('cpu')\n"
        "with distributed.process_group(world, 10 / 60):\n"
        "    for number in range(3):\n"
        "        time.sleep(600 if number == 2 and world.rank == 1 else 0)\n"
        "        watch.arrived(f'step {number}')\n"
        "        torch.distributed.barrier()\n"
    )
    command = "-m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=2"
    environment = {**os.environ, "PYTHONPATH": str(Path(watch.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *command.split(), str(script)], env=environment, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 1
    sentence = r"process 1 on \S+ is alive but still at step 1, where the others wait at step 2"
    assert len(re.findall("^error: " + sentence, done.stderr, re.MULTILINE)) == 1
    assert re.search(r"Root Cause[\s\S]*traceback : " + sentence, done.stderr)


def sign(arrivals, host="a", beat=1, clock=100.0, over=False):
    return Sign(host, beat, arrivals, f"step {arrivals}", clock, over)


@pytest.mark.parametrize(
    ("signs", "silent", "sentence", "show"),
    [
        (
            [3, 2, 3],
            {1},
            "process 1 on a has not answered for 20 s, last heard of at step 2; the others wait at step 3",
            [],
        ),
        (
            [3, 2, 2, 1],
            {1, 2},
            "each of the processes 1, 2 on a has not answered for 20 s, last heard of at step 2; "
            "the others wait at step 3",
            [],
        ),
        (
            [4, 2, 3, 2],
            set(),
            "each of the processes 1, 3 on a is alive but still at step 2, where the others wait at step 4 "
            "(a hanging disk or data loader?)",
            [1, 3],
        ),
        ([3, 3], {2}, "process 2 has never answered; the others wait at step 3", []),
        (
            [3, 3],
            set(),
            "all 2 processes answer and are at step 3: the connection between some of them hangs or was lost, or an "
            "operation there takes longer than --dist_timeout",
            [0, 1],
        ),
    ],
)
def test_sentences(signs, silent, sentence, show):
    assert describe({rank: sign(n) for rank, n in enumerate(signs)}, silent, 120.4) == (sentence, show)


def test_hosts_are_kept_apart_and_who_has_finished_is_not_behind():
    signs = {0: sign(1, over=True), 1: sign(2, "b"), 2: sign(2, "c"), 3: sign(3)}
    sentence, behind = describe(signs, set(), 100.0)
    assert sentence.startswith("process 1 on b is alive but still at step 2; process 2 on c is alive") and behind == [
        1,
        2,
    ]


def test_without_other_processes_nothing_is_watched():
    watch.arrived("step 0")
    with watch.paused("an evaluation"):
        assert watch.explain(ValueError()) is None
    watch.stop()


def test_an_arrival_costs_less_than_ten_microseconds():
    store = dist.HashStore()
    one = watch.Watch(store, 0, 2, 60.0, lambda sentence, aloud: None)
    start = time.perf_counter()
    for number in range(10_000):
        one.arrived(f"step {number}")
    one.stop()
    assert (time.perf_counter() - start) / 10_000 < 1e-5
