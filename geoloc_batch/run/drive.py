"""Drive: from an open ledger to a summary. What embed, predict and retry have in common."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from geoloc_batch.errors import EXIT_COMPLETE, EXIT_INCOMPLETE, EXIT_WITH_ERRORS, GeolocError
from geoloc_batch.locate.locator import Locator
from geoloc_batch.records import Unit
from geoloc_batch.run.config import RunConfig, Summary
from geoloc_batch.run.engine import Engine, Outputs
from geoloc_batch.run.sources import FeatureSource
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.workers import StopSignal, Worker
from geoloc_batch.store.adding import MANY_UNITS
from geoloc_batch.store.ledger import Ledger, Totals
from geoloc_batch.store.plan import read_plan
from geoloc_batch.store.scattered import find_scattered
from geoloc_batch.store.tables import errors_path

log = logging.getLogger("geoloc_batch")

Adopt = Callable[[Ledger], Sequence[Unit]]
"""Takes up the units that a run works on: those of a plan, or those to be retried."""


@contextlib.contextmanager
def explained_full_disk(out: Path) -> Iterator[None]:
    """Say, of an output folder whose disk fills up inside, what can be done.

    Raises:
        GeolocError: it did. What the writers raise names no file, and no remedy.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full or (error.filename is not None and not Path(str(error.filename)).is_relative_to(out)):
            raise
        raise GeolocError(
            f"--out {out} cannot be written on: {os.strerror(error.errno or 0)}; free some space there, then run the "
            "same command again: what is committed stays, and it goes on from there"
        ) from error


def drive(
    ledger: Ledger,
    adopt: Adopt,
    source: FeatureSource,
    outputs: Outputs,
    locators: Sequence[Locator],
    run: RunConfig,
    worker: Worker,
    stop: StopSignal,
) -> Summary:
    """Run the engine over what is left of the adopted units, and sum up."""
    plan = adopt(ledger)
    for warning in ledger.warnings:
        log.warning("%s", warning)
    stop.defer()
    telemetry = Telemetry(
        ledger.out / "_logs" / f"{worker.name}.jsonl", total_bytes=sum(unit.num_bytes for unit in plan)
    )
    try:
        Engine(ledger, outputs, locators, telemetry, stop).run(source)
    finally:
        telemetry.close()
    for note in ledger.notes:
        log.warning("%s", note)
    totals = ledger.totals(in_haste=stop.is_set)
    if totals.done < totals.units and totals.units > MANY_UNITS and stop.is_set():
        log.warning(
            "samples, rows and errors are those of this process: there is no time to read %d markers. geoloc status %s "
            "counts all",
            totals.done,
            ledger.out,
        )
    if totals.done < totals.units and not stop.is_set():
        # The units of this call were all seen through: a retry has met a run that was not.
        log.warning(
            "%d units of %s were never done: run the command that made it again", totals.units - totals.done, ledger.out
        )
    if totals.done == totals.units and not ledger.is_through:
        log.warning(
            "all units are done, and another process was clearing up in %s when this one was asked to end: the same "
            "command once more sees that nothing is missing",
            ledger.out,
        )
    if outputs.group_by:
        _tell_without_locations(ledger, totals, outputs.group_by)
    exit_code = _exit_code(totals, run.max_error_rate) if ledger.is_through else EXIT_INCOMPLETE
    if exit_code != EXIT_INCOMPLETE and outputs.group_by and _has_scattered(ledger, outputs):
        exit_code = EXIT_WITH_ERRORS
    return Summary(
        units=totals.units,
        samples=totals.samples,
        rows=totals.rows,
        errors=totals.errors,
        unit_errors=totals.units_failed,
        seconds=round(telemetry.seconds, 3),
        images_per_second=round(telemetry.images_per_second(), 3),
        limiting_stage=telemetry.limiting_stage(),
        out=str(ledger.out),
        kept=len(ledger.kept),
        exit_code=exit_code,
    )


def _exit_code(totals: Totals, max_error_rate: float) -> int:
    if totals.done < totals.units:
        return EXIT_INCOMPLETE
    if totals.units_failed or totals.errors > max_error_rate * totals.samples:
        return EXIT_WITH_ERRORS
    return EXIT_COMPLETE


def _tell_without_locations(ledger: Ledger, totals: Totals, field: str) -> None:
    """Say so where no photo at all has the field that names its location."""
    # Of a run that was stopped the totals may be those of this process alone.
    if totals.done < totals.units or totals.rows or not totals.errors:
        return
    stages: set[str] = set()
    for unit in ledger.units:
        path = ledger.out / errors_path(unit.index)
        # A unit that is not done, or that nothing could be read of, has none.
        with contextlib.suppress(FileNotFoundError):
            stages.update(pq.ParquetFile(path).read(["stage"])["stage"].unique().to_pylist())
    # One that a head could not place had a location.
    if "group" in stages and "locate" not in stages:
        log.warning(
            "no photo that could be read has %r in its json: there is not one location, and %s holds error rows alone. "
            "Name what tells locations apart with --group-by, and another --out",
            field,
            ledger.out,
        )


def _has_scattered(ledger: Ledger, outputs: Outputs) -> bool:
    """Whether locations have rows in several units; it is told, since each row knows the photos of its unit alone."""
    # Of earlier calls too: one row each is what OUT as a whole is asked for.
    units = [unit for unit in read_plan(ledger.out)[0] if unit.kind == "shard"]
    found = find_scattered(ledger.out, units, outputs.trees[0])
    if found is None:
        return False
    places = " and ".join(found.shards[:2]) if len(found.shards) > 1 else f"several parts of {found.shards[0]}"
    log.warning(
        "%d locations have rows in more than one unit, the first is %s, in %s: each row is made from the photos of its "
        "unit alone. For one row from all photos run geoloc embed on the shards, then geoloc predict --from-embeddings "
        "with --group-by %s",
        found.count,
        found.first,
        places,
        outputs.group_by,
    )
    return True
