"""Ranks that work on a simulated OUT under faults, and run what their scenario says: first results, then retries."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from ledger_model import MAX_EXECUTIONS, OUT, Model
from ledger_scenarios import Scenario
from simulated_disk import Disk
from simulated_files import Host, Process, SimulatedFiles
from simulated_turns import Turns
from store_samples import CONFIG, make_units

from geoloc_batch.errors import OutputError
from geoloc_batch.records import UnitError
from geoloc_batch.store.goal import Goal, parse_goal
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.plan import load_plan
from geoloc_batch.store.publish import read_published
from geoloc_batch.store.tables import embedding_paths, errors_path, predictions_path

Task = Literal["any", "first results", "retries"] | frozenset[int]


@dataclass(eq=False)
class Rank:
    """A process that works until nothing is left."""

    model: Model
    process: Process
    num_units: int
    scenario: Scenario
    task: Task = "any"
    """What it does: first results and retries by chance, or one of them; or it makes these units again."""
    is_through: bool = False
    """acquire has said that everything is done."""
    _in_hand: set[str] = field(default_factory=set)
    _forced: frozenset[int] = frozenset()
    _has_failed: bool = False

    def run(self) -> None:
        """Open, adopt, work, close; an error that was given ends it, as it ends a job."""
        self.files = SimulatedFiles(self.model.world, self.process)
        self.random = Random(f"{self.scenario.seed}.{self.process.owner.pid}")
        ledger = Ledger(OUT, files=self.files)
        try:
            ledger.open(CONFIG)
            self._work_through(ledger)
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

    def _work_through(self, ledger: Ledger) -> None:
        """First results, unless this rank is there for retries alone; then rounds of retries."""
        if isinstance(self.task, frozenset):
            self._retry(ledger, self.task, 0.0)
            return
        rounds = self.random.randint(1 if self.task == "retries" else 0, self.scenario.max_retries)
        if self.task == "first results" or not rounds or (self.task == "any" and self.random.random() < 0.8):
            ledger.adopt_plan(make_units(self.num_units))
            self._work(ledger, [Goal(unit) for unit in range(self.num_units)])
            if self.is_through and not self._has_failed:
                self._check_totals(ledger)
        for _ in range(rounds if self.task != "first results" else 0):
            # Meanwhile others may end what this one then takes up.
            self.files.sleep(self.random.choice([0.0, 5.0, 20.0, 300.0]))
            forced = frozenset(unit for unit in sorted(self.model.standing) if self.random.random() < 0.3)
            self._retry(ledger, forced, 0.7)

    def _check_totals(self, ledger: Ledger) -> None:
        found = ledger.totals()
        if found.done != self.num_units or found.units != self.num_units:
            self.model.world.violate(f"all is done, and totals says {found}")
        if not self.scenario.max_retries and not self.scenario.num_retriers:
            counts = [self.model.markers[Goal(unit)].counts for unit in range(self.num_units)]
            if (found.samples, found.rows) != (sum(c.samples for c in counts), sum(c.rows for c in counts)):
                self.model.world.violate(f"{counts} add up to {found}")

    def _retry(self, ledger: Ledger, forced: frozenset[int], chance: float) -> None:
        self._forced = forced
        units = ledger.adopt_retries(lambda counts: self.random.random() < chance, forced)
        self._work(ledger, [ledger._done.goal(unit.index) for unit in units])

    def _work(self, ledger: Ledger, goals: list[Goal]) -> None:
        while not self._has_failed:
            standing = dict(self.model.standing)
            taken = ledger.acquire()
            if taken is None:
                for goal in goals:
                    self.model.check_whole(goal)
                    # And what a retry has published before we asked, unless another rank has cleared up before that.
                    if ledger._adding is None or ledger._adding._has_cleared_up:
                        self.model.check_whole(standing.get(goal.unit, goal))
                self.is_through = True
                return
            if taken == "wait" and not self._in_hand and self._is_asked_to_end():
                self._end_early(ledger, goals)
                return
            if taken == "wait":
                self.files.sleep(5.0)
                continue
            if taken.unit.index in self._forced:
                self.model.forcing.add(taken.token)
            self._in_hand.add(taken.token)
            if self.scenario.in_hand == 1:
                self._finish(ledger, taken)
                continue
            self.model.world.spawn(self.process, lambda execution=taken: self._finish(ledger, execution))
            while len(self._in_hand) >= self.scenario.in_hand:
                self.files.sleep(1.0)

    def _is_asked_to_end(self) -> bool:
        is_at_the_end = self.model.world.num_early_steps > 0
        return not is_at_the_end and self.random.random() < self.scenario.stop_chance

    def _end_early(self, ledger: Ledger, goals: list[Goal]) -> None:
        """Asked to end, as a job that gets a signal is."""
        ledger.totals(in_haste=lambda: True)
        if ledger.is_through:
            for goal in goals:
                self.model.check_whole(goal)

    def _finish(self, ledger: Ledger, execution: Execution) -> None:
        """One unit, from its photos to its commit."""
        try:
            self.files.sleep(self.random.choice([0.0, 3.0, 20.0, 300.0]))
            if execution.unit.index == self.scenario.poison and execution.goal.retry <= self.scenario.poisons_retries:
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
        model, goal = self.model, execution.goal
        try:
            outputs, counts = self._write(execution)
        except OSError:
            # As the engine does: a folder that was swept means lost.
            if not ledger.is_lost(execution):
                raise
            ledger.abandon(execution)
            return
        try:
            has_won = ledger.commit(execution, outputs, counts)
        except OSError:
            if self.process not in model.world.failed or self.random.random() < 0.5:
                raise
            ledger.abandon(execution)
            return
        if goal not in model.markers or (model.markers[goal].token == execution.token) != has_won:
            model.world.violate(f"commit said {has_won} to {execution}, the marker is {model.markers.get(goal)}")
        if has_won:
            model.check_whole(goal)

    def _write(self, execution: Execution) -> tuple[list[str], UnitCounts]:
        """Files of its own: some executions find errors, some are longer than others, some are cut short."""
        unit, number = execution.unit.index, int(execution.token, 16)
        paths = [*embedding_paths(unit), predictions_path(unit)][: self.random.choice([0, 1, 3, 3])]
        rows, errors, is_cut = self.random.randint(1, 3), number % 2, self.random.random() < 0.3
        if self.scenario.is_improving:
            rows, errors, is_cut = 1 + execution.goal.retry, 1 - execution.goal.retry % 2, False
        if errors:
            paths.append(errors_path(unit))
        damage = UnitError("a shard", "cut", 7, None, retryable=True) if is_cut else None
        model, token = self.model, execution.token
        # Known before they are written: a commit may be seen by others at once.
        model.counts[token] = UnitCounts(
            samples=rows + errors, rows=rows, errors=errors, unit_error=damage, warnings=()
        )
        model.staged[token] = {path: f"{token} {path}".encode() + b"." * (number % 3) for path in paths}
        for path, data in model.staged[token].items():
            self.files.write(execution.stage(path), data)
        return paths, model.counts[token]


def run_scenario(scenario: Scenario) -> Turns:
    """Run a scenario to its end.

    Raises:
        ContractError: the ledger broke its promise.
    """
    # Ranks choose at random where to begin.
    random.seed(scenario.seed)
    disk = Disk(has_links=scenario.has_links, can_lose_power=any(fault.kind == "power" for fault in scenario.faults))
    world = Turns(disk, seed=scenario.seed, switch_chance=scenario.switch_chance, faults=scenario.faults)
    disk.make_folder(OUT.parent)
    disk.sync_folder(OUT.parent.parent)
    model = Model(world)
    world.watch, world.on_power_loss = model.watch, model.on_power_loss
    hosts = [Host(f"host{number}", ahead_s=1000.0 * number) for number in range(scenario.num_hosts)]

    def start(number: int, task: Task = "any", num_units: int = scenario.num_units, delay_s: float = 0.0) -> Rank:
        rank = Rank(model, world.new_process(hosts[number % len(hosts)]), num_units, scenario, task)
        world.spawn(rank.process, rank.run, delay_s)
        return rank

    for number, num_units in enumerate(scenario.first_units):
        delay_s = world.random.choice([0.0, 0.0, 5.0, 100.0])
        start(number, num_units=min(num_units, scenario.num_units), delay_s=delay_s)
    for number in range(scenario.num_retriers):
        start(number, "retries")
    for number in range(scenario.num_late):
        start(number, delay_s=world.random.choice([30.0, 100.0, 400.0]))
    world.run()
    world.num_early_steps = world.steps
    _run_to_the_end(model, start)
    _check_the_end(model, scenario)
    return world


def _run_to_the_end(model: Model, start: Callable[[int, Task], Rank]) -> None:
    """Ranks without faults, one after another, until one is through."""
    world = model.world
    world.end_faults()
    tasks: list[Callable[[], Task]] = [lambda: "first results", lambda: _cut_off(model), lambda: frozenset()]
    for task in tasks:
        # A poisoned unit kills three of them.
        for number in range(MAX_EXECUTIONS + 1):
            rank = start(number, task())
            world.run()
            if rank.is_through:
                break
        else:
            world.violation = "the units do not come to an end"
            world.run()
        # What the dead left behind is old enough at the end.
        world.pause(1_000_000.0)


def _cut_off(model: Model) -> frozenset[int]:
    """Units of which a retry was begun and not ended: its leavings go with the next one."""
    names = [name for folder in ("_staging", "_leases") for name in model.world.disk.names(OUT / folder)]
    goals = {goal for name in names if (goal := parse_goal(name.partition(".")[0])) is not None}
    return frozenset(goal.unit for goal in goals - model.markers.keys())


def _check_the_end(model: Model, scenario: Scenario) -> None:
    disk: Disk = model.world.disk
    assert set(model.standing) == set(range(scenario.num_units))
    for goal in model.standing.values():
        model.check_whole(goal)
    left = [name for folder in ("_staging", "_leases") for name in disk.names(OUT / folder)]
    assert not left, f"{left} stay"
    plan = load_plan(OUT, disk.read).units
    for (unit, _), marker in model.markers.items():
        assert marker.source == plan[unit].source, f"unit {unit} is {marker.source}, the plan says {plan[unit].source}"
    assert json.loads(read_published(OUT / "run.json", disk.read) or b"{}")["config"] == CONFIG
    if 0 <= scenario.poison < scenario.num_units:
        assert model.markers[Goal(scenario.poison)].quarantined
