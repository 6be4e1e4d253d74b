"""The sphere: degrees, unit vectors, distances and means. The Earth is a ball of one radius here.

Shape letters: ... any leading shape, N points. Points are (lat, lon) in degrees, in that order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

EARTH_RADIUS_KM = 6371.0
"""The radius behind every distance, the one that the field's tables use."""

# Shorter sums of unit vectors than this are rounding: they point nowhere.
_MIN_RESULTANT = 1e-9


def unit_vectors(point_deg: ArrayLike) -> NDArray[np.float64]:
    """Points on the unit sphere.

    Args:
        point_deg: [..., 2] (lat, lon) in degrees.

    Returns:
        [..., 3]: x towards (0, 0), y towards (0, 90), z towards the north pole.
    """
    lat, lon = _radians(point_deg)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def points_deg(vector: ArrayLike) -> NDArray[np.float64]:
    """Directions as (lat, lon) in degrees; the inverse of `unit_vectors`.

    Args:
        vector: [..., 3], of any length above zero. A zero vector gives (0, 0): ask for the length first.

    Returns:
        [..., 2], lat in [-90, 90], lon in [-180, 180].
    """
    x, y, z = np.moveaxis(np.asarray(vector, dtype=np.float64), -1, 0)
    # The arc tangent keeps its digits near the poles, where the arc sine of z loses half of them.
    radians = np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], axis=-1)
    return np.asarray(np.degrees(radians))


def haversine_km(a_deg: ArrayLike, b_deg: ArrayLike) -> NDArray[np.float64]:
    """Great-circle distance in kilometres, R = EARTH_RADIUS_KM.

    Both the half chord and its complement are built from half angles, so that the arc tangent keeps its digits
    between identical points, at antipodes and everywhere between.

    Args:
        a_deg: [..., 2] (lat, lon) in degrees.
        b_deg: like a_deg, or of a shape that broadcasts with it.

    Returns:
        [...] kilometres; NaN where a coordinate is NaN.

    Source: Sinnott, "Virtues of the Haversine", Sky & Telescope 68 (1984), p. 159.
    """
    a = np.asarray(a_deg, dtype=np.float64)
    b = np.asarray(b_deg, dtype=np.float64)
    # Degrees are subtracted before they become radians: the difference of close points is then exact.
    half_difference = np.radians((a - b) / 2)
    half_sum_lat = np.radians((a[..., 0] + b[..., 0]) / 2)
    sin_lat, cos_lat = np.sin(half_difference[..., 0]), np.cos(half_difference[..., 0])
    sin_lon, cos_lon = np.sin(half_difference[..., 1]), np.cos(half_difference[..., 1])
    chord = np.hypot(sin_lat * cos_lon, np.cos(half_sum_lat) * sin_lon)
    complement = np.hypot(cos_lat * cos_lon, np.sin(half_sum_lat) * sin_lon)
    return np.asarray(2 * EARTH_RADIUS_KM * np.arctan2(chord, complement))


def spherical_mean(point_deg_N2: ArrayLike, weight_N: ArrayLike | None = None) -> NDArray[np.float64]:
    """The direction of the sum of the points' unit vectors.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees, N > 0.
        weight_N: [N] weights, not negative; None weighs all points alike.

    Returns:
        [2] (lat, lon) in degrees.

    Raises:
        ValueError: there is no point, a coordinate or weight is NaN or infinite, a weight is negative, or the points
            cancel one another, so that no direction is their mean.
    """
    vector_N3 = unit_vectors(point_deg_N2)
    weights = np.ones(len(vector_N3)) if weight_N is None else np.asarray(weight_N, dtype=np.float64)
    if not np.isfinite(vector_N3).all() or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("the mean takes finite coordinates and finite weights that are not negative")
    total = weights.sum()
    if total <= 0:
        raise ValueError(f"the mean of {len(vector_N3)} points of total weight {total} is undefined")
    resultant = weights @ vector_N3 / total
    if np.linalg.norm(resultant) < _MIN_RESULTANT:
        raise ValueError(f"the {len(vector_N3)} points cancel one another: they have no mean on the sphere")
    return points_deg(resultant)


def _radians(point_deg: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    radians = np.radians(np.asarray(point_deg, dtype=np.float64))
    if radians.shape[-1:] != (2,):
        raise ValueError(f"points must end in (lat, lon), got the shape {radians.shape}")
    return radians[..., 0], radians[..., 1]
