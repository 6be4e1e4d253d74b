"""CellPlaces: from what is said of each cell to places on the map.

Shape letters: B rows, C cells, K kept, ... any shape of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.located import Located
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.sphere import unit_vectors
from geoloc_batch.locate.posterior import mean_and_spread, posterior_of

# Rows go through in blocks of this one shape. Matrix products of other shapes round differently, and a row's place must
# not depend on how many rows happened to come with it.
BLOCK = 64


def blocks(rows: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows [B, ...] as [BLOCK, ...] tensors, each with the number of rows that count; zeros fill the last one."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        count = len(block)
        if count < BLOCK:
            block = torch.cat([block, block.new_zeros(BLOCK - count, *rows.shape[1:])])
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
        self._xyz_C3 = torch.from_numpy(unit_vectors(partition.centroids_deg))

    def to(self, device: str | torch.device) -> Self:
        """Move the cells to `device`; returns itself."""
        self._xyz_C3 = self._xyz_C3.to(device)
        return self

    def of(self, logit_BC: Tensor) -> Located:
        """Places of B >= 0 rows of logits, or of logarithms of probabilities, on the CPU; each depends on its row."""
        if len(logit_BC) == 0:
            return self._nowhere()
        return Located.concatenate([self.of_block(block, count) for block, count in blocks(logit_BC)])

    def of_block(self, logit_BC: Tensor, num_rows: int) -> Located:
        """Places of the first `num_rows` of one block [BLOCK, C]."""
        posterior = posterior_of(logit_BC, self._xyz_C3, self.top_k)
        cell_BK, prob_BK, mean_B3, entropy_B = (part[:num_rows].cpu().numpy() for part in posterior)
        top1_deg_B2 = self.partition.centroids_deg[cell_BK[:, 0]]
        mean_deg_B2, spread_km_B = mean_and_spread(mean_B3, top1_deg_B2)
        return Located(
            position_deg=top1_deg_B2 if self.position == "top1" else mean_deg_B2,
            topk_cell=cell_BK.astype(np.int32),
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
