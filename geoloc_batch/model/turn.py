"""Turns: one process does a work whose outcome serves many, the others wait until it is done.

Whoever works holds a lock of the operating system on a file, which falls when its process dies, whatever ends it. On
a filesystem that refuses such locks (some mounts of NFS and Lustre) nobody waits: every process works for itself.
Where locks hold for one machine alone, one process of each machine works. Either costs time, never a result.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from geoloc_batch.errors import StopRequested

log = logging.getLogger("geoloc_batch")

_POLL_S, _SELDOM_S = 0.2, 2.0


def never() -> bool:
    """For those whom nobody asks to stop."""
    return False


@contextmanager
def turn(
    lock: Path, is_done: Callable[[], bool], *, work: str, wait_s: float, is_stopped: Callable[[], bool] = never
) -> Iterator[None]:
    """Nobody else works inside, unless the work is done, locks are missing or the wait was too long.

    Args:
        lock: a file, made where it is absent, in a folder that exists. It stays.
        is_done: whether there is nothing left to wait for.
        work: what is done in turns, for messages: "compiling in FOLDER".
        wait_s: seconds to wait for another process; then this one works too.
        is_stopped: asked while waiting.

    Raises:
        OSError: the file cannot be opened.
        StopRequested: a stop was asked for while it waited.
    """
    if is_done():
        yield
        return
    descriptor = open_lock(lock)
    try:
        _wait(descriptor, lock, is_done, work, wait_s, is_stopped)
        yield
    finally:
        # Gives the lock back, as the end of the process does, whatever ends it.
        os.close(descriptor)


def open_lock(lock: Path) -> int:
    """A descriptor of the file, which every user may lock whose rights on the folder allow it."""
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _wait(
    descriptor: int,
    lock: Path,
    is_done: Callable[[], bool],
    work: str,
    wait_s: float,
    is_stopped: Callable[[], bool],
) -> None:
    started, is_told = time.monotonic(), False
    while not _locked(descriptor, lock, work) and not is_done():
        if is_stopped():
            raise StopRequested
        if time.monotonic() - started > wait_s:
            log.warning("another process has been %s for %.0f s: not waiting longer", work, wait_s)
            return
        if not is_told:
            log.info("waiting for another process that is %s", work)
            is_told = True
        # Of thousands that wait for long each asks the file server less often.
        time.sleep(min(_POLL_S + (time.monotonic() - started) / 20, _SELDOM_S))


def _locked(descriptor: int, lock: Path, work: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.info("%s has no locks (%s): every process is %s for itself", lock.parent, error.strerror, work)
    return True
