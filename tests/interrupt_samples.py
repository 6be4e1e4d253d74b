"""What the tests of interrupted streams share: a consumer that waits, and who is alive."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_samples import threads
from stream_samples import unit_of

from geoloc_batch.stream.batches import BatchStream
from geoloc_batch.stream.config import StreamConfig

# No other process sleeps so long.
LONG = f"3{os.getpid():07d}"


def until(is_met: Callable[[], object], seconds: float = 10) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not is_met():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def sleepers(mark: str = LONG) -> list[int]:
    """Processes with the mark among their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def children() -> set[int]:
    """Processes that this one has started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found.update({int(folder.name)} if parent == os.getpid() else ())
    return found


class Waiting:
    """A stream whose consumer waits in a thread of its own."""

    def __init__(self, shard: str) -> None:
        self.children = children()
        self.items: list[Any] = []
        self.stream = BatchStream([unit_of(shard)], side=20, batch_size=99, config=StreamConfig(decode_threads=2))
        # A test that fails must not keep the process waiting with it.
        self.consumer = threading.Thread(target=lambda: self.items.extend(self.stream), daemon=True)
        self.consumer.start()

    def close(self) -> None:
        """From this thread, as a watcher of signals does it."""
        assert self.consumer.is_alive()
        started = time.monotonic()
        self.stream.close()
        self.consumer.join(5)
        seconds = time.monotonic() - started
        assert not self.consumer.is_alive()
        assert self.items == []
        assert seconds < 1.5, f"{seconds:.1f} s"
        assert threads() == []
        assert children() == self.children
