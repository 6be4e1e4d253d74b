"""A head at work: features in, places out.

Shape letters: B rows, D features, C cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from geoloc_batch.errors import HeadError
from geoloc_batch.geo.located import Located
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.head_file import Head, read_head
from geoloc_batch.locate.places import CellPlaces, blocks
from geoloc_batch.locate.requests import find_requests, local_cells, local_head
from geoloc_batch.locate.views import Fusion, Int64s, LocatedViews, checked, locate_views
from geoloc_batch.model.hub import fetch
from geoloc_kernels.fold import fold_layer_norm
from geoloc_kernels.head import prepare_head


def load_head(
    path: str | Path,
    cells: str | Path | Partition | None = None,
    *,
    top_k: int = 5,
    position: Literal["auto", "top1", "mean"] = "auto",
    device: str | torch.device = "cpu",
    name: str = "head",
) -> HeadLocator:
    """Load a head and its cells, ready to locate features.

        head = load_head("best.pt", "geocell_info.json", top_k=5)
        located = head.locate(encoder.encode(pixels))
        located.position_deg[0], located.topk_cell[0], located.topk_prob[0]

    Args:
        path: best.pt as the published heads have it, a bare state dict, or .safetensors; pickles are never executed. Or
            the short name of a published head, or hf:OWNER/REPO/PATH: what the cache lacks is downloaded.
        cells: geocell_info.json of the partition the head was trained on, or the partition itself. Its ids must be
            0 to C - 1: they index the head's rows. None takes the file beside the head, or the published head's own.
        top_k: cells kept per photo; all of them if there are fewer.
        position: what `position_deg` is: the best cell's centroid, or the posterior's mean on the sphere; auto takes
            the one that the head's file names, else the centroid.
        device: where the features are, as torch names it.
        name: what its results are called.

    Returns:
        The locator. `locate` takes raw features [B, D], as the encoder gives them, never normalised ones.

    Raises:
        HeadError: the head's file is wrong, or does not fit the cells.
        PartitionError: the file of cells is wrong.
        ConfigError: top_k or position cannot be, or the head has no cells.
        HubError: a file had to be downloaded and could not be.
    """
    named = "given" if isinstance(cells, Partition) else cells
    (request,) = find_requests(LocateConfig(head=(str(path),), cells=(str(named),) if named else ()))
    head = read_head(local_head(request, fetch))
    partition = cells if isinstance(cells, Partition) else load_partition(local_cells(request, fetch))
    return HeadLocator(head, partition, top_k=top_k, position=position, name=name).to(device)


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
        position: Literal["auto", "top1", "mean"] = "auto",
        name: str = "head",
        fusion: Fusion = "feature",
    ) -> None:
        if position == "auto":
            position = head.position or "top1"
        self.places = CellPlaces(partition, top_k=top_k, position=position)
        _check_fit(head, partition)
        self.name = name
        self.dim = head.dim
        self.tap = head.tap
        self.head = head
        self.partition = partition
        self.top_k = self.places.top_k
        self.position = self.places.position
        self.fusions: tuple[Fusion, ...] = (fusion,)
        self._folded = fold_layer_norm(head.norm_weight, head.norm_bias, head.weight, head.bias)
        self._prepared = prepare_head(*self._folded, self.places.xyz)

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
        return self._prepared.bias_C.device

    def to(self, device: str | torch.device) -> Self:
        """Move the weights to `device`; returns itself."""
        weight_CD, bias_C = self._folded
        self.places.to(device)
        self._prepared = prepare_head(weight_CD.to(device), bias_C.to(device), self.places.xyz)
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
        with torch.inference_mode():
            return self.located(checked(features_BD, self))

    def located(self, features_BD: Tensor) -> Located:
        """Places of finite float32 rows on its device."""
        return self.places.collect(
            (self._prepared.topk(block, self.top_k), count) for block, count in blocks(features_BD)
        )

    def locate_views(self, features_VD: Tensor, offset_L1: Int64s) -> LocatedViews:
        """Places of locations that several photos show; see `Locator.locate_views`."""
        return locate_views(self, features_VD, offset_L1)

    def logits(self, features_BD: Tensor) -> tuple[Tensor]:
        """[B, C] what it says of each cell before the soft-max, of float32 rows on its device."""
        parts = [self._prepared.logits(block, k=self.top_k)[:count] for block, count in blocks(features_BD)]
        return (torch.cat(parts) if parts else features_BD.new_empty(0, self.head.num_cells),)

    def joined(self, logits: Sequence[Tensor]) -> Tensor:
        """Its own logits as they are: there is nobody to join."""
        return logits[0]


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
