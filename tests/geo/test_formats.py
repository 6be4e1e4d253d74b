"""Files of cells: geocell_info.json and GeoParquet both ways, OSV-5M's quadtree in; the fingerprint over all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.shapes.base import Shapes
from geoloc_batch.geo.shapes.boxes import BoxShapes
from geoloc_batch.geo.shapes.h3 import H3Shapes
from geoloc_batch.geo.shapes.polygons import PolygonShapes

CENTROIDS = np.array([(48.123456789012345, 2 / 3), (-0.1, -179.99999999999997), (10.0, 10.1)])
BOXES = [(48, 0, 48.5, 1), (-1, 179, 0, -179), (1 / 3, 9.9, 20, 10.2)]


def shapes_of(kind: str) -> Shapes | None:
    if kind == "h3":
        return H3Shapes.from_names([h3.latlng_to_cell(lat, lon, 4) for lat, lon in CENTROIDS])
    if kind == "box":
        return BoxShapes(BOXES)
    if kind == "polygon":
        ring = [(0, 48), (1 / 3, 49), (1, 48), (0, 48)]
        holed = shapely.Polygon([(5, 5), (15, 5), (15, 15), (5, 15)], [[(6, 6), (7, 6), (7, 7)]])
        two = shapely.MultiPolygon([shapely.box(179, -1, 180, 0), shapely.box(-180, -1, -179, 0)])
        return PolygonShapes.of([shapely.Polygon(ring), two, holed])
    return None


def partition_of(kind: str, **changes: Any) -> Partition:
    fields: dict[str, Any] = {
        "ids": np.array([0, 2, 7]),
        "centroids_deg": CENTROIDS,
        "details": [{"name": "Île", "n": 1}, {"name": "b", "x": [1, None]}, {"name": "c"}],
        "shapes": shapes_of(kind),
        "parents": np.array([5, 0, 5]),
    }
    return Partition(**{**fields, **changes})


@pytest.mark.parametrize("suffix", ["json", "parquet", "GeoParquet"])
@pytest.mark.parametrize("kind", ["none", "h3", "box", "polygon"])
@pytest.mark.parametrize("is_bare", [False, True])
def test_a_partition_comes_back_bit_for_bit_from_either_format(
    tmp_path: Path, kind: str, suffix: str, is_bare: bool
) -> None:
    first = partition_of(kind, **({"details": (), "parents": None} if is_bare else {}))
    path = tmp_path / f"cells.{suffix}"
    first.save(path)
    second = load_partition(path)
    assert second == first
    assert second.centroids_deg.tobytes() == first.centroids_deg.tobytes()
    assert list(second.details) == list(first.details)
    assert (second.parents is None) == is_bare
    assert second.names == first.names
    assert type(second.shapes) is type(first.shapes)
    if first.shapes is not None:
        assert second.shapes is not None
        assert second.shapes.canonical_bytes() == first.shapes.canonical_bytes()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    before = path.read_bytes()
    second.save(path)
    assert path.read_bytes() == before


angle = st.floats(-1, 1).map(lambda value: value or 0.0)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(angle, angle, st.integers(0, 9), st.text(max_size=5)), min_size=1, max_size=5),
    st.sampled_from(["json", "parquet"]),
    st.booleans(),
)
def test_whatever_a_partition_holds_it_comes_back(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[float, float, int, str]], suffix: str, shaped: bool
) -> None:
    lat, lon = (np.array([cell[axis] for cell in cells]) for axis in (0, 1))
    boxes = np.stack([lat * 80, lon * 179, lat * 80 + 1e-3, np.where(lon > 0.9, -180, lon * 179 + 1)], axis=-1)
    first = Partition(
        ids=3 * np.arange(len(cells)),
        centroids_deg=np.stack([lat * 90, lon * 180], axis=-1),
        details=[{"name": name, "points": count} for _, _, count, name in cells],
        shapes=BoxShapes(boxes) if shaped else None,
        parents=[count for _, _, count, _ in cells],
    )
    path = tmp_path_factory.mktemp("cells") / f"cells.{suffix}"
    first.save(path)
    second = load_partition(path)
    assert second == first
    assert list(second.details) == list(first.details)


@pytest.mark.parametrize("kind", ["none", "h3", "box", "polygon"])
def test_the_fingerprint_changes_with_all_that_matters_and_with_nothing_else(kind: str) -> None:
    base = partition_of(kind)
    assert base.fingerprint == partition_of(kind, details=(), source="elsewhere").fingerprint
    others = [
        partition_of(kind, ids=np.array([0, 2, 8])),
        partition_of(kind, centroids_deg=CENTROIDS + np.array([[0, 0], [0, 0], [0, 1e-12]])),
        partition_of(kind, parents=np.array([5, 0, 6])),
        partition_of(kind, parents=None),
        *(partition_of(other) for other in ("none", "h3", "box", "polygon") if other != kind),
    ]
    if base.shapes is not None:
        others.append(partition_of(kind, shapes=base.shapes.take(np.array([1, 0, 2]))))
    if kind == "box":
        others.append(partition_of(kind, shapes=BoxShapes([*BOXES[:2], (1 / 3, 9.9, 20 + 1e-12, 10.2)])))
    prints = [each.fingerprint for each in (base, *others)]
    assert len(set(prints)) == len(prints)


def test_shapes_parents_and_details_must_be_of_as_many_cells() -> None:
    two = BoxShapes(BOXES[:2])
    with pytest.raises(PartitionError, match="3 ids, but shapes of 2 cells"):
        partition_of("none", shapes=two)
    with pytest.raises(PartitionError, match="3 ids, but parents of 2 cells"):
        partition_of("none", parents=np.array([1, 2]))
    with pytest.raises(PartitionError, match="parents must be ids, 0 or more, got -1"):
        partition_of("none", parents=np.array([1, 2, -1]))


def test_a_geoparquet_file_says_what_the_specification_asks_for(tmp_path: Path) -> None:
    for kind, types in (
        ("none", ["Point"]),
        ("box", ["MultiPolygon", "Polygon"]),
        ("polygon", ["MultiPolygon", "Polygon"]),
    ):
        partition_of(kind).save(tmp_path / "cells.parquet")
        table = pq.read_table(tmp_path / "cells.parquet")
        geo = json.loads(table.schema.metadata[b"geo"])
        assert (geo["version"], geo["primary_column"]) == ("1.1.0", "geometry")
        column = geo["columns"]["geometry"]
        assert (column["encoding"], column["geometry_types"]) == ("WKB", types)
        assert len(column["bbox"]) == 4
        assert table.schema.field("geometry").type == pa.binary()
        geometries = shapely.from_wkb(table["geometry"].to_pylist())
        assert shapely.total_bounds(geometries).tolist() == column["bbox"]
        assert sorted({each.geom_type for each in geometries}) == types
        assert table["name"].to_pylist() == ["Île", "b", "c"]
        if kind == "box":
            assert column["covering"]["bbox"]["xmax"] == ["bbox", "xmax"]
            assert table["bbox"].to_pylist()[0] == {"xmin": 0, "ymin": 48, "xmax": 1, "ymax": 48.5}
            assert table["bbox"].to_pylist()[1] == {"xmin": 179, "ymin": -1, "xmax": -179, "ymax": 0}


def test_cells_are_written_beside_and_moved_into_place(tmp_path: Path) -> None:
    for name in ("cells.json", "cells.parquet"):
        partition_of("none").save(tmp_path / name)
        (tmp_path / "reader").hardlink_to(tmp_path / name)
        before = (tmp_path / "reader").read_bytes()
        partition_of("h3").save(tmp_path / name)
        # Whoever has the old file open reads it to its end.
        assert (tmp_path / "reader").read_bytes() == before
        (tmp_path / "reader").unlink()


def test_rows_of_geoparquet_may_stand_in_any_order(tmp_path: Path) -> None:
    for kind in ("h3", "box", "polygon"):
        first = partition_of(kind)
        first.save(tmp_path / "cells.parquet")
        table = pq.read_table(tmp_path / "cells.parquet")
        pq.write_table(table.take([2, 0, 1]), tmp_path / "cells.parquet")
        again = load_partition(tmp_path / "cells.parquet")
        assert again == first
        assert list(again.details) == list(first.details)


def test_geocell_info_shows_shapes_as_fields_of_each_cell(tmp_path: Path) -> None:
    path = tmp_path / "geocell_info.json"
    partition_of("box").save(path)
    cell = json.loads(path.read_text(encoding="utf-8"))["2"]
    assert cell == {
        "centroid_lat": -0.1, "centroid_lon": -179.99999999999997, "name": "b", "x": [1, None], "parent": 0,
        "min_lat": -1.0, "min_lon": 179.0, "max_lat": 0.0, "max_lon": -179.0,
    }  # fmt: skip
    partition_of("h3").save(path)
    assert json.loads(path.read_text(encoding="utf-8"))["7"]["h3"] == h3.latlng_to_cell(10.0, 10.1, 4)
    partition_of("polygon").save(path)
    assert json.loads(path.read_text(encoding="utf-8"))["0"]["geometry"]["type"] == "Polygon"


@pytest.mark.parametrize("field", ["h3", "parent", "geometry", "min_lat"])
def test_a_field_that_only_some_cells_have_is_a_detail(tmp_path: Path, field: str) -> None:
    path = tmp_path / "geocell_info.json"
    for kind in ("h3", "box", "polygon"):
        partition_of(kind).save(path)
        cells = json.loads(path.read_text(encoding="utf-8"))
        if field in cells["2"]:
            del cells["2"][field]
            path.write_text(json.dumps(cells), encoding="utf-8")
            partition = load_partition(path)
            assert (partition.parents if field == "parent" else partition.shapes) is None
            assert field in partition.details[0]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("h3", {"h3": "841fb47fffffff0"}, "no H3 cell"),
        ("box", {"max_lat": -50}, "cell 1 .* south -1"),
        ("box", {"max_lat": "x"}, "max_lat is 'x', which is no number"),
        ("polygon", {"geometry": {"type": "Triangle"}}, "is no GeoJSON"),
        ("polygon", {"geometry": {"type": "Point", "coordinates": [1, 2]}}, "unfit Point"),
        ("polygon", {"geometry": 7}, "7 is no GeoJSON"),
        ("none", {"parent": -1}, "-1 is no id of a parent"),
    ],
)
def test_a_shape_that_is_none_is_refused_with_the_file(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "geocell_info.json"
    partition_of(kind).save(path)
    cells = json.loads(path.read_text(encoding="utf-8"))
    cells["2"] |= changes
    path.write_text(json.dumps(cells), encoding="utf-8")
    with pytest.raises(PartitionError, match=words) as caught:
        load_partition(path)
    assert str(path) in str(caught.value)


def test_parquet_that_is_no_partition_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "cells.parquet"
    with pytest.raises(PartitionError, match="no such file of cells"):
        load_partition(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(PartitionError, match="cannot be read as GeoParquet"):
        load_partition(path)
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(PartitionError, match=r"geoloc cells build polygons .*cells.parquet"):
        load_partition(path)
    remark = {b"geoloc": json.dumps({"form": 1, "shapes": "box"}).encode()}
    pq.write_table(pa.table({"id": [1]}).replace_schema_metadata(remark), path)
    with pytest.raises(PartitionError, match="damaged file of cells"):
        load_partition(path)
    remark = {b"geoloc": json.dumps({"form": 1, "shapes": "blob"}).encode()}
    pq.write_table(pa.table({"id": [1]}).replace_schema_metadata(remark), path)
    with pytest.raises(PartitionError, match="unknown kind 'blob'"):
        load_partition(path)


QUADTREE = "cluster_id,min_lat,min_lon,max_lat,max_lon,mean_lat,mean_lon\n"


def test_a_quadtree_csv_gives_boxes_and_means_in_the_order_of_ids(tmp_path: Path) -> None:
    path = tmp_path / "quadtree.csv"
    path.write_text(f"{QUADTREE}3,0,10,5,20,4,11\n0,-5.5,10,0,20,-1,12\n", encoding="utf-8")
    partition = load_partition(path)
    assert partition.ids.tolist() == [0, 3]
    assert partition.centroids_deg.tolist() == [[-1, 12], [4, 11]]
    assert partition.assign([0, -0.1, 5], [15, 15, 20]).tolist() == [3, 0, 3]
    with pytest.raises(PartitionError, match=r"are written as \.json"):
        partition.save(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column cluster_id: a CSV of cells is OSV-5M's quadtree"),
        ("id,lat,lon\n1,2,3\n", "has no column cluster_id"),
        (QUADTREE, "holds no cell"),
        (f"{QUADTREE}0,0,0,1,1,0.5,\n", "line 2: mean_lon is '', which is no number"),
        (f"{QUADTREE}0,0,0,1,1,0.5,1\n1,0,0,1,1,nan,1\n", "line 3: mean_lat is 'nan'"),
        (f"{QUADTREE}0.5,0,0,1,1,0.5,1\n", "0.5 is no id of a cell"),
        (f"{QUADTREE}0,0,0,0,1,0.5,1\n", "cell 0 .* which is none"),
        (f"{QUADTREE}0,0,0,1,1,0.5,1\n0,0,0,1,1,0.5,1\n", "ids must ascend"),
    ],
)
def test_a_csv_that_is_no_quadtree_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "quadtree.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PartitionError, match=words) as caught:
        load_partition(path)
    assert str(path) in str(caught.value)
