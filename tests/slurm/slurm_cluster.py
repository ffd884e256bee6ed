"""A private Slurm on loopback for tests: munge, a controller and a few nodes with fake GPUs, started in seconds.

No accounting: finished jobs stay in the controller's memory, where `scontrol show job` finds them. All files are in
one folder, and only processes started here are stopped. Partitions: `main`; `high`, which takes nodes from `main` and
`grace` by requeuing their jobs; `grace`, whose jobs first get 20 seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

# Reasons for some lines: without a database there is no accounting; a cgroup plugin is loaded even if nothing
# uses it; cred_expire is also the pause before a requeued job restarts, two minutes by default and for values below
# 5; with ReturnToService=2 a node that was set down would come back by itself.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,block_null_hash{loopback}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=1
JobRequeue=1
KillWait=30
MinJobAge=86400
MaxArraySize=1001
InactiveLimit=60
SlurmctldTimeout=30
SlurmdTimeout=120
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port={first}-{last} CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=main  Nodes=ALL Default=YES DefaultTime=30 MaxTime=INFINITE PriorityTier=10 GraceTime=0 State=UP
PartitionName=grace Nodes=ALL DefaultTime=30 MaxTime=INFINITE PriorityTier=5 GraceTime=20 State=UP
PartitionName=high  Nodes=ALL DefaultTime=30 MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF State=UP
"""


class SlurmCluster:
    """A running cluster. Its commands find it through the environment variable `SLURM_CONF`."""

    def __init__(self, root: Path, nodes: int = 3) -> None:
        self.root = root
        self.nodes = nodes
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        for folder in ("munge", "state", "spool", "log", "dev"):
            (self.root / folder).mkdir()
        (self.root / "munge" / "key").write_bytes(os.urandom(128))
        (self.root / "munge" / "key").chmod(0o400)
        for gpu in range(2):  # Slurm sets CUDA_VISIBLE_DEVICES only for devices, so these are copies of /dev/null
            os.mknod(self.root / "dev" / f"nvidia{gpu}", 0o20666, os.makedev(1, 3))
        ports = _free_ports(self.nodes + 1)
        try:  # with the flag srun listens only on the host name's address, and hangs unless that is the loopback
            on_loopback = socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
        except OSError:
            on_loopback = False
        text = CONFIGURATION.format(
            root=self.root,
            port=ports[0],
            first=ports[1],
            last=ports[-1],
            nodes=self.nodes,
            loopback=",NoInAddrAny" if on_loopback else "",
        )
        (self.root / "slurm.conf").write_text(text, encoding="utf-8")
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
        gpus = f"AutoDetect=off\nNodeName=n[1-{self.nodes}] Name=gpu File={self.root}/dev/nvidia[0-1]\n"
        (self.root / "gres.conf").write_text(gpus, encoding="utf-8")
        munge = self.root / "munge"
        self._daemon(
            "munged",
            *("--foreground", "--force", "--num-threads=4", "--origin=127.0.0.1", f"--socket={munge}/sock"),
            *(f"--key-file={munge}/key", f"--seed-file={munge}/seed", f"--pid-file={munge}/pid"),
            f"--log-file={munge}/log",
        )
        wait_for(lambda: (munge / "sock").exists(), "munge's socket", 10)
        self.start_controller()
        for node in range(1, self.nodes + 1):
            self._daemon(f"n{node}", "-D", "-N", f"n{node}", program="slurmd")
        ready = f"{self.nodes}"
        wait_for(lambda: self.output("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() == ready, "nodes")

    def start_controller(self) -> None:
        self._daemon("slurmctld", "-D")
        wait_for(lambda: "UP" in self.output("scontrol", "ping"), "the controller", 20)

    def stop_controller(self) -> None:
        """Send SIGTERM, on which the controller saves its state; SIGKILL would lose jobs that are seconds old."""
        _end(self.daemons.pop("slurmctld"))

    def stop(self) -> None:
        """Cancel all jobs, wait for their processes, then stop the daemons."""
        if "slurmctld" in self.daemons:
            self.cancel_all()
        for name in reversed(list(self.daemons)):
            _end(self.daemons.pop(name))

    def cancel_all(self) -> None:
        user = str(os.getuid())
        self.output("scancel", "--quiet", "--user", user)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self.output("squeue", "-h", "--user", user).strip(), "cancelled jobs", 20)

    def output(self, *command: str) -> str:
        """Return the standard output of a Slurm command, or "" if it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, encoding="utf-8", timeout=60)
        return result.stdout if result.returncode == 0 else ""

    def job(self, job: str) -> dict[str, str]:
        """Return the controller's fields of one job or array task (`12`, `12_3`): JobState, Restarts, ExitCode …"""
        for line in self.output("scontrol", "show", "job", "-o", job).splitlines():
            return dict(word.split("=", 1) for word in line.split() if "=" in word)
        return {}

    def wait(self, job: str, states: set[str], seconds: float = 60) -> dict[str, str]:
        """Wait until a job is in one of these states, and return its fields."""
        wait_for(lambda: self.job(job).get("JobState") in states, f"job {job} to be {states}", seconds)
        return self.job(job)

    def _daemon(self, name: str, *arguments: str, program: str | None = None) -> None:
        environment = {"PATH": SEARCH, "SLURM_CONF": self.environment["SLURM_CONF"]}
        log = (self.root / "log" / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            [program or name, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Return the first of `count` consecutive ports on which nothing listens."""
    for first in range(26800 + os.getpid() % 1000 * 8, 65000, 8):
        ports = list(range(first, first + count))
        with contextlib.ExitStack() as stack:
            try:
                for port in ports:
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return ports
    raise OSError("no free ports for a cluster")


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[SlurmCluster]:
    """Yield a cluster for the tests of one module; skip without Slurm."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm and munge)")
    if os.getuid() != 0:
        pytest.skip("a private Slurm has to be started by root")
    root = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a socket's path must be short
    root.chmod(0o755)  # munge wants all parents of its socket open to everyone
    cluster = SlurmCluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def cluster(running_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """Yield the cluster with an empty queue before and after a test, visible to the commands that the test runs."""
    monkeypatch.setenv("SLURM_CONF", running_cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", SEARCH)
    yield running_cluster
    running_cluster.cancel_all()
