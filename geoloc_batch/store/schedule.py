"""Schedule: in which order one rank tries units, and what may be done about those that others have or had."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal

from geoloc_batch.records import Unit
from geoloc_batch.store.lease import SECOND_NS, Lease
from geoloc_batch.store.marker import Marker

SLOW_FACTOR = 3.0
MAX_PACES = 64

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


class Schedule:
    """The units of one rank's plan: fresh ones in a queue, then those that were found taken."""

    def __init__(self, units: Sequence[Unit], done: Container[int] = ()) -> None:
        self.units = list(units)
        known = [unit.num_bytes for unit in units if unit.num_bytes > 0]
        # A source of unknown size is taken for a middling one.
        self._usual_bytes = max(mean(known), 1.0) if known else 1.0
        fresh = [unit for unit in units if unit.index not in done]
        # Of locations, which were cut alike, a reader knows what comes next.
        is_even = all(unit.kind == "locations" for unit in fresh)
        self._fresh = deque(fresh if is_even else self._largest_first(fresh))
        self._taken: dict[int, Unit] = {}
        self._paces: deque[float] = deque(maxlen=MAX_PACES)

    def num_bytes(self, unit: Unit) -> float:
        """Size of a unit, the usual one where it is not known."""
        return float(unit.num_bytes) or self._usual_bytes

    def _largest_first(self, units: Iterable[Unit]) -> list[Unit]:
        return sorted(units, key=lambda unit: (-self.num_bytes(unit), unit.index))

    def next_fresh(self) -> Unit | None:
        """The next unit that this rank has not tried, None at the end. It counts as taken until it is done."""
        try:
            unit = self._fresh.popleft()
        except IndexError:
            return None
        self._taken[unit.index] = unit
        return unit

    def put_back(self, unit: Unit) -> None:
        """A unit that was given back comes next."""
        self._fresh.appendleft(unit)

    def left_over(self, done: Container[int]) -> list[Unit]:
        """Units tried and not done, largest first."""
        self._taken = {index: unit for index, unit in self._taken.items() if index not in done}
        return self._largest_first(self._taken.values())

    def learn(self, unit: Unit, seconds: float) -> None:
        """Note how long a unit took."""
        self._paces.append(seconds / self.num_bytes(unit))

    def learn_from_others(self, marker_of: Callable[[int], Marker | None]) -> None:
        """Where this rank has seen little itself, take the times from markers."""
        for unit in self.units:
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
