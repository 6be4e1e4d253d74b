"""The nearest of many centroids: ids by chord, and kilometres of those that are kept.

    id_NK, km_NK = nearest(photo_deg_N2, centroid_deg_C2, k=5)

A custom op that finds the ids; its definition takes every chord, block by block. On the CPU a k-d tree over the unit
vectors finds the same where scipy is installed, on CUDA a Triton kernel that leaves out what is too far away. All
chords are in float64, from differences of unit vectors: exact to a nanometre, so that float32 positions lose nothing.

Shape letters: N points, C centroids, K kept. Points are (lat, lon) in degrees, in that order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from geoloc_kernels.chords import unit_vectors
from geoloc_kernels.great_circle import check_points, great_circle_km

# Elements of a block of chords.
_BLOCK_CPU = 1 << 17
_BLOCK_CUDA = 1 << 24
_BLOCK_COLUMNS = 1 << 14

# The kernel keeps its best in registers.
_MAX_KERNEL_K = 32

_SPREAD = (
    (32, 0x1F00000000FFFF), (16, 0x1F0000FF0000FF), (8, 0x100F00F00F00F00F), (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)  # fmt: skip

FAR_AWAY = 1e9
"""Coordinate of a centroid that is nowhere: no other is farther."""
MAX_SQUARE = 5.0
"""Squared chords on the sphere end at 4."""


class Nearest(NamedTuple):
    """The nearest centroids of N points, nearest first; the lowest id first among equals."""

    id_NK: Tensor
    """int64; -1 where the point is NaN or infinite, or no centroid that is finite is left."""
    km_NK: Tensor
    """Of the points' dtype; NaN where the id is -1."""


def nearest(points_deg_N2: Tensor, centroids_deg_C2: Tensor, k: int = 1) -> Nearest:
    """The k nearest centroids of each point.

    On the CPU the tree of the last centroids is kept: asking again with the same ones builds none.

    Args:
        points_deg_N2: [N, 2] float32 or float64, (lat, lon) in degrees.
        centroids_deg_C2: [C, 2], C > 0, the same dtype and device.
        k: how many, at least 1; all C where there are fewer.

    Returns:
        ids and kilometres, [N, min(k, C)]; the kilometres have a gradient, the ids have none.

    Raises:
        ValueError: a shape is not [N, 2], dtypes or devices differ, there is no centroid, or k is below 1.
    """
    check_points("points_deg_N2", points_deg_N2, "centroids_deg_C2", centroids_deg_C2, dims=2)
    if len(centroids_deg_C2) == 0:
        raise ValueError("there is no centroid to be near to: centroids_deg_C2 is empty")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    id_NK = nearest_op(points_deg_N2, centroids_deg_C2, k)
    km_NK = great_circle_km(points_deg_N2[:, None], centroids_deg_C2[id_NK.clamp(min=0)])
    return Nearest(id_NK, km_NK.masked_fill(id_NK < 0, torch.nan))


@torch.library.custom_op("geoloc::nearest", mutates_args=())
def nearest_op(points_deg_N2: Tensor, centroids_deg_C2: Tensor, k: int) -> Tensor:
    """Ids [N, min(k, C)] int64 of `nearest`."""
    return nearest_definition(points_deg_N2, centroids_deg_C2, k)


def nearest_definition(points_deg_N2: Tensor, centroids_deg_C2: Tensor, k: int) -> Tensor:
    """Ids [N, min(k, C)] int64 of `nearest`, from every chord."""
    point_N3, is_lost_N = placed_points(points_deg_N2)
    centroid_C3 = placed_centroids(centroids_deg_C2)
    k = min(k, len(centroid_C3))
    id_NK = torch.empty(len(point_N3), k, dtype=torch.int64, device=point_N3.device)
    columns = min(len(centroid_C3), _BLOCK_COLUMNS)
    rows = (_BLOCK_CUDA if point_N3.is_cuda else _BLOCK_CPU) // columns
    for top in range(0, len(point_N3), rows):
        id_NK[top : top + rows] = _nearest_rows(point_N3[top : top + rows], centroid_C3, k, columns)
    return id_NK.masked_fill_(is_lost_N[:, None], -1)


@nearest_op.register_kernel("cpu")
def _nearest_cpu(points_deg_N2: Tensor, centroids_deg_C2: Tensor, k: int) -> Tensor:
    try:
        from geoloc_kernels.nearest_tree import nearest_by_tree
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in {"numpy", "scipy"}:
            raise
        return nearest_definition(points_deg_N2, centroids_deg_C2, k)
    point_N3, is_lost_N = placed_points(points_deg_N2)
    id_NK = nearest_by_tree(point_N3, centroids_deg_C2.detach(), k)
    return id_NK.masked_fill_(is_lost_N[:, None], -1)


