"""Boxes and polygons: which of them holds a point, at edges, poles and the antimeridian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.shapes.base import Shapes
from geoloc_batch.geo.shapes.boxes import BoxShapes
from geoloc_batch.geo.shapes.polygons import PolygonShapes
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, haversine_km, spherical_mean

EARTH_KM2 = 4 * math.pi * EARTH_RADIUS_KM**2

# South, west, north, east: two side by side, one above them, one across the antimeridian, one round the south pole.
BOXES = [(0, 0, 10, 10), (0, 10, 10, 20), (10, 0, 20, 20), (-5, 170, 5, -170), (-90, -180, -80, 180)]
POINTS_AND_BOXES = [
    ((5, 5), 0),
    ((0, 0), 0),
    ((5, 10), 1),
    ((10, 10), 2),
    ((10, 5), 2),
    ((20, 20), 2),
    ((5, 20), 1),
    ((5, 20.000001), -1),
    ((0, 175), 3),
    ((0, -175), 3),
    ((0, 180), 3),
    ((0, -180), 3),
    ((0, 170), 3),
    ((5, -170), 3),
    ((0, 169.99), -1),
    ((5.1, 180), -1),
    ((-90, 0), 4),
    ((-90, 123), 4),
    ((-80, -180), 4),
    ((-80, 180), 4),
    ((90, 0), -1),
]


@pytest.mark.parametrize(("point", "row"), POINTS_AND_BOXES)
def test_a_box_holds_its_inside_and_the_southern_and_western_edge_before_the_others(
    point: tuple[float, float], row: int
) -> None:
    assert BoxShapes(BOXES).find(np.array([point], dtype=np.float64)).tolist() == [row]


def test_boxes_that_end_at_the_antimeridian_hold_it_by_both_names() -> None:
    for boxes in ([(0, 170, 10, 180)], [(0, -180, 10, -170)], [(0, 180, 10, -170)], [(0, 170, 10, -180)]):
        assert BoxShapes(boxes).find(np.array([(5.0, 180.0), (5.0, -180.0)])).tolist() == [0, 0]
    both = BoxShapes([(0, 170, 10, 180), (0, -180, 10, -170)])
    assert both.find(np.array([(5.0, 180.0), (5.0, -180.0)])).tolist() == [1, 1]


def test_a_pole_belongs_to_one_cell_by_all_its_names() -> None:
    names = np.array([(90.0, lon) for lon in (-180, -100, 0, 45.5, 90, 180)])
    quarters = BoxShapes([(80, west, 90, west + 90) for west in (-180, -90, 0, 90)])
    assert quarters.find(names).tolist() == [0] * 6
    assert quarters.take(np.array([3, 1])).find(names).tolist() == [0] * 6
    polygons = PolygonShapes.of(quarters.take(np.array([3, 1])).geometries())
    assert polygons.find(names).tolist() == [0] * 6


def test_the_lowest_of_overlapping_cells_takes_the_point() -> None:
    boxes = BoxShapes([(0, 0, 10, 10), (5, 5, 15, 15), (-20, -20, 30, 30)])
    points = np.array([(7.0, 7.0), (12.0, 12.0), (-9.0, -9.0)])
    assert boxes.find(points).tolist() == [0, 1, 2]
    assert PolygonShapes.of(boxes.geometries()).find(points).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((1, 2, 1, 3), "cell 1 .* south 1.0"),
        ((2, 2, 1, 3), "it must have an inside"),
        ((0, 5, 1, 5), "west 5.0"),
        ((0, 180, 1, -180), "west 180.0"),
        ((0, 5, 91, 6), "north 91"),
        ((0, 5, 1, 181), "east 181"),
        ((math.nan, 5, 1, 6), "south nan"),
    ],
)
def test_boxes_that_are_none_are_refused(box: tuple[float, ...], words: str) -> None:
    with pytest.raises(PartitionError, match=words):
        BoxShapes([(0, 0, 1, 1), box])


def test_areas_and_centres_are_those_of_the_sphere() -> None:
    octants = BoxShapes([(south, west, south + 90, west + 90) for south in (-90, 0) for west in (-180, -90, 0, 90)])
    np.testing.assert_allclose(octants.areas_km2(), EARTH_KM2 / 8)
    middle = math.degrees(math.asin(math.sqrt(1 / 3)))
    np.testing.assert_allclose(octants.centres_deg()[[2, 6]], [(-middle, 45), (middle, 45)])
    across = BoxShapes([(-10, 170, 10, -170)])
    assert haversine_km(across.centres_deg()[0], (0, 180)) < 1e-6
    assert BoxShapes([(-90, -180, 90, 180)]).areas_km2() == pytest.approx(EARTH_KM2)


def test_areas_and_centres_of_polygons_are_those_of_points_drawn_in_them() -> None:
    ring = np.array([(0, 40), (10, 40), (12, 70), (5, 60), (-3, 66)], dtype=np.float64)
    ring = shapely.get_coordinates(shapely.segmentize(shapely.Polygon(ring), 0.1))
    hole = shapely.Polygon([(4, 45), (8, 45), (8, 55), (4, 55)])
    polygon = shapely.difference(shapely.Polygon(ring), shapely.segmentize(hole, 0.1))
    shapes = PolygonShapes.of([polygon, shapely.transform(polygon, lambda xy: np.add(xy, (177.0, -50)))])
    rng = np.random.default_rng(0)
    lat = np.degrees(np.arcsin(rng.uniform(np.sin(np.radians(30)), 1, 40_000)))
    points = np.stack([lat, rng.uniform(-5, 15, 40_000)], axis=-1)
    inside = points[shapes.find(points) == 0]
    window = EARTH_RADIUS_KM**2 * (1 - np.sin(np.radians(30))) * np.radians(20)
    assert shapes.areas_km2()[0] == pytest.approx(window * len(inside) / len(points), rel=0.05)
    assert haversine_km(shapes.centres_deg()[0], spherical_mean(inside)) < 25
    # The same outline elsewhere lies across the antimeridian and was split.
    assert shapes.geometries()[1].geom_type == "MultiPolygon"
    assert shapely.bounds(shapes.geometries()[1]).tolist()[::2] == [-180, 180]
    assert abs(shapes.centres_deg()[1, 1]) > 178


def fiji(kind: str) -> shapely.Geometry:
    """One region from 177 E to 178 W with a hole round the antimeridian, written in four ways."""
    outer = np.array([(177, -20), (182, -20), (182, -15), (177, -15), (177, -20)], dtype=np.float64)
    hole = np.array([(179, -18), (181, -18), (181, -17), (179, -17), (179, -18)], dtype=np.float64)
    if kind == "split":
        west = shapely.difference(shapely.box(177, -20, 180, -15), shapely.box(179, -18, 180, -17))
        return shapely.union(
            west, shapely.difference(shapely.box(-180, -20, -178, -15), shapely.box(-180, -18, -179, -17))
        )
    if kind == "jumps":
        for ring in (outer, hole):
            ring[ring[:, 0] > 180, 0] -= 360
    if kind == "west":
        outer[:, 0] -= 360
    return shapely.Polygon(outer, [hole])


@pytest.mark.parametrize("kind", ["split", "beyond", "jumps", "west"])
def test_a_polygon_across_the_antimeridian_is_the_same_however_it_is_written(kind: str) -> None:
    shapes = PolygonShapes.of([shapely.box(0, 0, 1, 1), fiji(kind)])
    points = np.array(
        [
            (-16, 178),
            (-16, -179),
            (-16, 180),
            (-16, -180),
            (-17.5, 180),
            (-17.5, -179.5),
            (-16, 0),
            (-16, 176),
            (-16, -177),
        ]
    )
    assert shapes.find(points.astype(np.float64)).tolist() == [1, 1, 1, 1, -1, -1, -1, -1, -1]
    assert shapes.areas_km2()[1] == pytest.approx(PolygonShapes.of([fiji("split")]).areas_km2()[0])
    again = PolygonShapes(shapes.wkb)
    assert again.wkb == shapes.wkb


@pytest.mark.parametrize("pole", [90, -90])
def test_a_ring_round_a_pole_holds_the_pole(pole: int) -> None:
    lon = np.arange(-170, 190, 20.0)
    lat = np.full(len(lon), pole * 70 / 90) + np.cos(np.radians(lon))
    shapes = PolygonShapes.of([shapely.Polygon(np.stack([lon, lat], axis=-1))])
    points = np.array([(pole, 0), (pole, 77), (pole * 0.9, 180), (pole * 0.9, -3), (pole * 0.7, 5), (-pole, 0)])
    assert shapes.find(points).tolist() == [0, 0, 0, 0, -1, -1]
    assert haversine_km(shapes.centres_deg()[0], (pole, 0)) < 150
    assert PolygonShapes(shapes.wkb).wkb == shapes.wkb


def test_a_map_edge_from_180_to_180_is_no_crossing() -> None:
    world = PolygonShapes.of([shapely.box(-180, -90, 180, -60), shapely.box(-180, -60, 180, 90)])
    assert world.find(np.array([(-70.0, 0.0), (0.0, 0.0), (-90.0, 10.0), (90.0, 10.0)])).tolist() == [0, 1, 0, 1]
    assert world.areas_km2().sum() == pytest.approx(EARTH_KM2)


@pytest.mark.parametrize("east", [100, 150, 179])
def test_a_wide_box_is_not_taken_for_one_across_the_antimeridian(east: int) -> None:
    box = BoxShapes([(0, -east, 10, east)])
    assert PolygonShapes.of(box.geometries()).find(np.array([(5.0, 0.0), (5.0, 179.5)])).tolist() == [0, -1]


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (shapely.Point(1, 2), "unfit Point"),
        (shapely.Polygon(), "empty or unfit Polygon"),
        (None, "is missing"),
        (shapely.box(0, 80, 10, 95), "lat 95"),
        (shapely.box(500000, 80, 510000, 85), "lon 510000"),
        (shapely.Polygon([(0, 0), (1, 1), (2, 2), (0, 0)]), "no inside"),
    ],
)
def test_polygons_that_are_none_are_refused_by_the_number_of_the_cell(geometry: shapely.Geometry, words: str) -> None:
    with pytest.raises(PartitionError, match=words) as caught:
        PolygonShapes.of([shapely.box(0, 0, 1, 1), geometry])
    assert "cell 1" in str(caught.value)


def test_a_bow_tie_is_mended() -> None:
    shapes = PolygonShapes.of([shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])])
    assert shapes.find(np.array([(5.0, 1.0), (5.0, 9.0), (1.0, 5.0), (9.0, 5.0)])).tolist() == [0, 0, -1, -1]


def by_hand(boxes: NDArray[np.float64], point: NDArray[np.float64]) -> set[int]:
    """The rows of all closed boxes that hold a point by one of its names."""
    lat, lon = point
    names = [lon - 360, lon, lon + 360] if abs(lat) < 90 else np.arange(-180.0, 181.0)
    found = set()
    for row, (south, west, north, east) in enumerate(boxes):
        east = east + 360 if east < west else east
        if south <= lat <= north and any(west <= name <= east or west <= name + 360 <= east for name in names):
            found.add(row)
    return found


def draw_boxes(corner: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes of four integers each."""
    south, west = np.minimum(corner[:, 0], corner[:, 2]), corner[:, 1]
    north, east = np.maximum(corner[:, 0], corner[:, 2]) + (corner[:, 0] == corner[:, 2]), corner[:, 3]
    boxes = np.stack([south, west, north, east + (east == west)], axis=-1) * [9.0, 18, 9, 18]
    boxes[:, 0] = np.minimum(boxes[:, 0], 81)
    boxes[:, 2] = np.minimum(boxes[:, 2], 90)
    boxes[boxes[:, 3] > 180, 3] = -162
    boxes[(boxes[:, 1] == 180) & (boxes[:, 3] == -180), 3] = -162
    return boxes


