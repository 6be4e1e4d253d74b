"""`nearest` on CUDA: each program has some points that lie close together, and looks only where their nearest can be.

Points and centroids are put in the order of their places. Every tile of centroids has a ball around it. A program
takes the tile whose ball is nearest to its own first, then every tile whose ball reaches into the distance of the
worst of what it has. The balls are bounds by the triangle inequality, so what is left out cannot be among the nearest:
the answer is exact, and that of a point does not depend on the others.

Needs Triton: import this file inside functions.
Shape letters: Q points of a program, T centroids of a tile, S tiles looked at together, K kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from geoloc_kernels.nearest import FAR_AWAY, MAX_SQUARE, place_keys
from geoloc_kernels.triton_great_circle import on_device_of

_EMPTY = tl.constexpr(MAX_SQUARE)
_NO_ID = tl.constexpr(2**31 - 1)
# Chords of tiles that are done; bounds may be off by rounding.
_DONE = tl.constexpr(1e300)
_SLACK = tl.constexpr(1e-12)


@triton.jit
def _chord(x, y, z, other_x, other_y, other_z):
    return tl.sqrt(_squared(x, y, z, other_x, other_y, other_z))


@triton.jit
def _squared(x, y, z, other_x, other_y, other_z):
    return (x - other_x) * (x - other_x) + (y - other_y) * (y - other_y) + (z - other_z) * (z - other_z)


@triton.jit
def _bounds(first_tile, x, y, z, radius, ball_ptr, num_tiles, S: tl.constexpr):
    """Least chords between a ball and those of S tiles."""
    tile_S = first_tile + tl.arange(0, S)
    is_tile_S = tile_S < num_tiles
    other_x = tl.load(ball_ptr + tile_S, is_tile_S, other=0.0)
    other_y = tl.load(ball_ptr + num_tiles + tile_S, is_tile_S, other=0.0)
    other_z = tl.load(ball_ptr + 2 * num_tiles + tile_S, is_tile_S, other=0.0)
    reach_S = tl.load(ball_ptr + 3 * num_tiles + tile_S, is_tile_S, other=0.0)
    bound_S = _chord(x, y, z, other_x, other_y, other_z) - radius - reach_S - _SLACK
    return tl.where(is_tile_S, bound_S, _DONE)


@triton.jit
def _add_tile(square_QK, id_QK, tile, x_Q, y_Q, z_Q, centroid_ptr, id_ptr, size, T: tl.constexpr, K: tl.constexpr):
    """The K best with a tile's centroids among them: taken out one by one while any is better than a row's worst."""
    place_T = tile * T + tl.arange(0, T)
    other_x = tl.load(centroid_ptr + place_T)[None, :]
    other_y = tl.load(centroid_ptr + size + place_T)[None, :]
    other_z = tl.load(centroid_ptr + 2 * size + place_T)[None, :]
    id_T = tl.load(id_ptr + place_T)[None, :]
    square_QT = _squared(x_Q[:, None], y_Q[:, None], z_Q[:, None], other_x, other_y, other_z)
    slot_K = tl.arange(0, K)[None, :]
    is_any_better = True
    while is_any_better:
        least_Q = tl.min(square_QT, axis=1)
        is_least_QT = square_QT == least_Q[:, None]
        least_id_Q = tl.min(tl.where(is_least_QT, id_T, _NO_ID), axis=1)
        worst_Q = tl.max(square_QK, axis=1)
        is_worst_QK = square_QK == worst_Q[:, None]
        worst_id_Q = tl.max(tl.where(is_worst_QK, id_QK, -1), axis=1)
        is_better_Q = (least_Q < worst_Q) | ((least_Q == worst_Q) & (least_id_Q < worst_id_Q))
        # Of slots that are all empty only the first is filled.
        worst_slot_Q = tl.min(tl.where(is_worst_QK & (id_QK == worst_id_Q[:, None]), slot_K, K), axis=1)
        is_filled_QK = is_better_Q[:, None] & (slot_K == worst_slot_Q[:, None])
        square_QK = tl.where(is_filled_QK, least_Q[:, None], square_QK)
        id_QK = tl.where(is_filled_QK, least_id_Q[:, None], id_QK)
        square_QT = tl.where(is_least_QT & (id_T == least_id_Q[:, None]), _DONE, square_QT)
        is_any_better = tl.max(is_better_Q.to(tl.int32), axis=0) > 0
    return square_QK, id_QK


@triton.jit
def nearest_kernel(
    point_ptr, order_ptr, centroid_ptr, id_ptr, ball_ptr, out_ptr, num_points, num_tiles,
    k: tl.constexpr, K: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Ids [num_points, k] of the nearest, at the points' original rows, nearest first."""
    row_Q = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    is_row_Q = row_Q < num_points
    # Rows past the end repeat the last point: the ball stays small.
    from_Q = tl.minimum(row_Q, num_points - 1)
    x_Q = tl.load(point_ptr + from_Q)
    y_Q = tl.load(point_ptr + num_points + from_Q)
    z_Q = tl.load(point_ptr + 2 * num_points + from_Q)
    x, y, z = tl.sum(x_Q, axis=0) / Q, tl.sum(y_Q, axis=0) / Q, tl.sum(z_Q, axis=0) / Q
    radius = tl.sqrt(tl.max(_squared(x_Q, y_Q, z_Q, x, y, z), axis=0))

    first, least = 0, tl.full((), _DONE, tl.float64)
    for start in range(0, num_tiles, S):
        bound_S = _bounds(start, x, y, z, radius, ball_ptr, num_tiles, S)
        bound = tl.min(bound_S, axis=0)
        first = tl.where(bound < least, start + tl.argmin(bound_S, axis=0), first)
        least = tl.minimum(least, bound)

    square_QK = tl.full([Q, K], _EMPTY, tl.float64)
    id_QK = tl.full([Q, K], _NO_ID, tl.int32)
    size = num_tiles * T
    square_QK, id_QK = _add_tile(square_QK, id_QK, first, x_Q, y_Q, z_Q, centroid_ptr, id_ptr, size, T, K)
    for start in range(0, num_tiles, S):
        bound_S = _bounds(start, x, y, z, radius, ball_ptr, num_tiles, S)
        bound_S = tl.where(start + tl.arange(0, S) == first, _DONE, bound_S)
        while tl.min(bound_S, axis=0) <= tl.sqrt(tl.max(tl.max(square_QK, axis=1), axis=0)):
            offset = tl.argmin(bound_S, axis=0)
            square_QK, id_QK = _add_tile(
                square_QK, id_QK, start + offset, x_Q, y_Q, z_Q, centroid_ptr, id_ptr, size, T, K
            )
            bound_S = tl.where(tl.arange(0, S) == offset, _DONE, bound_S)

    out_Q = tl.load(order_ptr + from_Q) * k
    for rank in tl.static_range(k):
        least_Q = tl.min(square_QK, axis=1)
        is_least_QK = square_QK == least_Q[:, None]
        least_id_Q = tl.min(tl.where(is_least_QK, id_QK, _NO_ID), axis=1)
        tl.store(out_ptr + out_Q + rank, tl.where(least_id_Q == _NO_ID, -1, least_id_Q).to(tl.int64), is_row_Q)
        square_QK = tl.where(is_least_QK & (id_QK == least_id_Q[:, None]), _DONE, square_QK)


