"""A lane: one thread that does one kind of work on items in order, behind a short queue."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from geoloc_batch.stream.stats import Depth

Item = TypeVar("Item")
_POLL_S = 0.2


class Lane(Generic[Item]):
    """Runs `work` on every item in a thread of its own.

    An exception in `work` ends the lane: it is raised again by the next `put` and by `close`, and items that are still
    queued are dropped, so that nobody waits for a lane that no longer works.

    Args:
        name: of the thread.
        work: called with each item, in the order of `put`.
        depth: items that may wait; `put` blocks when they are that many.
    """

    def __init__(self, name: str, work: Callable[[Item], None], *, depth: int = 2) -> None:
        self._work = work
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._depth, self._depth_lock, self._started = Depth(), threading.Lock(), time.perf_counter()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand over an item; blocks while the lane is full; raises the lane's own exception if it has failed."""
        self._put(item)
        if self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether `work` has raised."""
        return self._error is not None

    def depth(self) -> tuple[int, float]:
        """How many items wait, now and on average since the lane was made; the one at work does not count."""
        with self._depth_lock:
            seconds = max(time.perf_counter() - self._started, 1e-9)
            # An item may be taken in the moment between its coming and its being counted.
            return max(0, self._depth.now), max(0.0, self._depth.area_s() / seconds)

    def close(self, *, quiet: bool = False) -> None:
        """Wait until every item is done; raises the lane's exception unless `quiet`."""
        self._put(None)
        self._thread.join()
        if self._error is not None and not quiet:
            raise self._error

    def _put(self, item: Item | None) -> None:
        while self._thread.is_alive() and self._error is None:
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            self._count(item, 1)
            return

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._count(item, -1)
                self._work(item)
        except BaseException as error:
            self._error = error

    def _count(self, item: Item | None, change: int) -> None:
        if item is not None:
            with self._depth_lock:
                self._depth.add(change)
