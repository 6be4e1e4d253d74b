"""`nearest` on the CPU by scipy's k-d tree. Needs scipy: import this file inside functions.

Shape letters: N points, C centroids, K kept, M rows that are done again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from geoloc_kernels.nearest import MAX_SQUARE, place_keys, placed_centroids

_last: tuple[Tensor, Any] | None = None


def nearest_by_tree(point_N3: Tensor, centroid_deg_C2: Tensor, k: int) -> Tensor:
    """Ids of the nearest, nearest first, the lowest id first among equals.

    Args:
        point_N3: [N, 3] float64, finite.
        centroid_deg_C2: [C, 2] (lat, lon) in degrees.
        k: how many, at least 1.

    Returns:
        [N, min(k, C)] int64, -1 where no centroid that is finite is left.
    """
    tree = _tree_of(centroid_deg_C2)
    # Points in the order of their places: neighbours walk the same branches, and find them in the cache.
    order_N = place_keys(point_N3).argsort()
    id_NK = torch.empty(len(point_N3), min(k, len(centroid_deg_C2)), dtype=torch.int64)
    id_NK[order_N] = torch.from_numpy(_query(tree, point_N3[order_N].numpy(), k))
    return id_NK


def _tree_of(centroid_deg_C2: Tensor) -> Any:
    """The tree of these centroids: the last one where it has the same."""
    global _last
    last = _last
    if last is None or last[0].dtype != centroid_deg_C2.dtype or not torch.equal(last[0], centroid_deg_C2):
        tree = cKDTree(placed_centroids(centroid_deg_C2).numpy())
        last = _last = (centroid_deg_C2.clone(), tree)
    return last[1]


def _query(tree: Any, point_N3: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    k = min(k, tree.n)
    # The tree takes any of equals; one more than is kept shows where that matters.
    asked = min(k + 1, tree.n)
    distance, index = tree.query(point_N3, k=np.arange(1, asked + 1), workers=torch.get_num_threads())
    index = index.astype(np.int64, copy=False)
    is_tied_N = (distance[:, 1:] == distance[:, :-1]).any(axis=1)
    row_M = is_tied_N.nonzero()[0]
    if len(row_M):
        index[row_M] = np.take_along_axis(index[row_M], np.lexsort((index[row_M], distance[row_M]), axis=1), axis=1)
    id_NK = np.where(distance[:, :k] ** 2 < MAX_SQUARE, index[:, :k], -1)
    is_open_N = (distance[:, k - 1] == distance[:, -1]) & (id_NK[:, -1] >= 0)
    row_M = is_open_N.nonzero()[0]
    if asked > k and len(row_M):
        # More equals than were asked for: twice as many, for these rows alone.
        id_NK[row_M] = _query(tree, point_N3[row_M], min(2 * k, tree.n))[:, :k]
    return id_NK
