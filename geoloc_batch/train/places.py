"""Places: which rows of stored embeddings show which place, and where that is. Metadata alone is read.

Shape letters: P embedding pairs, R rows of all pairs in their order, L places.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.evaluate.keys import match
from geoloc_batch.evaluate.places import look_at
from geoloc_batch.evaluate.sources import find_truth
from geoloc_batch.evaluate.tables import Column, read_table
from geoloc_batch.geo.points import LAT_NAMES, LON_NAMES, read_points
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.run.command import read_command
from geoloc_batch.run.sources import Origin, origin_of
from geoloc_batch.store.features import StoredFeatures, metadata_path, plan_embeddings, read_features
from geoloc_batch.store.locations import index_locations
from geoloc_batch.train.config import TrainConfig

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

MAX_VIEWS_KM = 1.0
"""Views farther than this from their location's first view are not of one place."""

log = logging.getLogger("geoloc_batch")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Places:
    """L places with the rows that show them."""

    pairs: tuple[StoredFeatures, ...]
    """[P] without their tables."""
    place_R: Ints
    """[R] the place that a row shows, -1 where it is left out."""
    name_L: pa.Array
    """[L] the location's name, or the photo's key, each once."""
    point_deg_L2: Floats
    """[L, 2] (lat, lon) in degrees."""
    origin: Origin
    """What the features are."""
    encoder: str
    """What the command that made them called the encoder, "" where that is not known."""
    left_out: dict[str, int]
    """Rows or locations that train nothing, by reason."""
    digest: str
    """sha256 of all the above but `encoder`, and of the lengths of the features."""

    def __len__(self) -> int:
        return len(self.name_L)

    @property
    def dim(self) -> int:
        """D."""
        return self.origin.dim


@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """What the metadata of all pairs say."""

    pairs: tuple[StoredFeatures, ...]
    key_R: pa.Array
    shard_R: pa.Array | None
    has_norm_R: Flags


def read_places(config: TrainConfig) -> Places:
    """Read which places the embeddings show.

    Raises:
        InputError: a folder or a column is missing or wrong, nothing has a position, or encoders differ.
        OutputError: the run.json of a folder cannot be read.
    """
    npys: list[Path] = []
    origins: list[Origin] = []
    for folder in config.embeddings:
        units = plan_embeddings(folder)
        npys += [Path(unit.source) for unit in units]
        origins.append(origin_of(folder, units, tap=config.tap))
        if origins[-1].num_missing:
            log.warning("%s is not complete: %d of its units are missing", folder, origins[-1].num_missing)
    _check_origins(config.embeddings, origins)
    rows = _read_rows(npys, origins[0].dim)
    left_out = {"rows without a length that could restore their features": int((~rows.has_norm_R).sum())}
    if config.group_by:
        located = index_locations(npys, config.group_by)
        place_R, names = np.concatenate(located.location_of), located.names
        left_out[f"rows without {config.group_by!r}"] = located.num_missing
    else:
        place_R, names = np.arange(len(rows.key_R), dtype=np.int64), rows.key_R
    place_R = np.where(rows.has_norm_R, place_R, -1)
    if config.truth:
        place_R, point_L2 = _stated(config, rows, place_R, names, left_out)
    else:
        place_R, point_L2 = _own(config, npys, place_R, len(names), left_out)
    place_R, kept = _renumbered(place_R, len(names))
    if not len(kept):
        raise InputError(_nothing(config, left_out))
    if not config.group_by:
        names = _unique_names(rows, kept)
    name_L = names if not config.group_by else names.take(pa.array(kept))
    places = Places(
        pairs=rows.pairs,
        place_R=place_R,
        name_L=name_L,
        point_deg_L2=point_L2[kept],
        origin=origins[0],
        encoder=_encoder_name(config.embeddings[0]),
        left_out={reason: count for reason, count in left_out.items() if count},
        digest="",
    )
    return replace(places, digest=_digest(places))


def _check_origins(folders: Sequence[str], origins: Sequence[Origin]) -> None:
    first = origins[0]
    for folder, origin in zip(folders, origins, strict=True):
        if (origin.dim, origin.tap, origin.encoder_sha256) != (first.dim, first.tap, first.encoder_sha256):
            raise InputError(
                f"{folders[0]} holds {_described(first)}, {folder} {_described(origin)}: a head is trained on one "
                "encoder's features; leave out one of them"
            )


