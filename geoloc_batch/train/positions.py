"""Positions: where places are, by their photos' own metadata or by a table of the truth.

Shape letters: R rows of all pairs in their order, L places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.evaluate.keys import match
from geoloc_batch.evaluate.places import look_at
from geoloc_batch.evaluate.sources import find_truth
from geoloc_batch.evaluate.tables import Column, read_table
from geoloc_batch.geo.points import LAT_NAMES, LON_NAMES, read_points
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.store.features import metadata_path
from geoloc_batch.train.config import TrainConfig

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_VIEWS_KM = 1.0
"""Views farther than this from their location's first view are not of one place."""


@dataclass(frozen=True, eq=False, slots=True)
class Positions:
    """Where L places are."""

    place_R: Ints
    """[R] the place that a row shows, -1 where it has none, or one without a position."""
    point_deg_L2: Floats
    """[L, 2] (lat, lon) in degrees, NaN where there is none."""
    point_deg_R2: Floats
    """[R, 2] where each row's photo was taken; of no meaning where it shows no place."""


def own_positions(
    config: TrainConfig, npys: Sequence[Path], place_R: Ints, num_places: int, left_out: dict[str, int]
) -> Positions:
    """Positions out of the photos' own metadata.

    Args:
        config: names the columns.
        npys: the pairs' features.
        place_R: [R] the place that a row shows, -1 for none.
        num_places: L.
        left_out: is told of rows and places without a position.

    Raises:
        InputError: there are no such columns.
    """
    point_R2 = _own_points(config, npys)
    has_point_R = np.isfinite(point_R2).all(axis=1)
    left_out["rows without a position"] = int((~has_point_R).sum())
    place_R = np.where(has_point_R, place_R, -1)
    shown_R = np.flatnonzero(place_R >= 0)
    point_L2 = np.full((num_places, 2), np.nan)
    # Backwards, so that what stays written is each place's first row.
    point_L2[place_R[shown_R[::-1]]] = point_R2[shown_R[::-1]]
    apart_km = haversine_km(point_R2[shown_R], point_L2[place_R[shown_R]])
    is_apart_L = np.zeros(num_places, dtype=np.bool_)
    is_apart_L[place_R[shown_R[apart_km > MAX_VIEWS_KM]]] = True
    left_out[f"locations whose photos lie more than {MAX_VIEWS_KM:g} km apart"] = int(is_apart_L.sum())
    return Positions(np.where((place_R >= 0) & ~is_apart_L[place_R], place_R, -1), point_L2, point_R2)


def _own_points(config: TrainConfig, npys: Sequence[Path]) -> Floats:
    """[R, 2] (lat, lon) of every row, NaN where there is none. A pair may lack the columns if others have them."""
    parts, complaint = [], None
    for npy in npys:
        parquet = metadata_path(npy)
        schema = pq.read_schema(parquet)
        wanted = ((config.lat,) if config.lat else LAT_NAMES, (config.lon,) if config.lon else LON_NAMES)
        lowered = {name.strip().lower() for name in schema.names} | set(schema.names)
        if not all(lowered & set(names) for names in wanted):
            complaint = complaint or parquet
            parts.append(np.full((pq.read_metadata(parquet).num_rows, 2), np.nan))
            continue
        points = read_points(parquet, lat=config.lat, lon=config.lon)
        point_N2 = np.full((len(points) + len(points.bad), 2), np.nan)
        is_good = np.ones(len(point_N2), dtype=np.bool_)
        is_good[[bad.row for bad in points.bad]] = False
        point_N2[is_good] = points.point_deg
        parts.append(point_N2)
    if complaint is not None and all(np.isnan(part).all() for part in parts):
        # Its own words say which columns there are.
        read_points(complaint, lat=config.lat, lon=config.lon)
    return np.concatenate(parts)


def stated_positions(
    config: TrainConfig, shard_L: pa.Array | None, place_R: Ints, names: pa.Array, left_out: dict[str, int]
) -> Positions:
    """Positions out of --truth: all photos of a place are where it is.

    Args:
        config: names the table and its columns.
        shard_L: [L] the shards of the places, where a place is a photo and they are known.
        place_R: [R] the place that a row shows, -1 for none.
        names: [L] the places' names.
        left_out: is told of places without a position.

    Raises:
        InputError: the table cannot be read, or names none of the places.
    """
    source = find_truth(config.truth)
    columns = [
        Column(name="key", kind="text", is_required=True),
        Column(name="shard", kind="text"),
        Column(name="lat", kind="degrees", written=config.lat, flag="--lat", is_required=True),
        Column(name="lon", kind="degrees", written=config.lon, flag="--lon", is_required=True),
    ]
    truth = read_table(source, columns)
    looked = look_at(*(np.asarray(pc.fill_null(truth[name], np.nan).to_numpy()) for name in ("lat", "lon")))
    ours = {"key": names.cast(pa.large_string())}
    if shard_L is not None:
        ours["shard"] = shard_L
    row_L = match(pa.table(ours), truth, config.embeddings[0], source.name)
    if not (row_L >= 0).any():
        kind = f"values of {config.group_by!r}, by which the photos are grouped" if config.group_by else "photos' keys"
        raise InputError(
            f"none of the {len(row_L)} places of {config.embeddings[0]} is in --truth {config.truth}: its column key "
            f"must hold the {kind}, such as {names[0].as_py()!r}"
        )
    has_point_L = row_L >= 0
    has_point_L[has_point_L] = looked.is_place_N[row_L[has_point_L]]
    left_out["places without a position in --truth"] = int((~has_point_L).sum())
    point_L2 = np.full((len(names), 2), np.nan)
    point_L2[has_point_L] = looked.point_deg_N2[row_L[has_point_L]]
    return Positions(np.where((place_R >= 0) & has_point_L[place_R], place_R, -1), point_L2, point_L2[place_R])
