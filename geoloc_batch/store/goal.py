"""Goals: what an execution is to publish. A unit's first result is one; each retry of the unit is one more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

THOUSAND = 1000
"""Units whose markers stand in one folder."""
LABEL = re.compile(r"([0-9]+)(?:r([1-9][0-9]*))?")


class Goal(NamedTuple):
    """Each is reached once, by one execution; the highest that was reached is what stands of the unit."""

    unit: int
    retry: int = 0
    """0 for the first result, n for that of the n-th retry."""

    @property
    def label(self) -> str:
        """How files and folders of this goal begin: 000007, or 000007r2."""
        return f"{self.unit:06d}" + (f"r{self.retry}" if self.retry else "")

    @property
    def before(self) -> Goal:
        """What stood before this retry."""
        assert self.retry, "nothing stands before the first result"
        return Goal(self.unit, self.retry - 1)


def parse_goal(label: str) -> Goal | None:
    """The goal with a label, None for any other text."""
    found = LABEL.fullmatch(label)
    return Goal(int(found[1]), int(found[2] or 0)) if found else None


def marker_path(out: Path, goal: Goal) -> Path:
    """Where the marker of a goal stands: those of a thousand units to a folder."""
    return out / "_done" / f"{goal.unit // THOUSAND:03d}" / f"{goal.label}.json"


def reached_goals(out: Path, units: Iterable[int], names: Callable[[Path], Iterable[str]]) -> dict[int, Goal]:
    """The highest goal of each unit that has one, from the names of the markers alone.

    Args:
        out: the output folder.
        units: which units.
        names: lists a folder, nothing where there is none.
    """
    found: dict[int, Goal] = {}
    for goal in _goals(out, set(units), names):
        found[goal.unit] = max(goal, found.get(goal.unit, goal))
    return found


def retry_without_first(out: Path, units: Iterable[int], names: Callable[[Path], Iterable[str]]) -> Goal | None:
    """A retry with a marker of a unit whose first marker has gone, None where there is none. Arguments as above."""
    there = set(_goals(out, set(units), names))
    return min((goal for goal in there if Goal(goal.unit) not in there), default=None)


def _goals(out: Path, units: set[int], names: Callable[[Path], Iterable[str]]) -> Iterator[Goal]:
    """Those of some units that have a marker."""
    for thousand in sorted({unit // THOUSAND for unit in units}):
        for name in names(marker_path(out, Goal(thousand * THOUSAND)).parent):
            goal = parse_goal(name.removesuffix(".json"))
            # Of this folder, and spelt in the one way that counts.
            if goal and goal.unit in units and goal.unit // THOUSAND == thousand and name == f"{goal.label}.json":
                yield goal
