"""Batches: which places in which order, and what dropout leaves of their features.

With xh a place's normed features, m the mask of dropout (0, or 1 / (1 - p)), LayerNorm's scale g and shift b, what the
linear layer sees is m (g xh + b), or the mean of that over the views where logits are fused: the layer is linear, so
that the mean of the views' logits is the logit of this mean. Either is g A + b M with A = mean(m xh), M = mean(m),
which hold nothing that is learned.

Everything random follows from (seed, epoch), so that an epoch that was cut off is repeated bit for bit.

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

Ints = NDArray[np.int64]

_ORDER, _DROPOUT, _VIEWS = 0, 1, 2
_LEVELS = 1 << 16


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """B places."""

    place_B: Tensor
    """[B] int64 on the device."""
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

    def draw(self, num_rows: int, dim: int) -> Tensor | None:
        """[num_rows, dim] 0 or 1 / (1 - p), good until the next draw; None where nothing is dropped."""
        if not self._threshold:
            return None
        kept = self._buffers.get("mask", num_rows, dim)
        if self._generator is not None:
            return kept.bernoulli_(1 / self._scale, generator=self._generator).mul_(self._scale)
        size = num_rows * dim
        lane_N = self._bits.random_raw(-(-size // 4)).view(np.uint16)[:size]
        is_kept_N = torch.from_numpy(lane_N >= self._threshold)
        return torch.mul(is_kept_N.view(num_rows, dim), self._scale, out=kept)


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
) -> Iterator[Batch]:
    """The training places of one epoch in random order, in batches of nearly equal sizes.

    A batch is good until the next one is asked for.

    Args:
        features: of all places.
        place_N: [N] the training places, N > 0.
        seed: of the training.
        epoch: from 0.
        batch_size: places in the largest batch.
        dropout: share of the normed features that is dropped.
        view_dropout: share of the views that is dropped; one of each place stays.
        buffers: kept from epoch to epoch.
    """
    buffers = buffers or Buffers(features.device)
    order_N = np.random.default_rng([seed, epoch, _ORDER]).permutation(place_N)
    mask = Mask(seed, epoch, dropout, buffers)
    views = np.random.default_rng([seed, epoch, _VIEWS])
    for place_B in np.array_split(order_N, num_batches(len(place_N), batch_size)):
        on_device_B = torch.from_numpy(place_B).to(features.device)
        if features.kind == "normed-views":
            yield _of_views(features, on_device_B, mask, views, view_dropout)
            continue
        if features.kind == "fused":
            feature_BD = features.rows(on_device_B, out=buffers.get("rows", len(place_B), features.dim))
        else:
            feature_BD = normed(_mean_of_kept(features, on_device_B, views, view_dropout))
        mask_BD = mask.draw(*feature_BD.shape)
        yield Batch(on_device_B, feature_BD if mask_BD is None else feature_BD.mul_(mask_BD), mask_BD)


def num_batches(num_places: int, batch_size: int) -> int:
    """Steps of an epoch."""
    return -(-num_places // batch_size)


def _of_views(
    features: Features, place_B: Tensor, mask: Mask, generator: np.random.Generator, view_dropout: float
) -> Batch:
    slot_V, count_B = _kept_views(features, place_B, generator, view_dropout)
    view_VD = features.rows(slot_V)
    mask_VD = mask.draw(*view_VD.shape)
    if mask_VD is None:
        return Batch(place_B, mean_of_views(view_VD, count_B), None)
    return Batch(place_B, mean_of_views(view_VD.mul_(mask_VD), count_B), mean_of_views(mask_VD, count_B))


def _mean_of_kept(features: Features, place_B: Tensor, generator: np.random.Generator, view_dropout: float) -> Tensor:
    slot_V, count_B = _kept_views(features, place_B, generator, view_dropout)
    return mean_of_views(features.rows(slot_V), count_B)


def _kept_views(
    features: Features, place_B: Tensor, generator: np.random.Generator, view_dropout: float
) -> tuple[Tensor, Tensor]:
    """([V] stored rows, [B] how many of them each place keeps)."""
    slot_V, count_B = features.views(place_B)
    if not view_dropout:
        return slot_V, count_B
    count = count_B.cpu().numpy()
    draw_V = generator.random(len(slot_V))
    begin_B = np.cumsum(count) - count
    # The view with the highest draw always stays: the others share its luck with nobody.
    highest_B = np.maximum.reduceat(draw_V, begin_B)
    is_kept_V = (draw_V >= view_dropout) | (draw_V == np.repeat(highest_B, count))
    kept_B = np.add.reduceat(is_kept_V.astype(np.int64), begin_B)
    device = slot_V.device
    return slot_V[torch.from_numpy(is_kept_V).to(device)], torch.from_numpy(kept_B).to(device)
