"""Cells from polygons that others drew: NUTS regions, countries, any GeoJSON or GeoParquet.

Shape letters: N points, C cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.cells.building import Centroid, partition_of
from geoloc_batch.geo.formats.polygon_file import Polygons
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.points import check_pairs
from geoloc_batch.geo.shapes.polygons import PolygonShapes


def build_polygons(
    polygons: Polygons,
    point_deg_N2: ArrayLike | None = None,
    *,
    min_points: int | None = None,
    centroid: Centroid = "mean",
    parents: list[str] | None = None,
) -> tuple[Partition, NDArray[np.int64]]:
    """A cell for each polygon.

    Args:
        polygons: as `read_polygons` gives them.
        point_deg_N2: [N, 2] (lat, lon) in degrees; None makes all polygons cells, with geometric centroids.
        min_points: cells with fewer points are left out; their points belong to the nearest centroid. None stands
            for 1 where there are points.
        centroid: the spherical mean of the cell's points, or the polygon's centre of gravity.
        parents: [P] the name of the coarser region that each polygon is part of.

    Returns:
        The partition: ids 0 to C - 1 in the order of the polygons, their own ids in the detail `code`. And [N] the id
        of each point's cell.

    Raises:
        PartitionError: a polygon or point cannot be one, or no cell holds `min_points` points.
    """
    points = np.empty((0, 2)) if point_deg_N2 is None else check_pairs(point_deg_N2)
    if point_deg_N2 is None and min_points:
        raise PartitionError(f"--min-points {min_points} needs points to count; give POINTS")
    try:
        shapes = PolygonShapes.of(polygons.geometries)
    except PartitionError as error:
        raise PartitionError(f"{polygons.source}: {error}") from error
    return partition_of(
        shapes,
        points,
        source=f"the polygons of {polygons.source}",
        min_points=(0 if point_deg_N2 is None else 1) if min_points is None else min_points,
        centroid=centroid,
        details=[{"name": name, "code": code} for name, code in zip(polygons.names, polygons.ids, strict=True)],
        parents=parents,
    )


def build_nuts(
    polygons: Polygons,
    point_deg_N2: ArrayLike | None = None,
    level: int = 3,
    *,
    min_points: int | None = None,
    centroid: Centroid = "mean",
) -> tuple[Partition, NDArray[np.int64]]:
    """Cells of one level of Eurostat's regions; their parents are the regions of the level above.

    Args:
        polygons: a file of NUTS regions, of this level alone or of several.
        point_deg_N2: as in `build_polygons`.
        level: 0 (countries) to 3. A region's code has two letters and one sign more for each level.
        min_points: as in `build_polygons`.
        centroid: as in `build_polygons`, as is what is returned.

    Raises:
        PartitionError: as in `build_polygons`, or the file has no region of that level.
    """
    if not 0 <= level <= 3:
        raise PartitionError(f"NUTS has the levels 0 to 3, got --level {level}")
    rows = np.array([row for row, code in enumerate(polygons.ids) if len(code) == level + 2], dtype=np.intp)
    if not len(rows):
        raise PartitionError(
            f"{polygons.source} has no region of level {level}: their codes have {level + 2} signs, such as "
            f"{'DE212'[: level + 2]}; give another --level, or --id-field with the codes"
        )
    polygons = polygons.take(rows)
    parents = [code[:-1] for code in polygons.ids] if level else None
    return build_polygons(polygons, point_deg_N2, min_points=min_points, centroid=centroid, parents=parents)
