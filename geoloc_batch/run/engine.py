"""The loop: read | decode | copy | encode | locate | write, overlapped by threads.

The calling thread drives the encoder; a lane of its own locates and gathers rows by unit; another writes tables and
commits. The stream's threads read and decode. No step waits for another rank. Photos that are grouped by location are
located when their unit is whole.

A unit with a photo whose features overflowed (fp16 ends at 65,504) is not committed but set aside, its lease in hand,
and made again as a whole in a precision of wider range: rows of one unit never mix precisions. That happens when this
rank has nothing else to do, or when MAX_ASIDE units wait for it.

Shape letters: B batch, D features.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from geoloc_batch.geo.located import Located
from geoloc_batch.locate.locator import Locator
from geoloc_batch.records import Sample, Unit, UnitEnd
from geoloc_batch.run.grouping import NOT_FINITE, FieldWatch, row_error
from geoloc_batch.run.lanes import Lane
from geoloc_batch.run.open_unit import OpenUnit, Outputs
from geoloc_batch.run.sources import FeatureBatch, FeatureSource
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.transfer import Features
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.store.ledger import Execution, Ledger

__all__ = ["Engine", "Outputs"]

log = logging.getLogger("geoloc_batch")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0
MAX_ASIDE = 8
"""Units that may wait to be made again: their leases keep other ranks off, and a crash costs the work on them."""


class Engine:
    """Runs units from a source through the locators into the ledger.

    Args:
        ledger: open, with its plan adopted.
        outputs: what is written.
        locators: one per tree of `outputs`, may be none.
        telemetry: gets the timers and counts.
        stop: units that are not whole when it is set are given back.
    """

    def __init__(
        self, ledger: Ledger, outputs: Outputs, locators: Sequence[Locator], telemetry: Telemetry, stop: StopSignal
    ) -> None:
        assert len(outputs.trees) == len(locators)
        self._ledger = ledger
        self._outputs = outputs
        self._locators = locators
        # What is grouped waits for all photos of its unit.
        self._at_once = () if outputs.group_by else locators
        self._field_watch = FieldWatch(outputs.group_by)
        self._telemetry = telemetry
        self._stop = stop
        self._can_widen = False
        self._open: dict[int, OpenUnit] = {}
        self._aside: dict[int, OpenUnit] = {}
        self._write_lane: Lane[OpenUnit] = Lane("write", self._write)
        self._locate_lane: Lane[FeatureBatch | UnitEnd] = Lane("locate", self._gather)
        telemetry.queues |= {"locate": self._locate_lane.depth, "write": self._write_lane.depth}

    def run(self, source: FeatureSource) -> None:
        """Work until every unit of the plan is committed by this rank or another, or until asked to stop."""
        done = False
        self._can_widen = source.wider is not None
        try:
            self._work(source, self._units())
            while source.wider is not None and self._aside and not self._is_ending():
                wider = source.wider()
                self._work(wider, self._units_again(source.precision, wider.precision))
                self._work(source, self._units())
            done = True
        finally:
            self._finish(quiet=not done)

    def _work(self, source: FeatureSource, units: Iterable[Unit | None]) -> None:
        with closing(source.features(units, self._telemetry)) as items:
            for item in items:
                with self._telemetry.stage("wait for locate"):
                    self._locate_lane.put(item)

    def _finish(self, *, quiet: bool) -> None:
        try:
            self._locate_lane.close(quiet=quiet)
        finally:
            try:
                self._write_lane.close(quiet=quiet)
            finally:
                for unit in (*self._open.values(), *self._aside.values()):
                    self._ledger.abandon(unit.execution)
                self._open.clear()
                self._aside.clear()

    def _is_ending(self) -> bool:
        return self._stop.is_set() or self._locate_lane.failed or self._write_lane.failed

    def _units(self) -> Iterator[Unit | None]:
        """Take leases as the stream asks for more; None where only units in work are left for now, here or elsewhere.

        Ends where nothing is left at all, and where there is nothing to do but what was set aside.
        """
        pause_s = _FIRST_WAIT_S
        while not self._is_ending():
            taken = self._acquire()
            if taken is None:
                return
            if taken == "wait":
                # What is set aside is so before it is no longer open: looked at in this order.
                if not self._open and self._aside:
                    return
                yield None
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_WAIT_S)
                continue
            pause_s = _FIRST_WAIT_S
            yield self._begin(taken, "")

    def _acquire(self) -> Execution | Literal["wait"] | None:
        if len(self._aside) >= MAX_ASIDE:
            return "wait"
        with self._telemetry.stage("ledger"):
            return self._ledger.acquire()

    def _units_again(self, precision: str, wider: str) -> Iterator[Unit]:
        """The units that were set aside."""
        for index, unit in list(self._aside.items()):
            if self._is_ending():
                return
            photos = f"{unit.num_overflowed} photo{'s' * (unit.num_overflowed != 1)}"
            remark = f"made in {wider}: {precision} gave {photos} with features that are not finite"
            again = self._begin(unit.execution, remark)
            del self._aside[index]
            yield again

    def _begin(self, execution: Execution, remark: str) -> Unit:
        self._open[execution.unit.index] = OpenUnit(execution, [[] for _ in self._at_once], remark)
        return execution.unit

    def _gather(self, item: FeatureBatch | UnitEnd) -> None:
        """The locate lane: locate a batch, sort its rows to their units, send whole units on."""
        if isinstance(item, UnitEnd):
            unit = self._open[item.unit.index]
            unit.end = item
            unit.errors.extend(item.errors)
            self._telemetry.count(errors=len(item.errors))
            touched = {item.unit.index}
        else:
            with self._telemetry.stage("encode"):
                # Waits for the device: this is the encoder's time, not the locator's.
                item.flight.wait()
            with item.flight.landed() as features:
                self._gather_batch(features, item.samples)
            touched = {sample.unit.index for sample in item.samples}
        for index in touched:
            self._settle(self._open[index])

    def _settle(self, unit: OpenUnit) -> None:
        """Send a unit on if it is whole: to be written, or, where it has overflowed, to wait for another precision."""
        index = unit.execution.unit.index
        if unit.num_overflowed or unit.is_cut_off:
            rows, errors = unit.drop()
            self._telemetry.count(rows=-rows, errors=-errors)
        if not unit.is_whole:
            return
        if unit.num_overflowed:
            self._aside[index] = unit
        else:
            if self._outputs.group_by:
                self._field_watch.look(unit.execution.unit, unit.samples)
                with self._telemetry.stage("locate"):
                    refused = unit.group(self._outputs.group_by, self._locators)
                self._telemetry.count(rows=-refused, errors=refused)
            with self._telemetry.stage("wait for write"):
                self._write_lane.put(unit)
        # Only now: a unit that the lane refused is still open, and is given back at the end.
        del self._open[index]

    def _gather_batch(self, features: Features, samples: tuple[Sample, ...]) -> None:
        features_BD = features.host_BD
        squared_B = np.einsum("bd,bd->b", features_BD, features_BD, dtype=np.float64)
        is_good_B = np.isfinite(squared_B) & (squared_B > 0)
        self._note_overflow(samples, np.isfinite(squared_B))
        bad = [sample for sample, good in zip(samples, is_good_B, strict=True) if not good]
        self._refuse(bad, "encode", "the encoder's features are zero or not finite; try --precision fp32")
        kept = np.flatnonzero(is_good_B)
        with self._telemetry.stage("locate"):
            good_BD = features.device_BD if is_good_B.all() else features.device_BD[kept.tolist()]
            # On the host all of them were seen to be finite: to ask the device again would be to wait for it again.
            with torch.inference_mode():
                located = [locator.located(good_BD) for locator in self._at_once]
        if not all(np.isfinite(places.topk_prob).all() for places in located):
            kept, located = self._refuse_unlocated(samples, kept, located)
        units = np.array([samples[row].unit.index for row in kept], dtype=np.int64)
        for index in np.unique(units).tolist():
            rows = np.flatnonzero(units == index)
            kept_BD = features_BD[kept[rows]] if self._outputs.keeps_features else None
            self._open[index].add([samples[kept[row]] for row in rows], kept_BD, [part.take(rows) for part in located])
        self._telemetry.count(rows=len(kept), errors=len(samples) - len(kept))

    def _note_overflow(self, samples: tuple[Sample, ...], is_finite_B: NDArray[np.bool_]) -> None:
        if not self._can_widen or is_finite_B.all():
            return
        overflowed = Counter(samples[row].unit.index for row in np.flatnonzero(~is_finite_B))
        for index, count in overflowed.items():
            unit = self._open[index]
            # In the wider precision too: then it is the photo's own error.
            if not unit.remark:
                unit.num_overflowed += count

    def _refuse_unlocated(
        self, samples: Sequence[Sample], kept: NDArray[np.intp], located: list[Located]
    ) -> tuple[NDArray[np.intp], list[Located]]:
        """Rows whose probabilities are no numbers: a head with weights near the end of float32 makes such."""
        is_sound = np.all([np.isfinite(places.topk_prob).all(axis=1) for places in located], axis=0)
        self._refuse([samples[row] for row in kept[~is_sound]], "locate", NOT_FINITE)
        rows = np.flatnonzero(is_sound)
        return kept[rows], [places.take(rows) for places in located]

    def _refuse(self, samples: Sequence[Sample], stage: str, message: str) -> None:
        for sample in samples:
            error = row_error(sample, stage, message, retryable=stage == "encode")
            self._open[sample.unit.index].errors.append(error)

    def _write(self, unit: OpenUnit) -> None:
        """The write lane: sort the rows, write the tables, commit."""
        execution, counts = unit.execution, unit.counts
        try:
            with self._telemetry.stage("write"):
                paths = unit.write(self._outputs)
        except OSError:
            # A rank that was stopped for long may find its folder swept because another has won: lost, not failed.
            if not self._ledger.is_lost(execution):
                raise
            self._ledger.abandon(execution)
            return
        for warning in counts.warnings:
            log.warning("%s: %s", execution.unit.source, warning)
        if counts.unit_error is not None:
            log.warning("%s: %s", execution.unit.source, counts.unit_error.message)
        with self._telemetry.stage("commit"):
            self._ledger.commit(execution, paths, counts, limiting_stage=self._telemetry.limiting_stage())
        self._telemetry.count(units=1)
