"""CellPlaces: from what is said of each cell to places on the map.

Shape letters: B rows, C cells, K kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.located import Located
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.sphere import unit_vectors
from geoloc_batch.locate.posterior import mean_and_spread, packed, unpacked
from geoloc_kernels.posterior import HeadTopk, posterior_topk

# Rows go through in blocks of one shape. Matrix products of other shapes round differently, and a row's place must not
# depend on how many rows happened to come with it.
BLOCK = 64
# On CUDA a run's usual batch.
CUDA_BLOCK = 256


def blocks(rows: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows [B, ...] as tensors of one shape, each with the number of rows that count; zeros fill the last one."""
    size = CUDA_BLOCK if rows.is_cuda else BLOCK
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        count = len(block)
        if count < size:
            block = torch.cat([block, block.new_zeros(size - count, *rows.shape[1:])])
        yield block, count


class CellPlaces:
    """The step from logits over a partition's cells to what is kept of them.

    Args:
        partition: its ids must be 0 to C - 1: they index the logits.
        top_k: cells kept per row; all of them if there are fewer.
        position: what `position_deg` is: the best cell's centroid, or the posterior's mean on the sphere.

    Raises:
        ConfigError: top_k or position cannot be.
    """

    def __init__(self, partition: Partition, *, top_k: int, position: Literal["top1", "mean"]) -> None:
        if top_k < 1:
            raise ConfigError(f"--top-k must be at least 1, got {top_k}")
        if position not in ("top1", "mean"):
            raise ConfigError(f"--position must be auto, top1 or mean, got {position!r}")
        self.partition = partition
        self.top_k = min(top_k, len(partition))
        self.position: Literal["top1", "mean"] = position
        self.xyz = torch.from_numpy(unit_vectors(partition.centroids_deg))
        """[C, 3] float64 unit vectors of the cells."""

    def to(self, device: str | torch.device) -> Self:
        """Move the cells to `device`; returns itself."""
        self.xyz = self.xyz.to(device)
        return self

    def of(self, logit_BC: Tensor) -> Located:
        """Places of B >= 0 rows of logits, or of logarithms of probabilities, on the CPU; each depends on its row."""
        return self.collect((self.topk(block), count) for block, count in blocks(logit_BC))

    def topk(self, logit_BC: Tensor) -> HeadTopk:
        """What is kept of one block of logits."""
        return posterior_topk(logit_BC, self.xyz, self.top_k)

    def collect(self, found: Iterable[tuple[HeadTopk, int]]) -> Located:
        """Places, on the CPU, of what is kept of blocks, each with the number of rows that count.

        A row whose logits are not all finite has NaN for everything, and the cell -1. The device is waited for once.
        """
        parts = [packed(topk)[:count] for topk, count in found]
        if not parts:
            return self._nowhere()
        cell_BK, prob_BK, mean_B3, entropy_B = unpacked(torch.cat(parts).cpu().numpy())
        best_B = cell_BK[:, 0]
        top1_deg_B2 = np.where((best_B >= 0)[:, None], self.partition.centroids_deg[best_B], np.nan)
        mean_deg_B2, spread_km_B = mean_and_spread(mean_B3, top1_deg_B2)
        return Located(
            position_deg=top1_deg_B2 if self.position == "top1" else mean_deg_B2,
            topk_cell=cell_BK,
            topk_prob=prob_BK,
            mean_deg=mean_deg_B2,
            spread_km=spread_km_B,
            entropy=entropy_B,
        )

    def _nowhere(self) -> Located:
        return Located(
            position_deg=np.empty((0, 2)),
            topk_cell=np.empty((0, self.top_k), np.int32),
            topk_prob=np.empty((0, self.top_k), np.float32),
            mean_deg=np.empty((0, 2)),
            spread_km=np.empty(0, np.float32),
            entropy=np.empty(0, np.float32),
        )
