"""A real SLURM of two nodes on one machine: a slurmctld, two slurmd, a munged where none runs.

Everything lies below one temporary folder. A guard, a process of its own, ends whatever was started from there as soon
as its pipe from us closes: after `stop`, after Ctrl-C, and when the tests themselves are killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

NODES = ("n1", "n2")
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "munged", "munge")
CREDENTIAL_S = 5
"""A requeued job waits for the life of its credential: SLURM's own 120 s would be most of the tests' time. Below 5 it
takes those 120."""

# The folder's mark in the environment of everything that comes from the cluster, SLURM's daemons and jobs alike.
_MARK = "SLURM_CONF"

_CONF = """\
ClusterName=geoloctest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire={credential_s}{socket}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,default_queue_depth=1000,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
KillWait=5
# A job that goes on beside the tests is asked for at their end: SLURM would have forgotten it after 300 s.
MinJobAge=3600
InactiveLimit=0
SlurmdTimeout=30
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP OverSubscribe=NO PriorityTier=1 GraceTime=5
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP OverSubscribe=NO PriorityTier=9 PreemptMode=OFF
"""
# Device files that any machine has: SLURM counts them and hands them out, nobody opens them.
_GRES = "NodeName=n1,n2 Name=gpu File=/dev/zero\nNodeName=n1,n2 Name=gpu File=/dev/full\n"


def why_absent() -> str | None:
    """Why no cluster can run here, None where one can."""
    missing = [name for name in NEEDED if not _program(name)]
    if missing:
        return f"SLURM is absent ({', '.join(missing)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts jobs as their users, which root alone may do"
    return None


class Cluster:
    """The cluster, from `with` to its end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="geoloc-slurm-", dir="/tmp"))
        # munge's clients want to come in, whoever they are.
        self.folder.chmod(0o755)
        self.environment = {**os.environ, _MARK: str(self.folder / "slurm.conf"), "PATH": _path()}
        # The settings of the tests are no choice of a job's user.
        for name in list(self.environment):
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "OMP_")) and name != _MARK:
                del self.environment[name]
        self._guard: subprocess.Popen[bytes] | None = None
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        self._guard = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait(timeout=60)
        for daemon in self._daemons:
            daemon.wait(timeout=10)

    def run(self, *command: object, check: bool = True, seconds: float = 60, **environment: str) -> str:
        """Run one of SLURM's commands. Returns its stdout; its own words are in the error where it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job; empty where SLURM has forgotten it."""
        words = self.run("scontrol", "--oneliner", "show", "job", job, check=False).split(" ")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something is true; else fail with what SLURM says of its jobs."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.run('squeue')}{self.run('sinfo')}"
            time.sleep(0.05)

    def is_up(self) -> bool:
        """Whether both nodes take jobs."""
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return len(states) >= len(NODES) and set(states) <= {"idle", "mixed", "allocated"}

    @contextlib.contextmanager
    def down(self, node: str) -> Iterator[None]:
        """A node is down until the end of the block."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        try:
            yield
        finally:
            self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        own_munge = "" if self._has_munge() else f",socket={self._start_munge()}"
        text = _CONF.format(
            host=socket.gethostname().split(".")[0],
            ports=_free_ports(1 + len(NODES)),
            folder=self.folder,
            socket=own_munge,
            credential_s=CREDENTIAL_S,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(_GRES)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait(self.is_up, 30, "both nodes idle")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._daemon("slurmd", "-D", "-N", node)

    def _has_munge(self) -> bool:
        return subprocess.run([_program("munge"), "-n"], capture_output=True).returncode == 0

    def _start_munge(self) -> Path:
        key, path = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = [f"--{name}={self.folder}/munged.{name}" for name in ("pid-file", "log-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", f"--socket={path}", f"--key-file={key}", *files)
        self.wait(path.is_socket, 10, "munged")
        return path

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            # A session of its own: Ctrl-C at the terminal is for the tests, which then stop the cluster in order.
            daemon = subprocess.Popen(
                [_program(name), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(daemon)


def _path() -> str:
    # Daemons lie where a user's PATH does not reach.
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _program(name: str) -> str:
    return shutil.which(name, path=_path()) or ""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def processes_of(folder: Path) -> Iterator[int]:
    """Ids of the processes that a cluster's daemons and jobs are, told by the mark in their environment."""
    mark = f"{_MARK}={folder}/slurm.conf".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                yield int(path.parent.name)


def _guard(folder: Path) -> None:
    """Wait for the end of the process that started the cluster, then end and remove what is left of it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end = time.monotonic() + 30
    while (found := list(processes_of(folder))) and time.monotonic() < end:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _guard(Path(sys.argv[1]))
