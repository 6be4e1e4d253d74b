"""Several heads with different partitions, asked together: one posterior on the finest of them.

Shape letters: B rows, C cells of the finest partition, H cells of another one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoloc_batch.errors import HeadError
from geoloc_batch.geo.located import Located
from geoloc_batch.geo.partition import Partition
from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.locate.places import CellPlaces, blocks
from geoloc_batch.locate.views import Fusion, Int64s, LocatedViews, checked, locate_views

log = logging.getLogger("geoloc_batch")

# Parents that a partition names are the cells of a given one where more than this share of its centroids lie in them.
_MIN_AGREEMENT = 0.5


class CombinedLocator:
    """The product of several heads' posteriors on the finest partition.

        log p(cell) = sum over heads of log p_head(the cell's parent in that head's partition) + constant

    Args:
        heads: two or more, of the same features, on one device. The finest partition is the one with the most cells,
            the first among equals.
        top_k: cells kept per row.
        position: what `position_deg` is: the best cell's centroid, or the posterior's mean on the sphere.
        name: what its results are called.

    Raises:
        HeadError: there are fewer than two heads, one stands twice, or they take different features.
        ConfigError: top_k or position cannot be.
    """

    def __init__(
        self,
        heads: Sequence[HeadLocator],
        *,
        top_k: int = 5,
        position: Literal["top1", "mean"] = "top1",
        name: str = "combined",
    ) -> None:
        _check_heads(heads)
        self.name = name
        self.heads = tuple(heads)
        self.dim, self.tap = heads[0].dim, heads[0].tap
        self.partition = max((head.partition for head in heads), key=len)
        self.places = CellPlaces(self.partition, top_k=top_k, position=position).to(heads[0].device)
        self.top_k, self.position = self.places.top_k, self.places.position
        self.fusions: tuple[Fusion, ...] = tuple(fusion for head in heads for fusion in head.fusions)
        parents = [parent_rows(self.partition, head.partition) for head in heads]
        self._parents_sha256 = hashlib.sha256(b"".join(rows.astype("<i8").tobytes() for rows in parents)).hexdigest()
        self._parents = [torch.from_numpy(rows).to(heads[0].device) for rows in parents]

    @property
    def identity(self) -> dict[str, Any]:
        """Of all heads, and of how their cells lie in one another."""
        return {"combined": [head.identity for head in self.heads], "parents_sha256": self._parents_sha256}

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.heads[0].device

    def to(self, device: str | torch.device) -> Self:
        """Move the weights to `device`; returns itself."""
        for head in self.heads:
            head.to(device)
        self.places.to(device)
        self._parents = [rows.to(device) for rows in self._parents]
        return self

    def locate(self, features_BD: Tensor) -> Located:
        """Places of B >= 0 photos by all heads together; see `Locator.locate`."""
        with torch.inference_mode():
            return self.located(checked(features_BD, self))

    def located(self, features_BD: Tensor) -> Located:
        """Places of finite float32 rows on its device."""
        return self.places.collect(
            (self.places.topk(self.joined(self.logits(block))), count) for block, count in blocks(features_BD)
        )

    def locate_views(self, features_VD: Tensor, offset_L1: Int64s) -> LocatedViews:
        """Places of locations that several photos show, each head's views fused first; see `Locator.locate_views`."""
        return locate_views(self, features_VD, offset_L1)

    def logits(self, features_BD: Tensor) -> tuple[Tensor, ...]:
        """For each head [B, H] what it says of its own cells, of float32 rows on its device."""
        return tuple(logit_BH for head in self.heads for logit_BH in head.logits(features_BD))

    def joined(self, logits: Sequence[Tensor]) -> Tensor:
        """[B, C] sums of the heads' log-probabilities of each cell's parents."""
        total_BC = torch.zeros(())
        for logit_BH, rows_C in zip(logits, self._parents, strict=True):
            # In float64: sums of large logarithms would cost the probabilities digits, others by each order of heads.
            total_BC = logit_BH.double().log_softmax(dim=-1)[:, rows_C] + total_BC.to(logit_BH.device)
        return (total_BC - total_BC.amax(dim=-1, keepdim=True)).float()


def parent_rows(fine: Partition, coarse: Partition) -> NDArray[np.int64]:
    """The cell of a coarser partition that each cell is part of.

    Those that `fine` names as its parents, where they are cells of `coarse`; else the cell that holds the centroid,
    or, where `coarse` has no shape that does, the one with the nearest centroid.

    Args:
        fine: C cells.
        coarse: H cells.

    Returns:
        [C] rows of `coarse`; each cell's own where both are the same partition.
    """
    if fine == coarse:
        return np.arange(len(fine))
    found = coarse.assign(*fine.centroids_deg.T)
    if fine.parents is not None and np.isin(fine.parents, coarse.ids).all():
        share = float((fine.parents == found).mean())
        if share > _MIN_AGREEMENT:
            found = fine.parents
            log.info("the parents that %s names are cells of %s: taken as given", fine.source, coarse.source)
        else:
            log.warning(
                "%s names parents with the ids of %s, but only %.0f %% of its cells lie in them: the cells that hold "
                "its centroids are taken",
                fine.source,
                coarse.source,
                100 * share,
            )
    return np.searchsorted(coarse.ids, found)


def _check_heads(heads: Sequence[HeadLocator]) -> None:
    if len(heads) < 2:
        raise HeadError(f"several heads can be combined, {len(heads)} was given; repeat --head")
    for number, head in enumerate(heads):
        twin = next((other for other in heads[:number] if other.head.sha256 == head.head.sha256), None)
        if twin is not None:
            raise HeadError(f"{head.head.path} and {twin.head.path} are the same head; give each once to --combine")
        if (head.dim, head.tap) != (heads[0].dim, heads[0].tap):
            raise HeadError(
                f"{head.head.path} takes {head.dim} {head.tap} features and {heads[0].head.path} {heads[0].dim} "
                f"{heads[0].tap} ones: only heads of the same features can be combined"
            )
