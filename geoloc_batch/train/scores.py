"""Scores: how good a head is on places, with both positions: the best cell's centroid and the posterior mean.

Shape letters: N places, C cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoloc_batch.errors import GeolocError
from geoloc_batch.geo.metrics import BALSCORE_BANDS_KM, Metrics, balscore, distances_km, summarise
from geoloc_batch.locate.posterior import mean_and_spread
from geoloc_batch.train.config import Position
from geoloc_batch.train.features import Features
from geoloc_batch.train.group import ALONE, Group
from geoloc_batch.train.network import Network

_ROWS = 2048
POSITIONS: tuple[Position, ...] = ("top1", "mean")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The metrics of one set of places."""

    top1: Metrics
    """Positions are centroids of the best cells."""
    mean: Metrics
    """Positions are posterior means."""

    def of(self, position: Position) -> Metrics:
        """Those of one of the two."""
        return self.top1 if position == "top1" else self.mean

    @property
    def better(self) -> Position:
        """The position that `rank` puts higher; top1 of equals."""
        return max(POSITIONS, key=lambda position: rank(self.of(position)))

    def by_name(self) -> dict[str, Any]:
        """{"top1": {name: value}, "mean": ...}."""
        return {position: self.of(position).by_name() for position in POSITIONS}


def rank(metrics: Metrics) -> tuple[float, float]:
    """The greater the better: the balscore, then the median.

    Half a place is added to each band: of few places one that happens to lie within 25 km would else outweigh all that
    the other bands say. Of thousands it changes nothing.
    """
    percent = {band.threshold_km: band.percent for band in metrics.bands}
    added = [(percent[km] * metrics.rows + 50) / (metrics.rows + 1) for km in BALSCORE_BANDS_KM]
    return balscore(*added), -metrics.median_km


@dataclass(frozen=True, eq=False, slots=True)
class Truth:
    """N places with what is true of them, and the cells to choose among."""

    place_N: NDArray[np.int64]
    """[N] their numbers among all places."""
    point_deg_N2: NDArray[np.float64]
    """[N, 2] (lat, lon) in degrees."""
    cell_N: NDArray[np.int64]
    """[N] rows of their cells."""
    centroid_deg_C2: NDArray[np.float64]
    """[C, 2] (lat, lon) in degrees."""
    xyz_C3: Tensor
    """[C, 3] float32 unit vectors of the centroids, on the device."""


def score(network: Network, features: Features, truth: Truth, group: Group = ALONE) -> Scores:
    """Evaluate a head in fp32, with nothing dropped: each rank some of the places, and the first adds them up.

    What follows from the scores must be the same in all ranks, which therefore all have those of the first.

    Raises:
        GeolocError: its answers are no numbers.
    """
    own = group.part(len(truth.place_N))
    answer_N5 = torch.zeros(len(truth.place_N), 5, dtype=torch.float64, device=features.device)
    for answer_n5, place_n, cell_n in zip(
        torch.split(answer_N5[own], _ROWS),
        torch.split(torch.from_numpy(truth.place_N[own]).to(features.device), _ROWS),
        torch.split(torch.from_numpy(truth.cell_N[own]).to(features.device), _ROWS),
        strict=True,
    ):
        best_n, rank_n, mean_n3 = decode(network.evaluated(features.fused(place_n)), cell_n, truth.xyz_C3)
        answer_n5.copy_(torch.cat([best_n[:, None], rank_n[:, None], mean_n3], dim=1))
    # Each row is zero but in one rank: the sum is exact.
    group.add(answer_N5)
    return group.from_first(lambda: _summarised(answer_N5.cpu().numpy(), truth))


def _summarised(answer_N5: NDArray[np.float64], truth: Truth) -> Scores:
    best_N, rank_N, mean_N3 = answer_N5[:, 0].astype(np.int64), answer_N5[:, 1].astype(np.int64), answer_N5[:, 2:]
    if not np.isfinite(mean_N3).all():
        raise GeolocError(
            f"the head's answers to {int((~np.isfinite(mean_N3).all(axis=1)).sum())} of {len(mean_N3)} places are no "
            "numbers: training has run away; pass a lower --lr, and another --out"
        )
    top1_deg_N2 = truth.centroid_deg_C2[best_N]
    mean_deg_N2, _ = mean_and_spread(mean_N3, top1_deg_N2)
    num_cells = len(truth.centroid_deg_C2)
    metrics = [
        summarise(distances_km(found_deg_N2, truth.point_deg_N2), cell_rank=rank_N, num_kept=num_cells)
        for found_deg_N2 in (top1_deg_N2, mean_deg_N2)
    ]
    return Scores(top1=metrics[0], mean=metrics[1])


def decode(logit_NC: Tensor, cell_N: Tensor, xyz_C3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a posterior says of N places.

    Args:
        logit_NC: [N, C] float32; they are overwritten.
        cell_N: [N] rows of the true cells.
        xyz_C3: [C, 3] unit vectors of the centroids.

    Returns:
        [N] the most probable cells' rows, the lowest among equals; [N] from 1, where the true cell stands among all;
        [N, 3] the probability-weighted mean vectors, NaN where a logit is none.
    """
    true_N1 = logit_NC.gather(1, cell_N[:, None])
    column_C = torch.arange(logit_NC.shape[1], device=logit_NC.device)
    # Of cells with an equal logit those before the true one count too: whatever is above the next smaller number.
    least_N1 = torch.nextafter(true_N1, torch.full_like(true_N1, -torch.inf))
    rank_N = torch.count_nonzero(logit_NC > torch.where(column_C < cell_N[:, None], least_N1, true_N1), dim=1) + 1
    best_N = logit_NC.argmax(dim=1)
    # Not posterior_topk: its sums in float64 would take twice as long, after each epoch.
    logit_NC -= logit_NC.gather(1, best_N[:, None])
    prob_NC = logit_NC.exp_()
    return best_N, rank_N, (prob_NC @ xyz_C3) / prob_NC.sum(dim=1, keepdim=True)
