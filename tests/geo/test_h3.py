"""Cells from the H3 grid."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import h3
import numpy as np
import pytest
from conftest import SHARED_DATA
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.cells.h3 import build_h3
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.shapes.h3 import H3Shapes
from geoloc_batch.geo.sphere import haversine_km, spherical_mean, unit_vectors


def draw_points(count: int, seed: int = 0) -> NDArray[np.float64]:
    """European points, some of them twice, with some on the antimeridian and near the poles."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([36, -10], [70, 40], (count, 2))
    points[: count // 10] = rng.uniform([-20, 179], [-15, 181], (count // 10, 2))
    points[: count // 10, 1] -= 360 * (points[: count // 10, 1] > 180)
    points[count // 10 : count // 5, 0] = rng.uniform(85, 90, count // 5 - count // 10)
    points[-5:] = points[-10:-5]
    return points


def holds(cell: str, point: NDArray[np.float64]) -> bool:
    """Whether a cell's outline goes round a point, which it sees along great circles."""
    corner_V3, up = unit_vectors(h3.cell_to_boundary(cell)), unit_vectors(point)
    east = np.cross([0.0, 0.0, 1.0], up)
    east /= np.linalg.norm(east)
    azimuth_V = np.arctan2(corner_V3 @ east, corner_V3 @ np.cross(up, east))
    turn_V = (np.roll(azimuth_V, -1) - azimuth_V + math.pi) % (2 * math.pi) - math.pi
    return abs(turn_V.sum()) > math.pi


def check(partition: Partition, cell_N: NDArray[np.int64], points: NDArray[np.float64], res: int) -> None:
    assert isinstance(partition.shapes, H3Shapes)
    indexes = partition.shapes.names
    assert indexes == sorted(indexes)
    assert partition.ids.tolist() == list(range(len(indexes)))
    assert np.unique(cell_N).tolist() == partition.ids.tolist()
    assert (partition.assign(points[:, 0], points[:, 1]) == cell_N).all()
    assert partition.locate(points[:, 0], points[:, 1]).num_outside == 0
    assert all(h3.get_resolution(index) == res for index in indexes)
    for cell, index in enumerate(indexes):
        own = points[cell_N == cell]
        assert all(holds(index, point) for point in own)
        assert haversine_km(partition.centroids_deg[cell], spherical_mean(own)) < 1e-6


@pytest.mark.parametrize("res", [0, 2, 5])
def test_every_cell_holds_its_points_and_has_their_mean_as_its_centroid(res: int) -> None:
    points = draw_points(600)
    partition, cell_N = build_h3(points, res)
    assert cell_N.shape == (600,)
    check(partition, cell_N, points, res)


def test_cells_of_real_positions() -> None:
    table = SHARED_DATA / "golden" / "gps_gallery_100k.csv"
    if not table.is_file():
        pytest.skip(f"real data is absent: {table}")
    with table.open(encoding="utf-8") as file:
        points = np.array([[float(row["LAT"]), float(row["LON"])] for row in csv.DictReader(file)][:5000])
    partition, cell_N = build_h3(points, 1)
    check(partition, cell_N, points, 1)


def test_one_point_makes_one_cell_and_the_order_of_points_does_not_matter() -> None:
    partition, cell_N = build_h3([(48.1, 11.5)], 4)
    assert cell_N.tolist() == [0]
    np.testing.assert_allclose(partition.centroids_deg, [[48.1, 11.5]], atol=1e-13)
    points = draw_points(101)
    forward, cell_N = build_h3(points, 3)
    backward, reversed_N = build_h3(points[::-1], 3)
    assert (cell_N == reversed_N[::-1]).all()
    assert forward == backward


def test_the_index_of_every_cell_survives_the_file(tmp_path: Path) -> None:
    partition, _ = build_h3(draw_points(50), 4)
    partition.save(tmp_path / "geocell_info.json")
    again = load_partition(tmp_path / "geocell_info.json")
    assert again == partition
    assert list(again.details) == list(partition.details)
    assert isinstance(again.shapes, H3Shapes)
    assert isinstance(partition.shapes, H3Shapes)
    assert again.shapes.names == partition.shapes.names


def test_neighbouring_cells_share_a_border_and_nothing_else() -> None:
    import shapely

    # With a pentagon and its neighbours, whose borders bend where the icosahedron does.
    middle = h3.latlng_to_cell(48.1, 11.5, 4)
    for cell in (middle, h3.get_pentagons(4)[3]):
        cells = h3.grid_disk(cell, 2)
        outlines = dict(zip(cells, H3Shapes.from_names(cells).geometries(), strict=True))
        for one in cells:
            for other in cells:
                shared = shapely.intersection(outlines[one], outlines[other], grid_size=1e-9)
                if h3.are_neighbor_cells(one, other):
                    assert shared.length > 0.02
                if one != other:
                    assert shared.area < 1e-9


def test_points_of_small_cells_that_are_left_out_go_to_the_nearest_centroid() -> None:
    points = draw_points(300)
    whole, cell_N = build_h3(points, 3)
    count_C = np.bincount(cell_N)
    partition, kept_N = build_h3(points, 3, min_points=3)
    assert len(partition) == (count_C >= 3).sum() < len(whole)
    assert [detail["points"] for detail in partition.details] == count_C[count_C >= 3].tolist()
    found = partition.locate(points[:, 0], points[:, 1])
    assert (found.ids == kept_N).all()
    assert (found.inside == (count_C >= 3)[cell_N]).all()
    lost = points[~found.inside]
    assert (kept_N[~found.inside] == partition.nearest(lost[:, 0], lost[:, 1])).all()


def test_geometric_centroids_are_the_grids_own() -> None:
    partition, _ = build_h3(draw_points(50), 3, centroid="geometric")
    assert isinstance(partition.shapes, H3Shapes)
    expected = [h3.cell_to_latlng(name) for name in partition.shapes.names]
    np.testing.assert_allclose(partition.centroids_deg, expected, atol=1e-12)


def test_a_point_goes_to_the_finest_of_cells_of_several_resolutions() -> None:
    coarse = h3.latlng_to_cell(48.1, 11.5, 3)
    fine = h3.latlng_to_cell(48.1, 11.5, 5)
    shapes = H3Shapes.from_names([coarse, fine, h3.latlng_to_cell(0, 0, 4)])
    elsewhere = h3.cell_to_latlng(sorted(set(h3.cell_to_children(coarse, 5)) - {fine})[0])
    points = np.array([(48.1, 11.5), elsewhere, (0.0, 0.0), (-40.0, 3.0)])
    assert shapes.find(points).tolist() == [1, 0, 2, -1]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["841fb47ffffffff", "nothing"], "hexadecimal number"),
        (["841fb47ffffffff", "8" * 20], "hexadecimal number"),
        (["841fb47ffffffff", "1234"], "cell 1 .* 1234, which is no H3 cell"),
        (["841fb47ffffffff"] * 2, "stands twice"),
    ],
)
def test_indexes_that_are_none_are_refused(names: list[str], words: str) -> None:
    with pytest.raises(PartitionError, match=words):
        H3Shapes.from_names(names)


@pytest.mark.parametrize(
    ("points", "res", "words"),
    [
        ([(1.0, 2.0)], 16, "an H3 resolution is from 0 to 15, got 16"),
        ([(1.0, 2.0)], -1, "got -1"),
        (np.empty((0, 2)), 4, r"with N > 0, got the shape \(0, 2\)"),
        ([1.0, 2.0], 4, r"got the shape \(2,\)"),
        ([(1.0, 2.0), (math.nan, 2.0)], 4, "point 1 is no place on Earth"),
        ([(1.0, 200.0)], 4, "point 0 is no place on Earth: lat 1.0, lon 200.0"),
    ],
)
def test_points_and_resolutions_that_cannot_be_are_refused(points: object, res: int, words: str) -> None:
    with pytest.raises(PartitionError, match=words):
        build_h3(points, res)  # type: ignore[arg-type]
