"""A head at work: features in, places out.

Shape letters: B rows, D features, C cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from geoloc_batch.errors import ConfigError, HeadError
from geoloc_batch.geo.located import Located
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.geo.sphere import unit_vectors
from geoloc_batch.locate.head_file import Head, read_head
from geoloc_batch.locate.posterior import fold_layer_norm, head_topk, mean_and_spread

# Rows go through in blocks of this one shape. Matrix products of other shapes round differently, and a row's place must
# not depend on how many rows happened to come with it.
_BLOCK = 64


def load_head(
    path: str | Path,
    cells: str | Path | Partition,
    *,
    top_k: int = 5,
    position: Literal["top1", "mean"] = "top1",
    device: str | torch.device = "cpu",
    name: str = "head",
) -> HeadLocator:
    """Load a head and its cells, ready to locate features.

        head = load_head("best.pt", "geocell_info.json", top_k=5)
        located = head.locate(encoder.encode(pixels))
        located.position_deg[0], located.topk_cell[0], located.topk_prob[0]

    Args:
        path: best.pt as the published heads have it, a bare state dict, or .safetensors. Pickles are never executed.
        cells: geocell_info.json of the partition the head was trained on, or the partition itself. Its ids must be
            0 to C - 1: they index the head's rows.
        top_k: cells kept per photo; all of them if there are fewer.
        position: what `position_deg` is: the best cell's centroid, or the posterior's mean on the sphere.
        device: where the features are, as torch names it.
        name: what its results are called.

    Returns:
        The locator. `locate` takes raw features [B, D], as the encoder gives them, never normalised ones.

    Raises:
        HeadError: the head's file is wrong, or does not fit the cells.
        PartitionError: the file of cells is wrong.
        ConfigError: top_k or position cannot be.
    """
    partition = cells if isinstance(cells, Partition) else load_partition(cells)
    return HeadLocator(read_head(path), partition, top_k=top_k, position=position, name=name).to(device)


class HeadLocator:
    """One head over one partition. Made by `load_head`, or by the factory for a run.

    Raises:
        HeadError: head and partition do not fit together.
        ConfigError: top_k or position cannot be.
    """

    def __init__(
        self,
        head: Head,
        partition: Partition,
        *,
        top_k: int = 5,
        position: Literal["top1", "mean"] = "top1",
        name: str = "head",
    ) -> None:
        if top_k < 1:
            raise ConfigError(f"--top-k must be at least 1, got {top_k}")
        if position not in ("top1", "mean"):
            raise ConfigError(f"--position must be top1 or mean, got {position!r}")
        _check_fit(head, partition)
        self.name = name
        self.dim = head.dim
        self.tap = head.tap
        self.head = head
        self.partition = partition
        self.top_k = min(top_k, head.num_cells)
        self.position = position
        self._weight_CD, self._bias_C = fold_layer_norm(head.norm_weight, head.norm_bias, head.weight, head.bias)
        self._xyz_C3 = torch.from_numpy(unit_vectors(partition.centroids_deg))

    @property
    def identity(self) -> dict[str, str | int]:
        """Hashes and sizes that its answers depend on. top_k and position are the run's own settings."""
        return {
            "head_sha256": self.head.sha256,
            "cells_sha256": self.partition.fingerprint,
            "num_cells": self.head.num_cells,
            "dim": self.dim,
            "tap": self.tap,
        }

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._weight_CD.device

    def to(self, device: str | torch.device) -> Self:
        """Move the weights to `device`; returns itself."""
        self._weight_CD = self._weight_CD.to(device)
        self._bias_C = self._bias_C.to(device)
        self._xyz_C3 = self._xyz_C3.to(device)
        return self

    def locate(self, features_BD: Tensor) -> Located:
        """Places of B photos.

        Args:
            features_BD: [B, D] raw features, any float type and device, B >= 0.

        Returns:
            B rows on the CPU. A row's values depend on nothing but that row.

        Raises:
            ValueError: the shape is not [B, D], or a value is NaN or infinite (the first such row is named).
        """
        if features_BD.ndim != 2 or features_BD.shape[1] != self.dim:
            raise ValueError(f"{self.name} takes features of shape [B, {self.dim}], got {list(features_BD.shape)}")
        if len(features_BD) == 0:
            return self._nowhere()
        with torch.inference_mode():
            features = features_BD.to(device=self.device, dtype=torch.float32)
            finite_B = features.isfinite().all(dim=1)
            if not finite_B.all():
                raise ValueError(f"row {int(finite_B.int().argmin())} of the features holds NaN or infinite values")
            return Located.concatenate(
                [self._locate_block(features[start : start + _BLOCK]) for start in range(0, len(features), _BLOCK)]
            )

    def _locate_block(self, features_BD: Tensor) -> Located:
        num_rows = len(features_BD)
        if num_rows < _BLOCK:
            features_BD = torch.cat([features_BD, features_BD.new_zeros(_BLOCK - num_rows, self.dim)])
        posterior = head_topk(features_BD, self._weight_CD, self._bias_C, self._xyz_C3, self.top_k)
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


def _check_fit(head: Head, partition: Partition) -> None:
    if head.num_cells != len(partition):
        raise HeadError(
            f"{head.path} chooses among {head.num_cells} cells, {partition.source} has {len(partition)}; "
            "give the geocell_info.json the head was trained with (--cells)"
        )
    # Ids ascend without repeats, so the last one tells whether any is left out.
    if partition.ids[-1] != head.num_cells - 1:
        raise HeadError(
            f"{partition.source}: ids must be 0 to {head.num_cells - 1} to index the rows of {head.path}, "
            f"found the id {partition.ids[-1]}; renumber the cells in the order the head was trained with"
        )
    if head.partition_fingerprint not in (None, partition.fingerprint):
        raise HeadError(
            f"{head.path} was trained on other cells than {partition.source}, though as many "
            f"(fingerprint {str(head.partition_fingerprint)[:12]}, not {partition.fingerprint[:12]}); "
            "give its own geocell_info.json (--cells)"
        )
