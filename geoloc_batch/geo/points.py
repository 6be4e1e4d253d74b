"""Positions: checks of coordinates, and reading of tables that hold them.

Shape letters: N good points, M bad rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import InputError, PartitionError

LAT_NAMES = ("lat", "latitude", "true_lat")
LON_NAMES = ("lon", "lng", "long", "longitude", "true_lon")
# What a table may write for a number; "nan" is told apart by name.
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_NAN = r"^(?i)[+-]?nan$"
_INFINITE = r"^(?i)[+-]?inf(inity)?$"


@dataclass(frozen=True, kw_only=True, slots=True)
class BadPoint:
    """A row of a table that is no place on Earth."""

    row: int
    """Counted from 0, the header left out."""
    reason: str
    """missing, no number, NaN or out of range."""
    lat: str
    lon: str
    """As they stand in the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """N positions, each a place on Earth, and the M rows that gave none. (0, 0) is a place like any other."""

    lat: NDArray[np.float64]
    """[N] degrees."""
    lon: NDArray[np.float64]
    """[N] degrees."""
    bad: tuple[BadPoint, ...] = ()
    """[M] in the order of the table."""
    source: str = field(default="the points")
    """What messages call them."""

    def __len__(self) -> int:
        return len(self.lat)

    @property
    def point_deg(self) -> NDArray[np.float64]:
        """[N, 2] (lat, lon) in degrees."""
        return np.stack([self.lat, self.lon], axis=-1)

    @property
    def num_bad(self) -> dict[str, int]:
        """How many rows gave no position, by reason."""
        return dict(Counter(row.reason for row in self.bad))

    def complaint(self) -> str:
        """One line on the rows that gave no position, the first named; empty where there are none."""
        if not self.bad:
            return ""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.num_bad.items()))
        first = self.bad[0]
        return (
            f"{self.source}: {len(self.bad)} of {len(self) + len(self.bad)} rows have no usable position ({counts}) "
            f"and are left out; the first is row {first.row}: lat {first.lat!r}, lon {first.lon!r}"
        )


def check_points(lat: ArrayLike, lon: ArrayLike) -> NDArray[np.float64]:
    """[N, 2] of N latitudes and longitudes, after a look at each.

    Raises:
        PartitionError: the two differ in shape, or a point is NaN, infinite or out of range (the first is named).
    """
    lat_N, lon_N = np.asarray(lat, dtype=np.float64), np.asarray(lon, dtype=np.float64)
    if lat_N.ndim != 1 or lat_N.shape != lon_N.shape:
        raise PartitionError(
            f"lat and lon must be two lists of one length, got the shapes {lat_N.shape}, {lon_N.shape}"
        )
    bad_N = ~((np.abs(lat_N) <= 90) & (np.abs(lon_N) <= 180))
    if bad_N.any():
        first = int(np.argmax(bad_N))
        raise PartitionError(
            f"point {first} is no place on Earth: lat {lat_N[first]}, lon {lon_N[first]} "
            f"({int(bad_N.sum())} such points)"
        )
    return np.stack([lat_N, lon_N], axis=-1)


