"""Keys: which prediction belongs to which row of the truth. No loop over rows: there may be 10 million of them.

Shape letters: T rows of the truth, P predictions.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from geoloc_batch.errors import InputError

Ints = NDArray[np.int64]


def match(truth: pa.Table, predictions: pa.Table, truth_name: str, predictions_name: str) -> Ints:
    """Find each row's prediction, by shard and key where both tables have both, else by key.

    Args:
        truth: T rows with `key`, and maybe `shard`.
        predictions: P rows likewise.
        truth_name: what messages call it.
        predictions_name: likewise.

    Returns:
        [T] rows of `predictions`, -1 where there is none.

    Raises:
        InputError: a key is empty, or stands twice in one of them.
    """
    # No dict by name: one file may be given as both.
    tables = [(truth_name, truth), (predictions_name, predictions)]
    has_shards = all("shard" in table.column_names for _, table in tables)
    code_T, code_P = _codes(tables, has_shards=has_shards)
    _check_unique(code_T, truth, truth_name, has_shards=has_shards, other_has_shards=True)
    other_has_shards = "shard" in truth.column_names
    _check_unique(code_P, predictions, predictions_name, has_shards=has_shards, other_has_shards=other_has_shards)
    row_of_code = np.full(int(max(code_T.max(initial=-1), code_P.max(initial=-1))) + 1, -1, dtype=np.int64)
    row_of_code[code_P] = np.arange(len(code_P))
    return row_of_code[code_T]


def check_unique(table: pa.Table, name: str) -> None:
    """Raise InputError where a key stands twice, in one shard if the table has shards."""
    has_shards = "shard" in table.column_names
    (code_N,) = _codes([(name, table)], has_shards=has_shards)
    _check_unique(code_N, table, name, has_shards=has_shards, other_has_shards=True)


def _codes(tables: list[tuple[str, pa.Table]], *, has_shards: bool) -> list[Ints]:
    """A number for each row, the same for the same identity in any of the tables; small and without large gaps."""
    for name, table in tables:
        _check_named(table, name)
    lengths = [table.num_rows for _, table in tables]
    code = _encode([table["key"] for _, table in tables])
    if has_shards:
        shard = _encode([table["shard"] for _, table in tables])
        _, code = np.unique(code * (int(shard.max(initial=0)) + 1) + shard, return_inverse=True)
    return np.split(code.astype(np.int64, copy=False), np.cumsum(lengths)[:-1])


def _encode(columns: list[pa.ChunkedArray]) -> Ints:
    """A null counts as a value of its own, so that no row falls out."""
    together = pa.chunked_array([chunk for column in columns for chunk in column.chunks], type=pa.large_string())
    # One dictionary for all chunks comes out, so the numbers are comparable.
    encoded = together.dictionary_encode(null_encoding="encode")
    parts = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)


def _check_named(table: pa.Table, name: str) -> None:
    is_empty = pc.fill_null(pc.equal(table["key"], ""), True)
    num_empty = int(pc.sum(is_empty).as_py() or 0)
    if num_empty:
        first = pc.index(is_empty, True).as_py()
        raise InputError(f"{name}: row {first + 1} has no key ({num_empty} such rows); fill the column or drop them")


def _check_unique(code_N: Ints, table: pa.Table, name: str, *, has_shards: bool, other_has_shards: bool) -> None:
    first_N = np.full(int(code_N.max(initial=-1)) + 1, -1, dtype=np.int64)
    # Backwards, so that what stays written is the first row of each.
    first_N[code_N[::-1]] = np.arange(len(code_N))[::-1]
    again_N = np.flatnonzero(first_N[code_N] != np.arange(len(code_N)))
    if not len(again_N):
        return
    later = int(again_N[0])
    earlier = int(first_N[code_N[later]])
    key = table["key"][later].as_py()
    message = f"{name}: the key {key!r} stands twice, in row {earlier + 1} and in row {later + 1}"
    if "shard" in table.column_names:
        shards = [table["shard"][row].as_py() for row in (earlier, later)]
        message += f" (shards {shards[0]} and {shards[1]})" if shards[0] != shards[1] else f" (shard {shards[0]})"
    message += f"; {len(again_N)} rows repeat an earlier key; "
    # The same key in two shards is two photos: only the truth can say which is meant.
    is_across_shards = not has_shards and "shard" in table.column_names and not other_has_shards
    remedy = "give the truth a column shard that says which is meant" if is_across_shards else "keep one row of each"
    raise InputError(message + remedy)
