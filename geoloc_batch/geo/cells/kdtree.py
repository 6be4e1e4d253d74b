"""Cells of a k-d tree: boxes on the map, cut at the median until each holds few points.

Shape letters: N points, C cells.

Source: Bentley, "Multidimensional Binary Search Trees Used for Associative Searching", CACM 18 (1975), p. 509.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.bbox import Box
from geoloc_batch.geo.cells.building import Centroid, Frame, partition_of
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.points import check_pairs
from geoloc_batch.geo.shapes.boxes import BoxShapes

Cut = tuple[int, float, NDArray[np.bool_]]
"""The axis (0 lat, 1 lon), the coordinate, and which points lie beyond it or on it."""


def build_kdtree(
    point_deg_N2: ArrayLike,
    max_points: int = 39,
    *,
    bbox: Box | None = None,
    min_points: int = 1,
    centroid: Centroid = "mean",
) -> tuple[Partition, NDArray[np.int64]]:
    """The leaves of the tree.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees, N > 0.
        max_points: a box that holds more is cut in two across its points' longer side (in km), so that each side has
            half of them. Points at one place are never parted: there a box may hold more.
        bbox: the box to begin with; without one the smallest that holds the points.
        min_points: cells with fewer points are left out; their points belong to the nearest centroid.
        centroid: the spherical mean of the cell's points, or the box's centre.

    Returns:
        The partition: ids 0 to C - 1 in the tree's order, south and west first. The boxes fill the first one without
        gap. And [N] the id of each point's cell.

    Raises:
        PartitionError: there is no point, a point is no place on Earth, a number is out of range, or no cell holds
            `min_points` points.
    """
    if max_points < 1:
        raise PartitionError(f"--max-points must be at least 1, got {max_points}")
    points = check_pairs(point_deg_N2)
    frame = Frame(points, bbox)
    unrolled = frame.unrolled(points)
    leaves = []
    stack = [(frame.low, frame.high, np.arange(len(points)))]
    while stack:
        low, high, rows = stack.pop()
        cut = _cut(unrolled[rows]) if len(rows) > max_points else None
        if cut is None:
            leaves.append(np.concatenate([low, high]))
            continue
        axis, at, is_beyond = cut
        far_low, near_high = low.copy(), high.copy()
        far_low[axis] = near_high[axis] = at
        stack.append((far_low, high, rows[is_beyond]))
        stack.append((low, near_high, rows[~is_beyond]))
    shapes = BoxShapes(frame.rolled(np.array(leaves)))
    source = f"the k-d tree of {max_points} points"
    return partition_of(shapes, points, source=source, min_points=max(min_points, 1), centroid=centroid)


def _cut(point_N2: NDArray[np.float64]) -> Cut | None:
    """Where to part the points; None where all lie at one place."""
    low, high = point_N2.min(axis=0), point_N2.max(axis=0)
    extent = (high - low) * [1.0, np.cos(np.radians((low[0] + high[0]) / 2))]
    for axis in (0, 1) if extent[0] >= extent[1] else (1, 0):
        if low[axis] < high[axis]:
            at = _median_gap(point_N2[:, axis])
            return axis, at, point_N2[:, axis] >= at
    return None


def _median_gap(value_N: NDArray[np.float64]) -> float:
    """The middle between the two neighbouring values, not equal, that part the values most evenly."""
    half = len(value_N) // 2
    median = np.partition(value_N, half)[half]
    below, above = value_N[value_N < median], value_N[value_N > median]
    # Equal values stay together: either the median goes with those above it, or with those below.
    if len(below) and (len(above) == 0 or abs(len(below) - half) <= abs(len(value_N) - len(above) - half)):
        left, right = below.max(), median
    else:
        left, right = median, above.min()
    middle = (left + right) / 2
    return float(middle if left < middle else right)
