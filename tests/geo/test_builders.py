"""Builders of cells: k-means, k-d tree, quadtree. H3 and polygons have their own files."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.bbox import REGIONS, Box
from geoloc_batch.geo.cells.h3 import build_h3
from geoloc_batch.geo.cells.kdtree import build_kdtree
from geoloc_batch.geo.cells.kmeans import build_kmeans
from geoloc_batch.geo.cells.quadtree import build_quadtree
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.points import one_name
from geoloc_batch.geo.shapes.boxes import BoxShapes
from geoloc_batch.geo.sphere import haversine_km, spherical_mean, unit_vectors

Built = tuple[Partition, NDArray[np.int64]]


def draw_points(count: int = 900, seed: int = 1) -> NDArray[np.float64]:
    """Three crowds, one of them across the antimeridian, a scatter over the Earth, and some places twice."""
    rng = np.random.default_rng(seed)
    centres = np.array([(48, 11), (51, 0), (-17, 180)])[rng.integers(0, 3, count)]
    points = centres + rng.normal(0, 3, (count, 2))
    points[: count // 9] = rng.uniform([-90, -180], [90, 180], (count // 9, 2))
    points[:, 1] = (points[:, 1] + 180) % 360 - 180
    points[-(count // 9) :] = points[count // 9 : 2 * (count // 9)]
    return points


BUILDERS: dict[str, Callable[[NDArray[np.float64]], Built]] = {
    "h3": lambda points: build_h3(points, 2),
    "kmeans": lambda points: build_kmeans(points, min(40, len(np.unique(one_name(points), axis=0))), min_points=1),
    "kdtree": lambda points: build_kdtree(points, 19),
    "quadtree": lambda points: build_quadtree(points, 50, 5),
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_point_gets_the_cell_that_assign_gives_it_and_every_cell_has_points(kind: str) -> None:
    points = draw_points()
    partition, cell_N = BUILDERS[kind](points)
    assert partition.ids.tolist() == list(range(len(partition)))
    found = partition.locate(points[:, 0], points[:, 1])
    assert (found.ids == cell_N).all()
    assert found.inside.all() == (kind != "kmeans")
    counts = np.bincount(cell_N, minlength=len(partition))
    assert counts.min() > 0
    assert [detail["points"] for detail in partition.details] == counts.tolist()
    for cell in range(0, len(partition), 5):
        distance = haversine_km(partition.centroids_deg[cell], spherical_mean(points[cell_N == cell]))
        # The means of k-means are those of the round before.
        assert distance < (300 if kind == "kmeans" else 1e-6)


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_order_of_the_points_does_not_matter(kind: str) -> None:
    points = draw_points()
    order = np.random.default_rng(0).permutation(len(points))
    partition, cell_N = BUILDERS[kind](points)
    again, again_N = BUILDERS[kind](points[order])
    assert again == partition
    assert (again_N == cell_N[order]).all()


@settings(deadline=None, max_examples=25)
@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 30), st.just(2)), elements=st.integers(-4, 4)),
    st.sampled_from(sorted(BUILDERS)),
)
def test_few_and_equal_points_and_points_at_poles_make_cells_too(points: NDArray[np.int64], kind: str) -> None:
    point_deg_N2 = points * [22.5, 45.0]
    partition, cell_N = BUILDERS[kind](point_deg_N2)
    assert (partition.assign(point_deg_N2[:, 0], point_deg_N2[:, 1]) == cell_N).all()
    assert len(np.unique(cell_N)) == len(partition)


def test_a_kd_tree_halves_its_points_and_fills_its_box_without_gap() -> None:
    rng = np.random.default_rng(5)
    points = rng.uniform([36, -10], [70, 40], (1024, 2))
    partition, cell_N = build_kdtree(points, 19, bbox=REGIONS["europe"])
    assert len(partition) == 64
    assert (np.bincount(cell_N) == 16).all()
    assert isinstance(partition.shapes, BoxShapes)
    europe = REGIONS["europe"]
    whole = BoxShapes([(europe.south, europe.west, europe.north, europe.east)])
    assert partition.shapes.areas_km2().sum() == pytest.approx(whole.areas_km2()[0])
    anywhere = rng.uniform([34, -25], [72, 45], (2000, 2))
    assert partition.locate(anywhere[:, 0], anywhere[:, 1]).num_outside == 0


def test_a_kd_tree_never_parts_points_at_one_place() -> None:
    points = np.array([(48.0, 11.0)] * 50 + [(48.0, 11.5)] * 7 + [(48.5, 11.5)] * 3)
    partition, cell_N = build_kdtree(points, 5)
    assert np.bincount(cell_N).tolist() == [50, 7, 3]
    assert np.abs(partition.centroids_deg - [(48, 11), (48, 11.5), (48.5, 11.5)]).max() < 1e-9
    alone, _ = build_kdtree([(90.0, 180.0)] * 9, 5)
    assert alone.locate([90], [0]).num_outside == 0


def test_a_kd_tree_cuts_the_longer_side_in_kilometres() -> None:
    # 10 degrees of longitude at 80 N are shorter than 3 of latitude.
    points = np.array([(79.0, 0.0), (79.0, 10.0), (82.0, 0.0), (82.0, 10.0)])
    _, cell_N = build_kdtree(points, 2)
    assert cell_N.tolist() == [0, 0, 1, 1]


def test_a_quadtree_cuts_middles_south_west_first_and_leaves_out_empty_quarters() -> None:
    crowd = np.stack([np.linspace(0, 1, 8), np.linspace(0, 1, 8)], axis=-1)
    points = np.concatenate([crowd, [(16.0, 16.0)], [(0.0, 15.0)]])
    partition, cell_N = build_quadtree(points, 5, 10)
    assert isinstance(partition.shapes, BoxShapes)
    assert partition.shapes.box_C4.tolist() == [
        [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [1, 1, 2, 2], [0, 8, 8, 16], [8, 8, 16, 16],
    ]  # fmt: skip
    assert cell_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 4, 3]
    assert partition.locate([10, 16.1], [4, 16]).num_outside == 2
    shallow, _ = build_quadtree(points, 5, 1)
    assert len(shallow) == 3
    # As many points as --max-points are cut, one less are not.
    assert len(build_quadtree(points, 11, 10)[0]) == 1
    assert len(build_quadtree(points, 10, 1)[0]) == 3


@pytest.mark.parametrize("build", [build_kdtree, build_quadtree])
def test_trees_can_begin_with_a_box_across_the_antimeridian(build: Callable[..., Built]) -> None:
    rng = np.random.default_rng(2)
    points = np.stack([rng.uniform(-20, -12, 300), (rng.uniform(175, 187, 300) + 180) % 360 - 180], axis=-1)
    partition, cell_N = build(points, 20, bbox=Box(south=-20, west=175, north=-12, east=-173))
    assert (partition.locate(points[:, 0], points[:, 1]).ids == cell_N).all()
    assert partition.locate(points[:, 0], points[:, 1]).num_outside == 0
    assert isinstance(partition.shapes, BoxShapes)
    assert partition.shapes.areas_km2().max() < 1e6
    assert np.bincount(cell_N).max() <= 20


def test_small_kmeans_cells_are_merged_until_each_holds_enough() -> None:
    points = draw_points()
    whole, _ = build_kmeans(points, 60, min_points=1)
    assert len(whole) == 60
    for min_points in (5, 30, 200):
        partition, cell_N = build_kmeans(points, 60, min_points=min_points)
        assert len(partition) < 60
        assert np.bincount(cell_N).min() >= min_points
        assert (partition.nearest(points[:, 0], points[:, 1]) == cell_N).all()


def test_kmeans_finds_crowds_across_the_antimeridian_and_at_the_pole() -> None:
    rng = np.random.default_rng(3)
    crowds = [np.array([(0, 180), (90, 0), (0, 0)])[i] + rng.normal(0, 1, (50, 2)) for i in range(3)]
    points = np.concatenate(crowds)
    points[50:100, 0] = 90 - np.abs(points[50:100, 0] - 90)
    points[50:100, 1] = rng.uniform(-180, 180, 50)
    points[:, 1] = (points[:, 1] + 180) % 360 - 180
    partition, cell_N = build_kmeans(points, 3)
    assert sorted(np.bincount(cell_N).tolist()) == [50, 50, 50]
    assert len(set(cell_N[:50])) == len(set(cell_N[50:100])) == 1
    assert haversine_km(partition.centroids_deg[cell_N[0]], (0, 180)) < 100


def test_kmeans_is_the_same_with_any_number_of_threads_and_another_with_another_seed() -> None:
    points = draw_points(3000)
    before = faiss.omp_get_max_threads()
    first, _ = build_kmeans(points, 100)
    try:
        faiss.omp_set_num_threads(1)
        assert build_kmeans(points, 100)[0] == first
        assert faiss.omp_get_max_threads() == 1
    finally:
        faiss.omp_set_num_threads(before)
    assert build_kmeans(points, 100, seed=1)[0] != first


def test_kmeans_centroids_are_a_resting_place() -> None:
    # Further rounds of exact k-means must not make the cells much tighter.
    points = draw_points(3000)
    partition, cell_N = build_kmeans(points, 50, min_points=1)
    means = np.array([spherical_mean(points[cell_N == cell]) for cell in range(len(partition))])
    own = 1 - (unit_vectors(points) * unit_vectors(partition.centroids_deg)[cell_N]).sum(axis=1)
    better = 1 - (unit_vectors(points) * unit_vectors(means)[cell_N]).sum(axis=1)
    assert own.sum() < 1.01 * better.sum()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: build_kmeans([(1, 2)] * 9, 2), "--k must be from 1 to 1, the number of different places, got 2"),
        (lambda: build_kmeans([(90, 2), (90, 4), (0, 180), (0, -180)], 3), "--k must be from 1 to 2"),
        (lambda: build_kmeans([(1, 2), (3, 4)], 1, min_points=3), "--min-points 3 is more than the 2 points"),
        (lambda: build_kmeans([(1, 2)], 1, min_points=-1), "--min-points must be 0 or more, got -1"),
        (lambda: build_kdtree([(1, 2)], 0), "--max-points must be at least 1, got 0"),
        (lambda: build_quadtree([(1, 2)], 0), "--max-points must be at least 1, got 0"),
        (lambda: build_quadtree([(1, 2)], 1, 41), "--depth must be from 0 to 40, got 41"),
        (lambda: build_kdtree([(1, 2)], min_points=2), "none of 1 cells holds 2 of the 1 points or more"),
        (lambda: build_kdtree(np.empty((0, 2))), "with N > 0"),
        (lambda: build_quadtree([(1, 200)]), "point 0 is no place on Earth"),
    ],
)
def test_numbers_that_cannot_be_are_refused(build: Callable[[], object], words: str) -> None:
    with pytest.raises(PartitionError, match=words):
        build()
