"""Done: which units have reached their goals, asked as seldom as can be, and kept as one bit each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import THOUSAND, Goal, marker_path, parse_goal
from geoloc_batch.store.marker import Marker, standing_marker
from geoloc_batch.store.sums import Sums, name_of_total

# With more units than this to ask for in one folder of markers, its names are read at once.
MAX_STATS = 8


class Done:
    """Units known to be done, with their markers once they were read. What is done stays done."""

    def __init__(self, files: FilePort, out: Path) -> None:
        self._files = files
        self._out = out
        self.sums: Sums | None = None
        """Where other ranks say what is done; None where that is not looked at."""
        # By the thousand, its units as the bits of a number: every rank comes to know all units.
        self._bits: dict[int, int] = {}
        self._markers: dict[int, Marker] = {}
        self.sources: Mapping[int, str] = {}
        """What the plan says of units: a marker must say the same."""
        self.num_first = 0
        """How many units this rank is to see done, where these are the first ones of the plan, and many."""
        self.retries: Mapping[int, int] = {}
        """Of units that are done when this retry of them has its result."""

    def __contains__(self, unit: object) -> bool:
        """Whether the unit is known to be done, without a look at the disk."""
        assert isinstance(unit, int)
        return bool(self._bits.get(unit // THOUSAND, 0) >> unit % THOUSAND & 1)

    def _note(self, unit: int) -> None:
        self._bits[unit // THOUSAND] = self._bits.get(unit // THOUSAND, 0) | 1 << unit % THOUSAND

    def is_whole(self, thousand: int) -> bool:
        """Whether all units that a folder of markers has place for are known to be done."""
        return self._bits.get(thousand, 0) == (1 << THOUSAND) - 1

    def whole(self) -> list[int]:
        """Numbers of the folders of which this is known."""
        return [thousand for thousand in self._bits if self.is_whole(thousand)]

    def learn(self, *, now: bool = False) -> None:
        """Look what has a sum, where that is due or shall be `now`: it is done."""
        for what in self.sums.look(now=now) if self.sums is not None else ():
            if isinstance(what, int):
                self._bits[what] = (1 << THOUSAND) - 1
            elif what == self.total:
                whole, rest = divmod(self.num_first, THOUSAND)
                self._bits = {**dict.fromkeys(range(whole), (1 << THOUSAND) - 1), whole: (1 << rest) - 1}

    @property
    def total(self) -> str:
        """The name of the sum over all units, "" where there is none to be."""
        return name_of_total(self.num_first) if self.num_first else ""

    def goal(self, unit: int) -> Goal:
        """What has to be reached."""
        return Goal(unit, self.retries.get(unit, 0))

    def _path(self, unit: int) -> Path:
        return marker_path(self._out, self.goal(unit))

    def add(self, marker: Marker) -> None:
        """Note a marker of our own."""
        self._note(marker.unit)
        self._markers[marker.unit] = marker

    def look(self, unit: int) -> bool:
        """Whether the unit is done, with a look at the disk."""
        if unit not in self and self._files.stat(self._path(unit)) is not None:
            self._note(unit)
        return unit in self

    def look_all(self, units: Iterable[int], names: Callable[[Path], Iterable[str]] | None = None) -> None:
        """Find out which of many units are done.

        Args:
            units: which.
            names: lists a folder, where that shall not be asked of the disk each time.
        """
        thousands: dict[int, list[int]] = defaultdict(list)
        for unit in units:
            if not self._bits.get(unit // THOUSAND, 0) >> unit % THOUSAND & 1:
                thousands[unit // THOUSAND].append(unit)
        for thousand, wanted in thousands.items():
            if len(wanted) > MAX_STATS:
                self.learn()
                if self.is_whole(thousand):
                    continue
                there = set((names or self._files.names)(self._path(wanted[0]).parent))
                for unit in wanted:
                    if (self._path(unit).name if unit in self.retries else f"{unit:06d}.json") in there:
                        self._note(unit)
            else:
                for unit in wanted:
                    self.look(unit)

    def beyond(self, num_units: int) -> Path | None:
        """A marker of a unit whose index is `num_units` or more, None where there is none."""
        root = self._out / "_done"
        for folder in self._files.names(root):
            if folder.isdecimal() and int(folder) >= num_units // THOUSAND:
                for name in self._files.names(root / folder):
                    goal = parse_goal(name.removesuffix(".json"))
                    if goal and goal.unit >= num_units:
                        return root / folder / name
        return None

    def kept(self, goal: Goal) -> Marker | None:
        """The marker of a goal where this process has it already."""
        marker = self._markers.get(goal.unit)
        return marker if marker is not None and marker.goal == goal else None

    def own(self) -> list[Marker]:
        """The markers that this process has."""
        return list(self._markers.values())

    def marker(self, unit: int) -> Marker | None:
        """What stands of a unit, None where it is not known to be done.

        Raises:
            OutputError: it is no marker, or that of another source.
        """
        if unit not in self:
            return None
        marker = self._markers.get(unit)
        if marker is None:
            marker = standing_marker(self._out, unit, self._files.read)
            if marker is not None:
                check_source(self._out, marker, self.sources.get(unit, marker.source))
                self._markers[unit] = marker
        return marker


def check_source(out: Path, marker: Marker, source: str) -> None:
    """Raise OutputError where a marker is of another source than the plan says."""
    if marker.source != source:
        path = marker_path(out, marker.goal)
        raise OutputError(
            f"{path} says that unit {marker.unit} is {marker.source}, the plan in {out} says {source}: one of them was "
            f"changed; put the plan back as it was, or remove {path} and run the same command again"
        )