# Whole numbers, so that points fall on edges, corners, poles and the antimeridian.
CORNERS = hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.just(4)), elements=st.integers(-10, 10))
POINTS = hnp.arrays(np.int64, st.tuples(st.integers(1, 20), st.just(2)), elements=st.integers(-20, 20))


@settings(deadline=None, max_examples=60)
@given(CORNERS, POINTS, st.booleans())
def test_whatever_the_boxes_a_point_is_in_one_that_holds_it_or_in_none_that_does(
    corners: NDArray[np.int64], points: NDArray[np.int64], as_polygons: bool
) -> None:
    boxes = draw_boxes(corners.astype(np.float64))
    point_deg_N2 = points * [4.5, 9.0]
    shapes: Shapes = BoxShapes(boxes)
    if as_polygons:
        shapes = PolygonShapes.of(shapes.geometries())
    for point, row in zip(point_deg_N2, shapes.find(point_deg_N2), strict=True):
        holders = by_hand(boxes, point)
        assert row in holders if holders else row == -1


@settings(deadline=None, max_examples=60)
@given(CORNERS, POINTS, st.integers(1, 7), st.booleans())
def test_assigning_is_total_and_depends_on_neither_order_nor_chunks(
    corners: NDArray[np.int64], points: NDArray[np.int64], size: int, as_polygons: bool
) -> None:
    boxes = BoxShapes(draw_boxes(corners.astype(np.float64)))
    shapes: Shapes = PolygonShapes.of(boxes.geometries()) if as_polygons else boxes
    partition = Partition(ids=7 * np.arange(len(boxes)) + 3, centroids_deg=boxes.centres_deg(), shapes=shapes)
    lat, lon = (points * [4.5, 9.0]).T
    found = partition.locate(lat, lon)
    assert np.isin(found.ids, partition.ids).all()
    assert (found.inside == (shapes.find(np.stack([lat, lon], axis=-1)) >= 0)).all()
    assert (found.ids[~found.inside] == partition.nearest(lat, lon)[~found.inside]).all()
    order = np.random.default_rng(size).permutation(len(lat))
    assert (partition.assign(lat[order], lon[order]) == found.ids[order]).all()
    parts = [partition.assign(lat[i : i + size], lon[i : i + size]) for i in range(0, len(lat), size)]
    assert (np.concatenate(parts) == found.ids).all()


def test_more_points_than_go_at_once_are_found_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoloc_batch.geo.shapes.base._POINTS_AT_ONCE", 7)
    points = np.array([point for point, _ in POINTS_AND_BOXES], dtype=np.float64)
    assert BoxShapes(BOXES).find(points).tolist() == [row for _, row in POINTS_AND_BOXES]
    assert BoxShapes(BOXES).find(points[:0]).tolist() == []


def test_a_complaint_counts_the_points_in_no_cell() -> None:
    partition = Partition(
        ids=np.arange(2),
        centroids_deg=np.array([(5.0, 5.0), (5.0, 15.0)]),
        shapes=BoxShapes(BOXES[:2]),
        source="cells.json",
    )
    found = partition.locate([5, 5, 50], [5, 15, 15])
    assert found.ids.tolist() == [0, 1, 1]
    assert found.inside.tolist() == [True, True, False]
    assert found.complaint(partition) == (
        "cells.json: 1 of 3 points lie in no cell and belong to the cell with the nearest centroid"
    )
    assert partition.locate([5], [5]).complaint(partition) == ""
    plain = Partition(ids=partition.ids, centroids_deg=partition.centroids_deg)
    assert plain.locate([5], [5]).complaint(plain) == ""
