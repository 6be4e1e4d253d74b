"""Search: where one rank finds its next unit: among those that nobody has tried, then among those of the dead."""

from __future__ import annotations

from typing import Literal

from geoloc_batch.records import Unit
from geoloc_batch.store.done import Done
from geoloc_batch.store.execution import Execution
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.hands import Hands
from geoloc_batch.store.lease import Leases
from geoloc_batch.store.outcome import Outcomes
from geoloc_batch.store.schedule import Candidate, Schedule, judge, looked_at
from geoloc_batch.store.some import SOME_JUDGED, SOME_LOOKED_AT, Looks


class Search:
    """Of one rank in one plan. Called by one thread at a time."""

    def __init__(
        self,
        files: FilePort,
        leases: Leases,
        done: Done,
        hands: Hands,
        outcomes: Outcomes,
        schedule: Schedule,
        max_executions: int,
    ) -> None:
        self._files = files
        self._leases = leases
        self._done = done
        self._hands = hands
        self._outcomes = outcomes
        self._schedule = schedule
        self._max_executions = max_executions
        self._looks = Looks(files.monotonic, is_long=schedule.order.is_long)

    def is_time(self) -> bool:
        """Whether to look now: after what was in vain a rank rests."""
        return self._looks.begin()

    def wake(self) -> None:
        """A unit has left this rank's hands: it may have been the last, or may be taken again."""
        self._looks.wake()

    def look(self) -> Execution | Literal["wait"] | None:
        """The next unit; "wait" where some are in work, None where all are done."""
        self._schedule.is_news = False
        found = self._fresh()
        if not isinstance(found, Execution):
            # Of very many units not only when all were tried, or those of the dead would wait for that.
            found = self._left_over() or found
        return found

    def rest(self, *, in_vain: bool, is_all_done: bool) -> None:
        """To be said after a look."""
        self._looks.end(in_vain=in_vain, is_seldom=is_all_done)

    def _fresh(self) -> Execution | Literal["wait"] | None:
        """From the units that this rank has not tried; None where all were."""
        while self._schedule.has_fresh and self._looks.goes_on():
            unit = self._schedule.next_fresh()
            if unit is None:
                continue
            self._looks.tried()
            # Whoever takes one that is done after all sees that, and gives it back.
            is_free = self._schedule.is_news or not self._done.look(unit.index)
            if is_free and (execution := self._take(unit, 1)) is not None:
                self._schedule.hit()
                return execution
        return "wait" if self._schedule.has_fresh else None

    def _left_over(self) -> Execution | Literal["wait"] | None:
        """From the units that others have, or had; where these are many, from some of them, others each time."""
        self._done.learn()
        self._see_done()
        left = self._schedule.left_over(self._done, SOME_JUDGED)
        if left:
            now_ns, is_all = self._leases.server_now_ns(), not self._schedule.order.is_long
            found = looked_at(left, self._done.goal, self._leases, now_ns, self._max_executions, is_all=is_all)
            for candidate in judge(*found):
                if (execution := self._take_candidate(candidate, now_ns)) is not None:
                    return execution
        is_done = not self._hands.all() and not self._schedule.left_over(self._done, 1)
        return None if is_done else "wait"

    def _see_done(self) -> None:
        """Look which of the units that others have are done by now: at some, and at more where most of these are.

        Asked for by a few at a time, the hundreds that a rank may have met would keep it long after the last is done.
        """
        while True:
            asked = [unit.index for unit in self._schedule.left_over(self._done, SOME_LOOKED_AT)]
            self._done.look_all(asked)
            news = [index for index in asked if index in self._done]
            if 2 * len(news) <= len(asked) or not self._schedule.order.is_long or not self._looks.is_short():
                return
            self._done.look_all(self._schedule.taken_beside(news))

    def _take_candidate(self, candidate: Candidate, now_ns: int) -> Execution | None:
        if candidate.why == "quarantine":
            goal = self._done.goal(candidate.unit.index)
            self._outcomes.quarantine(candidate.unit, goal, self._files.token(), self._max_executions)
            self._done.look(goal.unit)
            return None
        if candidate.why == "unleased":
            # It may have been done, and its lease given back, between our two looks.
            is_done = self._done.look(candidate.unit.index)
            return None if is_done else self._take(candidate.unit, candidate.slot)
        if self._hands.all():
            return None
        if candidate.why == "slow":
            self._schedule.learn_from_others(self._done.marker)
            if not self._schedule.is_slow(candidate, now_ns, self._leases.stale_s):
                return None
        return self._take(candidate.unit, candidate.slot, is_suspect=candidate.why == "left by the dead")

    def _take(self, unit: Unit, slot: int, *, is_suspect: bool = False) -> Execution | None:
        return self._hands.take(unit, slot, self._done, is_suspect=is_suspect)
