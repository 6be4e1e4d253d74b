"""FilePort: everything that the ledger asks of the machine, so that a test can kill, refuse or simulate each step.

OsFiles is the real one. No other file of the ledger touches the disk: the writers of tables do, in staging only.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from geoloc_batch.whole_file import sync_file, sync_folder

READ_BYTES = 1 << 20

# What filesystems answer that have no hard links, or do not let this user make one.
NO_LINK_ERRNOS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})

# The namespace that a machine starts with: PROC_PID_INIT_INO of the kernel's proc_ns.h.
_FIRST_NAMESPACE = "pid:[4026531836]"


@dataclass(frozen=True, slots=True)
class FileStat:
    """What the ledger needs to know of a file."""

    size: int
    mtime_ns: int
    """By the file server's clock."""
    is_folder: bool


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from every other that this or another machine ever ran."""

    host: str
    """For people; nothing is decided by it."""
    boot: str
    """Id of the machine's boot, "" where the system does not tell."""
    namespace: str
    """Namespace in which `pid` counts: containers on one machine each have their own."""
    pid: int
    started: int
    """Start of the process in clock ticks since the boot: pids are used again."""


class FilePort(Protocol):
    """One method for each step that can fail or be the last one before a crash. All raise OSError."""

    def create(self, path: Path) -> int:
        """Make an empty file, FileExistsError where one is. Returns its time by the server's clock, ns."""

    def fill(self, path: Path, data: bytes) -> None:
        """Write an existing file, FileNotFoundError where there is none."""

    def write(self, path: Path, data: bytes) -> None:
        """Write a file, made where there is none."""

    def read(self, path: Path) -> bytes:
        """A whole file; IsADirectoryError for a folder."""

    def digest(self, path: Path) -> tuple[int, str]:
        """Size and SHA-256 of a file."""

    def sync(self, path: Path) -> None:
        """Bring a file's bytes to the disk."""

    def sync_folder(self, path: Path) -> None:
        """Bring a folder's names to the disk, where the filesystem can."""

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file; FileExistsError where the target is."""

    def rename(self, source: Path, target: Path) -> None:
        """Move a file (over a file) or a folder (never over a folder that holds something)."""

    def remove(self, path: Path) -> None:
        """Remove a file, FileNotFoundError where there is none."""

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder, FileNotFoundError where there is none."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and what is above it; nothing to do where it is."""

    def names(self, path: Path) -> list[str]:
        """Names in a folder, sorted; none where there is no folder."""

    def stat(self, path: Path) -> FileStat | None:
        """None where nothing is."""

    def touch(self, path: Path) -> None:
        """Set a file's time to now by the server's clock, FileNotFoundError where there is none."""

    def free_bytes(self, path: Path) -> int:
        """Space left for this user."""

    def monotonic(self) -> float:
        """Seconds that never run backwards."""

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def every(self, seconds: float, task: Callable[[], None]) -> Callable[[], None]:
        """Do `task` beside everything else, every so often, first after `seconds`. What is returned ends that."""

    def token(self) -> str:
        """A name that was never given before."""

    def owner(self) -> Owner:
        """This process."""

    def is_gone(self, owner: Owner) -> bool:
        """True only where it is certain that the process has ended."""


class OsFiles:
    """The machine itself."""

    def create(self, path: Path) -> int:
        """See FilePort."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)

    def fill(self, path: Path, data: bytes) -> None:
        """See FilePort."""
        with open(os.open(path, os.O_WRONLY), "wb") as file:
            file.write(data)

    def write(self, path: Path, data: bytes) -> None:
        """See FilePort."""
        path.write_bytes(data)

    def read(self, path: Path) -> bytes:
        """See FilePort."""
        return path.read_bytes()

    def digest(self, path: Path) -> tuple[int, str]:
        """See FilePort."""
        return digest(path)

    def sync(self, path: Path) -> None:
        """See FilePort."""
        sync_file(path)

    def sync_folder(self, path: Path) -> None:
        """See FilePort."""
        sync_folder(path)

    def link(self, source: Path, target: Path) -> None:
        """See FilePort."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """See FilePort."""
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """See FilePort."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """See FilePort."""
        os.rmdir(path)

    def make_folder(self, path: Path) -> None:
        """See FilePort."""
        path.mkdir(parents=True, exist_ok=True)

    def names(self, path: Path) -> list[str]:
        """See FilePort."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def stat(self, path: Path) -> FileStat | None:
        """See FilePort."""
        return stat(path)

    def touch(self, path: Path) -> None:
        """See FilePort."""
        # Without times the file server's own clock is taken, also over NFS.
        os.utime(path)

    def free_bytes(self, path: Path) -> int:
        """See FilePort."""
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize

    def monotonic(self) -> float:
        """See FilePort."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See FilePort."""
        time.sleep(seconds)

    def every(self, seconds: float, task: Callable[[], None]) -> Callable[[], None]:
        """See FilePort."""
        ended = threading.Event()

        def keep_on() -> None:
            while not ended.wait(seconds):
                task()

        def end() -> None:
            ended.set()
            thread.join()

        thread = threading.Thread(target=keep_on, name="ledger-heartbeat", daemon=True)
        thread.start()
        return end

    def token(self) -> str:
        """See FilePort."""
        return os.urandom(8).hex()

    def owner(self) -> Owner:
        """See FilePort."""
        pid = os.getpid()
        state = process_state(pid)
        boot, namespace = _boot_and_namespace()
        return Owner(os.uname().nodename, boot, namespace, pid, state[1] if state else 0)

    def is_gone(self, owner: Owner) -> bool:
        """See FilePort."""
        # Another boot or namespace: its processes cannot be seen from here, so nothing is certain.
        if not owner.boot or (owner.boot, owner.namespace) != _boot_and_namespace():
            return False
        state = process_state(owner.pid)
        return state is None or state[0] in "ZX" or state[1] != owner.started


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, read in blocks."""
    total, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            total.update(block)
            size += len(block)
    return size, total.hexdigest()


def stat(path: Path) -> FileStat | None:
    """FileStat of a path, None where nothing is."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return FileStat(found.st_size, found.st_mtime_ns, (found.st_mode & 0o170000) == 0o040000)


def process_state(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process, None where it is gone (or where there is no /proc to ask)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def process_name() -> str:
    """The number of this process; in a container that counts its own, with that of its namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return str(os.getpid())
    return str(os.getpid()) if namespace == _FIRST_NAMESPACE else f"{os.getpid()}.{namespace.strip('pid:[]')}"


def _boot_and_namespace() -> tuple[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # In a container without a /proc of its own, numbers found there are those of others.
        is_ours = os.readlink("/proc/self") == str(os.getpid())
        return (boot, os.readlink("/proc/self/ns/pid")) if is_ours else ("", "")
    except OSError:
        return "", ""
