"""Batches: which places in which order, and what dropout leaves of their features.

With xh a place's normed features, m the mask of dropout (0, or 1 / (1 - p)), LayerNorm's scale g and shift b, what the
linear layer sees is m (g xh + b), or the mean of that over the views where logits are fused: the layer is linear, so
that the mean of the views' logits is the logit of this mean. Either is g A + b M with A = mean(m xh), M = mean(m),
which hold nothing that is learned.

Everything random follows from (seed, epoch), so that an epoch that was cut off is repeated bit for bit. Where ranks
share a batch, each draws for all of it and keeps what is its own: what is drawn does not depend on their number.

Shape letters: B places of a batch, L places, V views of the batch, N values, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoloc_batch.train.features import Features, mean_of_views, normed
from geoloc_batch.train.group import ALONE, Group

Ints = NDArray[np.int64]

_ORDER, _DROPOUT, _VIEWS = 0, 1, 2
_LEVELS = 1 << 16
_ALL = slice(None)


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """B places: this rank's of a batch."""

    all_place: Tensor
    """[A] int64 on the device, those of all ranks."""
    place_B: Tensor
    """[B] those of this rank, B = 0 where a batch has fewer places than there are ranks."""
    scaled_BD: Tensor
    """[B, D] A: what LayerNorm's scale is multiplied with."""
    shifted_BD: Tensor | None
    """[B, D] M: what its shift is multiplied with; None for ones."""


class Buffers:
    """Memory that is used again from batch to batch; each name is of the largest size asked for so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: dict[str, Tensor] = {}

    def get(self, name: str, num_rows: int, num_columns: int) -> Tensor:
        """[num_rows, num_columns] float32 of undefined values; what was there under this name is lost."""
        size = num_rows * num_columns
        found = self._tensors.get(name)
        if found is None or len(found) < size:
            found = self._tensors[name] = torch.empty(size, device=self.device)
        return found[:size].view(num_rows, num_columns)


class Mask:
    """Dropout's masks for one epoch, drawn on the device.

    Args:
        seed: of the training.
        epoch: from 0.
        dropout: the share that becomes 0.
        buffers: on the device of the masks.
    """

    def __init__(self, seed: int, epoch: int, dropout: float, buffers: Buffers) -> None:
        self._buffers = buffers
        self._dropout = dropout
        # The share in steps of 2^-16: four lanes come of one number, and drawing would else cost a quarter of a step.
        self._threshold = round(dropout * _LEVELS)
        self._scale = _LEVELS / (_LEVELS - self._threshold)
        entropy = np.random.SeedSequence([seed, epoch, _DROPOUT])
        self._bits = np.random.SFC64(entropy)
        self._generator = None
        if buffers.device.type != "cpu":
            self._generator = torch.Generator(buffers.device).manual_seed(
                int(entropy.generate_state(1, np.uint64)[0] >> 1)
            )

    def draw(self, num_rows: int, dim: int, own: slice = _ALL) -> Tensor | None:
        """[n, dim] 0 or 1 / (1 - p), good until the next draw; None where nothing is dropped.

        Args:
            num_rows: to draw for.
            dim: D.
            own: the n rows that are wanted of them.
        """
        if not self._threshold:
            return None
        if self._generator is not None:
            all_kept = self._buffers.get("mask", num_rows, dim)
            return all_kept.bernoulli_(1 / self._scale, generator=self._generator)[own].mul_(self._scale)
        lane_N = self._bits.random_raw(-(-num_rows * dim // 4)).view(np.uint16)[: num_rows * dim]
        is_kept_ND = torch.from_numpy(lane_N.reshape(num_rows, dim)[own] >= self._threshold)
        return torch.mul(is_kept_ND, self._scale, out=self._buffers.get("mask", len(is_kept_ND), dim))


def epoch_batches(
    features: Features,
    place_N: Ints,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    dropout: float,
    view_dropout: float = 0.0,
    buffers: Buffers | None = None,
    group: Group = ALONE,
) -> Iterator[Batch]:
    """The training places of one epoch in random order, in batches of nearly equal sizes.

    A batch is good until the next one is asked for.

    Args:
        features: of all places.
        place_N: [N] the training places, N > 0.
        seed: of the training.
        epoch: from 0.
        batch_size: places in the largest batch, of all ranks.
        dropout: share of the normed features that is dropped.
        view_dropout: share of the views that is dropped; one of each place stays.
        buffers: kept from epoch to epoch.
        group: the ranks that share each batch.
    """
    buffers = buffers or Buffers(features.device)
    order_N = np.random.default_rng([seed, epoch, _ORDER]).permutation(place_N)
    mask = Mask(seed, epoch, dropout, buffers)
    views = np.random.default_rng([seed, epoch, _VIEWS])
    for all_place in np.array_split(order_N, num_batches(len(place_N), batch_size)):
        batch = _Places(torch.from_numpy(all_place).to(features.device), group.part(len(all_place)))
        if features.kind == "normed-views":
            yield _of_views(features, batch, mask, views, view_dropout)
            continue
        if features.kind == "fused":
            feature_BD = features.rows(batch.own, out=buffers.get("rows", len(batch.own), features.dim))
        else:
            slot_V, count_B, _ = _kept_views(features, batch, views, view_dropout)
            feature_BD = normed(mean_of_views(features.rows(slot_V), count_B))
        mask_BD = mask.draw(len(all_place), features.dim, batch.part)
        yield batch.with_rows(feature_BD if mask_BD is None else feature_BD.mul_(mask_BD), mask_BD)


@dataclass(frozen=True, eq=False, slots=True)
class _Places:
    """The places of a batch, and which of them are this rank's."""

    all: Tensor
    part: slice

    @property
    def own(self) -> Tensor:
        return self.all[self.part]

    def with_rows(self, scaled_BD: Tensor, shifted_BD: Tensor | None) -> Batch:
        return Batch(self.all, self.own, scaled_BD, shifted_BD)


