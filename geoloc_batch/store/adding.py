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
from geoloc_batch.records import Unit
from geoloc_batch.store.done import Done, check_source
from geoloc_batch.store.execution import Totals
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import THOUSAND, Goal, reached_goals
from geoloc_batch.store.lease import Leases
from geoloc_batch.store.marker import UnitCounts, read_marker
from geoloc_batch.store.some import LOOK_S
from geoloc_batch.store.sums import Sums

SPELL_S = 5.0
"""For so long a rank adds up before it looks for work again."""
STEP = 50
"""Markers that are read at a time. A folder with no more to read is read by everybody."""
SOME_CLAIMED = 2
MANY_FOLDERS = 16
"""From so many on their sums are added up once for all ranks, too."""
MANY_UNITS = 10_000
"""Markers that can be read while a stopped process is given time to end."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0
PATIENCE_S = 300.0
"""After so long without a new sum a rank waits for no other: what is broken is broken for each that tries, in turn."""


@dataclass(slots=True)
class _Job:
    """A folder of markers that this rank is adding up."""

    thousand: int
    time_ns: int
    left: list[Goal]
    counts: list[UnitCounts] = field(default_factory=list)


class Adding:
    """One rank's part in it, for the units of a plan."""

    def __init__(
        self, files: FilePort, out: Path, leases: Leases, done: Done, sums: Sums, units: Sequence[Unit]
    ) -> None:
        # The sum over all is that of the first so many units: other ranks may have been given other shards.
        is_of_first = units[-1].index == len(units) - 1 and len(units) >= MANY_FOLDERS * THOUSAND
        done.num_first = len(units) if is_of_first else 0
        self._files = files
        self._out = out
        self._leases = leases
        self._done = done
        self._sums = sums
        self._job: _Job | None = None
        self._goes_well = False
        """Whether there was a folder to add up when last looked for."""
        self._is_last = self._has_cleared_up = False
        """Whether this rank has claimed the sum over all, and done what comes before it."""
        self._made: dict[int, Totals] = {}
        # Those that could not be added up: why, is said by who has to read their markers.
        self._refused: set[int] = set()
        # How many sums there were when last looked at once, and since when it is so many.
        self._news: tuple[int, float] = (-1, 0.0)

    def go_on(self, *, may_begin: bool) -> None:
        """Add up folders that are whole, for some seconds. Where that fails, nothing is lost."""
        began_s = self._files.monotonic()
        may_begin = may_begin or self._goes_well
        try:
            while self._files.monotonic() - began_s < SPELL_S:
                if self._job is None and may_begin:
                    self._begin([thousand for thousand in self._done.whole() if self._is_wanted(thousand)])
                self._goes_well = self._job is not None
                if self._job is None:
                    return
                self._step(self._job)
        except OSError:
            self._refuse()

    def pause(self) -> None:
        """Leave a folder to others: there is work to do."""
        job, self._job = self._job, None
        if job is not None:
            self._sums.let_go(job.thousand)

    def end(self, clear_up: Callable[[], None]) -> bool:
        """Once all is done: clear up what the dead have left, unless another rank does so for all.

        Args:
            clear_up: does it.

        Returns:
            Whether it is done. If not, another rank is at it: ask again.
        """
        total = self._done.total
        if total and not self._is_last:
            self._learn()
            if total in self._sums:
                # Who has made it has cleared up before.
                return True
            if not self._claims(total) and self._is_patient():
                return False
        clear_up()
        self._has_cleared_up = True
        return True

    def _claims(self, total: str) -> bool:
        """Whether this rank goes ahead."""
        self._has_cleared_up = False
        try:
            self._is_last = self._sums.claim(total)
        except OSError:
            # On a full disk nobody can share anything.
            return True
        return self._is_last

    def close(self) -> None:
        """Give back the claims that are still held."""
        self.pause()
        if self._is_last:
            self._sums.let_go(self._done.total)
            self._is_last = False

    def _refuse(self) -> None:
        if self._job is not None:
            self._refused.add(self._job.thousand)
        self.pause()

    def _is_wanted(self, thousand: int) -> bool:
        return thousand not in self._sums and thousand not in self._refused and thousand not in self._made

    def _begin(self, thousands: Sequence[int], *, is_last_moment: bool = False) -> None:
        """Claim one of these folders, whichever is free, and list it; one that has just changed at the last moment."""
        for thousand in random.sample(thousands, min(len(thousands), SOME_CLAIMED)):
            if self._sums.claim(thousand):
                # Ours before anything else is asked of the disk, so that it is given back where that fails.
                self._job = _Job(thousand, 0, [])
                self._job.time_ns = self._sums.time_of(thousand, self._leases.server_now_ns())
                if not self._job.time_ns and not is_last_moment:
                    # Those who come later could not believe its sum.
                    self.pause()
                    continue
                units = range(thousand * THOUSAND, (thousand + 1) * THOUSAND)
                self._job.left = list(reached_goals(self._out, units, self._files.names).values())
                if len(self._job.left) == THOUSAND:
                    return
                self._refuse()

    def _step(self, job: _Job) -> None:
        """Read some of its markers; with the last of them write the sum."""
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

    def total(self) -> Totals | None:
        """The sum over all units, where there is one: then no claim is of use any more."""
        self._learn()
        if (found := self._sums.read(self._done.total)) is not None:
            self.close()
        return found

    def totals(self, units: Sequence[int], in_haste: Callable[[], bool] = lambda: False) -> Totals:
        """Sums over the units of the plan; where these are many, not each rank reads all their markers.

        Args:
            units: their indexes; which are done has been looked at.
            in_haste: whether this process has been asked to end: then it waits for no other rank.

        Raises:
            OutputError: a marker is broken, or of another source than the plan says.
        """
        thousands: dict[int, list[int]] = defaultdict(list)
        for unit in units:
            thousands[unit // THOUSAND].append(unit)
        shared = {thousand for thousand, its in thousands.items() if self._is_shared(thousand, its)}
        try:
            self._await(shared, in_haste)
        except OSError:
            self._refuse()
        try:
            parts = []
            for thousand, its in thousands.items():
                part = self._sum_of(thousand) if thousand in shared else None
                parts.append(part or totals_of(self._done, its))
            found = Totals.sum(parts)
            if self._is_last and self._has_cleared_up:
                with contextlib.suppress(OSError):
                    self._sums.write(self._done.total, found)
            return found
        finally:
            self.close()

    def _is_shared(self, thousand: int, units: Sequence[int]) -> bool:
        if len(units) < THOUSAND or not self._done.is_whole(thousand):
            return False
        return sum(self._done.kept(Goal(unit)) is None for unit in units) > STEP

    def _await(self, shared: Collection[int], in_haste: Callable[[], bool]) -> None:
        """Until each folder has its sum, made here or elsewhere; in haste, until those are left that others make."""
        pause_s = FIRST_WAIT_S
        while wanted := [thousand for thousand in shared if self._is_wanted(thousand)]:
            if self._job is None:
                self._begin(wanted, is_last_moment=True)
            if self._job is not None:
                while self._job is not None:
                    self._step(self._job)
                pause_s = FIRST_WAIT_S
            elif in_haste() or not self._is_patient():
                return
            else:
                self._pause(pause_s, in_haste)
                pause_s = min(2 * pause_s, LONGEST_WAIT_S)
            self._learn()

    def _learn(self) -> None:
        """Look at once what has a sum."""
        self._done.learn(now=True)
        if self._news[0] != len(self._sums):
            self._news = len(self._sums), self._files.monotonic()

    def _is_patient(self) -> bool:
        return self._files.monotonic() - self._news[1] < PATIENCE_S

    def _pause(self, seconds: float, in_haste: Callable[[], bool]) -> None:
        until_s = self._files.monotonic() + seconds
        while (left_s := until_s - self._files.monotonic()) > 0 and not in_haste():
            self._files.sleep(min(left_s, LOOK_S))

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
