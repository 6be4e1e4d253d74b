"""Cells of spherical k-means: each point belongs to the nearest of k centroids. They have no outlines.

Shape letters: N points, C cells.

Source: Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering", Machine Learning 42
(2001), p. 143; the training is faiss.Kmeans.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.cells.building import MIN_RESULTANT, check_min_points, vector_sums
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.points import check_pairs, one_name
from geoloc_batch.geo.sphere import points_deg, unit_vectors

# Rounds of exact k-means (float64, all points) that follow those of FAISS (float32, a sample of 256 points a cell).
_EXACT_ROUNDS = 5


def build_kmeans(
    point_deg_N2: ArrayLike, k: int, *, min_points: int = 10, rounds: int = 20, seed: int = 0
) -> tuple[Partition, NDArray[np.int64]]:
    """At most k cells, the same for the same points and seed, whatever the order of the points.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees, with at least k different places.
        k: the number of cells to begin with.
        min_points: a cell with fewer points is merged into its nearest neighbour, the smallest first, and the cells
            are settled again: in the end each holds as many.
        rounds: rounds of k-means on a sample; a few exact ones on all points follow.
        seed: of the points that the cells start from.

    Returns:
        The partition: ids 0 to C - 1 from south to north, each centroid the spherical mean of its points as they were
        before the last round. And [N] the id of each point's cell, the nearest centroid's.

    Raises:
        PartitionError: a point is no place on Earth, there are fewer than k places, or fewer than `min_points` points.
    """
    check_min_points(min_points)
    points = check_pairs(point_deg_N2)
    named = one_name(points)
    ordered = named[np.lexsort((named[:, 1], named[:, 0]))]
    num_places = 1 + int((np.diff(ordered, axis=0) != 0).any(axis=1).sum())
    if not 1 <= k <= num_places:
        raise PartitionError(f"--k must be from 1 to {num_places}, the number of different places, got {k}")
    if min_points > len(points):
        raise PartitionError(f"--min-points {min_points} is more than the {len(points)} points that there are")
    source = f"the {k} cells of k-means"
    cells = _cells_of(_train(unit_vectors(ordered), k, rounds, seed), source)
    for _ in range(_EXACT_ROUNDS):
        cells, _ = _settled(cells, ordered, 1)
    while True:
        settled, smallest = _settled(cells, ordered, max(min_points, 1))
        if smallest >= max(min_points, 1):
            break
        cells = settled
    cell_N = cells.assign(points[:, 0], points[:, 1])
    counted = [{"points": count} for count in np.bincount(cell_N, minlength=len(cells)).tolist()]
    return replace(cells, details=counted), cell_N


def _train(vector_N3: NDArray[np.float64], k: int, rounds: int, seed: int) -> NDArray[np.float64]:
    """[k, 3] by FAISS."""
    import faiss

    # One thread: two that wait for one another on a busy machine take five times as long.
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        trainer = faiss.Kmeans(3, k, niter=rounds, seed=seed, spherical=True, min_points_per_centroid=1)
        trainer.train(np.ascontiguousarray(vector_N3, dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(num_threads)
    return np.asarray(trainer.centroids, dtype=np.float64)


def _cells_of(centroid_C3: NDArray[np.float64], source: str) -> Partition:
    """The cells of centroids, from south to north."""
    centroid_deg_C2 = points_deg(centroid_C3)
    centroid_deg_C2 = centroid_deg_C2[np.lexsort((centroid_deg_C2[:, 1], centroid_deg_C2[:, 0]))]
    return Partition(ids=np.arange(len(centroid_deg_C2)), centroids_deg=centroid_deg_C2, source=source)


def _settled(cells: Partition, ordered: NDArray[np.float64], min_points: int) -> tuple[Partition, int]:
    """One exact round: cells about the means of the points of each cell, small ones merged.

    Returns them, and how many points the smallest of the given cells has.
    """
    row_N = cells.assign(ordered[:, 0], ordered[:, 1])
    sum_C3, count_C = vector_sums(ordered, row_N, len(cells))
    centroid_C3 = _merged(sum_C3, count_C, unit_vectors(cells.centroids_deg), min_points)
    return _cells_of(centroid_C3, cells.source), int(count_C.min())


def _merged(
    sum_C3: NDArray[np.float64], count_C: NDArray[np.intp], centroid_C3: NDArray[np.float64], min_points: int
) -> NDArray[np.float64]:
    """[C', 3] means, the smallest cell again and again added to the nearest other, until none is too small."""
    filled = count_C > 0
    sum_C3, count_C = sum_C3[filled], count_C[filled]
    mean_C3 = _directions(sum_C3, centroid_C3[filled])
    while len(count_C) > 1 and count_C.min() < min_points:
        small = int(np.argmin(count_C))
        likeness_C = mean_C3 @ mean_C3[small]
        likeness_C[small] = -2
        other = int(np.argmax(likeness_C))
        sum_C3[other] += sum_C3[small]
        count_C[other] += count_C[small]
        mean_C3[other] = _directions(sum_C3[other], mean_C3[other])
        sum_C3, mean_C3 = np.delete(sum_C3, small, axis=0), np.delete(mean_C3, small, axis=0)
        count_C = np.delete(count_C, small)
    return mean_C3


def _directions(sum_C3: NDArray[np.float64], otherwise_C3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums at length 1; where points cancel one another, the direction that was there before."""
    length = np.linalg.norm(sum_C3, axis=-1, keepdims=True)
    return np.where(length > MIN_RESULTANT, sum_C3 / np.maximum(length, MIN_RESULTANT), otherwise_C3)
