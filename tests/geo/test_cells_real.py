"""Cells that others made and positions of real photos: figures that were measured beforehand."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED_DATA
from numpy.typing import NDArray

from geoloc_batch.geo.bbox import REGIONS
from geoloc_batch.geo.ceiling import ceiling
from geoloc_batch.geo.cells.h3 import build_h3
from geoloc_batch.geo.cells.kdtree import build_kdtree
from geoloc_batch.geo.cells.polygons import build_nuts, build_polygons
from geoloc_batch.geo.cells.quadtree import build_quadtree
from geoloc_batch.geo.formats.polygon_file import read_polygons
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.points import read_points
from geoloc_batch.geo.shapes.boxes import BoxShapes
from geoloc_batch.geo.sphere import haversine_km

GALLERY = SHARED_DATA / "golden" / "gps_gallery_100k.csv"
QUADTREE = SHARED_DATA / "partitions" / "osv5m_quadtree_10_1000.csv"
NUTS = SHARED_DATA / "polygons" / "nuts3_2021_60m.geojson"
COUNTRIES = SHARED_DATA / "polygons" / "ne_110m_admin_0_countries.geojson"

pytestmark = pytest.mark.skipif(
    not all(path.is_file() for path in (GALLERY, QUADTREE, NUTS, COUNTRIES)),
    reason=f"real data is absent: {SHARED_DATA}",
)


@cache
def gallery() -> NDArray[np.float64]:
    points = read_points(GALLERY)
    assert points.bad == ()
    return points.point_deg


@cache
def europe() -> NDArray[np.float64]:
    return gallery()[REGIONS["europe"].holds(gallery())]


def test_a_hundred_thousand_positions_on_the_quadtree_of_openstreetview_5m() -> None:
    quadtree = load_partition(QUADTREE)
    assert len(quadtree) == 11_399
    found = ceiling(quadtree, gallery())
    assert found.points == 100_000
    assert found.outside == 717
    assert found.nearest_is_not_containing_percent == pytest.approx(17.5, abs=0.05)
    assert found.containment is not None
    assert found.containment.points == 99_283
    assert found.containment.percent["within_25_km"] == pytest.approx(83.6, abs=0.05)
    assert found.assigned.percent["within_25_km"] == pytest.approx(83.0, abs=0.05)
    assert found.nearest.percent["within_25_km"] == pytest.approx(85.8, abs=0.05)
    # No head that answers centroids comes nearer than the nearest one.
    bands = found.nearest.percent
    assert all(bands[band] >= share for band, share in found.assigned.percent.items())


def test_positions_in_nuts_regions() -> None:
    nuts, _ = build_nuts(read_polygons(NUTS))
    assert len(nuts) == 1514
    assert nuts.parents is not None
    assert len(np.unique(nuts.parents)) == nuts.parents.max() + 1 == len({d["code"][:4] for d in nuts.details})
    found = ceiling(nuts, europe())
    assert (found.points, found.points - found.outside) == (42_062, 35_460)
    assert found.nearest_is_not_containing_percent == pytest.approx(15.1, abs=0.05)


def test_cells_of_a_region_by_name() -> None:
    nuts, _ = build_nuts(read_polygons(NUTS))
    berlin, madrid, nowhere = nuts.locate([52.52, 40.42, 50.0], [13.40, -3.70, -30.0]).ids
    assert nuts.details[berlin]["code"] == "DE300"
    assert nuts.details[madrid]["code"] == "ES300"
    assert nuts.locate([50.0], [-30.0]).num_outside == 1
    assert nuts.details[nowhere]["code"].startswith(("PT", "IE", "UKK"))


def test_countries_hold_their_capitals_and_antarctica_its_pole() -> None:
    countries, _ = build_polygons(read_polygons(COUNTRIES))
    assert len(countries) == 177
    assert countries.names is not None
    lat, lon = [48.86, 55.75, 66.0, -17.8, -16.3, -90, 90], [2.35, 37.6, -172.0, 178.0, 180.0, 50, 0]
    found = countries.locate(lat, lon)
    names = [countries.names[row] for row in np.searchsorted(countries.ids, found.ids)]
    assert names[:6] == ["France", "Russia", "Russia", "Fiji", "Fiji", "Antarctica"]
    assert found.inside.tolist() == [True] * 6 + [False]
    assert countries.shapes is not None
    areas = dict(zip(countries.names, countries.shapes.areas_km2(), strict=True))
    # The Earth's land and three countries, as atlases give them; the outlines are coarse.
    assert sum(areas.values()) == pytest.approx(147e6, rel=0.02)
    assert areas["Russia"] == pytest.approx(17.0e6, rel=0.02)
    assert areas["Antarctica"] == pytest.approx(14.0e6, rel=0.15)
    assert areas["Germany"] == pytest.approx(357e3, rel=0.02)
    fiji = countries.centroids_deg[countries.names.index("Fiji")]
    assert haversine_km(fiji, (-17.7, 178.5)) < 100


def test_h3_cells_that_real_positions_fill() -> None:
    in_europe, _ = build_h3(europe(), 4)
    everywhere, _ = build_h3(gallery(), 4)
    assert (len(in_europe), len(everywhere)) == (2940, 10_065)
    assert in_europe.locate(*europe().T).num_outside == 0
    found = ceiling(in_europe, europe())
    assert found.assigned.percent["within_25_km"] == pytest.approx(97.3, abs=0.05)


def test_a_kd_tree_of_as_many_places_as_the_published_ones_has_about_as_many_cells() -> None:
    # 79,144 places gave 5444, 2059, 1029 and 515 cells; other places tie elsewhere.
    places = np.unique(gallery(), axis=0)
    places = places[np.random.default_rng(0).permutation(len(places))[:79_144]]
    for max_points, published in ((19, 5444), (39, 2059), (78, 1029), (155, 515)):
        partition, cell_N = build_kdtree(places, max_points)
        assert len(partition) == pytest.approx(published, rel=0.01)
        assert np.bincount(cell_N).max() <= max_points


def test_our_quadtree_obeys_the_rule_of_openstreetview_5m() -> None:
    quadtree, cell_N = build_quadtree(gallery(), 1000, 10)
    check_quadtree(quadtree, gallery().min(axis=0), gallery().max(axis=0))
    counts = np.bincount(cell_N)
    assert isinstance(quadtree.shapes, BoxShapes)
    side = quadtree.shapes.box_C4[:, 2] - quadtree.shapes.box_C4[:, 0]
    assert (side[counts >= 1000] < side.max() / 100).all()
    published = load_partition(QUADTREE)
    assert isinstance(published.shapes, BoxShapes)
    boxes = published.shapes.box_C4
    check_quadtree(published, boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0))


def check_quadtree(partition: Partition, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
    """Sides are the whole's, halved both ways equally often; the order is south before north, west before east."""
    assert isinstance(partition.shapes, BoxShapes)
    box_C4 = partition.shapes.box_C4
    halvings = np.log2((high - low) / (box_C4[:, 2:] - box_C4[:, :2]))
    np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-6)
    np.testing.assert_allclose(halvings[:, 0], halvings[:, 1], atol=1e-6)
    assert halvings.max() < 10.001
    corner = np.round((box_C4[:, :2] - low) / (high - low) * 1024).astype(np.int64)
    path = sum((corner[:, axis] >> bit & 1) << (2 * bit + 1 - axis) for axis in (0, 1) for bit in range(10))
    assert (np.diff(path) > 0).all()


def test_the_partitions_of_real_files_survive_both_formats(tmp_path: Path) -> None:
    countries, _ = build_polygons(read_polygons(COUNTRIES), gallery())
    nuts, _ = build_nuts(read_polygons(NUTS), europe())
    for partition in (countries, nuts, load_partition(QUADTREE)):
        for name in ("cells.json", "cells.parquet"):
            partition.save(tmp_path / name)
            again = load_partition(tmp_path / name)
            assert again == partition
            assert list(again.details) == list(partition.details)


def test_the_reader_of_positions_agrees_with_a_plain_one() -> None:
    with GALLERY.open(encoding="utf-8") as file:
        rows = [(float(row["LAT"]), float(row["LON"])) for row in csv.DictReader(file)]
    assert (gallery() == np.array(rows)).all()
