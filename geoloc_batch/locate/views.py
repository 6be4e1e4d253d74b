"""Views: several photos of one location, fused to one place, and how far they agree.

Shape letters: V views, sorted by location, L locations, B rows, D features, C cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoloc_batch.geo.located import Located, Views
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.locate.places import CellPlaces

Fusion: TypeAlias = Literal["feature", "logit"]
Int64s: TypeAlias = NDArray[np.int64]

# Logits of so many views are held at once.
_VIEWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedViews:
    """Places of L locations."""

    located: Located
    """[L] places of the locations."""
    views: Views
    """[L] what they were made from."""
    is_sound_V: NDArray[np.bool_]
    """[V] whether the view alone has finite probabilities; one that has not spoils its location."""


class CellScorer(Protocol):
    """One head, or several that are asked together."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    @property
    def places(self) -> CellPlaces:
        """Of its cells."""
        ...

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """How each head's views are fused."""
        ...

    def located(self, features_BD: Tensor) -> Located:
        """Places of finite float32 rows on its device."""
        ...

    def logits(self, features_BD: Tensor) -> tuple[Tensor, ...]:
        """For each head [B, its cells]."""
        ...

    def joined(self, logits: Sequence[Tensor]) -> Tensor:
        """[B, C] logits over its own cells, from those of each head."""
        ...


def checked(features_BD: Tensor, scorer: CellScorer) -> Tensor:
    """Features as float32 on the scorer's device.

    Raises:
        ValueError: the shape is not [B, D], or a value is NaN or infinite (the first such row is named).
    """
    if features_BD.ndim != 2 or features_BD.shape[1] != scorer.dim:
        raise ValueError(f"{scorer.name} takes features of shape [B, {scorer.dim}], got {list(features_BD.shape)}")
    features = features_BD.to(device=scorer.device, dtype=torch.float32)
    finite_B = features.isfinite().all(dim=1)
    if not finite_B.all():
        raise ValueError(f"row {int(finite_B.int().argmin())} of the features holds NaN or infinite values")
    return features


def locate_views(scorer: CellScorer, features_VD: Tensor, offset_L1: Int64s) -> LocatedViews:
    """Fuse the views of each location, and locate it.

    `feature`: the mean of the raw features goes through the head, as in the published heads' quick start. `logit`: the
    head sees each view, and the means of the logits are taken. Means are made in float64: what a location gets depends
    on its views alone, and for a single view it is what that view gets.

    Args:
        scorer: the head or heads.
        features_VD: [V, D] raw (not normalised), finite features, any float type and device.
        offset_L1: the views of location i are offset[i] to offset[i + 1]; none is empty.

    Raises:
        ValueError: the features' shape is not [V, D], or a value is NaN or infinite.
    """
    assert offset_L1[0] == 0
    assert offset_L1[-1] == len(features_VD)
    features = checked(features_VD, scorer)
    places: list[Located] = []
    alone_deg: list[NDArray[np.float64]] = [np.empty((0, 2))]
    is_sound: list[NDArray[np.bool_]] = [np.empty(0, dtype=np.bool_)]
    with torch.inference_mode():
        for first, last in _chunks(offset_L1):
            offset = offset_L1[first : last + 1] - offset_L1[first]
            part_VD = features[int(offset_L1[first]) : int(offset_L1[last])]
            fused, alone = _located(scorer, part_VD, offset)
            places.append(fused)
            alone_deg += [each.position_deg for each in alone]
            is_sound += [np.asarray(np.isfinite(each.topk_prob).all(axis=1)) for each in alone]
    return LocatedViews(
        located=Located.concatenate(places) if places else scorer.places.of(features),
        views=Views(
            num_views=np.diff(offset_L1).astype(np.int32),
            view_km=mean_pairwise_km(np.concatenate(alone_deg), offset_L1).astype(np.float32),
        ),
        is_sound_V=np.concatenate(is_sound),
    )


