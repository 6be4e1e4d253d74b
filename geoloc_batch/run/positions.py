"""Positions for `geoloc cells`: from a table, from stored embeddings, or from the json of shards."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from geoloc_batch.errors import InputError
from geoloc_batch.geo.points import LAT_NAMES, LON_NAMES, Points, points_of, read_points
from geoloc_batch.records import RowError
from geoloc_batch.store.features import metadata_path, plan_embeddings
from geoloc_batch.store.metadata import Scalar, flatten
from geoloc_batch.stream.samples import UnitReader
from geoloc_batch.stream.shards import expand_shards, plan_units

log = logging.getLogger("geoloc_batch")

TABLE_ENDINGS = (".csv", ".csv.gz", ".parquet")


def read_positions(given: str, lat: str = "", lon: str = "") -> Points:
    """The positions of whatever has some.

    Args:
        given: a CSV or Parquet table; a folder that `geoloc embed` wrote; or shards, whose photos' json is read.
        lat: the column, or member of the json, with latitudes; see geo.points.read_points.
        lon: that of longitudes.

    Raises:
        InputError: it is none of these, or has no such column.
    """
    if given.lower().endswith(TABLE_ENDINGS):
        return read_points(given, lat=lat, lon=lon)
    if (Path(given) / "img_emb").is_dir():
        return _of_embeddings(given, lat, lon)
    return _of_shards(given, lat, lon)


def _of_embeddings(folder: str, lat: str, lon: str) -> Points:
    tables = [read_points(metadata_path(Path(unit.source)), lat=lat, lon=lon) for unit in plan_embeddings(folder)]
    return Points(
        lat=np.concatenate([points.lat for points in tables]),
        lon=np.concatenate([points.lon for points in tables]),
        bad=tuple(bad for points in tables for bad in points.bad),
        source=folder,
    )


def _of_shards(shards: str, lat: str, lon: str) -> Points:
    names = ((lat,) if lat else LAT_NAMES, (lon,) if lon else LON_NAMES)
    found = [[_number(meta, kinds) for kinds in names] for meta in _metas(shards)]
    if not found:
        raise InputError(f"{shards} holds no photo, so no position; give a table, embeddings or shards")
    pairs = np.array(found)
    return points_of(pairs[:, 0], pairs[:, 1], shards)


def _metas(shards: str) -> Iterator[Mapping[str, Scalar]]:
    """The json of each photo, one after another."""
    for unit in plan_units(expand_shards([shards])):
        reader = UnitReader(unit)
        for item in reader:
            if not isinstance(item, RowError):
                yield flatten(item[0].meta) or {}
        if reader.unit_error is not None:
            log.warning("%s: %s", unit.source, reader.unit_error.message)


def _number(meta: Mapping[str, Scalar], names: Iterable[str]) -> float:
    """The member with one of the names, in capitals or not; NaN where there is none or it is no number."""
    by_name = {name.lower(): value for name, value in meta.items()}
    value = next((by_name[name.lower()] for name in names if name.lower() in by_name), None)
    try:
        return float("nan") if value is None or isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        return float("nan")
