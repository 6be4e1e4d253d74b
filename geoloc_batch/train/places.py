"""Places: which rows of stored embeddings show which place, and where that is. Metadata alone is read.

Shape letters: P embedding pairs, R rows of all pairs in their order, L places, S spots.
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
from numpy.typing import NDArray

from geoloc_batch.errors import InputError, OutputError
from geoloc_batch.run.command import read_command
from geoloc_batch.run.sources import Origin, origin_of
from geoloc_batch.store.doubled import refuse_doubled
from geoloc_batch.store.features import StoredFeatures, plan_embeddings, read_features
from geoloc_batch.store.locations import index_locations
from geoloc_batch.train.config import TrainConfig
from geoloc_batch.train.positions import own_positions, stated_positions

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

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
    """[L, 2] (lat, lon) in degrees: of a place's first photo, or as --truth has it."""
    place_S: Ints
    """[S] the place of each spot."""
    spot_deg_S2: Floats
    """[S, 2] where photos were taken: first the L places' own points, then those of photos that lie elsewhere."""
    origin: Origin
    """What the features are."""
    encoder: str
    """What the command that made them called the encoder, "" where that is not known."""
    left_out: dict[str, int]
    """Rows or locations that train nothing, by reason."""
    digest: str
    """sha256 of names, points, which row shows which place, and of the lengths of the features."""

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
        InputError: a folder or a column is missing or wrong, a photo stands in two pairs, nothing has a position, or
            encoders differ.
        OutputError: the run.json of a folder cannot be read.
    """
    _check_once(config.embeddings)
    npys: list[Path] = []
    origins: list[Origin] = []
    for folder in config.embeddings:
        units = plan_embeddings(folder)
        npys += [Path(unit.source) for unit in units]
        origins.append(origin_of(folder, units, tap=config.tap))
        if origins[-1].num_missing:
            log.warning("%s is not complete: %d of its units are missing", folder, origins[-1].num_missing)
    _check_origins(config.embeddings, origins)
    refuse_doubled(npys)
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
        found = stated_positions(config, None if config.group_by else rows.shard_R, place_R, names, left_out)
    else:
        found = own_positions(config, npys, place_R, len(names), left_out)
    place_R, kept = _renumbered(found.place_R, len(names))
    if not len(kept):
        raise InputError(_nothing(config, left_out))
    if not config.group_by:
        names = _unique_names(rows, kept)
    name_L = names if not config.group_by else names.take(pa.array(kept))
    point_L2 = found.point_deg_L2[kept]
    place_S, spot_S2 = _spots(place_R, point_L2, found.point_deg_R2)
    places = Places(
        pairs=rows.pairs,
        place_R=place_R,
        name_L=name_L,
        point_deg_L2=point_L2,
        place_S=place_S,
        spot_deg_S2=spot_S2,
        origin=origins[0],
        encoder=_encoder_name(config.embeddings[0]),
        left_out={reason: count for reason, count in left_out.items() if count},
        digest="",
    )
    return replace(places, digest=_digest(places))


def _check_once(folders: Sequence[str]) -> None:
    by_path: dict[Path, str] = {}
    for folder in folders:
        path = Path(folder).resolve()
        if path in by_path:
            raise InputError(
                f"{by_path[path]} and {folder} are the same folder of embeddings: its photos would count twice; "
                "give it once"
            )
        by_path[path] = folder


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


def _renumbered(place_R: Ints, num_places: int) -> tuple[Ints, Ints]:
    """([R] places numbered without gaps, [L] their numbers before), in their order."""
    kept = np.unique(place_R[place_R >= 0])
    number = np.full(num_places + 1, -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    # Row -1 is the last, which stays -1.
    return number[place_R], kept


def _spots(place_R: Ints, point_L2: Floats, point_R2: Floats) -> tuple[Ints, Floats]:
    """([S] places, [S, 2] points) of the places themselves and of rows that lie elsewhere than their place."""
    shown_R = np.flatnonzero(place_R >= 0)
    elsewhere_R = shown_R[(point_R2[shown_R] != point_L2[place_R[shown_R]]).any(axis=1)]
    place_S = np.concatenate([np.arange(len(point_L2)), place_R[elsewhere_R]])
    return place_S, np.concatenate([point_L2, point_R2[elsewhere_R]])


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