def check_pairs(point_deg_N2: ArrayLike) -> NDArray[np.float64]:
    """[N, 2] (lat, lon) with N > 0, after the same look.

    Raises:
        PartitionError: as `check_points`, or the shape is another, or there is no point.
    """
    points = np.asarray(point_deg_N2, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise PartitionError(f"points must be [N, 2] (lat, lon) with N > 0, got the shape {points.shape}")
    return check_points(points[:, 0], points[:, 1])


def one_name(point_deg_N2: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 2] the same places, each under one name: 180 for -180, longitude 0 at the poles, no -0.0."""
    named = point_deg_N2 + 0.0
    named[named[:, 1] == -180, 1] = 180
    named[np.abs(named[:, 0]) == 90, 1] = 0
    return named


def read_points(path: str | Path, *, lat: str = "", lon: str = "") -> Points:
    """Read the positions of a CSV or Parquet table.

    Args:
        path: a .csv (or .csv.gz) with a header, or a .parquet file.
        lat: the column of latitudes; without it lat, latitude or true_lat, in capitals or not.
        lon: the column of longitudes; without it lon, lng, long, longitude or true_lon.

    Returns:
        The good rows' positions; the others are counted by reason and named.

    Raises:
        InputError: the table cannot be read, or has no such columns, or two that could be meant.
    """
    import pyarrow as pa

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such table of points: {path}; give a CSV or Parquet file with lat and lon")
    try:
        return _read(path, lat, lon)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a CSV or Parquet table: {error}") from error


def points_of(lat: ArrayLike, lon: ArrayLike, source: str = "the points") -> Points:
    """Points of two lists of numbers, as `read_points` tells good from bad; None and NaN are rows without position."""
    lat_R, lon_R = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (lat, lon))
    if lat_R.shape != lon_R.shape:
        raise InputError(f"{source}: {len(lat_R)} latitudes do not fit {len(lon_R)} longitudes")
    return _sorted_out(lat_R, lon_R, {}, lambda row: (str(lat_R[row]), str(lon_R[row])), source)


def _read(path: Path, lat: str, lon: str) -> Points:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        names = list(pq.read_schema(path).names)
        columns = [_column(names, given, kinds, path) for given, kinds in ((lat, LAT_NAMES), (lon, LON_NAMES))]
        # By name and not by position; the file may hold embeddings' metadata of any width.
        table = pq.ParquetFile(path).read(columns=columns)
    else:
        import pyarrow as pa
        import pyarrow.csv as pv

        with pv.open_csv(path) as file:
            names = list(file.schema.names)
        columns = [_column(names, given, kinds, path) for given, kinds in ((lat, LAT_NAMES), (lon, LON_NAMES))]
        options = pv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
        )
        table = pv.read_csv(path, convert_options=options)
    texts = [table.column(name) for name in columns]
    numbers, reasons = zip(*(_numbers(column) for column in texts), strict=True)
    reason: dict[int, str] = {**reasons[1], **reasons[0]}
    return _sorted_out(
        numbers[0],
        numbers[1],
        reason,
        lambda row: (_text(texts[0][row].as_py()), _text(texts[1][row].as_py())),
        str(path),
    )


def _sorted_out(
    lat_R: NDArray[np.float64], lon_R: NDArray[np.float64], reason: dict[int, str], text: Any, source: str
) -> Points:
    good_R = (np.abs(lat_R) <= 90) & (np.abs(lon_R) <= 180)
    bad = []
    for row in np.flatnonzero(~good_R).tolist():
        fallback = "NaN" if np.isnan(lat_R[row]) or np.isnan(lon_R[row]) else "out of range"
        lat, lon = text(row)
        bad.append(BadPoint(row=row, reason=reason.get(row, fallback), lat=lat, lon=lon))
    return Points(lat=lat_R[good_R], lon=lon_R[good_R], bad=tuple(bad), source=source)


def _numbers(column: Any) -> tuple[NDArray[np.float64], dict[int, str]]:
    """A column as float64, NaN where that cannot be, and why it cannot (nulls and texts)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_boolean(column.type):
        # As a CSV has them: true is no number, and no degree east of Greenwich.
        column = column.cast(pa.string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        missing = np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False))
        return _float64(column), dict.fromkeys(missing.tolist(), "missing")
    text = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    is_number = pc.match_substring_regex(text, _NUMBER)
    number = _float64(pc.cast(pc.if_else(is_number, text, pa.scalar(None, text.type)), pa.float64()))
    infinite = pc.match_substring_regex(text, _INFINITE).to_numpy(zero_copy_only=False)
    number[infinite] = np.inf
    reasons: dict[int, str] = {}
    for row in np.flatnonzero(np.isnan(number)).tolist():
        value = text[row].as_py()
        reasons[row] = "missing" if not value else "NaN" if value.lower().lstrip("+-") == "nan" else "no number"
    return number, reasons


def _float64(column: Any) -> NDArray[np.float64]:
    import pyarrow as pa

    return np.array(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def _column(names: list[str], given: str, kinds: Iterable[str], path: Path) -> str:
    if given:
        if given not in names:
            raise InputError(f"{path} has no column {given!r}; it has {', '.join(names[:20])}")
        return given
    for kind in kinds:
        found = [name for name in names if name.strip().lower() == kind]
        if len(found) > 1:
            raise InputError(f"{path} has the columns {' and '.join(found)}; say which one is meant")
        if found:
            return found[0]
    raise InputError(f"{path} has no column {', '.join(kinds)}; it has {', '.join(names[:20]) or 'none'}")


def _text(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
