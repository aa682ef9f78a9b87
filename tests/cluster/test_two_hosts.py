"""Two hosts through run_jit_multinode.sh: one run, faults of the link and of a host, restarts."""

import os
import signal
import subprocess
import time

import pytest

from tests.cluster.conftest import STEPS, has_trained, run_flags, wait_for
from tests.conftest import raw, read_log, state_differences
from tests.launcher_stand_ins import basics, children
from util.dist.preemption import EXIT_CODE

pytestmark = pytest.mark.cluster


def start(hosts, folder, *flags, **variables):
    """Both launchers, and the files with what they say."""
    said = [folder / f"said-{host.number}-{time.monotonic_ns()}" for host in hosts]
    words = [*run_flags(folder / "run"), *flags]
    return [host.start(file, words, **variables) for host, file in zip(hosts, said, strict=True)], said


def finish(launchers, said, seconds=300):
    """Exit codes and what was said."""
    codes = [launcher.wait(seconds) for launcher in launchers]
    return codes, [file.read_text() for file in said]


def test_two_hosts_train_as_two_ranks_of_one(hosts, whole, tmp_path):
    codes, said = finish(*start(hosts, tmp_path))
    assert codes == [0, 0], said
    assert read_log(tmp_path / "run") == read_log(whole)
    assert state_differences(tmp_path / "run", whole) == []


def test_an_interface_that_does_not_lead_to_the_other_host(hosts, tmp_path):
    """As that of a node whose own name stands for 127.0.1.1."""
    launchers, said = start(hosts, tmp_path, GLOO_SOCKET_IFNAME="lo")
    wait_for(lambda: any(launcher.poll() is not None for launcher in launchers))
    first = 0 if launchers[0].poll() is not None else 1  # gloo lets either of them connect, and the other one waits
    assert launchers[first].returncode == 2
    assert "error: The ranks cannot connect" in said[first].read_text()
    assert "GLOO_SOCKET_IFNAME" in said[first].read_text()


def test_one_host_is_asked_to_stop_and_both_do(hosts, whole, tmp_path):
    launchers, said = start(hosts, tmp_path, SECONDS_PER_STEP="0.2")
    wait_for(lambda: has_trained(tmp_path / "run", 4))
    os.killpg(launchers[1].pid, signal.SIGTERM)
    codes, text = finish(launchers, said)
    assert codes == [EXIT_CODE, EXIT_CODE], text
    assert 4 <= raw(tmp_path / "run")["run"]["step"] < STEPS
    codes, text = finish(*start(hosts, tmp_path))
    assert codes == [0, 0], text
    assert state_differences(tmp_path / "run", whole) == []


def test_a_host_dies_and_both_start_again(hosts, whole, tmp_path):
    launchers, said = start(hosts, tmp_path, SECONDS_PER_STEP="0.2")
    wait_for(lambda: has_trained(tmp_path / "run", 5))
    hosts[1].kill()
    began = time.monotonic()
    codes, text = finish(launchers, said)
    assert codes[0] not in (0, EXIT_CODE) and time.monotonic() - began < 40, text
    assert 0 < raw(tmp_path / "run")["run"]["step"] < STEPS
    codes, text = finish(*start(hosts, tmp_path))
    assert codes == [0, 0], text
    assert state_differences(tmp_path / "run", whole) == []


def test_the_link_is_cut_for_good(hosts, tmp_path):
    """Both sides end, with a message, soon after the timeout of 15 s."""
    launchers, said = start(hosts, tmp_path, "--dist_timeout", "0.25", SECONDS_PER_STEP="0.2")
    wait_for(lambda: has_trained(tmp_path / "run", 5))
    hosts[0].ip("link", "set", hosts[0].link, "down")
    began = time.monotonic()
    codes, text = finish(launchers, said)
    took = time.monotonic() - began
    print(f"ended {took:.0f} s after the cut")
    assert all(code not in (0, EXIT_CODE) for code in codes), (codes, text)
    assert took < 75 and all("Error" in part or "error" in part for part in text), (took, text)


def test_the_link_is_down_for_a_moment(hosts, whole, tmp_path):
    launchers, said = start(hosts, tmp_path, SECONDS_PER_STEP="0.2")
    wait_for(lambda: has_trained(tmp_path / "run", 5))
    hosts[0].ip("link", "set", hosts[0].link, "down")
    time.sleep(5)
    hosts[0].ip("link", "set", hosts[0].link, "up")
    codes, text = finish(launchers, said)
    assert codes == [0, 0], text
    assert state_differences(tmp_path / "run", whole) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_dies_and_torchrun_starts_all_again(hosts, whole, tmp_path, victim):
    launchers, said = start(hosts, tmp_path, SECONDS_PER_STEP="0.2", MAX_RESTARTS="2")
    wait_for(lambda: has_trained(tmp_path / "run", 7))
    os.kill(hosts[victim].workers()[0], signal.SIGKILL)
    codes, text = finish(launchers, said)
    assert codes == [0, 0], text
    assert len(read_log(tmp_path / "run", "start")) == 2
    assert state_differences(tmp_path / "run", whole) == []


def test_a_rank_of_a_single_host_dies(script, whole, tmp_path):
    """Without a second host: --standalone restarts as well."""
    env = basics(NUM_GPUS="2", GLOO_SOCKET_IFNAME="lo", SECONDS_PER_STEP="0.2", MAX_RESTARTS="1")
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(["bash", script, *run_flags(tmp_path / "run")], env=env, stdout=said, stderr=said)
    wait_for(lambda: has_trained(tmp_path / "run", 7))
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    assert launcher.wait(300) == 0, (tmp_path / "said").read_text()
    assert len(read_log(tmp_path / "run", "start")) == 2
    assert state_differences(tmp_path / "run", whole) == []