def launch_nearest(point_N3: Tensor, centroid_C3: Tensor, k: int) -> Tensor:
    """Ids of the nearest, nearest first, the lowest id first among equals.

    Bytes: those of the tiles that are looked at, some five of a program's Q points where both are dense; at most all
    C centroids for each program. The chords of a tile are 8 Q T operations in float64.

    Args:
        point_N3: [N, 3] float64, finite.
        centroid_C3: [C, 3] float64, C < 2^31; those that are nowhere stand far away.
        k: how many, 1 to 32.

    Returns:
        [N, min(k, C)] int64, -1 where only centroids that are far away are left.
    """
    k = min(k, len(centroid_C3))
    id_NK = torch.empty(len(point_N3), k, dtype=torch.int64, device=point_N3.device)
    if len(point_N3):
        order_N = place_keys(point_N3).argsort()
        centroid_3C, id_C, ball_4T = _tiles(centroid_C3, 64)
        slots = triton.next_power_of_2(k)
        with on_device_of(point_N3):
            nearest_kernel[(triton.cdiv(len(point_N3), 16),)](
                point_N3[order_N].T.contiguous(), order_N, centroid_3C, id_C, ball_4T, id_NK,
                len(point_N3), ball_4T.shape[1], k, slots, 16, 64, 256, num_warps=warps_for(slots),
                enable_fp_fusion=True,
            )  # fmt: skip
    return id_NK


def warps_for(slots: int) -> int:
    """Warps of a program that keeps so many: of two, four warps spill on Ampere."""
    return 8 if slots == 2 else 4


def _tiles(centroid_C3: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids in tiles: coordinates [3, tiles * size], ids [tiles * size], and balls [4, tiles]: x, y, z, radius."""
    num_tiles = triton.cdiv(len(centroid_C3), size)
    order_C = place_keys(centroid_C3).argsort()
    tile_TS3 = centroid_C3.new_full((num_tiles * size, 3), FAR_AWAY)
    tile_TS3[: len(order_C)] = centroid_C3[order_C]
    id_C = torch.full((num_tiles * size,), _NO_ID.value, dtype=torch.int32, device=centroid_C3.device)
    id_C[: len(order_C)] = order_C.int()
    tile_TS3 = tile_TS3.view(num_tiles, size, 3)
    # Those that are nowhere belong into no ball.
    is_here_TS1 = (tile_TS3 < FAR_AWAY).all(dim=2, keepdim=True)
    count_T1 = is_here_TS1.sum(dim=1)
    middle_T3 = torch.where(is_here_TS1, tile_TS3, 0).sum(dim=1) / count_T1.clamp(min=1)
    chord_TS = (tile_TS3 - middle_T3[:, None]).square().sum(dim=2).sqrt()
    radius_T = torch.where(is_here_TS1[..., 0], chord_TS, 0).amax(dim=1)
    middle_T3 = torch.where(count_T1 > 0, middle_T3, FAR_AWAY)
    ball_4T = torch.cat([middle_T3.T, radius_T[None]]).contiguous()
    return tile_TS3.view(-1, 3).T.contiguous(), id_C, ball_4T
