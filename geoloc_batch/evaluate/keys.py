"""Keys: which prediction belongs to which row of the truth. No loop over rows: there may be 10 million of them.

Shape letters: T rows of the truth, P predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def merge_repeats(
    truth: pa.Table, predictions: pa.Table, truth_name: str, columns: Sequence[str]
) -> tuple[pa.Table, int]:
    """Keep one row of each identity whose rows agree, as a table of photos has them that is asked for locations.

    Args:
        truth: T rows with `key`, and maybe `shard`.
        predictions: the other table, by which it is told whether `shard` counts.
        truth_name: what messages call the first.
        columns: in which rows of one identity are to agree; a null, or NaN, agrees with such.

    Returns:
        The first row of each, and how many were left out.

    Raises:
        InputError: a key is empty, or stands twice and its rows differ.
    """
    has_shards = all("shard" in table.column_names for table in (truth, predictions))
    (code_N,) = _codes([(truth_name, truth)], has_shards=has_shards)
    first_N = _first_of(code_N)
    is_again_N = first_N != np.arange(len(code_N))
    differs_N = np.zeros(len(code_N), dtype=bool)
    for column in columns:
        differs_N |= _differs(truth[column], first_N)
    if differs_N.any():
        how = f" with another {' or '.join(columns)}"
        raise InputError(_repeated(np.flatnonzero(differs_N), first_N, truth, truth_name, how=how))
    num_repeats = int(is_again_N.sum())
    return (truth.filter(pa.array(~is_again_N)) if num_repeats else truth), num_repeats


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


def _first_of(code_N: Ints) -> Ints:
    """[N] for each row the first one with its number."""
    first = np.full(int(code_N.max(initial=-1)) + 1, -1, dtype=np.int64)
    # Backwards, so that what stays written is the first row of each.
    first[code_N[::-1]] = np.arange(len(code_N))[::-1]
    return first[code_N]


def _differs(column: pa.ChunkedArray, first_N: Ints) -> NDArray[np.bool_]:
    """[N] whether a row has another number than the row `first_N`; of NaN and null there is one kind."""
    is_null_N = pc.is_null(column, nan_is_null=True).to_numpy()
    value_N = np.where(is_null_N, 0, pc.fill_null(column, 0).to_numpy())
    differs_N: NDArray[np.bool_] = (is_null_N != is_null_N[first_N]) | (value_N != value_N[first_N])
    return differs_N


def _check_unique(code_N: Ints, table: pa.Table, name: str, *, has_shards: bool, other_has_shards: bool) -> None:
    first_N = _first_of(code_N)
    again_N = np.flatnonzero(first_N != np.arange(len(code_N)))
    if len(again_N):
        # The same key in two shards is two photos: only the truth can say which is meant.
        is_across_shards = not has_shards and "shard" in table.column_names and not other_has_shards
        raise InputError(_repeated(again_N, first_N, table, name, is_across_shards=is_across_shards))


def _repeated(
    again_N: Ints, first_N: Ints, table: pa.Table, name: str, *, is_across_shards: bool = False, how: str = ""
) -> str:
    later = int(again_N[0])
    earlier = int(first_N[later])
    key = table["key"][later].as_py()
    message = f"{name}: the key {key!r} stands twice{how}, in row {earlier + 1} and in row {later + 1}"
    if "shard" in table.column_names:
        shards = [table["shard"][row].as_py() for row in (earlier, later)]
        message += f" (shards {shards[0]} and {shards[1]})" if shards[0] != shards[1] else f" (shard {shards[0]})"
    message += f"; {len(again_N)} rows repeat an earlier key{how}; "
    remedy = "give the truth a column shard that says which is meant" if is_across_shards else "keep one row of each"
    return message + remedy