def _located(scorer: CellScorer, features_VD: Tensor, offset_L1: Int64s) -> tuple[Located, list[Located]]:
    """Places of some locations, and of their views alone, in parts."""
    if "logit" not in scorer.fusions:
        # Nobody needs the logits of all cells, so that they are never in memory.
        return scorer.located(_feature_means(features_VD, offset_L1)), [scorer.located(features_VD)]
    fused, alone = _said(scorer, features_VD, offset_L1)
    return scorer.places.of(scorer.joined(fused)), alone


def _said(scorer: CellScorer, features_VD: Tensor, offset_L1: Int64s) -> tuple[list[Tensor], list[Located]]:
    """For each head the logits [L, its cells] of the locations, and the places of their views alone, in parts.

    The views are those of several locations, at most _VIEWS_AT_ONCE, or of a single one.
    """
    by_feature: Sequence[Tensor] = ()
    if "feature" in scorer.fusions:
        by_feature = scorer.logits(_feature_means(features_VD, offset_L1))
    sums: dict[int, NDArray[np.float64]] = {}
    alone: list[Located] = []
    for part_VD in torch.split(features_VD, _VIEWS_AT_ONCE):
        logits = scorer.logits(part_VD)
        alone.append(scorer.places.of(scorer.joined(logits)))
        # The last part of a large location is shorter than the location.
        offset = np.minimum(offset_L1, len(part_VD))
        for head, fusion in enumerate(scorer.fusions):
            if fusion == "logit":
                sums[head] = sums.get(head, 0.0) + _sums(logits[head], offset)
    means = {head: torch.from_numpy(sum_LC / np.diff(offset_L1)[:, None]) for head, sum_LC in sums.items()}
    return [
        means[head].to(device=features_VD.device, dtype=torch.float32) if head in means else by_feature[head]
        for head in range(len(scorer.fusions))
    ], alone


def _feature_means(features_VD: Tensor, offset_L1: Int64s) -> Tensor:
    """[L, D] float32 means over the views of each location."""
    mean_LD = torch.from_numpy(_sums(features_VD, offset_L1) / np.diff(offset_L1)[:, None])
    return mean_LD.to(device=features_VD.device, dtype=torch.float32)


def _sums(value_VX: Tensor, offset_L1: Int64s) -> NDArray[np.float64]:
    """[L, X] sums over the views of each location."""
    # On the host, whose sums have one order; a CUDA device's sums by index have none.
    return np.asarray(np.add.reduceat(value_VX.double().cpu().numpy(), offset_L1[:-1], axis=0))


def _chunks(offset_L1: Int64s) -> Iterator[tuple[int, int]]:
    """Ranges of locations that hold at most _VIEWS_AT_ONCE views, or are a single location."""
    first, num_locations = 0, len(offset_L1) - 1
    while first < num_locations:
        last = int(np.searchsorted(offset_L1, offset_L1[first] + _VIEWS_AT_ONCE, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def mean_pairwise_km(point_deg_V2: NDArray[np.float64], offset_L1: Int64s) -> NDArray[np.float64]:
    """How far the points of each group lie apart: the mean great-circle distance of its pairs.

    Args:
        point_deg_V2: [V, 2] (lat, lon) in degrees.
        offset_L1: the points of group i are offset[i] to offset[i + 1].

    Returns:
        [L] kilometres, 0 for a group of one.
    """
    count_L = np.diff(offset_L1)
    km_L = np.zeros(len(count_L))
    for count in np.unique(count_L[count_L > 1]).tolist():
        groups = np.flatnonzero(count_L == count)
        points = point_deg_V2[offset_L1[groups, None] + np.arange(count)]
        for view in range(count - 1):
            km_L[groups] += haversine_km(points[:, view, None], points[:, view + 1 :]).sum(axis=1)
        km_L[groups] /= count * (count - 1) / 2
    return km_L
