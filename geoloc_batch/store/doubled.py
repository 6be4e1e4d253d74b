"""Photos that stand in several embedding pairs, looked for before they are grouped: each would count as two views.

Shape letters: N rows of several pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.store.features import IDENTITY, KEY_COLUMNS, has_identity, key_text, metadata_path

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of pairs, of shards that several of them hold."""

    pair_N: Ints
    position_N: Ints
    """[N] where they stand in their pairs."""
    shard_N: Ints
    """[N] a number for each shard."""
    row_N: Ints

    def take(self, chosen: Ints | NDArray[np.bool_]) -> _Rows:
        return _Rows(self.pair_N[chosen], self.position_N[chosen], self.shard_N[chosen], self.row_N[chosen])


def refuse_doubled(npys: Sequence[Path | str], *, limit: int | None = None) -> None:
    """Look for photos (shard, row and key) that stand in several embedding pairs, as `geoloc verify` does.

    Pairs whose metadata do not name shard and row are of photos that nobody can tell apart. In one folder a photo
    without a key is named by its row, and other tools count rows from 0 in each pair: such are left alone.

    Args:
        npys: the features of each pair.
        limit: look at the first so many rows alone.

    Raises:
        InputError: a photo stands in several, or a table cannot be read.
    """
    paths = [Path(npy) for npy in npys]
    shards_of = [_shards(metadata_path(path)) for path in paths]
    held_by = Counter(shard for shards in shards_of for shard in shards)
    # Most folders have none: nothing but one column was read then.
    shared = [shard for shard, count in held_by.items() if count > 1]
    if not shared:
        return
    rows = _doubled(_rows_of(paths, pa.array(shared, pa.string()), limit))
    if not len(rows.pair_N):
        return
    rows = _with_equal_keys(paths, rows)
    if not len(rows.pair_N):
        return
    first = (rows.shard_N == rows.shard_N[0]) & (rows.row_N == rows.row_N[0])
    holders = " and ".join(str(paths[pair]) for pair in np.unique(rows.pair_N[first])[:2].tolist())
    num_photos = len(np.unique(np.stack([rows.shard_N, rows.row_N]), axis=1)[0])
    raise InputError(
        f"{num_photos} photos, of {len(np.unique(rows.shard_N))} shards, stand in more than one embedding pair, those "
        f"of {shared[rows.shard_N[0]]} in {holders}: two sources hold the same photos, and each would count twice; "
        f"embed only one of the two, or take away the pair that was copied, or, where they are other "
        f"photos of the same names, embed each under shard names of its own"
    )


def _shards(parquet: Path) -> list[str]:
    """The shards that a pair's metadata name."""
    table = _read(parquet, IDENTITY[:1])
    if table is None or not (pa.types.is_string(table["shard"].type) or pa.types.is_large_string(table["shard"].type)):
        return []
    return [shard for shard in pc.unique(table["shard"]).to_pylist() if shard is not None]


def _read(parquet: Path, columns: Sequence[str]) -> pa.Table | None:
    """Columns of a table, None where it lacks one of them."""
    try:
        with pq.ParquetFile(parquet) as file:
            names = file.schema_arrow.names
            return file.read(list(columns)) if all(names.count(name) == 1 for name in columns) else None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{parquet} cannot be read: {error}; write the embeddings again") from error


def _rows_of(paths: Sequence[Path], shared: pa.Array, limit: int | None) -> _Rows:
    """The rows of the shared shards, of pairs that tell their photos apart."""
    none = np.empty(0, dtype=np.int64)
    parts: list[tuple[Ints, Ints, Ints, Ints]] = [(none, none, none, none)]
    for pair, path in enumerate(paths):
        table = _read(metadata_path(path), IDENTITY)
        if table is None:
            continue
        is_told = has_identity(table)
        if limit is not None:
            table = table.slice(0, limit)
            limit -= table.num_rows
        if is_told:
            number_N = pc.index_in(table["shard"].cast(pa.string()), value_set=shared)
            position_N = np.flatnonzero(pc.is_valid(number_N).to_numpy())
            shard_N = pc.drop_null(number_N).to_numpy().astype(np.int64)
            row_N = table["row"].to_numpy().astype(np.int64)[position_N]
            parts.append((np.full(len(position_N), pair, dtype=np.int64), position_N, shard_N, row_N))
    return _Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _doubled(rows: _Rows) -> _Rows:
    """Those whose shard and row stand in several pairs; equal ones beside each other."""
    order = np.lexsort((rows.pair_N, rows.row_N, rows.shard_N))
    rows = rows.take(order)
    is_next = (np.diff(rows.shard_N) == 0) & (np.diff(rows.row_N) == 0)
    return rows.take(np.append(is_next, False) | np.append(False, is_next))


def _with_equal_keys(paths: Sequence[Path], rows: _Rows) -> _Rows:
    """Of rows whose shard and row stand in several pairs, those whose key does, too."""
    text_N = np.empty(len(rows.pair_N), dtype=object)
    for pair, here in _by_pair(rows.pair_N):
        text_N[here] = _keys(metadata_path(paths[pair]), rows.position_N[here], rows.row_N[here])
    # Rows without a key are compared between folders alone: those of one folder count as one.
    hand_N = [
        str(paths[pair].parent if key == str(row) else paths[pair])
        for pair, row, key in zip(rows.pair_N.tolist(), rows.row_N.tolist(), text_N.tolist(), strict=True)
    ]
    photo_N = list(zip(rows.shard_N.tolist(), rows.row_N.tolist(), text_N.tolist(), strict=True))
    count = Counter(photo for photo, _ in set(zip(photo_N, hand_N, strict=True)))
    return rows.take(np.fromiter((count[photo] > 1 for photo in photo_N), dtype=np.bool_, count=len(photo_N)))


def _by_pair(pair_N: Ints) -> Iterator[tuple[int, Ints]]:
    for pair in np.unique(pair_N).tolist():
        yield pair, np.flatnonzero(pair_N == pair)


def _keys(parquet: Path, position_N: Ints, row_N: Ints) -> list[str]:
    """The rows' keys, as StoredFeatures has them."""
    tables = (_read(parquet, [name]) for name in KEY_COLUMNS)
    table = next((table for table in tables if table is not None), None)
    named = row_N.tolist() if table is None else table.column(0).take(pa.array(position_N)).to_pylist()
    return [key_text(value, row) for value, row in zip(named, row_N.tolist(), strict=True)]
