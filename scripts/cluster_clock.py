"""A virtual clock: tasks that each believe to wait, of which one runs at a time, in the order of their times.

A task is a greenlet, so that production code calls `wait` from any depth without knowing of it. Nothing happens between
two waits: what a task does without waiting is atomic. Equal times keep the order in which they were asked for, and so
the same seed gives the same run.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from greenlet import greenlet

Item = TypeVar("Item")


class Vanished(BaseException):
    """The process of a task has been killed. No handler of the ledger's takes this."""


class Clock:
    """Seconds since the start, and who is to run when."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._hub = greenlet.getcurrent()
        self._due: list[tuple[float, int, greenlet | Callable[[], None]]] = []
        self._numbers = itertools.count()

    def wait(self, seconds: float) -> None:
        """Let time pass for the task that calls; for what `at` calls, which is no task, nothing passes."""
        ours = greenlet.getcurrent()
        if ours is self._hub:
            return
        until_s = self.now_s + seconds
        if not self._due or until_s < self._due[0][0]:
            # Nobody else is due before: the switch there and back is saved.
            self.now_s = until_s
            return
        heapq.heappush(self._due, (until_s, next(self._numbers), ours))
        self._hub.switch()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call something at a time. It must not wait."""
        heapq.heappush(self._due, (time_s, next(self._numbers), call))

    def start(self, work: Callable[[], None]) -> greenlet:
        """A task of its own, from now on. It ends with its work, or by Vanished."""

        def live() -> None:
            with contextlib.suppress(Vanished):
                work()

        task = greenlet(live, self._hub)
        self.wake(task)
        return task

    def park(self) -> None:
        """Stop the task that calls until somebody wakes it."""
        self._hub.switch()

    def wake(self, task: greenlet) -> None:
        """Let a parked task, or one that has not begun, go on at this time."""
        heapq.heappush(self._due, (self.now_s, next(self._numbers), task))

    def kill(self, task: greenlet) -> None:
        """End a task where it waits. Called by the hub alone, or by a task for others than itself."""
        if task:

            def end() -> None:
                if task:
                    task.throw(Vanished)

            self.at(self.now_s, end)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Let everything happen until something is the case, or nothing is left to happen."""
        while self._due and not is_over():
            self.now_s, _, what = heapq.heappop(self._due)
            if not isinstance(what, greenlet):
                what()
            elif not what.dead:
                what.switch()


class Handover(Generic[Item]):
    """A place for one thing between two tasks: who puts waits while it is taken, who gets while it is empty."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._items: deque[Item] = deque()
        self._parked: greenlet | None = None

    def put(self, item: Item) -> None:
        """Wait until the place is free, then fill it."""
        while self._items:
            self._park()
        self._items.append(item)
        self._wake()

    def get(self) -> Item:
        """Wait until something is there, then take it."""
        while not self._items:
            self._park()
        item = self._items.popleft()
        self._wake()
        return item

    def _park(self) -> None:
        self._parked = greenlet.getcurrent()
        self._clock.park()

    def _wake(self) -> None:
        if self._parked is not None:
            self._clock.wake(self._parked)
            self._parked = None
