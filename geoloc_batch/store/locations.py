"""Views by location: which rows of stored embeddings show one place, wherever among the pairs they stand.

Shape letters: P embedding pairs, V views (rows that have a location), L locations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.records import Unit
from geoloc_batch.store import metadata
from geoloc_batch.store.features import OWN_COLUMNS, metadata_path
from geoloc_batch.store.metadata import Scalar

BUCKET_VIEWS = 10_000
"""Views of one unit of locations, about."""


@dataclass(frozen=True, eq=False, slots=True)
class Locations:
    """The locations of embedding pairs, numbered by their first appearance."""

    npys: tuple[Path, ...]
    """[P] the pairs' features, in the order in which they were read."""
    field: str
    """What they are grouped by."""
    names: pa.Array
    """[L] the grouping field's value of each, as text."""
    location_of: tuple[NDArray[np.int64], ...]
    """[P] arrays, one value a row of the pair: its location, or -1 where it has none."""
    view_pair_V: NDArray[np.int32]
    """[V] the pair of each view. Views are sorted by location, then by pair and row."""
    view_row_V: NDArray[np.int64]
    """[V] its row in the pair."""
    offset_L1: NDArray[np.int64]
    """[L + 1] the views of location i are offset[i] to offset[i + 1]."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_missing(self) -> int:
        """Rows without a location."""
        return sum(len(rows) for rows in self.location_of) - len(self.view_row_V)

    @property
    def sha256(self) -> str:
        """Of the field, the pairs' names, and which row shows which location by name: what buckets are cut from."""
        digest = hashlib.sha256(f"{self.field}\n".encode())
        for npy, rows in zip(self.npys, self.location_of, strict=True):
            digest.update(f"{npy.name}\0{len(rows)}\n".encode())
            digest.update(rows.astype("<i8").tobytes())
        for name in self.names.to_pylist():
            digest.update(f"{len(name)}:{name}".encode())
        return digest.hexdigest()


def index_locations(npys: Sequence[Path | str], field: str, *, limit: int | None = None) -> Locations:
    """Group the rows of embedding pairs by a field of their metadata. Reads that one column alone.

    Args:
        npys: the features of each pair, as `plan_embeddings` lists them.
        field: a member of the photos' json, nested members with dots. 7, 7.0 and "7" name the same location, the text
            "7.0" another, an empty text or NaN none.
        limit: take the first so many rows alone.

    Raises:
        InputError: a table cannot be read, or no row of any has the field.
    """
    paths = [Path(npy) for npy in npys]
    columns = []
    for path in paths:
        column = _column(metadata_path(path), field)
        columns.append(column if limit is None else column[:limit])
        limit = None if limit is None else limit - len(columns[-1])
    named = pa.chunked_array(columns, pa.string()).dictionary_encode() if columns else pa.chunked_array([], pa.string())
    if named.null_count == len(named):
        raise InputError(_no_field(paths, field))
    encoded = named.combine_chunks()
    id_N = np.asarray(pc.fill_null(encoded.indices, -1), dtype=np.int64)
    location_of = tuple(np.split(id_N, np.cumsum([len(column) for column in columns])[:-1]))
    view_N = np.argsort(id_N, kind="stable")[int((id_N < 0).sum()) :]
    pair_N = np.repeat(np.arange(len(paths), dtype=np.int32), [len(rows) for rows in location_of])
    row_N = np.concatenate([np.arange(len(rows)) for rows in location_of])
    count_L = np.bincount(id_N[view_N], minlength=len(encoded.dictionary))
    return Locations(
        npys=tuple(paths),
        field=field,
        names=encoded.dictionary,
        location_of=location_of,
        view_pair_V=pair_N[view_N],
        view_row_V=row_N[view_N],
        offset_L1=np.concatenate([[0], np.cumsum(count_L)]),
    )


def _column(parquet: Path, field: str) -> pa.Array:
    """The field of every row as text; null where a row has none."""
    column = metadata.escape(field)
    try:
        file = pq.ParquetFile(parquet)
        wanted = [name for name in (column, metadata.RAW_COLUMN) if name in file.schema_arrow.names]
        table = file.read(wanted)
        texts = _as_text(_in_one(table[column])) if column in wanted else pa.nulls(file.metadata.num_rows, pa.string())
        if metadata.RAW_COLUMN in wanted:
            # A json with too many members for columns keeps its text.
            raws = table[metadata.RAW_COLUMN].to_pylist()
            whole = [location_name((metadata.flatten(_bytes(text)) or {}).get(field)) for text in raws]
            texts = pc.coalesce(texts, pa.array(whole, pa.string()))
        return texts
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"{parquet} cannot be read: {error}; write the embeddings again") from error


def _bytes(text: object) -> bytes:
    return b"" if text is None else str(text).encode(errors="backslashreplace")


def _in_one(values: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.nulls(0, values.type)


def _as_text(values: pa.Array) -> pa.Array:
    if pa.types.is_floating(values.type):
        return pa.array([location_name(value) for value in values.to_pylist()], pa.string())
    texts = values.cast(pa.string())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def location_name(value: Scalar) -> str | None:
    """The name of a location by a member of a photo's json; None where it names none.

    A number is named as `metadata.number_text` spells it, which is also how it stands in a column of text. Text is a
    name as it is: "7" is that of the number 7, and "7.0" another.
    """
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else metadata.number_text(value)


def _no_field(paths: Sequence[Path], field: str) -> str:
    if not paths:
        return "no embeddings were given"
    columns = pq.ParquetFile(metadata_path(paths[0])).schema_arrow.names
    there = [metadata.unescape(name) for name in columns if name not in OWN_COLUMNS]
    return (
        f"no photo of {paths[0].parent.parent} has {field!r} in its json, by which locations are to be told apart; "
        f"there {'are ' + ', '.join(there) if there else 'is nothing'}: name what tells them apart with --group-by"
    )


def plan_locations(folder: str, locations: Locations, *, row_bytes: int) -> list[Unit]:
    """Units of whole locations, each of about BUCKET_VIEWS views; after them one for the rows without a location.

    Args:
        folder: of the pairs.
        locations: of all of them.
        row_bytes: of one stored feature.
    """
    offset_L1, num_locations = locations.offset_L1, len(locations)
    units: list[Unit] = []
    first = 0
    while first < num_locations:
        full = int(np.searchsorted(offset_L1, offset_L1[first] + BUCKET_VIEWS, side="right")) - 1
        last = max(full, first + 1)
        num_bytes = int(offset_L1[last] - offset_L1[first]) * row_bytes
        units.append(
            Unit(index=len(units), kind="locations", source=folder, num_bytes=num_bytes, start=first, stop=last)
        )
        first = last
    if locations.num_missing:
        units.append(Unit(index=len(units), kind="locations", source=folder, start=first, stop=first))
    return units
