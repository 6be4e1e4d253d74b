"""Ranks that work on a simulated OUT under faults, and the model that looks on: nothing lost, doubled or mixed.

Each execution stages files that no other execution would, so that one byte of a loser among a winner's files shows.
The model is asked after each step that could change what readers see, and at the end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ledger_scenarios import Scenario
from simulated_disk import Disk
from simulated_files import Host, Process, SimulatedFiles
from simulated_turns import Turns
from store_samples import CONFIG, make_units

from geoloc_batch.errors import OutputError
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.marker import Marker
from geoloc_batch.store.plan import load_plan
from geoloc_batch.store.publish import read_published
from geoloc_batch.store.tables import embedding_paths, errors_path, predictions_path

OUT = Path("/shared/out")
OWN = ("_leases", "_staging", "_done", "_logs", "run.json")
MAX_EXECUTIONS = 3
CHANGES = frozenset({"create", "open_empty", "put", "link", "rename", "remove", "remove_folder", "make_folder"})


class Model:
    """What must hold, from what was seen."""

    def __init__(self, world: Turns) -> None:
        self.world = world
        self.markers: dict[int, Marker] = {}
        self.marker_bytes: dict[int, bytes] = {}
        self.results: dict[Path, bytes] = {}
        self.staged: dict[str, dict[str, bytes]] = {}
        self.returned: set[int] = set()
        """Units whose commit, or whose end, was told to a caller."""
        self.leases: dict[Path, Process] = {}
        """Who made each lease that stands."""
        self.makers: dict[Path, Process] = {}
        """Who made each lease that ever stood, as the last."""
        self.num_executions: Counter[int] = Counter()
        """Of each unit: those that were begun and not given back."""

    def watch(self, process: Process, name: str, path: Path) -> None:
        """After a step."""
        if name not in CHANGES or not path.is_relative_to(OUT) or path == OUT:
            return
        top = path.relative_to(OUT).parts[0]
        if top == "_leases" and path.stem.isdecimal():
            self._watch_lease(process, name, path)
        elif top not in ("_leases", "_staging", "_logs"):
            self.look()

    def _watch_lease(self, process: Process, name: str, path: Path) -> None:
        unit = int(path.stem)
        if name == "create":
            self.leases[path] = self.makers[path] = process
            self.num_executions[unit] += 1
        elif name == "remove":
            self.num_executions[unit] -= 1
            if self.leases.pop(path) is not process and unit not in self.markers:
                self.world.violate(f"{path} of an undecided unit was removed by another")

    def look(self) -> None:
        """Compare what readers see with what they saw before."""
        seen = self._read_markers()
        for unit, data in self.marker_bytes.items():
            if seen.get(unit) != data:
                self.world.violate(f"the marker of unit {unit} has changed or gone")
        for unit in seen.keys() - self.marker_bytes.keys():
            self._add_marker(unit, seen[unit])
        files = self._result_files()
        for path, data in self.results.items():
            if files.get(path) != data:
                self.world.violate(f"{path} has changed or gone")
        for path, data in files.items():
            marker = self.markers.get(int(path.stem.rpartition("_")[2]))
            if marker is None or data != self.staged[marker.token].get(path.relative_to(OUT).as_posix()):
                self.world.violate(f"{path} holds {data!r}, which is not what {marker} has committed")
        self.results = files

    def _read_markers(self) -> dict[int, bytes]:
        found = self.world.disk.files_below(OUT / "_done")
        if len({path.stem for path in found}) < len(found):
            self.world.violate(f"a unit has two markers: {sorted(found)}")
        return {int(path.stem): data for path, data in found.items()}

    def _result_files(self) -> dict[Path, bytes]:
        tops = [name for name in self.world.disk.names(OUT) if name not in OWN and not name.startswith("plan")]
        return {path: data for top in tops for path, data in self.world.disk.files_below(OUT / top).items()}

    def _add_marker(self, unit: int, data: bytes) -> None:
        marker = Marker.from_bytes(data)
        if marker.quarantined:
            self._check_quarantine(unit)
            self.staged[marker.token] = {}
        staged = self.staged.get(marker.token, {})
        if marker.unit != unit or {file.path: file.size for file in marker.files} != {
            path: len(content) for path, content in staged.items()
        }:
            self.world.violate(f"unit {unit} was committed as {marker}, staged were {staged}")
        self.marker_bytes[unit], self.markers[unit] = data, marker

    def _check_quarantine(self, unit: int) -> None:
        owners = [owner for path, owner in self.leases.items() if int(path.stem) == unit]
        if self.num_executions[unit] < MAX_EXECUTIONS:
            self.world.violate(f"unit {unit} was quarantined after {self.num_executions[unit]} executions")
        if any(owner.is_alive and owner not in self.world.disturbed for owner in owners):
            self.world.violate(f"unit {unit} was quarantined while an undisturbed rank worked on it")

    def check_whole(self, unit: int) -> None:
        """A unit of which it was said that it stands: so it does, with every file."""
        marker = self.markers.get(unit)
        if marker is None:
            self.world.violate(f"unit {unit} was called done and has no marker")
        self.returned.add(unit)
        for path in self.staged[self.markers[unit].token]:
            if OUT / path not in self.results:
                self.world.violate(f"unit {unit} was called done and {path} is not there")

    def on_power_loss(self) -> None:
        """Everybody is dead. What was promised is there; what was only seen may be gone, and counts no more."""
        seen = self._read_markers()
        files = self._result_files()
        for unit in [unit for unit, data in self.marker_bytes.items() if seen.get(unit) != data]:
            if unit in self.returned:
                self.world.violate(f"unit {unit} was called done, and its marker went with the power")
            del self.markers[unit], self.marker_bytes[unit]
        for unit, marker in self.markers.items():
            for path, data in self.staged[marker.token].items():
                staged = self.world.disk.files_below(OUT / marker.staging).values()
                if files.get(OUT / path) != data and (unit in self.returned or data not in staged):
                    self.world.violate(f"{path} of the committed unit {unit} went with the power")
        self.results = {}
        standing = self.world.disk.names(OUT / "_leases")
        self.leases = {path: owner for path, owner in self.makers.items() if path.name in standing}
        self.num_executions = Counter(int(path.stem) for path in self.leases)
        self.look()


@dataclass(eq=False)
class Rank:
    """A process that works until nothing is left."""

    model: Model
    process: Process
    num_units: int
    scenario: Scenario
    is_through: bool = False
    """acquire has said that everything is done."""
    _in_hand: set[str] = field(default_factory=set)
    _has_failed: bool = False

    def run(self) -> None:
        """Open, adopt, work, close; an error that was given ends it, as it ends a job."""
        self.files = SimulatedFiles(self.model.world, self.process)
        self.random = Random(f"{self.scenario.seed}.{self.process.owner.pid}")
        ledger = Ledger(OUT, files=self.files)
        try:
            ledger.open(CONFIG)
            ledger.adopt_plan(make_units(self.num_units))
            self._work(ledger)
        except (OSError, OutputError):
            if self.process not in self.model.world.failed:
                raise
            self._has_failed = True
        while self._in_hand:
            self.files.sleep(1.0)
        try:
            ledger.close()
        except OSError:
            if self.process not in self.model.world.failed:
                raise
        # Others live on: who calls the ledger need not be a program that ends.
        if self.random.random() < 0.5:
            self.model.world.kill(self.process)

    def _work(self, ledger: Ledger) -> None:
        while not self._has_failed:
            taken = ledger.acquire()
            if taken is None:
                for unit in range(self.num_units):
                    self.model.check_whole(unit)
                self.is_through = True
                return
            if taken == "wait":
                self.files.sleep(5.0)
                continue
            self._in_hand.add(taken.token)
            if self.scenario.in_hand == 1:
                self._finish(ledger, taken)
                continue
            self.model.world.spawn(self.process, lambda execution=taken: self._finish(ledger, execution))
            while len(self._in_hand) >= self.scenario.in_hand:
                self.files.sleep(1.0)

    def _finish(self, ledger: Ledger, execution: Execution) -> None:
        """One unit, from its photos to its commit."""
        try:
            self.files.sleep(self.random.choice([0.0, 3.0, 20.0, 300.0]))
            if execution.unit.index == self.scenario.poison:
                self.model.world.kill(self.process)
            if self.random.random() < self.scenario.abandon_chance:
                ledger.abandon(execution)
            else:
                self._commit(ledger, execution)
        except OSError:
            if self.process not in self.model.world.failed:
                raise
            self._has_failed = True
        finally:
            self._in_hand.discard(execution.token)

    def _commit(self, ledger: Ledger, execution: Execution) -> None:
        model, unit = self.model, execution.unit.index
        try:
            outputs = self._write(execution)
        except OSError:
            # As the engine does: a folder that was swept means lost.
            if not ledger.is_lost(execution):
                raise
            ledger.abandon(execution)
            return
        counts = UnitCounts(samples=len(outputs), rows=len(outputs), errors=0, unit_error=None, warnings=())
        try:
            has_won = ledger.commit(execution, outputs, counts)
        except OSError:
            if self.process not in model.world.failed or self.random.random() < 0.5:
                raise
            ledger.abandon(execution)
            return
        if unit not in model.markers or (model.markers[unit].token == execution.token) != has_won:
            model.world.violate(f"commit said {has_won} to {execution}, the marker is {model.markers.get(unit)}")
        if has_won:
            model.check_whole(unit)

    def _write(self, execution: Execution) -> list[str]:
        """Files of its own: some executions find errors, and some are longer than others."""
        unit, number = execution.unit.index, int(execution.token, 16)
        paths = [*embedding_paths(unit), predictions_path(unit)][: self.random.choice([1, 3])]
        if number % 2:
            paths.append(errors_path(unit))
        # Known before they are written: a commit may be seen by others at once.
        self.model.staged[execution.token] = {
            path: f"{execution.token} {path}".encode() + b"." * (number % 3) for path in paths
        }
        for path, data in self.model.staged[execution.token].items():
            self.files.write(execution.stage(path), data)
        return paths


def run_scenario(scenario: Scenario) -> Turns:
    """Run a scenario to its end.

    Raises:
        ContractError: the ledger broke its promise.
    """
    disk = Disk(has_links=scenario.has_links, can_lose_power=any(fault.kind == "power" for fault in scenario.faults))
    world = Turns(disk, seed=scenario.seed, switch_chance=scenario.switch_chance, faults=scenario.faults)
    disk.make_folder(OUT.parent)
    disk.sync_folder(OUT.parent.parent)
    model = Model(world)
    world.watch, world.on_power_loss = model.watch, model.on_power_loss
    hosts = [Host(f"host{number}", ahead_s=1000.0 * number) for number in range(scenario.num_hosts)]

    def start(number: int, num_units: int, delay_s: float) -> Rank:
        rank = Rank(model, world.new_process(hosts[number % len(hosts)]), num_units, scenario)
        world.spawn(rank.process, rank.run, delay_s)
        return rank

    for number, num_units in enumerate(scenario.first_units):
        start(number, min(num_units, scenario.num_units), world.random.choice([0.0, 0.0, 5.0, 100.0]))
    for number in range(scenario.num_late):
        start(number, scenario.num_units, world.random.choice([30.0, 100.0, 400.0]))
    world.run()
    world.num_early_steps = world.steps
    _run_to_the_end(world, start, scenario)
    _check_the_end(model, scenario)
    return world


def _run_to_the_end(world: Turns, start: Callable[[int, int, float], Rank], scenario: Scenario) -> None:
    """Ranks without faults, one after another, until one is through."""
    world.end_faults()
    # A poisoned unit kills three of them.
    for number in range(MAX_EXECUTIONS + 1):
        rank = start(number, scenario.num_units, 0.0)
        world.run()
        if rank.is_through:
            break
    else:
        world.violation = "the units do not come to an end"
        world.run()
    # What the dead left behind is old enough now.
    world.pause(1_000_000.0)
    start(0, scenario.num_units, 0.0)
    world.run()


def _check_the_end(model: Model, scenario: Scenario) -> None:
    disk = model.world.disk
    assert set(model.markers) == set(range(scenario.num_units))
    left = [name for folder in ("_staging", "_leases") for name in disk.names(OUT / folder)]
    assert not left, f"{left} stay"
    plan = load_plan(OUT, disk.read).units
    for unit, marker in model.markers.items():
        assert marker.source == plan[unit].source, f"unit {unit} is {marker.source}, the plan says {plan[unit].source}"
    assert json.loads(read_published(OUT / "run.json", disk.read) or b"{}")["config"] == CONFIG
    if 0 <= scenario.poison < scenario.num_units:
        assert model.markers[scenario.poison].quarantined
