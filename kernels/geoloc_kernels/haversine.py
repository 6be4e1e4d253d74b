"""The great circle in plain PyTorch: distance and gradient, in the precision of their inputs.

    a = sin^2(dphi / 2) + cos(phi1) cos(phi2) sin^2(dlambda / 2)
    b = sin^2((phi1 + phi2) / 2) + cos(phi1) cos(phi2) cos^2(dlambda / 2) = 1 - a
    distance = 2 R atan2(sqrt(a), sqrt(b))

Both are sums of terms that are not negative (for latitudes within +-90), so that a keeps its digits between close
points and b at antipodes. Everything is subtracted in degrees, where differences of close points, the way to the pole
and the way across the antimeridian are exact; only then do angles become radians.

Source: Sinnott, "Virtues of the Haversine", Sky & Telescope 68 (1984), p. 159; b is a, measured to the antipode.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EARTH_RADIUS_KM = 6371.0
"""The radius behind every distance."""


class Way(NamedTuple):
    """From a point to another, all in degrees; every field of the pair's shape."""

    difference: Tensor
    """Latitude of the second less that of the first."""
    sum: Tensor
    """Of the two latitudes."""
    turn: Tensor
    """Shorter way around between the longitudes, 0 to 180."""
    is_east: Tensor
    """bool: the shorter way from the first to the second leads east."""


def distance_km(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """Distance by the definition.

    Args:
        a_deg: [..., 2] float32 or float64, (lat, lon) in degrees.
        b_deg: the same dtype, a shape that broadcasts with it.

    Returns:
        [...] kilometres; NaN where a coordinate is NaN or infinite.
    """
    way = way_between(a_deg, b_deg)
    cosines = cosine(a_deg[..., 0]) * cosine(b_deg[..., 0])
    near = sine(way.difference / 2).square() + cosines * sine(way.turn / 2).square()
    far = sine(way.sum / 2).square() + cosines * cosine(way.turn / 2).square()
    # Rounding goes below zero only where a latitude lies beyond a pole; the clamp lets NaN pass.
    return 2 * EARTH_RADIUS_KM * torch.atan2(near.clamp(min=0).sqrt(), far.clamp(min=0).sqrt())


def gradient_km(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """Gradient of the distance with respect to the first point: minus the direction of the way to the second.

    Args:
        a_deg: [..., 2] float32 or float64, (lat, lon) in degrees.
        b_deg: the same dtype, a shape that broadcasts with it.

    Returns:
        [..., 2] kilometres a degree of latitude and of longitude, never longer than pi / 180 R. Zero where no direction
        leads to the other point: between identical points, and at exact antipodes.
    """
    way = way_between(a_deg, b_deg)
    sin_a, cos_a = sine(a_deg[..., 0]), cosine(a_deg[..., 0])
    cos_b = cosine(b_deg[..., 0])
    sin_half, cos_half = sine(way.turn / 2), cosine(way.turn / 2)
    east = 2 * sin_half * cos_half * cos_b
    is_near = sine(way.difference / 2).square() + cos_a * cos_b * sin_half.square() <= 0.5
    # cos(phi1) sin(phi2) - sin(phi1) cos(phi2) cos(dlambda), without cancellation on the near and the far side.
    north = torch.where(
        is_near,
        sine(way.difference) + 2 * sin_a * cos_b * sin_half.square(),
        sine(way.sum) - 2 * sin_a * cos_b * cos_half.square(),
    )
    length = torch.hypot(north, east)
    length = torch.where(length == 0, torch.ones_like(length), length)
    # Divided first: kilometres by a length of 1e-38 would overflow.
    scale = -EARTH_RADIUS_KM * math.pi / 180
    return torch.stack([north / length * scale, torch.where(way.is_east, east, -east) / length * scale * cos_a], dim=-1)


def way_between(a_deg: Tensor, b_deg: Tensor) -> Way:
    """The differences that both are made of, each rounded once, and exact where the result is small.

    Args:
        a_deg: [..., 2] (lat, lon) in degrees, the longitude of any size.
        b_deg: a shape that broadcasts with it.
    """
    lat_a, lon_a = a_deg[..., 0], wrapped(a_deg[..., 1])
    lat_b, lon_b = b_deg[..., 0], wrapped(b_deg[..., 1])
    inside = (lon_b - lon_a).abs()
    east = (180 - lon_a) + (180 + lon_b)
    west = (180 + lon_a) + (180 - lon_b)
    across = torch.minimum(east, west)
    is_east = torch.where(inside <= across, lon_b >= lon_a, east <= west)
    return Way(lat_b - lat_a, lat_a + lat_b, torch.minimum(inside, across), is_east)


def wrapped(degrees: Tensor) -> Tensor:
    """The same direction within [-180, 180), exactly."""
    return degrees - 360 * torch.floor(degrees / 360 + 0.5)


def sine(degrees: Tensor) -> Tensor:
    """Sine of an angle in degrees."""
    return torch.sin(torch.deg2rad(degrees))


def cosine(degrees: Tensor) -> Tensor:
    """Cosine of an angle in degrees: the sine of what is left to 90, which keeps its digits near the poles."""
    return sine(90 - degrees.abs())
