"""The loop: read | decode | copy | encode | locate | write, overlapped by threads.

The calling thread drives the encoder; a lane of its own locates and gathers rows by unit; another writes tables and
commits. The stream's threads read and decode. No step waits for another rank.

Shape letters: B batch, N rows of a unit, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.geo.located import Located
from geoloc_batch.locate.locator import Locator
from geoloc_batch.records import RowError, Sample, Unit, UnitEnd
from geoloc_batch.run.lanes import Lane
from geoloc_batch.run.sources import FeatureBatch, FeatureSource
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.store import tables
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts

log = logging.getLogger("geoloc_batch")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What a run writes for each unit."""

    embeddings: bool
    trees: tuple[str, ...] = ()
    """Folder of the predictions of each locator below OUT; "" is OUT itself."""


@dataclass(slots=True)
class _OpenUnit:
    """What has been gathered of a unit that is not committed yet."""

    execution: Execution
    samples: list[Sample] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)
    located: list[list[Located]] = field(default_factory=list)
    errors: list[RowError] = field(default_factory=list)
    end: UnitEnd | None = None

    @property
    def is_whole(self) -> bool:
        return self.end is not None and len(self.samples) + len(self.errors) == self.end.num_samples


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
        self._telemetry = telemetry
        self._stop = stop
        self._open: dict[int, _OpenUnit] = {}
        self._write_lane: Lane[_OpenUnit] = Lane("write", self._write)
        self._locate_lane: Lane[FeatureBatch | UnitEnd] = Lane("locate", self._gather)

    def run(self, source: FeatureSource) -> None:
        """Work until every unit of the plan is committed by this rank or another, or until asked to stop."""
        done = False
        try:
            with closing(source.features(self._units(), self._telemetry)) as items:
                for item in items:
                    with self._telemetry.stage("wait for locate"):
                        self._locate_lane.put(item)
            done = True
        finally:
            self._finish(quiet=not done)

    def _finish(self, *, quiet: bool) -> None:
        try:
            self._locate_lane.close(quiet=quiet)
        finally:
            try:
                self._write_lane.close(quiet=quiet)
            finally:
                for unit in self._open.values():
                    self._ledger.abandon(unit.execution)
                self._open.clear()

    def _units(self) -> Iterator[Unit | None]:
        """Take leases as the stream asks for more; None where only other ranks' units are left for now."""
        pause_s = _FIRST_WAIT_S
        while not (self._stop.is_set() or self._locate_lane.failed or self._write_lane.failed):
            with self._telemetry.stage("ledger"):
                taken = self._ledger.acquire()
            if taken is None:
                return
            if taken == "wait":
                yield None
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_WAIT_S)
                continue
            pause_s = _FIRST_WAIT_S
            self._open[taken.unit.index] = _OpenUnit(taken, located=[[] for _ in self._locators])
            yield taken.unit

    def _gather(self, item: FeatureBatch | UnitEnd) -> None:
        """The locate lane: locate a batch, sort its rows to their units, send whole units on."""
        if isinstance(item, UnitEnd):
            unit = self._open[item.unit.index]
            unit.end = item
            unit.errors.extend(item.errors)
            self._telemetry.count(errors=len(item.errors))
            touched = {item.unit.index}
        else:
            touched = self._gather_batch(item)
        for index in touched:
            if self._open[index].is_whole:
                whole = self._open[index]
                with self._telemetry.stage("wait for write"):
                    self._write_lane.put(whole)
                # Only now: a unit that the lane refused is still open, and is given back at the end.
                del self._open[index]

    def _gather_batch(self, batch: FeatureBatch) -> set[int]:
        with self._telemetry.stage("encode"):
            # Waits for the device: this is the encoder's time, not the locator's.
            features_BD: NDArray[np.float32] = batch.features_BD.cpu().numpy()
        squared_B = np.einsum("bd,bd->b", features_BD, features_BD, dtype=np.float64)
        is_good_B = np.isfinite(squared_B) & (squared_B > 0)
        bad = [sample for sample, good in zip(batch.samples, is_good_B, strict=True) if not good]
        self._refuse(bad, "encode", "the encoder's features are zero or not finite; try --precision fp32")
        kept = np.flatnonzero(is_good_B)
        with self._telemetry.stage("locate"):
            good_BD = batch.features_BD if is_good_B.all() else batch.features_BD[kept.tolist()]
            located = [locator.locate(good_BD) for locator in self._locators]
        if not all(np.isfinite(places.topk_prob).all() for places in located):
            kept, located = self._refuse_unlocated(batch.samples, kept, located)
        units = np.array([batch.samples[row].unit.index for row in kept], dtype=np.int64)
        for index in np.unique(units).tolist():
            rows = np.flatnonzero(units == index)
            unit = self._open[index]
            unit.samples.extend(batch.samples[kept[row]] for row in rows)
            if self._outputs.embeddings:
                unit.features.append(features_BD[kept[rows]])
            for gathered, places in zip(unit.located, located, strict=True):
                gathered.append(places.take(rows))
        self._telemetry.count(rows=len(kept), errors=len(batch.samples) - len(kept))
        return {sample.unit.index for sample in batch.samples}

    def _refuse_unlocated(
        self, samples: Sequence[Sample], kept: NDArray[np.intp], located: list[Located]
    ) -> tuple[NDArray[np.intp], list[Located]]:
        """Rows whose probabilities are no numbers: a head with weights near the end of float32 makes such."""
        is_sound = np.all([np.isfinite(places.topk_prob).all(axis=1) for places in located], axis=0)
        self._refuse([samples[row] for row in kept[~is_sound]], "locate", "the head's probabilities are not finite")
        rows = np.flatnonzero(is_sound)
        return kept[rows], [places.take(rows) for places in located]

    def _refuse(self, samples: Sequence[Sample], stage: str, message: str) -> None:
        for sample in samples:
            error = RowError(sample.key, sample.shard, sample.row, stage, message, retryable=stage == "encode")
            self._open[sample.unit.index].errors.append(error)

    def _write(self, unit: _OpenUnit) -> None:
        """The write lane: sort the rows, write the tables, commit."""
        end, execution = unit.end, unit.execution
        assert end is not None
        try:
            with self._telemetry.stage("write"):
                outputs = self._write_tables(unit)
        except OSError:
            # A rank that was stopped for long may find its folder swept because another has won: lost, not failed.
            if not self._ledger.is_lost(execution):
                raise
            self._ledger.abandon(execution)
            return
        for warning in end.warnings:
            log.warning("%s: %s", execution.unit.source, warning)
        if end.unit_error is not None:
            log.warning("%s: %s", execution.unit.source, end.unit_error.message)
        counts = UnitCounts(
            samples=end.num_samples,
            rows=len(unit.samples),
            errors=len(unit.errors),
            unit_error=end.unit_error,
            warnings=end.warnings,
        )
        with self._telemetry.stage("commit"):
            self._ledger.commit(execution, outputs, counts)
        self._telemetry.count(units=1)

    def _write_tables(self, unit: _OpenUnit) -> list[str]:
        index, stage = unit.execution.unit.index, unit.execution.stage
        # Photos come out of order from the stream; stored rows come in theirs, and may belong to several shards.
        is_shard = unit.execution.unit.kind == "shard"
        order = np.argsort([sample.row if is_shard else 0 for sample in unit.samples], kind="stable")
        samples = [unit.samples[row] for row in order]
        outputs: list[str] = []
        if samples and self._outputs.embeddings:
            npy, parquet = tables.embedding_paths(index)
            tables.write_embeddings(stage(npy), stage(parquet), samples, np.concatenate(unit.features)[order])
            outputs += [npy, parquet]
        for tree, parts in zip(self._outputs.trees, unit.located, strict=True):
            if samples:
                path = tables.predictions_path(index, tree)
                tables.write_predictions(stage(path), samples, Located.concatenate(parts).take(order))
                outputs.append(path)
        if unit.errors:
            path = tables.errors_path(index)
            tables.write_errors(stage(path), sorted(unit.errors, key=lambda error: error.row))
            outputs.append(path)
        return outputs
