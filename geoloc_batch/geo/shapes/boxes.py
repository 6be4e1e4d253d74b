"""Boxes between two parallels and two meridians.

Shape letters: C cells, N points.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.shapes.base import Shapes, first_pairs
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, points_deg


class BoxShapes(Shapes):
    """C boxes, which may overlap. A box with its west east of its east lies across the antimeridian.

    Raises:
        PartitionError: a bound is NaN or out of range, or a box is empty.
    """

    kind: ClassVar[str] = "box"

    def __init__(self, box_C4: ArrayLike) -> None:
        self.box_C4 = np.array(box_C4, dtype=np.float64) + 0.0
        """[C, 4] south, west, north, east in degrees."""
        self.box_C4.setflags(write=False)
        if self.box_C4.ndim != 2 or self.box_C4.shape[1] != 4:
            raise PartitionError(f"boxes must be [C, 4] (south, west, north, east), got the shape {self.box_C4.shape}")
        south, west, north, east = self.box_C4.T
        # From 180 to -180 there is nothing, from -180 to 180 everything.
        is_wide_C = (west != east) & (west - east != 360)
        bad_C = ~((np.abs(self.box_C4) <= [90, 180, 90, 180]).all(axis=1) & (south < north) & is_wide_C)
        if bad_C.any():
            row = int(np.argmax(bad_C))
            raise PartitionError(
                f"cell {row} of the partition has the box south {south[row]}, west {west[row]}, north {north[row]}, "
                f"east {east[row]}, which is none: it must have an inside, within 90 and 180 degrees"
            )

    def __len__(self) -> int:
        return len(self.box_C4)

    def take(self, rows: NDArray[np.intp]) -> BoxShapes:
        """The boxes named by `rows`."""
        return BoxShapes(self.box_C4[rows])

    def canonical_bytes(self) -> bytes:
        """The bounds."""
        return self.box_C4.astype("<f8").tobytes()

    def centres_deg(self) -> NDArray[np.float64]:
        """[C, 2] the direction of the integral of the unit vector over each box."""
        south, north = np.radians(self.box_C4[:, 0]), np.radians(self.box_C4[:, 2])
        middle = np.radians(self.box_C4[:, 1] + self._widths / 2)
        half_width = np.radians(self._widths / 2)
        # The element of area is cos(lat); so across: integral of cos^2, upwards: integral of cos sin.
        across = (north - south) / 2 + (np.sin(2 * north) - np.sin(2 * south)) / 4
        upwards = half_width * (np.sin(north) ** 2 - np.sin(south) ** 2)
        across = across * 2 * np.sin(half_width)
        vector_C3 = np.stack([across * np.cos(middle), across * np.sin(middle), upwards], axis=-1)
        # A ring round the whole Earth at the equator has no centre: its middle on the map is as good as any.
        flat = np.linalg.norm(vector_C3, axis=1) < 1e-12
        centre_C2 = points_deg(vector_C3)
        centre_C2[flat] = np.stack([(self.box_C4[:, 0] + self.box_C4[:, 2]) / 2, np.degrees(middle)], axis=-1)[flat]
        return centre_C2

    def areas_km2(self) -> NDArray[np.float64]:
        """[C] by Archimedes: the width times the height between the parallels' planes."""
        south, north = np.radians(self.box_C4[:, 0]), np.radians(self.box_C4[:, 2])
        return np.asarray(EARTH_RADIUS_KM**2 * np.radians(self._widths) * (np.sin(north) - np.sin(south)))

    def geometries(self) -> NDArray[np.object_]:
        """[C] boxes; two in one where they lie across the antimeridian."""
        import shapely

        parts, owner = self._parts
        # With more points on long edges, so that nobody takes them for jumps across the antimeridian.
        whole = shapely.segmentize(shapely.box(parts[:, 1], parts[:, 0], parts[:, 3], parts[:, 2]), 120)
        geometries = np.empty(len(self), dtype=object)
        geometries[owner[::-1]] = whole[::-1]
        for row in np.flatnonzero(np.bincount(owner) > 1):
            geometries[row] = shapely.MultiPolygon(list(whole[owner == row]))
        return geometries

    @property
    def _widths(self) -> NDArray[np.float64]:
        width = self.box_C4[:, 3] - self.box_C4[:, 1]
        return np.asarray(np.where(width < 0, width + 360, width))

    @cached_property
    def _parts(self) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Boxes that lie within the map, and the cell that each belongs to."""
        across = np.flatnonzero(self.box_C4[:, 1] > self.box_C4[:, 3])
        west_part, east_part = self.box_C4.copy(), self.box_C4[across].copy()
        west_part[across, 3] = 180
        east_part[:, 1] = -180
        owner = np.concatenate([np.arange(len(self)), across])
        parts = np.concatenate([west_part, east_part])
        # A box that starts at 180 or ends at -180 has nothing on one side.
        real = parts[:, 1] < parts[:, 3]
        return parts[real], owner[real]

    @cached_property
    def _tree(self) -> Any:
        import shapely

        parts, _ = self._parts
        return shapely.STRtree(shapely.box(parts[:, 1], parts[:, 0], parts[:, 3], parts[:, 2]))

    def _find(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.intp]:
        import shapely

        parts, owner = self._parts
        point, part = self._tree.query(shapely.points(point_deg_N2[:, 1], point_deg_N2[:, 0]))
        # The tree answers closed boxes. A shared edge is the southern or western edge of the one that takes the point.
        at_end = (point_deg_N2[point, 0] == parts[part, 2]) | (point_deg_N2[point, 1] == parts[part, 3])
        return first_pairs(point, owner[part], at_end, len(point_deg_N2))

    def _at_pole(self, lat: float) -> int:
        touches = np.flatnonzero(self.box_C4[:, 2 if lat > 0 else 0] == lat)
        return int(touches[0]) if len(touches) else -1
