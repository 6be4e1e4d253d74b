"""Ledger: hands out the units of a plan and publishes what came of them, exactly once, for any number of ranks.

Ranks share nothing but the folder. OUT then holds:

    run.json              the pinned config                     (pin.py)
    plan.parquet          the units and their indexes           (plan.py)
    _leases/{goal}.{slot} who works on what                     (lease.py)
    _staging/{goal}.{token}/  what an execution has written     (commit.py)
    _done/{thousands}/{goal}.json  what is committed            (marker.py)
    _sums/                what many units add up to             (sums.py)

A goal is a unit's first result, or that of a retry            (goal.py)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from geoloc_batch.records import Unit
from geoloc_batch.store.adding import MANY_UNITS, Adding, totals_of, totals_of_own
from geoloc_batch.store.adoption import adopt
from geoloc_batch.store.commit import Commits
from geoloc_batch.store.done import Done
from geoloc_batch.store.execution import Execution, Totals
from geoloc_batch.store.files import FilePort, OsFiles
from geoloc_batch.store.goal import THOUSAND
from geoloc_batch.store.hands import Hands
from geoloc_batch.store.lease import Leases
from geoloc_batch.store.marker import UnitCounts, read_marker
from geoloc_batch.store.outcome import Outcomes, notes_of
from geoloc_batch.store.pin import config_hash, pin_config, prepare_folder, refuse_object_store
from geoloc_batch.store.publish import JsonValue
from geoloc_batch.store.retry import retried
from geoloc_batch.store.schedule import Schedule
from geoloc_batch.store.search import Search
from geoloc_batch.store.some import SOME_STAGED
from geoloc_batch.store.sums import Sums

__all__ = ["Execution", "Ledger", "Totals", "UnitCounts"]


class Ledger:
    """One rank's hand on an OUT. acquire, commit and abandon may be called from different threads."""

    def __init__(
        self,
        out: Path | str,
        *,
        beat_s: float = 15.0,
        stale_beats: int = 4,
        max_executions: int = 3,
        files: FilePort | None = None,
        worker: str = "",
    ) -> None:
        """Nothing is touched before `open`.

        Args:
            out: the output folder; as text, so that an error shows a URL as it was given.
            beat_s: seconds between two touches of a lease.
            stale_beats: beats that a lease may miss before others take it for dead.
            max_executions: executions that end without a commit before the unit is quarantined.
            files: the machine; a test's own, or None for the real one.
            worker: name of this process for those who look on, by default its host and number.
        """
        refuse_object_store(out)
        # Absolute, so that a later change of the working folder moves nothing.
        self.out = Path(out).absolute()
        self.warnings: list[str] = []
        self.kept: list[int] = []
        """Units whose retry here gave nothing to replace what stands."""
        self.notes: list[str] = []
        """What came of retries here that a user should know."""
        self._files = files or OsFiles()
        self._max_executions = max_executions
        self._make_leases = partial(Leases, beat_s=beat_s, stale_beats=stale_beats, worker=worker)
        self._turn = threading.Lock()
        self.is_through = False
        """Whether all units are done, and what dead ranks have left of these has been put in its place."""
        self._adding: Adding | None = None
        self._is_open = False

    def open(self, pinned: Mapping[str, JsonValue], *, adoptable: Collection[str] = ()) -> dict[str, JsonValue]:
        """Make or take up OUT: probe it, pin or compare the config, finish what a crash cut off.

        Args:
            pinned: everything that decides what the rows are.
            adoptable: keys that the user left to us: a pinned value replaces the given one.

        Returns:
            The config that holds.

        Raises:
            OutputError: OUT cannot be used, is not ours, or is pinned to another config.
        """
        has_links = prepare_folder(self._files, self.out)
        config = pin_config(self._files, self.out, pinned, adoptable, has_links=has_links)
        self._config_hash = config_hash(config)
        self._leases = self._make_leases(self._files, self.out / "_leases")
        self._commits = Commits(self._files, self.out, has_links=has_links)
        self._hands = Hands(self._files, self._leases, self._commits)
        self._done = Done(self._files, self.out)
        self.units: Sequence[Unit] = ()
        """Those of this call, as they are pinned; of a retry all that are planned."""
        self._is_open = True
        self._commits.sweep(self._leases, (SOME_STAGED, self._max_executions))
        return config

    def adopt_plan(self, units: Sequence[Unit]) -> list[Unit]:
        """Pin units, or find them again.

        Args:
            units: in the order in which they would be numbered; their own indexes mean nothing.

        Returns:
            The given units as they are pinned, in the order of their indexes; a source that its pinned spelling no
            longer leads to is spelt as it is given now. Units that are pinned and were not given stay pinned, and are
            not executed by this rank. `warnings` names sources that have changed.

        Raises:
            InputError: a source is given twice, or has the name of another file that was pinned.
            OutputError: a source was pinned in another way, and not all of it is done; or the plan was removed.
        """
        assert self._is_open, "open() comes first"
        self._done.sums = Sums(self._files, self.out, self._leases)
        # What is found now holds for a while; what is found later for as long as we live.
        self._done.learn()
        adopted = adopt(self._files, self.out, units, self._done, has_links=self._commits.has_links)
        self._plan(adopted.units, Schedule(adopted.units, self._done), adopted.sources)
        self.warnings = adopted.warnings
        return adopted.units

    def adopt_retries(self, choose: Callable[[UnitCounts], bool], forced: Collection[int] = ()) -> list[Unit]:
        """Take up done units once more, in place of adopt_plan. Totals are then those of all units in OUT.

        Args:
            choose: whether a unit with these counts is tried again. What comes of it stands in place of what stood if
                something is gained by it and nothing good lost.
            forced: indexes of units that are tried whatever their counts, and replaced unless they cannot be read.

        Returns:
            The units to execute, each spelt as it can be opened. `warnings` names those that were left out.

        Raises:
            InputError: a forced unit is not planned, or not done.
            OutputError: the plan, or a marker, is broken.
        """
        assert self._is_open, "open() comes first"
        found = retried(self._files, self.out, self._done, choose, forced)
        self._done = Done(self._files, self.out)
        self._done.retries = found.retries
        sources = {unit.index: unit.source for unit in found.planned}
        self._plan(found.planned, Schedule(found.units, self._done), sources, forced)
        self.warnings = found.warnings
        return found.units

    def _plan(
        self, units: Sequence[Unit], schedule: Schedule, sources: Mapping[int, str], forced: Collection[int] = ()
    ) -> None:
        self.units = units
        self.is_through = False
        self._schedule = schedule
        if self._adding is not None:
            self._adding.close()
        self._done.sources = sources
        if len(units) <= THOUSAND:
            self._done.sums = None
        sums = self._done.sums
        self._adding = None
        if sums is not None:
            self._adding = Adding(self._files, self.out, self._leases, self._done, sums, units)
        self._outcomes = Outcomes(
            commits=self._commits, config=self._config_hash, sources=sources, forced=forced, worker=self._leases.worker
        )
        self._search = Search(
            self._files, self._leases, self._done, self._hands, self._outcomes, schedule, self._max_executions
        )

    def acquire(self) -> Execution | Literal["wait"] | None:
        """The next unit to work on, largest first.

        Returns:
            An Execution; "wait" where there is nothing to take now but units are still in work, here or elsewhere
            (finish and commit what is in hand, then ask again in a second); None where every unit is committed or
            quarantined and every file stands under its name, but for those of a retry beside us that has just died.
            A unit that a dead execution has left comes last and alone: if it kills this process too, nothing else is
            blamed for it. So "wait" is also the answer while such a unit is in hand.
        """
        with self._turn:
            if any(held.is_suspect for held in self._hands.all()):
                return "wait"
            is_time = self._search.is_time()
            found = self._search.look() if is_time else "wait"
            is_all_done = found is None
            if is_all_done:
                found = self._end()
            if is_time:
                self._search.rest(in_vain=found == "wait", is_all_done=is_all_done)
            if self._adding is not None and found == "wait" and not self._hands.all():
                self._adding.go_on(may_begin=is_time)
            elif self._adding is not None and isinstance(found, Execution):
                self._adding.pause()
            return found

    def _end(self) -> Literal["wait"] | None:
        """Some rank may have died between its marker and its moves. Of thousands one looks, and the others wait."""

        def clear_up() -> None:
            self._commits.sweep(self._leases)

        if self._adding is not None:
            self.is_through = self._adding.end(clear_up)
        else:
            clear_up()
            self.is_through = True
        return None if self.is_through else "wait"

    def commit(
        self, execution: Execution, outputs: Sequence[str], counts: UnitCounts, *, limiting_stage: str = ""
    ) -> bool:
        """Publish what an execution has staged.

        Args:
            execution: from acquire.
            outputs: the files' final paths, relative to OUT, each written and closed under `execution.stage(path)`.
            counts: what came out.
            limiting_stage: what this process waits for, as far as it knows: for those who look on.

        Returns:
            True: it stands, durably. False: another execution of the unit won and ours is cleared away; no error.

        Raises:
            OSError: the disk is full or fails. The execution is still held: abandon it.
        """
        unit, marker = execution.unit, None
        if not self._done.look(unit.index):
            try:
                seconds = self._hands.seconds(execution)
                made = self._outcomes.committed(execution, outputs, counts, seconds, limiting_stage)
                marker = made if self._commits.publish_marker(made) else None
            except FileNotFoundError:
                # Our folder was swept, as is done to losers alone; else a named file was never written.
                if not self._done.look(unit.index) and self._files.stat(execution.staging) is not None:
                    raise
        if marker is None:
            self._hands.clear(execution)
        else:
            self._commits.move_in(marker)
            self._done.add(marker)
            self.kept += [marker.unit] * marker.kept
            self.notes += notes_of(marker, counts)
            self._schedule.learn(unit, marker.seconds)
        self._hands.let_go(execution)
        self._search.wake()
        return marker is not None

    def is_lost(self, execution: Execution) -> bool:
        """Whether another execution of the unit has won. To be asked when writing to the staging folder fails."""
        marker = read_marker(self.out, execution.goal, self._files.read)
        return marker is not None and marker.token != execution.token

    def abandon(self, execution: Execution) -> None:
        """Give a unit back. It counts towards no quarantine and comes first at the next acquire."""
        self._hands.clear(execution)
        self._hands.let_go(execution)
        self._schedule.put_back(execution.unit)
        self._search.wake()

    def totals(self, *, in_haste: Callable[[], bool] = lambda: False) -> Totals:
        """Sums over the adopted units, from their markers; others in OUT do not count.

        Args:
            in_haste: whether this process has been asked to end, which it may be meanwhile: then it waits for no other
                rank, and all may be done and `is_through` false. If it is so from the start and not all is done, only
                its own units are summed up of very many, for reading the markers of all the others would outlast the
                time that it is given.

        Raises:
            OutputError: a marker is broken, or of another source than the plan says.
        """
        if self.is_through and self._adding is not None and (found := self._adding.total()) is not None:
            # Before anything is made of a million units.
            return found
        units = [unit.index for unit in self.units]
        if not self.is_through and in_haste() and len(units) > MANY_UNITS and not self._are_done(units):
            return totals_of_own(self._done, units)
        self._done.look_all(units)
        if not self.is_through and self._are_done(units):
            # Asked to end, perhaps after the last commit, and before acquire could say so.
            self._end()
        if self._adding is None:
            return totals_of(self._done, units)
        return self._adding.total() or self._adding.totals(units, in_haste)

    def _are_done(self, units: Sequence[int]) -> bool:
        return all(unit in self._done for unit in units)

    def close(self) -> None:
        """Give back what is still held and stop the heartbeat. The ledger cannot be used after it."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            for held in self._hands.all():
                self._hands.clear(held.execution)
                self._hands.let_go(held.execution)
            if self._adding is not None:
                self._adding.close()
        finally:
            # Whatever fails above: what is left must grow stale, so that others take it up.
            self._leases.close()
