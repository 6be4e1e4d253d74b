"""Pairs of points that are hard on a distance, and distances with forty digits."""

from __future__ import annotations

import mpmath
import numpy as np
import torch
from torch import Tensor

CASES = ("random", "close", "antipodes")


def hard_pairs(case: str, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors [count, 2] of (lat, lon) in degrees: sixths of them near poles, the antimeridian and the equator.

    Args:
        case: "random" pairs, "close" ones of a millimetre to 300 km, or "antipodes" that miss each other by as much.
        count: how many.
        dtype: of the tensors.
    """
    rng = np.random.default_rng(CASES.index(case))
    lat, lon = np.degrees(np.arcsin(rng.uniform(-1, 1, count))), rng.uniform(-180, 180, count)
    sixth = count // 6
    side, small = rng.choice([-1, 1], sixth), 10 ** rng.uniform(-6, 1, (3, sixth))
    lat[:sixth] = side * (90 - small[0])
    lon[sixth : 2 * sixth] = side * (180 - small[1])
    lat[2 * sixth : 3 * sixth] = side * small[2]
    a_deg = np.stack([lat, lon], axis=-1)
    b_deg = a_deg[rng.permutation(count)] if case == "random" else moved(a_deg, rng)
    if case == "antipodes":
        b_deg = np.stack([-b_deg[:, 0], b_deg[:, 1] % 360 - 180], axis=-1)
    return torch.tensor(a_deg, dtype=dtype), torch.tensor(b_deg, dtype=dtype)


def moved(point_deg: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The points after a way of a millimetre to 300 km in any direction."""
    way, bearing = 10 ** rng.uniform(-6, 2.5, len(point_deg)) / 6371, rng.uniform(0, 2 * np.pi, len(point_deg))
    lat, lon = np.radians(point_deg).T
    sine = np.clip(np.sin(lat) * np.cos(way) + np.cos(lat) * np.sin(way) * np.cos(bearing), -1, 1)
    lon = lon + np.arctan2(np.sin(bearing) * np.sin(way) * np.cos(lat), np.cos(way) - np.sin(lat) * sine)
    return np.degrees(np.stack([np.arcsin(sine), (lon + np.pi) % (2 * np.pi) - np.pi], axis=-1))


def exact_km(a_deg: Tensor, b_deg: Tensor) -> list[mpmath.mpf]:
    """Distances of pairs [N, 2] and [N, 2] as they are stored, with forty digits: the angle between unit vectors."""
    with mpmath.workdps(40):
        return [_angle(_vector(*a), _vector(*b)) * 6371 for a, b in zip(a_deg.tolist(), b_deg.tolist(), strict=True)]


def error_m(km: Tensor, exact: list[mpmath.mpf]) -> Tensor:
    """[N] float64: how far distances are off, in metres."""
    with mpmath.workdps(40):
        off = [abs(mpmath.mpf(value) - true) * 1000 for value, true in zip(km.tolist(), exact, strict=True)]
    return torch.tensor([float(metres) for metres in off], dtype=torch.float64)


def _vector(lat: float, lon: float) -> list[mpmath.mpf]:
    lat, lon = mpmath.radians(mpmath.mpf(lat)), mpmath.radians(mpmath.mpf(lon))
    return [mpmath.cos(lat) * mpmath.cos(lon), mpmath.cos(lat) * mpmath.sin(lon), mpmath.sin(lat)]


def _angle(u: list[mpmath.mpf], v: list[mpmath.mpf]) -> mpmath.mpf:
    near = mpmath.sqrt(sum((x - y) ** 2 for x, y in zip(u, v, strict=True)))
    far = mpmath.sqrt(sum((x + y) ** 2 for x, y in zip(u, v, strict=True)))
    return 2 * mpmath.atan2(near, far)
