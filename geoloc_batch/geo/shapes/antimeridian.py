"""Polygons that lie across the antimeridian or round a pole, brought onto the map from -180 to 180 degrees.

Shape letters: C polygons, V points of a ring.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.errors import PartitionError

# A crossing written without a split jumps by nearly 360 degrees; wide boxes have edges of 180 and more.
_MIN_JUMP_DEG = 270


def on_the_map(geometry_C: NDArray[np.object_]) -> NDArray[np.object_]:
    """Polygons as RFC 7946 wants them: split at the antimeridian, closed at a pole they go round, valid.

    Those that are so already come back as they are, point for point.

    Args:
        geometry_C: [C] polygons and multipolygons in (lon, lat). An edge of more than 270 degrees is read as one that
            goes the short way, across the antimeridian, unless both its ends lie at +-180 or at one pole.

    Raises:
        PartitionError: a coordinate is NaN, infinite, beyond a pole or more than 540 degrees from Greenwich.
    """
    import shapely

    if len(geometry_C) == 0:
        return geometry_C
    geometry_C = geometry_C.copy()
    parts, part_owner = shapely.get_parts(geometry_C, return_index=True)
    rings, ring_part = shapely.get_rings(parts, return_index=True)
    lon_lat, ring = shapely.get_coordinates(rings, return_index=True)
    owner = part_owner[ring_part[ring]]
    bad = ~(np.abs(lon_lat) <= [540, 90]).all(axis=1)
    if bad.any():
        lon, lat = lon_lat[int(np.argmax(bad))].tolist()
        raise PartitionError(
            f"the shape of cell {owner[int(np.argmax(bad))]} of the partition has a point at lat {lat}, lon {lon}; "
            f"polygons are in degrees, longitude first (EPSG:4326 or CRS84)"
        )
    jumps = _jumps(lon_lat) & (ring[1:] == ring[:-1])
    suspect = set(owner[1:][jumps].tolist()) | set(owner[np.abs(lon_lat[:, 0]) > 180].tolist())
    for row in sorted(suspect):
        geometry_C[row] = _split(_unwrapped(geometry_C[row]))
    for row in np.flatnonzero(~shapely.is_valid(geometry_C)).tolist():
        geometry_C[row] = _polygonal(shapely.make_valid(geometry_C[row]), row)
    return geometry_C


def _jumps(lon_lat_V2: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[V - 1] whether each edge jumps across the antimeridian."""
    start, end = lon_lat_V2[:-1], lon_lat_V2[1:]
    # Those from -180 to 180 and those along a pole are edges of the map itself: a box round the world, Antarctica.
    on_edge = (np.abs(start[:, 0]) == 180) & (np.abs(end[:, 0]) == 180)
    on_edge |= (np.abs(start[:, 1]) == 90) & (start[:, 1] == end[:, 1])
    return np.asarray((np.abs(end[:, 0] - start[:, 0]) > _MIN_JUMP_DEG) & ~on_edge)


def _unwrapped(geometry: Any) -> Any:
    """The polygon with no jumps: longitudes may leave [-180, 180]. Parts and holes are gathered by even and odd."""
    import shapely

    result = shapely.Polygon()
    for part in shapely.get_parts(geometry):
        outer, *holes = (shapely.Polygon(_walk(shapely.get_coordinates(ring))) for ring in shapely.get_rings(part))
        outer = shapely.make_valid(outer)
        for hole in holes:
            # A hole may come out one turn beside its shell.
            shift = 360 * round((_middle(outer) - _middle(hole)) / 360)
            outer = shapely.difference(outer, _moved(shapely.make_valid(hole), shift))
        result = shapely.union(_split(result), _split(outer))
    return result


def _walk(lon_lat_V2: NDArray[np.float64]) -> NDArray[np.float64]:
    """A closed ring with each edge going the short way round; closed at the pole when it goes round one."""
    lon_lat_V2 = lon_lat_V2.copy()
    lon_V, lat_V = lon_lat_V2[:, 0], lon_lat_V2[:, 1]
    turns = np.where(_jumps(lon_lat_V2), -np.round(np.diff(lon_V) / 360), 0.0)
    # Whole turns are added, so that points keep their digits.
    lon_V[1:] += 360 * np.cumsum(turns)
    total = lon_V[-1] - lon_V[0]
    if abs(total) < 180:
        return lon_lat_V2
    pole = 90.0 if lat_V.mean() > 0 else -90.0
    return np.concatenate([lon_lat_V2, [[lon_V[-1], pole], [lon_V[0], pole]]])


def _split(geometry: Any) -> Any:
    """What lies beyond +-180, brought back to the other side."""
    import shapely

    west, _, east, _ = shapely.bounds(geometry).tolist()
    if not (west < -180 or east > 180):
        return geometry
    turns = range(int(np.floor((west + 180) / 360)), int(np.ceil((east - 180) / 360)) + 1)
    parts = []
    for turn in turns:
        window = shapely.box(360 * turn - 180, -90, 360 * turn + 180, 90)
        parts.append(_moved(shapely.intersection(geometry, window), -360 * turn))
    return shapely.union_all(parts)


def _moved(geometry: Any, degrees: float) -> Any:
    import shapely

    return shapely.transform(geometry, lambda lon_lat: np.add(lon_lat, (degrees, 0.0))) if degrees else geometry


def _middle(geometry: Any) -> float:
    import shapely

    west, _, east, _ = shapely.bounds(geometry).tolist()
    return float((west + east) / 2)


def _polygonal(geometry: Any, row: int) -> Any:
    """The polygons among what a repair gives: lines and points have no inside."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(geometry))
    polygons = [part for part in parts if part.geom_type == "Polygon" and part.area > 0]
    if not polygons:
        raise PartitionError(f"the shape of cell {row} of the partition has no inside")
    return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)