def num_batches(num_places: int, batch_size: int) -> int:
    """Steps of an epoch."""
    return -(-num_places // batch_size)


def _of_views(
    features: Features, batch: _Places, mask: Mask, generator: np.random.Generator, view_dropout: float
) -> Batch:
    slot_V, count_B, (num_views, own) = _kept_views(features, batch, generator, view_dropout)
    view_VD = features.rows(slot_V)
    mask_VD = mask.draw(num_views, features.dim, own)
    if mask_VD is None:
        return batch.with_rows(mean_of_views(view_VD, count_B), None)
    return batch.with_rows(mean_of_views(view_VD.mul_(mask_VD), count_B), mean_of_views(mask_VD, count_B))


def _kept_views(
    features: Features, batch: _Places, generator: np.random.Generator, view_dropout: float
) -> tuple[Tensor, Tensor, tuple[int, slice]]:
    """([V] this rank's stored rows, [B] how many each of its places keeps, (all ranks' views, which are its own))."""
    slot_V, count_B = features.views(batch.all)
    if view_dropout:
        slot_V, count_B = _without_dropped(slot_V, count_B, generator, view_dropout)
    if len(batch.own) == len(batch.all):
        return slot_V, count_B, (len(slot_V), _ALL)
    end = count_B.cpu().cumsum(0).tolist()
    begin = [0, *end]
    own = slice(begin[batch.part.start], begin[batch.part.stop])
    return slot_V[own], count_B[batch.part], (len(slot_V), own)


def _without_dropped(
    slot_V: Tensor, count_B: Tensor, generator: np.random.Generator, view_dropout: float
) -> tuple[Tensor, Tensor]:
    count = count_B.cpu().numpy()
    draw_V = generator.random(len(slot_V))
    begin_B = np.cumsum(count) - count
    # The view with the highest draw always stays: the others share its luck with nobody.
    highest_B = np.maximum.reduceat(draw_V, begin_B)
    is_kept_V = (draw_V >= view_dropout) | (draw_V == np.repeat(highest_B, count))
    kept_B = np.add.reduceat(is_kept_V.astype(np.int64), begin_B)
    device = slot_V.device
    return slot_V[torch.from_numpy(is_kept_V).to(device)], torch.from_numpy(kept_B).to(device)
