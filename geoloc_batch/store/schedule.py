"""Schedule: in which order one rank tries units, and what may be done about those that others have or had."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Literal

from geoloc_batch.records import Unit
from geoloc_batch.store.done import Done
from geoloc_batch.store.goal import THOUSAND, Goal
from geoloc_batch.store.lease import SECOND_NS, Lease, Leases
from geoloc_batch.store.marker import Marker
from geoloc_batch.store.some import SOME_GROUPS, some

SLOW_FACTOR = 3.0
MAX_PACES = 64
MAX_MISSES, MANY_MISSES = 4, 16
IN_WORK = 32
"""Units of a folder that others may have in work, about."""
LEAST_HITS, HIT_SHARE = 4, 64
"""After so many units from one folder, and such a part of what it had left, a rank looks who else is there, and
whether more is left elsewhere. Ten ranks have taken a sixth of it by then."""

Why = Literal["unleased", "quarantine", "left by the dead", "slow"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A unit in the hands of others, and what may be done about it."""

    unit: Unit
    why: Why
    slot: int
    """The slot to take; 0 for a quarantine."""
    taken_ns: int = 0
    """When its live lease was taken."""


@dataclass(frozen=True, slots=True)
class Order:
    """In which order units are begun: the same for all ranks, but for what each of them shuffles."""

    units: Sequence[Unit]
    usual_bytes: float
    """For a source of unknown size, which is taken for a middling one."""
    groups: Sequence[Sequence[Unit]]
    """Units that are tried one after another, largest first: all of them, or those of a folder of markers."""
    is_long: bool
    """More units than one folder has markers: each rank comes to the folders in an order of its own."""
    is_even: bool = False
    """Of locations, which were cut alike: a reader knows what comes next, and has read it already."""

    @staticmethod
    def of(units: Sequence[Unit], done: Container[int] = ()) -> Order:
        """The order of units, without those that are done.

        All ranks along one list would ask for each unit that another has, 10,000 ranks and 1,000,000 units 10^10 times.
        By folders of markers each can begin elsewhere, and see in one listing what is done where it comes to.
        """
        known = [unit.num_bytes for unit in units if unit.num_bytes > 0]
        usual_bytes = max(fmean(known), 1.0) if known else 1.0
        fresh = [unit for unit in units if unit.index not in done]
        is_even = all(unit.kind == "locations" for unit in fresh)
        is_long = len(fresh) > THOUSAND
        ordered = fresh if is_even else largest_first(fresh, usual_bytes)
        if not is_long:
            return Order(units, usual_bytes, [ordered], is_long, is_even)
        groups: dict[int, list[Unit]] = defaultdict(list)
        for unit in ordered:
            groups[unit.index // THOUSAND].append(unit)
        return Order(units, usual_bytes, list(groups.values()), is_long, is_even)


def largest_first(units: Iterable[Unit], usual_bytes: float) -> list[Unit]:
    """By size, the usual one where it is not known."""
    return sorted(units, key=lambda unit: (-(unit.num_bytes or usual_bytes), unit.index))


class Schedule:
    """The units of one rank's plan: fresh ones, group by group, then those that were found taken."""

    def __init__(self, units: Sequence[Unit], done: Done | None = None, *, order: Order | None = None) -> None:
        """Of units that are not done; `order` is theirs, where it is known already."""
        self._done: Done | Container[int] = () if done is None else done
        self.order = order or Order.of(units, self._done)
        self._groups = deque(random.sample(self.order.groups, len(self.order.groups)))
        self._fresh: deque[Unit] = deque()
        self._num_misses = 0
        self._num_hits, self._enough_hits = 0, 0
        self.is_news = False
        """Whether the units that come next were just seen not to be done."""
        # A unit is put back by another thread than the one that looks for the next.
        self._back: deque[Unit] = deque()
        self._taken: dict[int, Unit] = {}
        self._paces: deque[float] = deque(maxlen=MAX_PACES)

    def num_bytes(self, unit: Unit) -> float:
        """Size of a unit, the usual one where it is not known."""
        return float(unit.num_bytes) or self.order.usual_bytes

    @property
    def has_fresh(self) -> bool:
        """Whether there may be units that this rank has not tried."""
        return bool(self._back or self._fresh or self._groups)

    def next_fresh(self) -> Unit | None:
        """The next unit that this rank has not tried. It counts as taken until it is done.

        None where the group that it came to had none: ask again while `has_fresh`.
        """
        with contextlib.suppress(IndexError):
            return self._back.pop()
        if not self._fresh and self._groups:
            self._num_misses = 0
            self._fresh = self._fullest()
        elif self._fresh and self.order.is_long and self._num_hits >= self._enough_hits and not self.order.is_even:
            self._look_around()
        elif self.order.is_long and self._num_misses and self._num_misses % MAX_MISSES == 0:
            if self._num_misses == MANY_MISSES:
                self._choose_again()
                # So late many come to the same folder at once.
                self._fresh.rotate(-random.randrange(len(self._fresh) + 1))
            else:
                # Others are at work along here: further on, the further the more they are.
                self._fresh.rotate(-random.randrange(4 * self._num_misses))
        if not self._fresh:
            return None
        self._num_misses += 1
        unit = self._fresh.popleft()
        self._taken[unit.index] = unit
        return unit

    def _look_around(self) -> None:
        """Where others are at work too, go where more is left: so that all folders come to their end together.

        Where each rank stayed to the end of its folder, one that few had come to would be found by few, and late.
        """
        left = self._not_done(self._fresh)
        is_crowded = len(self._fresh) - len(left) > self._num_hits
        self._fresh = left
        if is_crowded:
            self._choose_again()
        else:
            # With one or two ranks a folder is better seen through: its markers can then be added up.
            self._num_hits, self._enough_hits = 0, 2 * self._enough_hits

    def _choose_again(self) -> None:
        """Go where more is left, which may be here."""
        self._num_misses = 0
        self._groups.appendleft(self._fresh)
        self._fresh = self._fullest()

    def _fullest(self) -> deque[Unit]:
        """Of the next few folders the one with the most to do: so that none is left over when all others are done."""
        found = [self._not_done(self._groups.popleft()) for _ in range(min(SOME_GROUPS, len(self._groups)))]
        found.sort(key=len)
        fullest = found.pop()
        self._num_hits, self._enough_hits = 0, max(LEAST_HITS, len(fullest) // HIT_SHARE)
        self._groups.extend(units for units in found if units)
        if self.order.is_long and len(fullest) < THOUSAND:
            # Others have been here, and have the largest in work.
            fullest.rotate(-random.randrange(min(len(fullest), IN_WORK) + 1))
        return fullest

    def _not_done(self, units: Sequence[Unit]) -> deque[Unit]:
        if units and self.order.is_long and isinstance(self._done, Done):
            if self._done.is_whole(units[0].index // THOUSAND):
                return deque()
            self._done.look_all(unit.index for unit in units)
            self.is_news = True
        return deque(unit for unit in units if unit.index not in self._done)

    def hit(self) -> None:
        """The last unit could be taken. By the time that it is done, others will be that much further, too."""
        if self.order.is_long and self._num_misses > 1:
            self._fresh.rotate(-random.randrange(2 * self._num_misses))
        self._num_misses = 0
        self._num_hits += 1

    def put_back(self, unit: Unit) -> None:
        """A unit that was given back comes next."""
        self._back.append(unit)

    def left_over(self, done: Container[int], count: int) -> list[Unit]:
        """Units tried and not done, largest first; of a long plan at most `count`, by chance."""
        asked = self._some_taken(count)
        # Those that are done would stand in the way of the others.
        if any(index in done for index in asked):
            self._taken = {index: unit for index, unit in self._taken.items() if index not in done}
            asked = self._some_taken(count)
        return largest_first((self._taken[index] for index in asked if index not in done), self.order.usual_bytes)

    def taken_beside(self, indexes: Iterable[int]) -> list[int]:
        """Units tried whose markers stand in the same folders as those of some units."""
        thousands = {index // THOUSAND for index in indexes}
        return [index for index in self._taken if index // THOUSAND in thousands]

    def _some_taken(self, count: int) -> Sequence[int]:
        taken = list(self._taken)
        return some(taken, count) if self.order.is_long else taken

    def learn(self, unit: Unit, seconds: float) -> None:
        """Note how long a unit took."""
        self._paces.append(seconds / self.num_bytes(unit))

    def learn_from_others(self, marker_of: Callable[[int], Marker | None]) -> None:
        """Where this rank has seen little itself, take the times from markers."""
        for unit in self.order.units:
            if len(self._paces) >= MAX_PACES // 2:
                return
            marker = marker_of(unit.index)
            if marker is not None and not marker.quarantined:
                self.learn(unit, marker.seconds)

    def is_slow(self, candidate: Candidate, now_ns: int, least_s: float) -> bool:
        """Whether a live execution takes far longer than such units do; never before `least_s`."""
        if not self._paces or not candidate.taken_ns:
            return False
        usual_s = median(self._paces) * self.num_bytes(candidate.unit)
        return (now_ns - candidate.taken_ns) / SECOND_NS > max(SLOW_FACTOR * usual_s, least_s)


def looked_at(
    left: Sequence[Unit], goal: Callable[[int], Goal], leases: Leases, now_ns: int, max_executions: int, *, is_all: bool
) -> tuple[Sequence[Unit], Mapping[int, Sequence[Lease]], Mapping[Path, bool], int]:
    """For `judge`: units that are not done, their leases, and which are live. For `is_all` the folder is listed."""
    everything = leases.all() if is_all else leases.of((goal(unit.index) for unit in left), max_executions)
    found = {unit.index: everything.get(goal(unit.index), []) for unit in left}
    is_live = {lease.path: leases.is_live(lease, now_ns) for of_unit in found.values() for lease in of_unit}
    return left, found, is_live, max_executions


def judge(
    left: Sequence[Unit], leases: Mapping[int, Sequence[Lease]], is_live: Mapping[Path, bool], max_executions: int
) -> Iterator[Candidate]:
    """What may be done about units that are not done: first what is free, last the backup of a live execution."""
    found: dict[Why, list[Candidate]] = {"unleased": [], "quarantine": [], "left by the dead": [], "slow": []}
    for unit in left:
        of_unit = leases.get(unit.index, ())
        live = [lease for lease in of_unit if is_live[lease.path]]
        free = sorted(set(range(1, max_executions + 1)) - {lease.slot for lease in of_unit})
        if not of_unit:
            found["unleased"].append(Candidate(unit, "unleased", 1))
        elif not live and not free:
            found["quarantine"].append(Candidate(unit, "quarantine", 0))
        elif not live:
            found["left by the dead"].append(Candidate(unit, "left by the dead", free[0]))
        elif len(of_unit) == 1 and free:
            found["slow"].append(Candidate(unit, "slow", free[0], live[0].taken_ns))
    for candidates in found.values():
        yield from candidates
