"""Cells from files of polygons: GeoJSON and GeoParquet, NUTS regions, ids and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from geoloc_batch.errors import InputError, PartitionError
from geoloc_batch.geo.cells.polygons import build_nuts, build_polygons
from geoloc_batch.geo.formats.polygon_file import read_polygons


def write_geojson(path: Path, rows: list[tuple[dict[str, Any], Any]], **more: Any) -> Path:
    features = [
        {"type": "Feature", "properties": row, "geometry": None if shape is None else shapely.geometry.mapping(shape)}
        for row, shape in rows
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}), encoding="utf-8")
    return path


NUTS = [
    ({"NUTS_ID": "XX12", "NAME_LATN": "East"}, shapely.box(20, 40, 30, 50)),
    ({"NUTS_ID": "XX11", "NAME_LATN": "West"}, shapely.box(10, 40, 20, 50)),
    ({"NUTS_ID": "YY21", "NAME_LATN": "Empty"}, shapely.box(40, 40, 50, 50)),
    ({"NUTS_ID": "XX1", "NAME_LATN": "Both"}, shapely.box(10, 40, 30, 50)),
    ({"NUTS_ID": "ZZ01", "NAME_LATN": "Nowhere"}, None),
]
INLAND = np.array([(45.0, 12.0), (46.0, 14.0), (45.0, 25.0), (45.0, 30.5)])


def test_nuts_regions_become_cells_in_the_order_of_their_codes(tmp_path: Path) -> None:
    polygons = read_polygons(write_geojson(tmp_path / "nuts.geojson", NUTS))
    assert polygons.without_geometry == ("ZZ01",)
    partition, cell_N = build_nuts(polygons, INLAND, 2)
    assert partition.names == ["West", "East"]
    assert [detail["code"] for detail in partition.details] == ["XX11", "XX12"]
    assert partition.parents is not None
    assert partition.parents.tolist() == [0, 0]
    assert cell_N.tolist() == [0, 0, 1, 1]
    assert partition.locate(*INLAND.T).num_outside == 1
    # The one beyond the border counts for no centroid.
    np.testing.assert_allclose(partition.centroids_deg[1], (45, 25), atol=1e-12)
    whole, _ = build_nuts(polygons, None, 2)
    assert whole.names == ["West", "East", "Empty"]
    assert whole.parents is not None
    assert whole.parents.tolist() == [0, 0, 1]
    np.testing.assert_allclose(whole.centroids_deg[:, 1], (15, 25, 45))
    with_empty, _ = build_nuts(polygons, INLAND, 2, min_points=0)
    assert with_empty.names == ["West", "East", "Empty"]
    np.testing.assert_allclose(with_empty.centroids_deg[2], whole.centroids_deg[2])
    with pytest.raises(PartitionError, match="has no region of level 3: their codes have 5 signs, such as DE212"):
        build_nuts(polygons, INLAND, 3)
    with pytest.raises(PartitionError, match="levels 0 to 3, got --level 4"):
        build_nuts(polygons, INLAND, 4)


def test_geoparquet_of_polygons_gives_the_same_cells(tmp_path: Path) -> None:
    path = write_geojson(tmp_path / "regions.geojson", [row for row in NUTS if len(row[0]["NUTS_ID"]) == 4])
    rows = json.loads(path.read_text(encoding="utf-8"))["features"]
    shapes = [shapely.geometry.shape(row["geometry"]).wkb if row["geometry"] else None for row in rows]
    geo = {
        "version": "1.1.0",
        "primary_column": "shape",
        "columns": {"shape": {"encoding": "WKB", "geometry_types": []}},
    }
    columns = {name: [row["properties"][name] for row in rows] for name in ("NUTS_ID", "NAME_LATN")}
    table = pa.table({**columns, "shape": shapes})
    pq.write_table(table.replace_schema_metadata({b"geo": json.dumps(geo)}), tmp_path / "regions.parquet")
    first, _ = build_polygons(read_polygons(path), INLAND)
    second, _ = build_polygons(read_polygons(tmp_path / "regions.parquet"), INLAND)
    assert first == second
    assert first.names == second.names == ["West", "East"]
    geo["columns"]["shape"]["crs"] = {"id": {"authority": "EPSG", "code": 3035}}  # type: ignore[index]
    pq.write_table(table.replace_schema_metadata({b"geo": json.dumps(geo)}), tmp_path / "regions.parquet")
    with pytest.raises(InputError, match="is in EPSG:3035; give polygons in degrees"):
        read_polygons(tmp_path / "regions.parquet")
    pq.write_table(table, tmp_path / "regions.parquet")
    with pytest.raises(InputError, match="is no GeoParquet with WKB geometries"):
        read_polygons(tmp_path / "regions.parquet")


def test_ids_are_found_named_or_asked_for(tmp_path: Path) -> None:
    box = shapely.box(0, 0, 1, 1)
    path = write_geojson(tmp_path / "a.geojson", [({"code": -99, "key": 10}, box), ({"code": -99, "key": 9}, box)])
    with pytest.raises(InputError, match="no property tells the polygons apart; give --id-field, one of code, key"):
        read_polygons(path)
    polygons = read_polygons(path, id_field="key")
    assert polygons.ids == polygons.names == ("9", "10")
    with pytest.raises(InputError, match="2 of 2 rows have no --name-field 'title'; there are code, key"):
        read_polygons(path, id_field="key", name_field="title")
    with pytest.raises(InputError, match="the id '-99' stands on 2 polygons"):
        read_polygons(path, id_field="code")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no GeoJSON FeatureCollection"),
        ('{"type": "Polygon"}', "is no GeoJSON FeatureCollection"),
        ('{"features": []}', "holds no polygon"),
        ('{"features": [{"properties": {"id": 1}, "geometry": null}]}', "none of 1 rows has a geometry"),
        ('{"features": [{"properties": {"id": 1}, "geometry": {"type": "Blob"}}]}', "is no GeoJSON"),
        (
            '{"crs": {"properties": {"name": "urn:ogc:def:crs:EPSG::3035"}}, "features": [{"properties": {"id": 1}}]}',
            "is in urn:ogc:def:crs:EPSG::3035; give polygons in degrees",
        ),
    ],
)
def test_a_file_that_holds_no_polygons_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "polygons.geojson"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_polygons(path)
    assert str(path) in str(caught.value)


def test_a_point_among_polygons_is_refused_with_the_file(tmp_path: Path) -> None:
    path = write_geojson(tmp_path / "a.geojson", [({"id": 1}, shapely.Point(1, 2))])
    with pytest.raises(PartitionError, match="unfit Point") as caught:
        build_polygons(read_polygons(path))
    assert str(path) in str(caught.value)
    with pytest.raises(PartitionError, match="--min-points 3 needs points to count"):
        build_polygons(read_polygons(path), min_points=3)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"features": ' * 100_000])
def test_brackets_without_an_end_are_no_geojson(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"deep.json is no GeoJSON FeatureCollection: .* nested too deeply"):
        read_polygons(path)
