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
    indexes = [detail["h3"] for detail in partition.details]
    assert indexes == sorted(indexes)
    assert partition.ids.tolist() == list(range(len(indexes)))
    assert np.unique(cell_N).tolist() == partition.ids.tolist()
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
    assert (haversine_km(forward.centroids_deg, backward.centroids_deg) < 1e-9).all()


def test_the_index_of_every_cell_survives_the_file(tmp_path: Path) -> None:
    partition, _ = build_h3(draw_points(50), 4)
    partition.save(tmp_path / "geocell_info.json")
    again = load_partition(tmp_path / "geocell_info.json")
    assert again == partition
    assert list(again.details) == list(partition.details)


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