def _described(origin: Origin) -> str:
    encoder = f"the encoder {origin.encoder_sha256[:12]}" if origin.encoder_sha256 else "an encoder that is not named"
    return f"{origin.dim} {origin.tap} features of {encoder}"


def _read_rows(npys: Sequence[Path], dim: int) -> _Rows:
    pairs, keys, shards = [], [], []
    for npy in npys:
        stored = read_features(npy)
        if stored.num_features != dim:
            raise InputError(
                f"{npy} has {stored.num_features} features a row, {npys[0]} {dim}; they do not go together"
            )
        names = stored.table.column_names
        key_name = next((name for name in ("key", "image_path") if name in names), None)
        numbers = pa.array([str(row) for row in range(stored.num_rows)]) if key_name is None else stored.table[key_name]
        keys.append(_text(numbers))
        shards.append(_text(stored.table["shard"]) if stored.has_identity else None)
        pairs.append(replace(stored, table=stored.table.select([])))
    norm_R = np.concatenate([pair.norm_N for pair in pairs])
    return _Rows(
        pairs=tuple(pairs),
        key_R=pa.concat_arrays(keys),
        shard_R=pa.concat_arrays(shards) if all(shard is not None for shard in shards) else None,
        has_norm_R=np.isfinite(norm_R) & (norm_R > 0),
    )


def _text(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    try:
        values = values.cast(pa.large_string())
    except pa.ArrowInvalid:
        # Paths of other tools, in whatever encoding a disk had.
        texts = [None if key is None else key.decode(errors="backslashreplace") for key in values.to_pylist()]
        values = pa.array(texts, pa.large_string())
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _own(
    config: TrainConfig, npys: Sequence[Path], place_R: Ints, num_places: int, left_out: dict[str, int]
) -> tuple[Ints, Floats]:
    """Positions out of the photos' own metadata: ([R] places, -1 where a row has none; [L, 2] points)."""
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
    place_R = np.where((place_R >= 0) & ~is_apart_L[place_R], place_R, -1)
    return place_R, point_L2


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


def _stated(
    config: TrainConfig, rows: _Rows, place_R: Ints, names: pa.Array, left_out: dict[str, int]
) -> tuple[Ints, Floats]:
    """Positions out of --truth: ([R] places, -1 where a row has none; [L, 2] points)."""
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
    if not config.group_by and rows.shard_R is not None:
        ours["shard"] = rows.shard_R
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
    return np.where((place_R >= 0) & has_point_L[place_R], place_R, -1), point_L2


def _renumbered(place_R: Ints, num_places: int) -> tuple[Ints, Ints]:
    """([R] places numbered without gaps, [L] their numbers before), in their order."""
    kept = np.unique(place_R[place_R >= 0])
    number = np.full(num_places + 1, -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    # Row -1 is the last, which stays -1.
    return number[place_R], kept


def _unique_names(rows: _Rows, kept: Ints) -> pa.Array:
    """The kept rows' keys; with their shard before them, or else their number, where a key stands twice."""
    key_L = rows.key_R.take(pa.array(kept))
    if rows.shard_R is not None and not _is_unique(key_L):
        slash = pa.scalar("/", pa.large_string())
        key_L = pc.binary_join_element_wise(rows.shard_R.take(pa.array(kept)), key_L, slash)
    if not _is_unique(key_L):
        key_L = pa.array([str(number) for number in kept.tolist()], pa.large_string())
    return key_L


def _is_unique(names: pa.Array) -> bool:
    return bool(pc.count_distinct(names, mode="all").as_py() == len(names))


def _nothing(config: TrainConfig, left_out: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "no row at all"
    return f"{', '.join(config.embeddings)}: no photo can train a head ({reasons}); see --truth, --lat and --lon"


def _encoder_name(folder: str) -> str:
    try:
        command = read_command(Path(folder)).config
    except (OutputError, OSError):
        return ""
    return command.encoder.encoder


def _digest(places: Places) -> str:
    digest = hashlib.sha256()
    texts = places.name_L.cast(pa.large_string())
    for part in (
        "\0".join(str(name) for name in texts.to_pylist()).encode(errors="backslashreplace"),
        np.ascontiguousarray(places.point_deg_L2, dtype="<f8").tobytes(),
        np.ascontiguousarray(places.place_R, dtype="<i8").tobytes(),
        *(np.ascontiguousarray(pair.norm_N, dtype="<f4").tobytes() for pair in places.pairs),
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
