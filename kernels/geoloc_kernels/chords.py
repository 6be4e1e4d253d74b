"""All pairs on the CPU from unit vectors: trigonometry once a point, then one arc cosine or sine a pair.

    distance = R acos(u . v)
    h = |u - v|^2 / 4 = sin^2(angle / 2);  distance = 2 R asin(sqrt(h))

The first has two thirds of the second's steps and loses digits between close points and at the antipode: a block where
some pair is within 2.8 km of either goes by the second. Its differences of unit vectors are exact to 1e-16, and so is
the chord, down to identical points; only within some 13 km of the antipode does the arc sine lose digits, and those few
pairs are done again by the definition. Work is in float64 for either dtype: unit vectors in float32 are half a metre
apart. Which way a pair goes, and so its distance by some micrometres, depends on its neighbours.

Shape letters: N and M points.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

from geoloc_kernels.haversine import EARTH_RADIUS_KM, cosine, distance_km, sine, wrapped

# Elements of a block: two buffers of float64 that stay in a core's second-level cache. Below 2^15 PyTorch leaves an
# operation to the thread that calls it: each thread has rows of its own, and none waits for others after every step.
_BLOCK = (1 << 15) - 1
_BLOCK_COLUMNS = 4096

# Within this cosine a rounding error of 3e-16 in it is less than 5 micrometres of distance.
_PLAIN_COSINE = 1 - 1e-7
# Beyond this h a rounding error of 4e-16 in it would be more than a micrometre of distance.
_NEAR_ANTIPODE = 1 - 1e-6

_Axes: TypeAlias = tuple[Tensor, ...]
"""x, y and z of points."""


def unit_vectors(point_deg: Tensor) -> Tensor:
    """Points on the unit sphere.

    Args:
        point_deg: [..., 2] (lat, lon) in degrees.

    Returns:
        [..., 3] float64: x towards (0, 0), y towards (0, 90), z towards the north pole.
    """
    lat, lon = point_deg.double().unbind(-1)
    lon = wrapped(lon)
    cos_lat = cosine(wrapped(lat))
    # The cosine of a longitude beyond 90 is negative, and so it comes out: of what is left to 90.
    return torch.stack([cos_lat * cosine(lon), cos_lat * sine(lon), sine(lat)], dim=-1)


def pairwise_by_chords(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    """Distance of every point to every other one, in kilometres.

    Args:
        a_deg_N2: [N, 2] float32 or float64, (lat, lon) in degrees.
        b_deg_M2: [M, 2] of the same dtype.

    Returns:
        [N, M] of that dtype.
    """
    a_deg_N2, b_deg_M2 = a_deg_N2.detach(), b_deg_M2.detach()
    km_NM = a_deg_N2.new_empty(len(a_deg_N2), len(b_deg_M2))
    if km_NM.numel() == 0:
        return km_NM
    a_3N1 = unit_vectors(a_deg_N2).T.unsqueeze(-1)
    b_31M = unit_vectors(b_deg_M2).T.contiguous().unsqueeze(1)
    is_inference = torch.is_inference_mode_enabled()

    def fill(band: slice) -> None:
        with torch.inference_mode(is_inference):
            _fill_band(km_NM[band], a_3N1[:, band], b_31M, a_deg_N2[band], b_deg_M2)

    bands = _bands(*km_NM.shape)
    if len(bands) == 1:
        fill(bands[0])
    else:
        with ThreadPoolExecutor(len(bands)) as pool:
            list(pool.map(fill, bands))
    return km_NM


def _bands(num_rows: int, num_columns: int) -> list[slice]:
    """Rows cut among as many threads as PyTorch may use, fewer where there is little to do."""
    num_bands = min(torch.get_num_threads(), num_rows, max(1, num_rows * num_columns // (4 * _BLOCK)))
    ends = [num_rows * band // num_bands for band in range(num_bands + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _fill_band(km_RM: Tensor, a_3R1: Tensor, b_31M: Tensor, a_deg_R2: Tensor, b_deg_M2: Tensor) -> None:
    """Distances of some rows, block by block."""
    num_rows, num_columns = km_RM.shape
    columns = min(num_columns, _BLOCK_COLUMNS)
    rows = max(1, min(num_rows, _BLOCK // columns))
    buffers = torch.empty(2, rows * columns, dtype=torch.float64).unbind()
    for left in range(0, num_columns, columns):
        column = slice(left, left + columns)
        b = b_31M[..., column].unbind()
        for top in range(0, num_rows, rows):
            row = slice(top, top + rows)
            a = a_3R1[:, row].unbind()
            km = km_RM[row, column]
            work, step = (buffer[: km.numel()].view(km.shape) for buffer in buffers)
            if not _by_cosines(a, b, work, km):
                _by_chords(a, b, work, step, km, a_deg_R2[row], b_deg_M2[column])


def _by_cosines(a: _Axes, b: _Axes, dot: Tensor, km: Tensor) -> bool:
    """Distances from scalar products, unless some pair is too close or too far apart for them, or is no number."""
    torch.mul(a[0], b[0], out=dot)
    dot.addcmul_(a[1], b[1]).addcmul_(a[2], b[2])
    low, high = dot.aminmax()
    # NaN compares as false.
    if not (float(low) > -_PLAIN_COSINE and float(high) < _PLAIN_COSINE):
        return False
    torch.mul(dot.acos_(), EARTH_RADIUS_KM, out=km)
    return True


def _by_chords(a: _Axes, b: _Axes, h: Tensor, step: Tensor, km: Tensor, a_deg: Tensor, b_deg: Tensor) -> None:
    """Distances from differences of unit vectors."""
    torch.sub(a[0], b[0], out=step)
    torch.mul(step, step, out=h)
    for axis in (1, 2):
        torch.sub(a[axis], b[axis], out=step)
        h.addcmul_(step, step)
    h.mul_(0.25)
    # A maximum of NaN compares as false: such a block is looked through as well.
    is_plain = bool(h.max() <= _NEAR_ANTIPODE)
    far = None if is_plain else (h > _NEAR_ANTIPODE).nonzero(as_tuple=True)
    torch.mul(h.sqrt_().asin_(), 2 * EARTH_RADIUS_KM, out=km)
    if far is not None:
        row, column = far
        km[row, column] = distance_km(a_deg[row].double(), b_deg[column].double()).to(km.dtype)
