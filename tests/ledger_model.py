"""The model that looks on while ranks work on a simulated OUT: nothing is lost, doubled or mixed.

Each execution stages files that no other execution would, so that one byte of a loser among a winner's files shows.
The model is asked after each step that could change what readers see, and at the end.

Of each unit the goal with the highest marker stands (store/goal.py). A reader may see, file by file, what the goal
before it had, until that file was seen as the standing goal has it; and nothing of the goal before once the standing
one was called done, or a later one is published.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from simulated_files import Process
from simulated_turns import Turns

from geoloc_batch.store.goal import Goal, parse_goal
from geoloc_batch.store.ledger import UnitCounts
from geoloc_batch.store.marker import Marker

OUT = Path("/shared/out")
OWN = ("_leases", "_staging", "_done", "_logs", "_sums", "run.json")
MAX_EXECUTIONS = 3
CHANGES = frozenset({"create", "open_empty", "put", "link", "rename", "remove", "remove_folder", "make_folder"})


class Model:
    """What must hold, from what was seen."""

    def __init__(self, world: Turns) -> None:
        self.world = world
        self.markers: dict[Goal, Marker] = {}
        self.marker_bytes: dict[Goal, bytes] = {}
        self.standing: dict[int, Goal] = {}
        """The highest goal that was reached, by unit."""
        self.results: dict[Path, bytes] = {}
        self.staged: dict[str, dict[str, bytes]] = {}
        """What each execution writes, by its token."""
        self.counts: dict[str, UnitCounts] = {}
        """What each execution says of it."""
        self.forcing: set[str] = set()
        """Tokens of executions of units that their rank was told to make again."""
        self.returned: set[Goal] = set()
        """Whose commit, or whose end, was told to a caller."""
        self.leases: dict[Path, Process] = {}
        """Who made each lease that stands."""
        self.makers: dict[Path, Process] = {}
        """Who made each lease that ever stood, as the last."""
        self.num_executions: Counter[Goal] = Counter()
        """Of each goal: those that were begun and not given back."""

    def contents(self, goal: Goal | None) -> dict[str, bytes]:
        """The files of a unit while a goal stands; none before the first."""
        while goal is not None and self.markers[goal].kept:
            goal = goal.before
        return self.staged[self.markers[goal].token] if goal is not None else {}

    def watch(self, process: Process, name: str, path: Path) -> None:
        """After a step."""
        if name not in CHANGES or not path.is_relative_to(OUT) or path == OUT:
            return
        top = path.relative_to(OUT).parts[0]
        if top == "_leases":
            goal = parse_goal(path.stem)
            if goal is not None:
                self._watch_lease(process, name, path, goal)
        elif top == "_staging" and name == "rename":
            # An obsolete file has left the results.
            self.look()
        elif top not in ("_staging", "_logs", "_sums"):
            self.look()

    def _watch_lease(self, process: Process, name: str, path: Path, goal: Goal) -> None:
        if name == "create":
            self.leases[path] = self.makers[path] = process
            self.num_executions[goal] += 1
        elif name == "remove":
            self.num_executions[goal] -= 1
            if self.leases.pop(path) is not process and goal not in self.markers:
                self.world.violate(f"{path} of an undecided goal was removed by another")

    def look(self) -> None:
        """Compare what readers see with what they saw before."""
        self._look_at_markers()
        files = self._result_files()
        for path in files.keys() | self.results.keys():
            new, relative = files.get(path), path.relative_to(OUT).as_posix()
            goal = self.standing.get(unit_of(path))
            now = self.contents(goal).get(relative)
            before = self.contents(goal.before).get(relative) if goal is not None and goal.retry else None
            if new != now and (new != self.results.get(path) or new != before):
                self.world.violate(f"{path} holds {new!r}; {goal} has {now!r}, before it stood {before!r}")
        self.results = files

    def _look_at_markers(self) -> None:
        seen = self._read_markers()
        for goal, data in self.marker_bytes.items():
            if seen.get(goal) != data:
                self.world.violate(f"the marker of {goal} has changed or gone")
        for goal in sorted(seen.keys() - self.marker_bytes.keys()):
            self._add_marker(goal, seen[goal])

    def _read_markers(self) -> dict[Goal, bytes]:
        found = {path: parse_goal(path.stem) for path in self.world.disk.files_below(OUT / "_done")}
        goals = [goal for goal in found.values() if goal is not None]
        if len(set(goals)) < len(found):
            self.world.violate(f"a goal has two markers, or one is none: {sorted(found)}")
        return {goal: self.world.disk.read(path) for path, goal in found.items() if goal is not None}

    def _result_files(self) -> dict[Path, bytes]:
        tops = [name for name in self.world.disk.names(OUT) if name not in OWN and not name.startswith("plan")]
        return {path: data for top in tops for path, data in self.world.disk.files_below(OUT / top).items()}

    def _add_marker(self, goal: Goal, data: bytes) -> None:
        marker = Marker.from_bytes(data)
        if marker.token not in self.staged:
            self._check_quarantine(goal, marker)
            self.staged[marker.token] = {}
        if goal.retry:
            self._check_retry(goal, marker)
        self.marker_bytes[goal], self.markers[goal] = data, marker
        self.standing[goal.unit] = max(goal, self.standing.get(goal.unit, goal))
        if marker.goal != goal or {file.path: file.size for file in marker.files} != {
            path: len(content) for path, content in self.contents(goal).items()
        }:
            self.world.violate(f"{goal} was reached by {marker}, its files are {self.contents(goal)}")

    def _check_quarantine(self, goal: Goal, marker: Marker) -> None:
        owners = [owner for path, owner in self.leases.items() if parse_goal(path.stem) == goal]
        if not (marker.kept if goal.retry else marker.quarantined):
            self.world.violate(f"{marker} is of an execution that nobody began")
        if self.num_executions[goal] < MAX_EXECUTIONS:
            self.world.violate(f"{goal} was quarantined after {self.num_executions[goal]} executions")
        if any(owner.is_alive and owner not in self.world.disturbed for owner in owners):
            self.world.violate(f"{goal} was quarantined while an undisturbed rank worked on it")

    def _check_retry(self, goal: Goal, marker: Marker) -> None:
        """A retry's marker keeps what stood, or replaces it by something better."""
        before = self.markers.get(goal.before)
        if before is None:
            self.world.violate(f"{goal} was reached before {goal.before}")
            return
        counts = self.counts.get(marker.token)
        is_taken = counts is not None and _is_to_be_taken(counts, before.counts, marker.token in self.forcing)
        if marker.kept is is_taken:
            self.world.violate(f"{goal}: of {before.counts} and {counts} the wrong one was taken")
        if marker.kept and (marker.files, marker.counts) != (before.files, before.counts):
            self.world.violate(f"{goal} is to keep {before}, and says {marker}")
        # Counts never sink unless somebody has named the unit.
        if marker.counts.rows < before.counts.rows and marker.token not in self.forcing:
            self.world.violate(f"{goal} has {marker.counts.rows} rows, {goal.before} had {before.counts.rows}")

    def check_whole(self, goal: Goal) -> None:
        """Of a goal it was said that it stands: so it does, with every file and no other, unless a later one does."""
        if goal not in self.markers:
            self.world.violate(f"{goal} was called done and has no marker")
        self.returned.add(goal)
        if self.standing[goal.unit] == goal:
            self._check_files(goal)

    def _check_files(self, goal: Goal) -> None:
        there = {path.relative_to(OUT).as_posix(): data for path, data in self.results.items()}
        files = {path: data for path, data in there.items() if unit_of(Path(path)) == goal.unit}
        if files != self.contents(goal):
            self.world.violate(f"{goal} was called done with {self.contents(goal)}, and there are {files}")

    def on_power_loss(self) -> None:
        """Everybody is dead. What was promised is there; what was only seen may be gone, and counts no more."""
        seen = self._read_markers()
        for goal in [goal for goal, data in self.marker_bytes.items() if seen.get(goal) != data]:
            if goal in self.returned:
                self.world.violate(f"{goal} was called done, and its marker went with the power")
            del self.markers[goal], self.marker_bytes[goal]
        self.standing = {}
        for goal in sorted(self.markers):
            if goal.retry and goal.before not in self.markers:
                self.world.violate(f"the marker of {goal} outlived that of {goal.before}")
            self.standing[goal.unit] = goal
        self.results = self._result_files()
        for goal in self.standing.values():
            self._check_durable(goal)
        standing = self.world.disk.names(OUT / "_leases")
        self.leases = {path: owner for path, owner in self.makers.items() if path.name in standing}
        self.num_executions = Counter(goal for path in self.leases if (goal := parse_goal(path.stem)) is not None)
        self.look()

    def _check_durable(self, goal: Goal) -> None:
        """Each file of a goal is under its name, or staged, with what stood before it under its name."""
        if goal in self.returned:
            self._check_files(goal)
        staged = self.world.disk.files_below(OUT / self.markers[goal].staging).values()
        before = self.contents(goal.before) if goal.retry else {}
        for path, data in self.contents(goal).items():
            found = self.results.get(OUT / path)
            if found != data and (data not in staged or found != before.get(path)):
                self.world.violate(f"{path} of {goal} went with the power")


def unit_of(path: Path) -> int:
    """The unit of a result file."""
    return int(path.stem.rpartition("_")[2])


def _is_to_be_taken(new: UnitCounts, old: UnitCounts, is_forced: bool) -> bool:
    """What a retry replaces, said once more: more rows, fewer errors, or no unit error, and none of them worse."""
    has_damage, had_damage = new.unit_error is not None, old.unit_error is not None
    if is_forced and not has_damage:
        return new.rows > 0 or not old.rows
    is_worse = new.rows < old.rows or (has_damage and not had_damage)
    is_better = new.rows > old.rows or new.errors < old.errors or (had_damage and not has_damage)
    return not is_worse and (is_better or is_forced)
