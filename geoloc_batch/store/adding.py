"""Adding: what is done is added up by ranks that have nothing else to do, and at the end by who comes to it first."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from geoloc_batch.errors import OutputError
from geoloc_batch.store.done import Done, check_source
from geoloc_batch.store.execution import Totals
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import THOUSAND, Goal, reached_goals
from geoloc_batch.store.lease import Leases
from geoloc_batch.store.marker import UnitCounts, read_marker
from geoloc_batch.store.some import LOOK_S
from geoloc_batch.store.sums import Sums

STEP = 50
"""Markers that are read at a time. A folder with no more to read is read by everybody."""
SOME_CLAIMED = 2
MANY_FOLDERS = 16
"""From so many on their sums are added up once for all ranks, too."""
MANY_UNITS = 10_000
"""Markers that can be read while a stopped process is given time to end."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0


@dataclass(slots=True)
class _Job:
    """A folder of markers that this rank is adding up."""

    thousand: int
    time_ns: int
    left: list[Goal]
    counts: list[UnitCounts] = field(default_factory=list)


class Adding:
    """One rank's part in it, for the units of a plan."""

    def __init__(self, files: FilePort, out: Path, leases: Leases, done: Done, sums: Sums) -> None:
        self._files = files
        self._out = out
        self._leases = leases
        self._done = done
        self._sums = sums
        self._job: _Job | None = None
        self._made: dict[int, Totals] = {}
        # Those that could not be added up: why, is said by who has to read their markers.
        self._refused: set[int] = set()

    def go_on(self, *, may_begin: bool) -> None:
        """Add up a part of a folder that is whole, for a second. Where that fails, nothing is lost."""
        began_s = self._files.monotonic()
        try:
            if self._job is None and may_begin:
                self._begin([thousand for thousand in self._done.whole() if self._is_wanted(thousand)])
            while self._job is not None and self._files.monotonic() - began_s < LOOK_S:
                self._step(self._job)
        except OSError:
            self.close()

    def close(self) -> None:
        """Give back a claim that is still held."""
        with contextlib.suppress(OSError):
            self._refuse()

    def _refuse(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            self._refused.add(job.thousand)
            self._sums.let_go(job.thousand)

    def _is_wanted(self, thousand: int) -> bool:
        return thousand not in self._sums and thousand not in self._refused and thousand not in self._made

    def _begin(self, thousands: Sequence[int]) -> None:
        """Claim one of these folders, whichever is free, and list it."""
        for thousand in random.sample(thousands, min(len(thousands), SOME_CLAIMED)):
            if self._sums.claim(thousand):
                # Ours before anything else is asked of the disk, so that it is given back where that fails.
                self._job = _Job(thousand, 0, [])
                self._job.time_ns = self._sums.time_of(thousand, self._leases.server_now_ns())
                units = range(thousand * THOUSAND, (thousand + 1) * THOUSAND)
                self._job.left = list(reached_goals(self._out, units, self._files.names).values())
                if len(self._job.left) == THOUSAND:
                    return
                self._refuse()

    def _step(self, job: _Job) -> None:
        """Read some of its markers; with the last of them write the sum."""
        self._sums.touch(job.thousand)
        try:
            job.counts += [self._counts(goal) for goal in job.left[-STEP:]]
        except OutputError:
            self._refuse()
            return
        del job.left[-STEP:]
        if not job.left:
            totals = self._made[job.thousand] = Totals.of(THOUSAND, job.counts)
            # The markers were seen, and some may not be on the disk yet: what says the same must not outlive them.
            self._files.sync_folder(self._sums.folder_of(job.thousand))
            self._sums.write(job.thousand, totals, job.time_ns)
            self._job = None

    def _counts(self, goal: Goal) -> UnitCounts:
        marker = self._done.kept(goal) or read_marker(self._out, goal, self._files.read)
        if marker is None:
            raise OutputError(f"the marker of {goal.label} has gone")
        check_source(self._out, marker, self._done.sources.get(goal.unit, marker.source))
        return marker.counts

    def totals(self, units: Sequence[int], in_haste: Callable[[], bool] = lambda: False) -> Totals:
        """Sums over the units of the plan; where these are many, not each rank reads all their markers.

        Args:
            units: their indexes.
            in_haste: whether this process has been asked to end: then it waits for no other rank.

        Raises:
            OutputError: a marker is broken, or of another source than the plan says.
        """
        total = self._done.total
        if total and (found := self._known(total)) is not None:
            return found
        self._done.look_all(units)
        thousands: dict[int, list[int]] = defaultdict(list)
        for unit in units:
            thousands[unit // THOUSAND].append(unit)
        shared = {thousand for thousand, its in thousands.items() if self._is_shared(thousand, its)}
        if len(shared) < MANY_FOLDERS or not all(unit in self._done for unit in units):
            # A sum over all says that all are done.
            total = ""
        try:
            awaited = self._await(shared, total, in_haste)
        except OSError:
            # On a full disk nobody can share anything.
            self.close()
            shared, awaited = set(), False
        if isinstance(awaited, Totals):
            return awaited
        total = total if awaited else ""
        try:
            parts = []
            for number, (thousand, its) in enumerate(thousands.items()):
                if total and number % STEP == 0:
                    self._sums.touch(total)
                part = self._sum_of(thousand) if thousand in shared else None
                parts.append(part or totals_of(self._done, its))
            found = Totals.sum(parts)
            if total:
                with contextlib.suppress(OSError):
                    self._sums.write(total, found)
                total = ""
            return found
        finally:
            if total:
                self._sums.let_go(total)

    def _is_shared(self, thousand: int, units: Sequence[int]) -> bool:
        if len(units) < THOUSAND or not self._done.is_whole(thousand):
            return False
        return sum(self._done.kept(Goal(unit)) is None for unit in units) > STEP

    def _await(self, shared: Collection[int], total: str, in_haste: Callable[[], bool]) -> Totals | bool:
        """Until each folder has its sum, made here or elsewhere; in haste, until those are left that others are making.

        Returns:
            The sum over all, where another rank has made it; else whether this rank is to make it.
        """
        pause_s = FIRST_WAIT_S
        while True:
            if (found := self._known(total)) is not None:
                return found
            wanted = [thousand for thousand in shared if self._is_wanted(thousand)]
            if not wanted and (not total or self._sums.claim(total)):
                return bool(total)
            if self._job is None:
                self._begin(wanted)
            if self._job is not None:
                while self._job is not None:
                    self._step(self._job)
                pause_s = FIRST_WAIT_S
            elif in_haste():
                return False
            else:
                self._pause(pause_s, in_haste)
                pause_s = min(2 * pause_s, LONGEST_WAIT_S)

    def _pause(self, seconds: float, in_haste: Callable[[], bool]) -> None:
        until_s = self._files.monotonic() + seconds
        while (left_s := until_s - self._files.monotonic()) > 0 and not in_haste():
            self._files.sleep(min(left_s, LOOK_S))

    def _known(self, total: str) -> Totals | None:
        """The sum over all, where there is one."""
        self._done.learn(now=True)
        return self._sums.read(total) if total in self._sums else None

    def _sum_of(self, thousand: int) -> Totals | None:
        if thousand in self._sums and self._sums.has_changed(thousand):
            # A retry has passed since, beside this run.
            return None
        if thousand in self._made:
            return self._made[thousand]
        return self._sums.read(thousand) if thousand in self._sums else None


def totals_of(done: Done, units: Sequence[int]) -> Totals:
    """Sums over units, from the markers of those that are known to be done."""
    return Totals.of(len(units), [marker.counts for unit in units if (marker := done.marker(unit)) is not None])


def totals_of_own(done: Done, units: Sequence[int]) -> Totals:
    """The same where no marker is to be read: how many are known to be done, and what came of this process's own.

    Among these are a few of others, where their markers have been read to learn how long a unit takes.
    """
    own = Totals.of(len(units), [marker.counts for marker in done.own()])
    return dataclasses.replace(own, done=sum(unit in done for unit in units))
