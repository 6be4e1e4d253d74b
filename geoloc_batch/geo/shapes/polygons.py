"""Polygons with straight edges on the map of (lon, lat), such as regions and countries.

Shape letters: C cells, N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError
from geoloc_batch.geo.shapes.antimeridian import on_the_map
from geoloc_batch.geo.shapes.base import Shapes, first_pairs
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, points_deg, unit_vectors

_POLYGONAL = (3, 6)  # shapely's numbers of Polygon and MultiPolygon


class PolygonShapes(Shapes):
    """C polygons or multipolygons, given as WKB. Where they overlap, the lowest id takes the point.

    Polygons across the antimeridian may be split there, run beyond 180 degrees, or jump from 179 to -179: they are
    split once, here. One that goes round a pole is closed at the pole.

    Raises:
        PartitionError: a polygon cannot be read, is empty or is no polygon, or lies beyond the poles.
    """

    kind: ClassVar[str] = "polygon"

    def __init__(self, wkb_C: Sequence[bytes]) -> None:
        import shapely

        try:
            geometry_C = shapely.from_wkb(np.array([bytes(wkb) for wkb in wkb_C], dtype=object))
        except (shapely.errors.ShapelyError, TypeError) as error:
            raise PartitionError(f"a polygon of the partition cannot be read as WKB: {error}") from error
        self._set(geometry_C)

    @classmethod
    def of(cls, geometry_C: Any) -> PolygonShapes:
        """Of shapely geometries."""
        shapes = cls.__new__(cls)
        shapes._set(np.array(geometry_C, dtype=object))
        return shapes

    def _set(self, geometry_C: NDArray[np.object_]) -> None:
        import shapely

        bad_C = ~np.isin(shapely.get_type_id(geometry_C), _POLYGONAL) | shapely.is_empty(geometry_C)
        if bad_C.any():
            row = int(np.argmax(bad_C))
            kind = "missing" if geometry_C[row] is None else f"an empty or unfit {geometry_C[row].geom_type}"
            raise PartitionError(f"the shape of cell {row} of the partition is {kind}; give a Polygon or MultiPolygon")
        self._geometry_C = on_the_map(shapely.force_2d(geometry_C))

    def __len__(self) -> int:
        return len(self._geometry_C)

    @property
    def wkb(self) -> list[bytes]:
        """[C] well-known binary, little-endian, two-dimensional."""
        import shapely

        return list(shapely.to_wkb(self._geometry_C, byte_order=1, output_dimension=2))

    def take(self, rows: NDArray[np.intp]) -> PolygonShapes:
        """The polygons named by `rows`."""
        return PolygonShapes.of(self._geometry_C[rows])

    def canonical_bytes(self) -> bytes:
        """Each polygon's WKB after its length."""
        return b"".join(len(wkb).to_bytes(8, "little") + wkb for wkb in self.wkb)

    def geometries(self) -> NDArray[np.object_]:
        """[C] as they are."""
        return self._geometry_C.copy()

    def areas_km2(self) -> NDArray[np.float64]:
        """[C] on the cylinder of equal areas; an edge is as good as its points are close."""
        import shapely

        def to_cylinder(lon_lat: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.stack([np.radians(lon_lat[:, 0]), np.sin(np.radians(lon_lat[:, 1]))], axis=-1)

        return np.asarray(shapely.area(shapely.transform(self._geometry_C, to_cylinder)) * EARTH_RADIUS_KM**2)

    def centres_deg(self) -> NDArray[np.float64]:
        """[C, 2] the direction of the integral of the unit vector over each polygon, edges taken as great circles.

        Source: by Stokes' theorem the integral is half the sum, over the edges a -> b, of the angle between a and b
        times the unit normal of their plane.
        """
        import shapely

        rings, owner = _oriented_rings(self._geometry_C)
        lon_lat, ring = shapely.get_coordinates(rings, return_index=True)
        vector = unit_vectors(lon_lat[:, ::-1])
        start, end = vector[:-1], vector[1:]
        normal = np.cross(start, end)
        sine = np.linalg.norm(normal, axis=1)
        angle = np.arctan2(sine, (start * end).sum(axis=1))
        with np.errstate(invalid="ignore"):
            edge = np.where(sine[:, None] > 0, normal / sine[:, None] * (angle / 2)[:, None], 0.0)
        edge[ring[1:] != ring[:-1]] = 0
        sum_C3 = np.zeros((len(self), 3))
        np.add.at(sum_C3, owner[ring[1:]], edge)
        centre_C2 = points_deg(sum_C3)
        # Slivers whose area drowns in rounding: any point of theirs.
        lost = np.linalg.norm(sum_C3, axis=1) < 1e-14
        if lost.any():
            inside = shapely.get_coordinates(shapely.point_on_surface(self._geometry_C[lost]))
            centre_C2[lost] = inside[:, ::-1]
        return centre_C2

    @cached_property
    def _tree(self) -> Any:
        import shapely

        return shapely.STRtree(self._geometry_C)

    def _find(self, point_deg_N2: NDArray[np.float64]) -> NDArray[np.intp]:
        import shapely

        points = shapely.points(point_deg_N2[:, 1], point_deg_N2[:, 0])
        point, row = self._tree.query(points, predicate="intersects")
        return first_pairs(point, row, np.zeros(len(row)), len(point_deg_N2))

    def _at_pole(self, lat: float) -> int:
        import shapely

        bounds = shapely.bounds(self._geometry_C)
        touches = np.flatnonzero(bounds[:, 3 if lat > 0 else 1] == lat)
        return int(touches[0]) if len(touches) else -1


def _oriented_rings(geometry_C: NDArray[np.object_]) -> tuple[NDArray[np.object_], NDArray[np.intp]]:
    """All rings, outer ones anticlockwise and holes clockwise, and the cell of each."""
    import shapely

    parts, owner = shapely.get_parts(geometry_C, return_index=True)
    rings, part = shapely.get_rings(shapely.orient_polygons(parts), return_index=True)
    return rings, owner[part]
