"""The samples' json as table columns, and back.

A nested object is flattened with dots; a list, or an object without members, stands as its JSON text. A column is
int64, double (integers and floats mixed, where no digit is lost by it), bool, or string (everything else, numbers then
as `number_text` spells them); what is absent is null. A json that cannot be read, or is no object, keeps its text in
the column `json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

Scalar: TypeAlias = "bool | int | float | str | None"

RAW_COLUMN = "json"
PREFIX = "meta_"
# Names that the metadata of embeddings needs for itself.
RESERVED = frozenset({"image_path", "key", "shard", "row", "emb_norm", RAW_COLUMN})
# An object whose members are data (ids, file names) would make a table as wide as it is long: then all keep their text.
MAX_COLUMNS = 1000
INT64 = range(-(2**63), 2**63)


def text(value: str) -> str:
    """`value` as UTF-8 can hold it: what stands alone of a surrogate pair is spelt out."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode(errors="backslashreplace").decode()
    return value


def flatten(meta: bytes) -> dict[str, Scalar] | None:
    """One sample's json as flat members, None where it cannot be read or is no object.

    Args:
        meta: its bytes; b"" gives no members.
    """
    flat: dict[str, Scalar] = {}
    if not meta:
        return flat
    try:
        value = json.loads(meta)
        if not isinstance(value, dict):
            return None
        _flatten_into(flat, "", value)
    # Also what is nested too deeply, and integers with thousands of digits.
    except (ValueError, RecursionError):
        return None
    return flat


def _flatten_into(flat: dict[str, Scalar], prefix: str, members: Mapping[str, Any]) -> None:
    for name, value in members.items():
        path = text(prefix + name)
        if isinstance(value, dict) and value:
            _flatten_into(flat, path + ".", value)
        elif isinstance(value, dict | list):
            flat[path] = json.dumps(value)
        else:
            flat[path] = text(value) if isinstance(value, str) else value


def escape(name: str, reserved: Container[str] = RESERVED) -> str:
    """A column's name that is none of `reserved`; different names stay different."""
    return PREFIX + name if _bare(name) in reserved else name


def unescape(column: str) -> str:
    """The name that `escape` was given."""
    return column[len(PREFIX) :] if column not in RESERVED and _bare(column) in RESERVED else column


def _bare(name: str) -> str:
    while name.startswith(PREFIX):
        name = name[len(PREFIX) :]
    return name


def columns(metas: Sequence[bytes], *, is_prefixed: bool) -> dict[str, pa.Array]:
    """The columns of many samples' json, sorted by name.

    Args:
        metas: N jsons.
        is_prefixed: True: every name gets PREFIX. False: only those in RESERVED.

    Returns:
        Arrays of N values each.
    """
    flats = [flatten(meta) for meta in metas]
    names = sorted({name for flat in flats if flat is not None for name in flat})
    if len(names) > MAX_COLUMNS:
        flats, names = [None if meta else {} for meta in metas], []
    prefix, reserved = (PREFIX, frozenset({RAW_COLUMN})) if is_prefixed else ("", RESERVED)
    arrays = {
        prefix + escape(name, reserved): _array([None if flat is None else flat.get(name) for flat in flats])
        for name in names
    }
    if None in flats:
        texts = [
            meta.decode(errors="backslashreplace") if flat is None else None
            for meta, flat in zip(metas, flats, strict=True)
        ]
        arrays[prefix + RAW_COLUMN] = pa.array(texts, pa.string())
    return dict(sorted(arrays.items()))


def _array(values: Sequence[Scalar]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(value in INT64 for value in values if value is not None):
        return pa.array(values, pa.int64())
    if kinds == {float} or (kinds == {int, float} and all(_fits_double(value) for value in values)):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    texts = [value if value is None or isinstance(value, str) else number_text(value) for value in values]
    return pa.array(texts, pa.string())


def number_text(value: bool | int | float) -> str | None:
    """A number as text, None for NaN. Equal numbers have one spelling: 7 and 7.0 are 7, and so in whatever column."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def _fits_double(value: Scalar) -> bool:
    return not isinstance(value, int) or (value in INT64 and int(float(value)) == value)


def restore(table: pa.Table, drop: Iterable[str]) -> list[bytes]:
    """The json of each row of a metadata table, such that flattening it again gives the same columns.

    Args:
        table: of N rows, written by us or by others.
        drop: columns that are not the user's.

    Returns:
        N jsons.
    """
    raw = table[RAW_COLUMN].to_pylist() if RAW_COLUMN in table.column_names else [None] * table.num_rows
    kept = [name for name in table.column_names if name not in {*drop, RAW_COLUMN}]
    if not kept and RAW_COLUMN not in table.column_names:
        return [b""] * table.num_rows
    names = [unescape(name) for name in kept]
    rows = zip(*(table[name].to_pylist() for name in kept), strict=True) if kept else [()] * table.num_rows
    return [
        # Nulls are written: a column stays a column where none of its values is set.
        json.dumps(dict(zip(names, row, strict=True)), default=str).encode() if text is None else str(text).encode()
        for text, row in zip(raw, rows, strict=True)
    ]


def agreed(metas: Sequence[bytes]) -> bytes:
    """The json of a location: the members on which the jsons of all its views agree; the others are null.

    Args:
        metas: one or more. A single one, and such as are all alike, stay as they are.
    """
    if all(meta == metas[0] for meta in metas):
        return metas[0]
    flats = [flatten(meta) or {} for meta in metas]
    names = dict.fromkeys(name for flat in flats for name in flat)
    common = {name: _common([flat.get(name) for flat in flats]) for name in names}
    # Nulls are written: a column stays a column where none of its values is set.
    return json.dumps(common).encode()


def _common(values: Sequence[Scalar]) -> Scalar:
    first = values[0]
    # True is no 1 here, though Python has them equal; 1 is 1.0.
    is_alike = all(value == first and isinstance(value, bool) == isinstance(first, bool) for value in values)
    return first if is_alike else None
