"""A number of bytes that threads share."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBudget:
    """Lets threads hold bytes up to a limit, first come, first served.

    One that wants more than the whole limit waits until nobody holds anything, and then runs alone: a large photo is
    slow, but neither refused nor able to fill the memory together with others.

    Args:
        limit: bytes that may be held at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes ever held."""
        self.wait_s = 0.0
        """Seconds that threads have waited, summed; a wait counts when it is over."""
        self._own = threading.local()
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @property
    def own_wait_s(self) -> float:
        """Seconds that the calling thread has waited."""
        waited: float = getattr(self._own, "wait_s", 0.0)
        return waited

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait for `num_bytes`, keep them for the time of the block."""
        ticket = object()
        started = time.perf_counter()
        with self._changed:
            self._queue.append(ticket)
            # Order is kept, or a large photo would wait for ever while small ones slip past it.
            self._changed.wait_for(
                lambda: self._queue[0] is ticket and (not self.held or self.held + num_bytes <= self.limit)
            )
            self._queue.popleft()
            waited = time.perf_counter() - started
            self.wait_s += waited
            self._own.wait_s = self.own_wait_s + waited
            self.held += num_bytes
            self.peak = max(self.peak, self.held)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.held -= num_bytes
                self._changed.notify_all()
