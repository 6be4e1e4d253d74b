"""`geoloc predict --from-embeddings`: places from stored embeddings, photo by photo or location by location."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from geoloc_batch.errors import EXIT_INCOMPLETE, OutputError
from geoloc_batch.records import Unit
from geoloc_batch.run.command import record_command
from geoloc_batch.run.config import PredictConfig, Summary
from geoloc_batch.run.drive import Adopt, drive, explained_full_disk
from geoloc_batch.run.location_source import LocationSource
from geoloc_batch.run.parts import locators_of, outputs_of, pinned_of
from geoloc_batch.run.sources import FeatureSource, Origin, StoredSource, origin_of
from geoloc_batch.run.workers import StopSignal, this_worker
from geoloc_batch.store.doubled import refuse_doubled
from geoloc_batch.store.features import plan_embeddings, read_features
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.locations import Locations, index_locations, plan_locations
from geoloc_batch.store.pin import RUN_FILE, read_config

log = logging.getLogger("geoloc_batch")

_HALF_THERE = "%s is not complete: %d of its units are missing; %s, then run the same command again"


def predict_stored(config: PredictConfig, stop: StopSignal, adopt: Adopt | None = None) -> Summary:
    """From stored embeddings to places.

    Args:
        config: `from_embeddings` and `out` must be set.
        stop: ends it between units.
        adopt: takes up other units than those of the folder: a retry.
    """
    limit, folder = config.run.limit, config.from_embeddings
    pairs = _limited(plan_embeddings(folder), limit)
    worker = this_worker()
    origin = origin_of(folder, pairs, tap=config.encoder.tap)
    is_incomplete = origin.num_missing > 0 and limit is None
    if is_incomplete and config.group_by:
        # A location may be there by half: nothing of it may be published.
        log.warning(_HALF_THERE, folder, origin.num_missing, _remedy(folder, origin))
        return _nothing_yet(config)
    locators = locators_of(
        config.locate,
        origin.dim,
        origin.tap,
        origin.encoder_sha256,
        worker.device,
        features="stored" if origin.encoder_sha256 else "foreign",
    )
    pinned = {
        **pinned_of(config.run, config.locate, locators, embeddings=False, group_by=config.group_by),
        "encoder_sha256": origin.encoder_sha256,
        "tap": origin.tap,
        "from_embeddings": True,
    }
    units: Sequence[Unit] = pairs
    source: FeatureSource = StoredSource(worker.device)
    if config.group_by:
        refuse_doubled([pair.source for pair in pairs], limit=limit)
        locations = index_locations([pair.source for pair in pairs], config.group_by, limit=limit)
        units = plan_locations(folder, locations, row_bytes=read_features(pairs[0].source).row_bytes)
        source = LocationSource(locations)
        pinned["locations"] = {"count": len(locations), "sha256": locations.sha256}
        _refuse_changed(Path(config.out), folder, locations, pinned["locations"])
    ledger = Ledger(config.out, beat_s=config.run.heartbeat_s, worker=worker.name)
    with explained_full_disk(ledger.out), closing(ledger):
        ledger.open(pinned)
        if adopt is None:
            record_command(ledger.out, config)
        outputs = outputs_of(locators, embeddings=False, group_by=config.group_by)
        adopt = adopt or partial(Ledger.adopt_plan, units=units)
        summary = drive(ledger, adopt, source, outputs, locators, config.run, worker, stop)
    if is_incomplete:
        log.warning(_HALF_THERE, folder, origin.num_missing, _remedy(folder, origin))
        return dataclasses.replace(summary, exit_code=EXIT_INCOMPLETE)
    return summary


def _remedy(folder: str, origin: Origin) -> str:
    """How a folder becomes whole."""
    if not origin.lost:
        return "finish it"
    return f"{origin.lost} is gone: `geoloc verify {folder}` names what is, and how it is made again; mend it"


def _nothing_yet(config: PredictConfig) -> Summary:
    return Summary(
        units=0,
        samples=0,
        rows=0,
        errors=0,
        seconds=0.0,
        images_per_second=0.0,
        limiting_stage="read",
        out=config.out,
        exit_code=EXIT_INCOMPLETE,
    )


def _refuse_changed(out: Path, folder: str, locations: Locations, now: dict[str, object]) -> None:
    """Raise OutputError where OUT was made from other locations: the numbers of the plan would mean others."""
    if not (out / RUN_FILE).is_file():
        return
    pinned = read_config(out)
    before = pinned.get("locations")
    # Another field is among the settings that the ledger compares.
    if pinned.get("group_by") == locations.field and isinstance(before, dict) and before != now:
        raise OutputError(
            f"--out {out} was made when {folder} showed {before.get('count')} locations by {locations.field!r}; now it "
            f"shows {len(locations)}, or others: photos were added, taken away or written again. Give another --out, "
            f"or the folder as it was"
        )


def _limited(units: Sequence[Unit], limit: int | None) -> list[Unit]:
    """The units that hold the first `limit` stored rows; the last of them is cut."""
    if limit is None:
        return list(units)
    taken: list[Unit] = []
    for unit in units:
        if limit <= 0:
            break
        taken.append(dataclasses.replace(unit, max_rows=limit))
        limit -= read_features(unit.source).num_rows
    return taken
