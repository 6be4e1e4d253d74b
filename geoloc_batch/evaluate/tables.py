"""Tables of places, read from Parquet or CSV: the columns that are asked for, under our names and in our types."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from geoloc_batch.errors import InputError
from geoloc_batch.evaluate.sources import Source

Kind = Literal["text", "degrees", "cell", "cells"]

_TYPES = {"text": pa.large_string(), "degrees": pa.float64(), "cell": pa.int64(), "cells": pa.large_list(pa.int64())}
_WORDS = {"text": "text", "degrees": "degrees", "cell": "ids of cells", "cells": "lists of cells"}
# What other tools call these, likeliest first.
_KNOWN_AS = {
    "key": ("image_path", "id", "image_id", "img_id", "image", "filename", "file", "path", "name"),
    "lat": ("latitude", "true_lat", "pred_lat", "gps_lat", "y"),
    "lon": ("longitude", "lng", "long", "true_lon", "pred_lon", "gps_lon", "gps_lng", "x"),
}
# A header is at most this long.
_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column that is wanted."""

    name: str
    """Ours."""
    kind: Kind
    written: str = ""
    """The file's, where it is another."""
    flag: str = ""
    """The flag that says what the file calls it, for messages."""
    is_required: bool = False

    @property
    def in_file(self) -> str:
        """What it is called in the file."""
        return self.written or self.name


def read_table(source: Source, columns: Sequence[Column]) -> pa.Table:
    """The wanted columns of all files of a source, one after the other.

    Args:
        source: the files.
        columns: what is wanted. One that is not required may be absent: from every file, then the table lacks it,
            or from some, then it is null there.

    Returns:
        Columns by our names: text as large_string, degrees as float64 (null where absent), cells as int64.

    Raises:
        InputError: a file cannot be read, lacks a required column, or has one of another kind.
    """
    tables = [_read(path, columns) for path in source.files]
    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise InputError(f"the tables of {source.name} do not go together: {error}") from error


def count_rows(files: Iterable[Path]) -> int:
    """Rows of Parquet files, from their footers."""
    try:
        return sum(int(pq.read_metadata(path).num_rows) for path in files)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"a table of error rows cannot be read: {error}; see `geoloc verify`") from error


def _read(path: Path, columns: Sequence[Column]) -> pa.Table:
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        return _read_parquet(path, columns) if is_parquet else _read_csv(path, columns)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {error}; give a Parquet, or a CSV with a header") from error


def _read_parquet(path: Path, columns: Sequence[Column]) -> pa.Table:
    with pq.ParquetFile(path) as file:
        present = _present(path, columns, file.schema_arrow.names)
        table = file.read(columns=[column.in_file for column in present])
    arrays = {column.name: _typed(table[column.in_file], column, path) for column in present}
    return pa.table(arrays, schema=_schema(present))


def _read_csv(path: Path, columns: Sequence[Column]) -> pa.Table:
    header, delimiter = _csv_header(path)
    present = _present(path, columns, header)
    as_text = {column.in_file: pa.large_string() for column in present if column.kind in ("text", "cells")}
    as_number = {column.in_file: pa.float64() for column in present if column.kind in ("degrees", "cell")}
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
        # Keys stay as they are written: 007 is no number and NA no gap.
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=[column.in_file for column in present], column_types={**as_text, **as_number}
        ),
    )
    arrays = {column.name: _typed(table[column.in_file], column, path) for column in present}
    return pa.table(arrays, schema=_schema(present))


def _csv_header(path: Path) -> tuple[list[str], str]:
    """(the columns, the delimiter: what is commonest in the header of comma, semicolon and tab)."""
    with pa.input_stream(str(path), compression="detect") as stream:
        start = stream.read(_HEADER_BYTES)
    try:
        line = start.decode("utf-8-sig", errors="strict" if len(start) < _HEADER_BYTES else "ignore")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is neither Parquet nor a CSV in UTF-8 ({error.reason}); give one of them") from None
    first = line.splitlines()[0] if line else ""
    if not first:
        raise InputError(f"{path} is empty; give a Parquet, or a CSV with a header")
    delimiter = max(",;\t", key=first.count)
    return next(csv.reader(io.StringIO(line), delimiter=delimiter)), delimiter


def _present(path: Path, columns: Sequence[Column], found: Sequence[str]) -> list[Column]:
    present = []
    for column in columns:
        if found.count(column.in_file) > 1:
            raise InputError(f"{path} has two columns {column.in_file!r}; rename one")
        if column.in_file in found:
            present.append(column)
        elif column.is_required:
            raise InputError(_absent(path, column, found))
    return present


def _absent(path: Path, column: Column, found: Sequence[str]) -> str:
    near = _nearest(column.name, column.in_file, found)
    listed = ", ".join(found[:30]) + (", ..." if len(found) > 30 else "")
    if not near:
        return f"{path} has no column {column.in_file!r}; it has {listed}"
    remedy = f"pass {column.flag} {near}" if column.flag else "rename it"
    return f"{path} has no column {column.in_file!r}; did you mean {near!r}? Then {remedy}. It has {listed}"


def _nearest(name: str, written: str, found: Sequence[str]) -> str:
    by_lower = {other.lower(): other for other in reversed(found)}
    known = [alias for alias in (written.lower(), name, *_KNOWN_AS.get(name, ())) if alias in by_lower]
    near = known or difflib.get_close_matches(written.lower(), by_lower, n=1)
    return by_lower[near[0]] if near else ""


def _typed(values: pa.ChunkedArray, column: Column, path: Path) -> pa.ChunkedArray:
    try:
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if column.kind != "text" and pa.types.is_boolean(values.type):
            raise pa.ArrowInvalid("true and false are no numbers")
        if column.kind == "text" and (pa.types.is_floating(values.type) or pa.types.is_nested(values.type)):
            raise pa.ArrowInvalid("keys are text or whole numbers")
        if column.kind == "cells" and not pa.types.is_nested(values.type):
            values = _lists(values)
        if column.kind == "cell" and pa.types.is_floating(values.type):
            # pandas has no gaps among whole numbers: it makes them 7.0 and NaN.
            values = pc.if_else(pc.is_nan(values), None, values)
        return values.cast(_TYPES[column.kind])
    except pa.ArrowException as error:
        words = f"column {column.in_file!r} holds {values.type}, which is not all {_WORDS[column.kind]}"
        raise InputError(f"{path}: {words}: {error}; mend the column") from error


def _lists(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists from how a CSV spells them: `[73, 85]`, `[73 85]`, `73;85`."""
    between = pc.replace_substring_regex(values, pattern=r"^[^0-9]+|[^0-9]+$", replacement="")
    filled = pc.if_else(pc.equal(between, ""), None, between)
    return pc.split_pattern_regex(filled, pattern=r"[^0-9]+")


def _schema(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema([(column.name, _TYPES[column.kind]) for column in columns])
