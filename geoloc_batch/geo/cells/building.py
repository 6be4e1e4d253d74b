"""What all builders share: which cells hold enough points, and where their centroids lie.

Shape letters: N points, C cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.bbox import Box
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.shapes.base import Shapes
from geoloc_batch.geo.sphere import points_deg, unit_vectors

Centroid = Literal["mean", "geometric"]
"""mean: the spherical mean of the cell's points. geometric: the outline's centre of gravity on the sphere."""

MIN_RESULTANT = 1e-9
"""A sum of unit vectors shorter than this, a point, is rounding: the points cancel one another."""


def partition_of(
    shapes: Shapes,
    point_deg_N2: NDArray[np.float64],
    *,
    source: str,
    min_points: int = 1,
    centroid: Centroid = "mean",
    details: Sequence[Mapping[str, Any]] = (),
    parents: Sequence[str] | None = None,
) -> tuple[Partition, NDArray[np.int64]]:
    """The partition of those shapes that hold at least `min_points` of the points.

    Args:
        shapes: [C'] outlines, in the order that ids shall have.
        point_deg_N2: [N, 2] (lat, lon) in degrees, checked; N may be 0 where min_points is.
        source: what messages call the partition.
        min_points: cells with fewer are left out: their points belong to no cell, so to the nearest centroid.
        centroid: see `Centroid`; a cell without points has its geometric one.
        details: [C'] fields of each cell; the number of its points is added as `points`.
        parents: [C'] the name of each cell's parent. Its id is its place among the names that remain, sorted.

    Returns:
        The partition, ids 0 to C - 1; and [N] the id of each point's cell, as `Partition.assign` answers.

    Raises:
        PartitionError: no cell holds that many points.
    """
    check_min_points(min_points)
    row_N = shapes.find(point_deg_N2)
    count_all = np.bincount(row_N[row_N >= 0], minlength=len(shapes))
    kept = np.flatnonzero(count_all >= min_points)
    if not len(kept):
        raise PartitionError(
            f"{source}: none of {len(shapes)} cells holds {min_points} of the {len(point_deg_N2)} points or more; "
            f"give a smaller --min-points, or larger cells"
        )
    shapes, count_C = shapes.take(kept), count_all[kept]
    new_row = np.full(len(count_all) + 1, -1)
    new_row[kept] = np.arange(len(kept))
    own_N = new_row[row_N]
    centroid_deg_C2, is_known_C = mean_points(point_deg_N2, own_N, len(kept))
    if centroid == "geometric" or not is_known_C.all():
        geometric_C2 = shapes.centres_deg()
        replaced_C = ~is_known_C | (centroid == "geometric")
        centroid_deg_C2[replaced_C] = geometric_C2[replaced_C]
    counted = [
        {**(details[old] if details else {}), "points": count}
        for old, count in zip(kept.tolist(), count_C.tolist(), strict=True)
    ]
    names = None if parents is None else np.array(list(parents))[kept]
    partition = Partition(
        ids=np.arange(len(kept), dtype=np.int64),
        centroids_deg=centroid_deg_C2,
        details=counted if len(point_deg_N2) else [dict(details[old]) for old in kept.tolist()] if details else (),
        source=source,
        shapes=shapes,
        parents=None if names is None else np.unique(names, return_inverse=True)[1],
    )
    return partition, own_or_nearest(partition, point_deg_N2, own_N)


def own_or_nearest(
    partition: Partition, point_deg_N2: NDArray[np.float64], row_N: NDArray[np.intp]
) -> NDArray[np.int64]:
    """[N] ids by rows that are known already, the nearest centroid's where the row is -1."""
    id_N = np.asarray(partition.ids[row_N], dtype=np.int64)
    lost = row_N < 0
    id_N[lost] = partition.nearest(point_deg_N2[lost, 0], point_deg_N2[lost, 1])
    return id_N


def mean_points(
    point_deg_N2: NDArray[np.float64], row_N: NDArray[np.intp], num_cells: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The spherical mean of each cell's points, the same bits whatever their order.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees.
        row_N: [N] the cell of each, -1 for none.
        num_cells: C.

    Returns:
        [C, 2] (lat, lon) in degrees; and [C] whether there is one: points can be missing, or cancel one another.
    """
    sum_C3, count_C = vector_sums(point_deg_N2, row_N, num_cells)
    is_known_C = np.linalg.norm(sum_C3, axis=1) > MIN_RESULTANT * count_C
    return points_deg(sum_C3), is_known_C


def vector_sums(
    point_deg_N2: NDArray[np.float64], row_N: NDArray[np.intp], num_cells: int
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """[C, 3] sums of the unit vectors of each cell's points, added in the points' own order, and [C] their number."""
    order = np.lexsort((point_deg_N2[:, 1], point_deg_N2[:, 0], row_N))
    order = order[row_N[order] >= 0]
    vector_N3, row_N = unit_vectors(point_deg_N2[order]), row_N[order]
    sums = [np.bincount(row_N, weights=vector_N3[:, axis], minlength=num_cells) for axis in range(3)]
    return np.stack(sums, axis=-1), np.bincount(row_N, minlength=num_cells)


def check_min_points(min_points: int) -> None:
    """A PartitionError unless `min_points` can be one."""
    if min_points < 0:
        raise PartitionError(f"--min-points must be 0 or more, got {min_points}")


class Frame:
    """The map that trees of boxes are cut from: a box round the points, or a given one, unrolled across 180 degrees."""

    def __init__(self, point_deg_N2: NDArray[np.float64], bbox: Box | None) -> None:
        low, high = point_deg_N2.min(axis=0), point_deg_N2.max(axis=0)
        self._turn_at = -180.0
        if bbox is not None:
            low, high = np.array([[bbox.south, bbox.west], [bbox.north, bbox.east]], dtype=np.float64)
            if bbox.west > bbox.east:
                self._turn_at = bbox.west
                high[1] += 360
        # A box has an inside, also round points that have none between them.
        for axis, limit in ((0, 90.0), (1, 180.0 if self._turn_at == -180 else 540.0)):
            if low[axis] == high[axis]:
                low[axis], high[axis] = max(low[axis] - 1e-6, -limit), min(high[axis] + 1e-6, limit)
        self.low, self.high = low, high
        """[2] south and west, north and east; longitudes up to 540."""

    def unrolled(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """The points on this map."""
        turned = point_deg_N2.copy()
        turned[turned[:, 1] < self._turn_at, 1] += 360
        return turned

    def rolled(self, box_C4: NDArray[np.float64]) -> NDArray[np.float64]:
        """[C, 4] boxes of this map as south, west, north, east between -180 and 180."""
        rolled = box_C4.copy()
        for column in (1, 3):
            beyond = rolled[:, column] > 180
            rolled[beyond, column] -= 360
        # What starts at the antimeridian starts at -180.
        rolled[rolled[:, 1] == 180, 1] = -180
        return rolled
