"""A rank that is killed, stopped or late ends the whole job within about the timeout; the others say what they lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launcher_stand_ins import basics, children

TIMEOUT = 15.0  # seconds, as ranks may start that far apart on a busy machine
MAIN = """
import os, signal, sys, time
import torch
from util.dist import worker
from util.dist.context import all_reduce_mean, barrier, find_context, process_group

def run(argv):
    ctx = find_context("cpu")
    with process_group(ctx, {timeout} / 60):
        for step in range(5):
            if step == 3 and ctx.rank == 1:
                {event}
            {meet}
    return "done"

sys.exit(worker.run_main(run, sys.argv[1:]))
"""
STEP, SAVE = "all_reduce_mean(torch.ones(3), ctx)", f"barrier(ctx, {TIMEOUT} / 60)"
KILLED, STOPPED, LATE = (
    "os.kill(os.getpid(), signal.SIGKILL)",
    "os.kill(os.getpid(), signal.SIGSTOP)",
    "time.sleep(600)",
)
LOST, WAITED = "gloo/transport", "Timed out waiting 15000ms"


@pytest.mark.slow  # real waiting, which a busy machine makes longer
@pytest.mark.parametrize(
    ("event", "meet", "said"),
    [
        (KILLED, STEP, LOST),
        (STOPPED, STEP, WAITED),
        (LATE, STEP, WAITED),
        (STOPPED, SAVE, "Ranks 1 failed to pass monitoredBarrier"),
        ("raise ValueError('no memory left')", STEP, "rank 1: ValueError: no memory left"),
    ],
    ids=["killed", "stopped", "late", "stopped before a save", "in error"],
)
def test_the_job_ends_and_says_what_was_lost(tmp_path, event, meet, said):
    main = tmp_path / "main_jit.py"
    main.write_text(MAIN.format(timeout=TIMEOUT, event=event, meet=meet))
    command = [sys.executable, "-P", "-m", "util.dist.launch", "--nproc_per_node=3", "--standalone"]
    began = time.monotonic()
    with (tmp_path / "said").open("w") as file:
        process = subprocess.Popen([*command, "--local_addr=127.0.0.1", str(main)], env=basics(), stderr=file)
        time.sleep(1)
        workers = children(process.pid)
        code = process.wait(300)
    took, text = time.monotonic() - began, (tmp_path / "said").read_text()
    print(f"ended {took:.0f} s after it was started")
    assert code == 1 and said in text, text
    assert "rank 0: " in text and "rank 2: " in text
    for pid in workers:  # also the one that is stopped
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert took < 120
