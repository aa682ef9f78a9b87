"""Two hosts and a scheduler on one machine, for tests that need root: `make test-cluster`.

A host is a network namespace with one end of a veth pair; the file system is shared, as a cluster's is. SLURM is a real
one, with a configuration, ports and a munge key of its own, so that one that is there already is left alone.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import arguments
from tests.launcher_stand_ins import basics, tiny_checkout

EPOCHS = 10  # of two steps
STEPS = 2 * EPOCHS


def missing(*programs: str) -> str | None:
    """Why the tests cannot run here, if they cannot."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in programs if shutil.which(name) is None]
    return f"needs {', '.join(lacking)}: make test-cluster installs them" if lacking else None


def run_flags(folder: Path) -> list[str]:
    """A run of STEPS steps that saves after every third."""
    return arguments(output_dir=folder, epochs=EPOCHS, batch_size=8, save_every_steps=3)


def wait_for(what, seconds: float = 300, step: float = 0.1):
    """The first true value of `what()`."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(step)
    return value


def has_trained(folder: Path, steps: int) -> bool:
    log = folder / "log.jsonl"
    return log.exists() and log.read_text().count('"event": "train"') >= steps


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    return tiny_checkout(tmp_path_factory.mktemp("cluster") / "checkout")


@pytest.fixture(scope="session")
def whole(script, tmp_path_factory):
    """An uninterrupted run: one host, two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    env = basics(NUM_GPUS="2", GLOO_SOCKET_IFNAME="lo")
    subprocess.run(["bash", script, *run_flags(folder)], env=env, check=True, timeout=400)
    return folder


class Host:
    """A network namespace."""

    def __init__(self, number: int, script: Path):
        self.number, self.script = number, script
        self.name, self.link, self.address = f"jit{os.getpid()}-{number}", f"veth{number}", f"10.77.0.{number + 1}"

    def start(self, said: Path, flags: list[str], **variables: str) -> subprocess.Popen:
        env = basics(NUM_GPUS="1", NNODES="2", NODE_RANK=str(self.number), MASTER_ADDR="10.77.0.1")
        env |= {"GLOO_SOCKET_IFNAME": self.link, "LOCAL_ADDR": self.address, **variables}
        command = ["ip", "netns", "exec", self.name, "bash", self.script, *flags]
        with said.open("w") as file:
            return subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", "-n", self.name, *words], check=True)

    def processes(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def workers(self) -> list[int]:
        """The processes with a rank."""
        return [pid for pid in self.processes() if b"\0LOCAL_RANK=" in _read(f"/proc/{pid}/environ")]

    def kill(self) -> None:
        """As if its power was cut."""
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):  # it has ended since it was listed
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""  # it has ended meanwhile


@pytest.fixture
def hosts(script):
    """Two hosts, 10.77.0.1 and 10.77.0.2, that see each other and nothing else."""
    if reason := missing("ip"):
        pytest.skip(reason)
    pair = [Host(number, script) for number in (0, 1)]
    made = []
    try:
        for host in pair:
            done = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"needs network namespaces: {done.stderr.strip()}")
            made.append(host)
        first, second = pair
        first.ip("link", "add", first.link, "type", "veth", "peer", "name", second.link, "netns", second.name)
        for host in pair:
            host.ip("addr", "add", f"{host.address}/24", "dev", host.link)
            host.ip("link", "set", host.link, "up")
            host.ip("link", "set", "lo", "up")
        yield pair
    finally:
        for host in made:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], check=True)


# ---- SLURM -----------------------------------------------------------------------------------

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
KillWait=15
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Two nodes on this machine."""

    def __init__(self, folder: Path, script: Path):
        self.folder, self.script, self.daemons = folder, script, []
        self.env = basics(SLURM_CONF=str(folder / "slurm.conf"))

    def start(self) -> None:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        conf = self.folder / "slurm.conf"
        conf.write_text(CONF.format(folder=self.folder, host=socket.gethostname().split(".")[0], ports=ports))
        files = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files.values())
        wait_for((self.folder / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-f", str(conf))
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node, "-f", str(conf))
        wait_for(lambda: self("sinfo", "--noheader", "--format=%D %t").strip() == "2 idle", 60)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{len(self.daemons)}.out").open("w") as out:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=out, stderr=out))

    def stop(self) -> None:
        if len(self.daemons) == 4:
            self("scancel", "--user=root")
            wait_for(lambda: not self("squeue", "--noheader").strip(), 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)

    def __call__(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout

    def submit(self, said: Path, flags: list[str], *options: str, **variables: str) -> str:
        """The number of a job with two nodes of one process each."""
        job = said.with_suffix(".sbatch")
        words = " ".join(f"'{word}'" for word in flags)
        job.write_text(f"#!/bin/bash\nexec bash {self.script} {words}\n")
        env = self.env | {"NUM_GPUS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", **variables}
        command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={said}"]
        command += ["--requeue", "--open-mode=append", *options, str(job)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        words = self("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str, seconds: float = 300) -> dict[str, str]:
        """What is known of the job when it runs no more, which includes that it waits to run again."""

        def state() -> dict[str, str] | None:
            job = self.job(number)
            first = job["JobState"] == "PENDING" and job["Restarts"] == "0"
            return None if first or job["JobState"] in ("RUNNING", "COMPLETING", "CONFIGURING") else job

        return wait_for(state, seconds, step=0.5)


@pytest.fixture(scope="module")
def slurm(script):
    if reason := missing("munged", "slurmctld", "slurmd", "sbatch"):
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="jit-slurm-") as folder:
        cluster = Slurm(Path(folder), script)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
