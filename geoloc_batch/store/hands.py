"""Hands: the executions that this process holds, from their leases to the end of their staging folders."""

from __future__ import annotations

import threading

from geoloc_batch.records import Unit
from geoloc_batch.store.commit import Commits
from geoloc_batch.store.done import Done
from geoloc_batch.store.execution import Execution, Held
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.lease import Leases


class Hands:
    """Asked by the threads of one process."""

    def __init__(self, files: FilePort, leases: Leases, commits: Commits) -> None:
        self._files = files
        self._leases = leases
        self._commits = commits
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}

    def all(self) -> list[Held]:
        """What is held now."""
        with self._lock:
            return list(self._held.values())

    def take(self, unit: Unit, slot: int, done: Done, *, is_suspect: bool) -> Execution | None:
        """Take a slot of a unit's goal; None where it is taken, or the unit done."""
        token, goal = self._files.token(), done.goal(unit.index)
        if (lease := self._leases.take(goal, slot, token)) is None:
            return None
        # A winner publishes its marker before it gives its lease back: a lease on a finished unit shows here.
        if done.look(unit.index):
            self._leases.give_back(token)
            return None
        staging = self._commits.staging(goal, token)
        execution = Execution(unit, goal, token, slot, staging, self._files, lease.taken_ns)
        try:
            self._files.make_folder(execution.staging)
        except OSError:
            self._leases.give_back(token)
            raise
        with self._lock:
            self._held[token] = Held(execution, self._files.monotonic(), is_suspect)
        return execution

    def seconds(self, execution: Execution) -> float:
        """Since it was taken."""
        return self._files.monotonic() - self._held[execution.token].since_s

    def clear(self, execution: Execution) -> None:
        """Drop its staging folder, unless it has won after all."""
        self._commits.clear(execution.goal, execution.token)

    def let_go(self, execution: Execution) -> None:
        """Give its lease back."""
        self._leases.give_back(execution.token)
        with self._lock:
            self._held.pop(execution.token, None)
