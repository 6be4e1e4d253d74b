"""Tables of positions: which rows are places, and what is said of the others."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geoloc_batch.errors import ConfigError, InputError
from geoloc_batch.geo.bbox import REGIONS, Box
from geoloc_batch.geo.points import points_of, read_points

TABLE = """key,lat,lon,city
a,48.137, 11.575 ,"München, Altstadt"
b,,11,missing lat
c,91,0,beyond the pole
d,nan,0,NaN
e,"48,1",11,decimal comma
f,0,0,null island is a place
g,-90,-180,the pole
h,1e1,+2.5,other spellings
i,10,1000,beyond 180
j,inf,3,infinite
k,12, ,missing lon
"""


def test_rows_without_a_position_are_counted_by_reason_and_named(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(TABLE, encoding="utf-8")
    points = read_points(path)
    assert points.lat.tolist() == [48.137, 0, -90, 10]
    assert points.lon.tolist() == [11.575, 0, -180, 2.5]
    assert points.point_deg.tolist() == [[48.137, 11.575], [0, 0], [-90, -180], [10, 2.5]]
    assert [(bad.row, bad.reason) for bad in points.bad] == [
        (1, "missing"), (2, "out of range"), (3, "NaN"), (4, "no number"), (8, "out of range"), (9, "out of range"),
        (10, "missing"),
    ]  # fmt: skip
    assert points.num_bad == {"missing": 2, "out of range": 3, "NaN": 1, "no number": 1}
    assert points.bad[3].lat == "48,1"
    assert points.complaint() == (
        f"{path}: 7 of 11 rows have no usable position (1 NaN, 2 missing, 1 no number, 3 out of range) and are left "
        f"out; the first is row 1: lat '', lon '11'"
    )


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.string(), pa.large_string()])
def test_parquet_gives_the_same_as_csv(tmp_path: Path, kind: pa.DataType) -> None:
    lat, lon = [48.5, None, math.nan, 0.0, 95.0], [11.5, 1.0, 2.0, 0.0, 1.0]
    columns = [pa.array(values, pa.float64()).cast(kind) for values in (lat, lon)]
    pq.write_table(pa.table(dict(zip(("Latitude", "LNG"), columns, strict=True))), tmp_path / "points.parquet")
    points = read_points(tmp_path / "points.parquet")
    assert points.point_deg.tolist() == [[48.5, 11.5], [0, 0]]
    assert [(bad.row, bad.reason) for bad in points.bad] == [(1, "missing"), (2, "NaN"), (4, "out of range")]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("y,x,lat,lon\n1,2,3,4\n", encoding="utf-8")
    assert read_points(path).point_deg.tolist() == [[3, 4]]
    assert read_points(path, lat="y", lon="x").point_deg.tolist() == [[1, 2]]
    with pytest.raises(InputError, match="has no column 'z'; it has y, x, lat, lon"):
        read_points(path, lat="z")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as a CSV"),
        ("a,b\n1,2\n", "has no column lat, latitude, true_lat; it has a, b"),
        ("lat,b\n1,2\n", "has no column lon, lng"),
        ("lat,LAT,lon\n1,2,3\n", "has the columns lat and LAT"),
        ("lat,lon\n1,2\n3\n", "cannot be read as a CSV"),
    ],
)
def test_tables_without_positions_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_points(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such table of points"):
        read_points(tmp_path / "absent.csv")
    (tmp_path / "points.parquet").write_bytes(b"lat,lon\n1,2\n")
    with pytest.raises(InputError, match="cannot be read as a CSV or Parquet table"):
        read_points(tmp_path / "points.parquet")


def test_a_table_of_headings_alone_holds_no_point(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("lat,lon\n", encoding="utf-8")
    points = read_points(tmp_path / "points.csv")
    assert (len(points), points.bad, points.complaint()) == (0, (), "")


def test_arrays_are_sorted_out_alike() -> None:
    points = points_of([1, None, 2, 91], [3, 4, math.nan, 5], "the shards")
    assert points.point_deg.tolist() == [[1, 3]]
    assert [(bad.row, bad.reason) for bad in points.bad] == [(1, "NaN"), (2, "NaN"), (3, "out of range")]
    assert points.complaint().startswith("the shards: 3 of 4 rows")
    with pytest.raises(InputError, match="2 latitudes do not fit 1 longitudes"):
        points_of([1, 2], [3])


def test_a_box_holds_its_edges_also_across_the_antimeridian() -> None:
    points = np.array([(34, -25), (72, 45), (33.9, 0), (50, 45.1), (50, 0)], dtype=np.float64)
    assert REGIONS["europe"].holds(points).tolist() == [True, True, False, False, True]
    across = Box(south=-20, west=177, north=-12, east=-178)
    points = np.array([(-15, 178), (-15, 180), (-15, -180), (-15, -178), (-15, -177), (-15, 0)], dtype=np.float64)
    assert across.holds(points).tolist() == [True, True, True, True, False, False]
    ends = Box(south=-20, west=170, north=-12, east=180)
    assert ends.holds(points).tolist() == [True, True, True, False, False, False]
    assert REGIONS["world"].holds(points).all()


@pytest.mark.parametrize(
    "box", [(72, -25, 34, 45), (34, -25, 72, 181), (34, 5, 72, 5), (0, 180, 1, -180), (math.nan, 0, 1, 1)]
)
def test_a_box_that_is_none_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ConfigError, match="--bbox takes SOUTH WEST NORTH EAST"):
        Box(south=box[0], west=box[1], north=box[2], east=box[3])


def test_true_and_false_are_no_degrees(tmp_path: Path) -> None:
    pq.write_table(pa.table({"lat": [True, False, None], "lon": [1.0, 2.0, 3.0]}), tmp_path / "points.parquet")
    points = read_points(tmp_path / "points.parquet")
    assert len(points) == 0
    assert [(bad.reason, bad.lat) for bad in points.bad] == [
        ("no number", "True"),
        ("no number", "False"),
        ("missing", ""),
    ]
