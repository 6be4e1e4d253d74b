"""A split of the user's own: a CSV or Parquet that names the split of each key.

Shape letters: N keys, R rows of the file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from geoloc_batch.errors import SplitError
from geoloc_batch.evaluate.sources import Source
from geoloc_batch.evaluate.tables import Column, read_table
from geoloc_batch.train.split import LEFT_OUT, SPLITS

log = logging.getLogger("geoloc_batch")

# What other tools call them, and what a row of no split may hold.
_WRITTEN = {
    **{name: code for code, name in enumerate(SPLITS)},
    **{str(code): code for code in range(len(SPLITS))},
    **dict.fromkeys(("training",), 0),
    **dict.fromkeys(("valid", "validation", "dev"), 1),
    **dict.fromkeys(("testing",), 2),
    **dict.fromkeys(("", "-1", "left out"), LEFT_OUT),
}
_COLUMNS = (Column(name="key", kind="text", is_required=True), Column(name="split", kind="text", is_required=True))


def read_split_file(path: str | Path, keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> NDArray[np.int8]:
    """The split of each key, by a table with the columns key and split.

    Args:
        path: a Parquet, or a CSV with a header. `split` holds train, val (or valid, validation, dev) and test, in
            capitals or not, or 0, 1, 2; an empty one, -1 and `left out` leave the key out.
        keys: [N] the keys to look up; one may stand there several times.

    Returns:
        [N] int8: 0 train, 1 val, 2 test, -1 left out or not in the file; those not in the file are counted in a
        warning.

    Raises:
        InputError: the file cannot be read, or lacks one of the columns.
        SplitError: a split is none of these, a key stands in the file with two splits, or no key is in the file.
    """
    table = read_table(Source(name=str(path), files=(Path(path),)), _COLUMNS)
    code_R = _codes(table["split"], path)
    named = table["key"].combine_chunks().dictionary_encode(null_encoding="encode")
    key_R = np.asarray(named.indices, dtype=np.int64)
    code_K = np.full(len(named.dictionary), LEFT_OUT, dtype=np.int8)
    code_K[key_R] = code_R
    other = np.flatnonzero(code_K[key_R] != code_R)
    if len(other):
        row = int(other[0])
        raise SplitError(
            f"{path}: the key {table['key'][row].as_py()!r} stands in {_name(code_R[row])} (row {row + 1}) and in "
            f"{_name(code_K[key_R[row]])}; {len(other)} rows differ from a later one of their key; keep one of each"
        )
    wanted = keys if isinstance(keys, pa.Array | pa.ChunkedArray) else pa.array(keys, pa.large_string())
    row_N = pc.fill_null(pc.index_in(wanted.cast(pa.large_string()), named.dictionary), -1).to_numpy()
    is_missing_N = row_N < 0
    if is_missing_N.any():
        first = wanted[int(np.argmax(is_missing_N))].as_py()
        told = f"{int(is_missing_N.sum())} of {len(row_N)} keys are not in {path}, first {first!r}"
        if is_missing_N.all():
            raise SplitError(f"{told}; it has {table['key'][0].as_py()!r}" if len(table) else f"{path} has no row")
        log.warning("%s: they are left out", told)
    return np.where(is_missing_N, np.int8(LEFT_OUT), code_K[row_N])


def _codes(split_R: pa.ChunkedArray, path: str | Path) -> NDArray[np.int8]:
    text = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(split_R, "")))
    row_R = pc.index_in(text, pa.array(list(_WRITTEN), pa.large_string()))
    if row_R.null_count:
        row = pc.index(pc.is_null(row_R), True).as_py()
        raise SplitError(
            f"{path}: row {row + 1} has the split {split_R[row].as_py()!r} ({row_R.null_count} rows of no known one); "
            f"write train, val or test"
        )
    return np.asarray(np.array(list(_WRITTEN.values()), dtype=np.int8)[row_R.to_numpy()])


def _name(code: int) -> str:
    return SPLITS[code] if code >= 0 else "none"
