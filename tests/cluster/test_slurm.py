"""A real SLURM of two nodes: sbatch, srun by the launcher, signals, requeue, scancel."""

import time

import pytest

from tests.cluster.conftest import STEPS, has_trained, run_flags, wait_for
from tests.conftest import raw, read_log, state_differences

pytestmark = pytest.mark.cluster


def trained(folder) -> int:
    return raw(folder)["run"]["step"]


def test_asked_to_stop_requeued_and_finished(slurm, whole, tmp_path):
    """The signal of --signal=B:USR1. SLURM starts a requeued job again after two to three minutes."""
    said, run = tmp_path / "said", tmp_path / "run"
    number = slurm.submit(said, run_flags(run), SECONDS_PER_STEP="0.4", REQUEUE="1")
    wait_for(lambda: has_trained(run, 4))
    slurm("scancel", "--batch", "--signal=USR1", number)
    job = slurm.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), said.read_text()
    assert f"job {number} is requeued" in said.read_text()
    assert 4 <= trained(run) < STEPS
    began = time.monotonic()
    wait_for(lambda: slurm.job(number)["JobState"] == "COMPLETED", 600, step=1)
    print(f"finished {time.monotonic() - began:.0f} s after it was requeued")
    assert len(read_log(run, "start")) == 2
    assert state_differences(run, whole) == []


def test_signal_to_the_steps(slurm, tmp_path):
    """--signal=USR1 without B: every process of the steps gets it, torchrun and what loads images included."""
    said, run = tmp_path / "said", tmp_path / "run"
    flags = [*run_flags(run), "--num_workers", "1"]
    number = slurm.submit(said, flags, SECONDS_PER_STEP="0.4")
    wait_for(lambda: has_trained(run, 4))
    slurm("scancel", "--signal=USR1", number)
    job = slurm.ended(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "75:0"), said.read_text()
    assert 4 <= trained(run) < STEPS and "Stopped by SIGUSR1" in said.read_text()


def test_cancelled(slurm, tmp_path):
    """TERM to all and, after KillWait, KILL: saved in between, and REQUEUE=1 does not bring it back."""
    said, run = tmp_path / "said", tmp_path / "run"
    number = slurm.submit(said, run_flags(run), SECONDS_PER_STEP="0.4", REQUEUE="1")
    wait_for(lambda: has_trained(run, 4))
    slurm("scancel", number)
    job = slurm.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), said.read_text()
    wait_for(lambda: f"job {number} is not requeued" in said.read_text(), 60)
    assert 4 <= trained(run) < STEPS


def test_a_refusal_ends_the_job(slurm, tmp_path):
    """With the exit code of a refusal, and without a requeue."""
    said, run = tmp_path / "said", tmp_path / "run"
    number = slurm.submit(said, [*run_flags(run), "--model", "no-such-model"], REQUEUE="1")
    job = slurm.ended(number)
    assert job["JobState"] == "FAILED" and job["Restarts"] == "0", said.read_text()
    assert job["ExitCode"] == "2:0" and "no-such-model" in said.read_text()