@nearest_op.register_kernel("cuda")
def _nearest_cuda(points_deg_N2: Tensor, centroids_deg_C2: Tensor, k: int) -> Tensor:
    if min(k, len(centroids_deg_C2)) > _MAX_KERNEL_K:
        return nearest_definition(points_deg_N2, centroids_deg_C2, k)
    from geoloc_kernels.triton_nearest import launch_nearest

    point_N3, is_lost_N = placed_points(points_deg_N2)
    id_NK = launch_nearest(point_N3, placed_centroids(centroids_deg_C2), k)
    return id_NK.masked_fill_(is_lost_N[:, None], -1)


@nearest_op.register_fake
def _nearest_fake(points_deg_N2: Tensor, centroids_deg_C2: Tensor, k: int) -> Tensor:
    shape = (points_deg_N2.shape[0], min(k, centroids_deg_C2.shape[0]))
    return points_deg_N2.new_empty(shape, dtype=torch.int64)


def placed_points(point_deg_N2: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [N, 3] float64, and which points [N] are lost: not finite, and put anywhere."""
    vector_N3 = unit_vectors(point_deg_N2)
    is_lost_N = ~torch.isfinite(vector_N3).all(dim=1)
    anywhere_3 = torch.eye(1, 3, dtype=vector_N3.dtype, device=vector_N3.device)
    return torch.where(is_lost_N[:, None], anywhere_3, vector_N3), is_lost_N


def placed_centroids(point_deg_C2: Tensor) -> Tensor:
    """Unit vectors [C, 3] float64; those that are not finite are put far away from all others."""
    vector_C3 = unit_vectors(point_deg_C2)
    is_lost_C = ~torch.isfinite(vector_C3).all(dim=1)
    return torch.where(is_lost_C[:, None], FAR_AWAY, vector_C3)


def place_keys(vector_N3: Tensor) -> Tensor:
    """[N] int64 by which points that are close in space come close in order: the bits of x, y and z interleaved.

    Source: Morton, "A computer oriented geodetic data base", IBM (1966).
    """
    key_N3 = ((vector_N3 + 1) * 2**20).clamp(0, 2**21 - 1).long()
    # 21 bits each, spread in steps until two empty ones lie between neighbours.
    for shift, mask in _SPREAD:
        key_N3 = (key_N3 | (key_N3 << shift)) & mask
    return key_N3[:, 0] | (key_N3[:, 1] << 1) | (key_N3[:, 2] << 2)


def _nearest_rows(point_R3: Tensor, centroid_C3: Tensor, k: int, columns: int) -> Tensor:
    """Ids [R, k] for some rows, a block of centroids at a time; -1 where none is left."""
    square_RK = point_R3.new_empty(len(point_R3), 0)
    id_RK = torch.empty(len(point_R3), 0, dtype=torch.int64, device=point_R3.device)
    for left in range(0, len(centroid_C3), columns):
        part_C3 = centroid_C3[left : left + columns]
        square_RC = (point_R3[:, None, 0] - part_C3[None, :, 0]).square_()
        for axis in (1, 2):
            difference = point_R3[:, None, axis] - part_C3[None, :, axis]
            square_RC.addcmul_(difference, difference)
        id_C = torch.arange(left, left + len(part_C3), device=id_RK.device)
        square_RC = torch.cat([square_RK, square_RC], dim=1)
        # Those found so far come first, and have the lower ids: among equals the first is the lowest.
        column_RK = _smallest(square_RC, k)
        id_RK = torch.cat([id_RK, id_C.expand(len(point_R3), -1)], dim=1).gather(1, column_RK)
        square_RK = square_RC.gather(1, column_RK)
    return torch.where(square_RK < MAX_SQUARE, id_RK, -1)


def _smallest(value_RC: Tensor, k: int) -> Tensor:
    """Columns [R, min(k, C)] of the smallest values of each row, ascending, the first column first among equals."""
    num_columns = value_RC.shape[1]
    if k == 1:
        return value_RC.min(dim=1, keepdim=True).indices
    if num_columns <= 4 * k:
        return value_RC.argsort(dim=1, stable=True)[:, :k]
    # topk takes any of equals; one more than is kept shows where that matters.
    value_RK, column_RK = value_RC.topk(k + 1, dim=1, largest=False)
    row = (value_RK[:, k - 1] == value_RK[:, k]).nonzero().squeeze(1)
    column_RK = column_RK[:, :k].sort(dim=1).values
    column_RK = column_RK.gather(1, value_RC.gather(1, column_RK).argsort(dim=1, stable=True))
    if len(row):
        column_RK[row] = value_RC[row].argsort(dim=1, stable=True)[:, :k]
    return column_RK
