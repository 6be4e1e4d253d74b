"""The step from features to places: soft-max over cells, its best cells, its mean on the sphere, spread, entropy.

Shape letters: B rows, D features, C cells, K kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, points_deg

LAYER_NORM_EPS = 1e-5

# A resultant shorter than this is the rounding of vectors that cancel: it points nowhere.
_MIN_RESULTANT = 1e-6


class Posterior(NamedTuple):
    """What `posterior_of` keeps of the probabilities of B rows over C cells."""

    topk_row: Tensor
    """[B, K] int64, the head's rows of the most probable cells, best first; the lowest row first among equals."""
    topk_prob: Tensor
    """[B, K] float32."""
    mean: Tensor
    """[B, 3] float64, the probability-weighted mean of the cells' unit vectors."""
    entropy: Tensor
    """[B] float32, nats, not negative."""


def fold_layer_norm(
    norm_weight_D: Tensor, norm_bias_D: Tensor, weight_CD: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    """LayerNorm's scale and shift moved into the linear layer behind it.

    The rows of the folded weight have mean zero, so that they may meet features whose mean was or was not taken off:
    logits = (x @ weight'.T) / sqrt(var(x) + eps) + bias'.

    Args:
        norm_weight_D: [D] LayerNorm's scale.
        norm_bias_D: [D] its shift.
        weight_CD: [C, D] the linear layer's weight.
        bias_C: [C] its bias.

    Returns:
        weight' [C, D] and bias' [C], float32, computed in float64.
    """
    weight = weight_CD.double() * norm_weight_D.double()
    bias = bias_C.double() + weight_CD.double() @ norm_bias_D.double()
    return (weight - weight.mean(dim=1, keepdim=True)).float(), bias.float()


def head_logits(features_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, temperature: float = 1.0) -> Tensor:
    """What a folded head says of each cell, before the soft-max.

    Args:
        features_BD: [B, D] float32, raw, finite.
        weight_CD: [C, D] float32, from `fold_layer_norm`.
        bias_C: [C] float32, from `fold_layer_norm`.
        temperature: logits are divided by it.

    Returns:
        [B, C] float32, on the features' device.
    """
    # LayerNorm first, although the folded weight would allow one scale afterwards: this way large means don't cancel.
    # In float64, because the squares of values above 1e19 overflow in float32.
    normed_BD = functional.layer_norm(features_BD.double(), features_BD.shape[-1:], eps=LAYER_NORM_EPS).float()
    return torch.addmm(bias_C, normed_BD, weight_CD.T) / temperature


def posterior_of(logit_BC: Tensor, xyz_C3: Tensor, k: int) -> Posterior:
    """What is kept of a posterior: top-k, mean vector and entropy.

    Args:
        logit_BC: [B, C] float32: logits, or logarithms of probabilities that need not add up to 1.
        xyz_C3: [C, 3] float64, the cells' unit vectors.
        k: cells to keep, from 1 to C.

    Returns:
        The posterior, on the logits' device.
    """
    log_prob_BC = logit_BC.log_softmax(dim=-1)
    prob_BC = log_prob_BC.exp()
    topk_row_BK = _stable_topk(logit_BC, k)
    # Divided by its own sum in float64: in float32 a certain posterior would have a spread of kilometres by rounding.
    exact_BC = prob_BC.double()
    return Posterior(
        topk_row=topk_row_BK,
        topk_prob=prob_BC.gather(1, topk_row_BK),
        mean=(exact_BC @ xyz_C3) / exact_BC.sum(dim=-1, keepdim=True),
        # Subtracted, because a negated zero would be -0.0.
        entropy=0.0 - (prob_BC * log_prob_BC).sum(dim=-1).clamp(max=0.0),
    )


def head_topk(
    features_BD: Tensor, weight_CD: Tensor, bias_C: Tensor, xyz_C3: Tensor, k: int, temperature: float = 1.0
) -> Posterior:
    """The posterior of a folded head in one call: `posterior_of` its `head_logits`, whose arguments these are."""
    return posterior_of(head_logits(features_BD, weight_CD, bias_C, temperature), xyz_C3, k)


def mean_and_spread(
    mean_B3: NDArray[np.float64], fallback_deg_B2: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Where a posterior's mean vector points, and how wide the posterior is.

    spread_km = R sqrt(-2 ln r), with r the length of the mean vector: the circular standard deviation. For a posterior
    that is narrow against the Earth this is the root mean square distance of its cells from its mean. It ends at
    pi R (20,015 km), beyond which no two places are apart.

    Args:
        mean_B3: [B, 3] mean vectors, no longer than 1 but for rounding.
        fallback_deg_B2: [B, 2] the places to answer where the vectors cancel, so that their mean points nowhere.

    Returns:
        [B, 2] (lat, lon) in degrees and [B] kilometres.

    Source: Mardia and Jupp, "Directional Statistics", Wiley 2000, sections 2.3.1 and 9.2.1.
    """
    length_B = np.minimum(np.linalg.norm(mean_B3, axis=1), 1.0)
    mean_deg_B2 = np.where((length_B < _MIN_RESULTANT)[:, None], fallback_deg_B2, points_deg(mean_B3))
    angle_B = np.sqrt(-2 * np.log(np.maximum(length_B, math.exp(-(math.pi**2) / 2))))
    return mean_deg_B2, (EARTH_RADIUS_KM * angle_B).astype(np.float32)


def _stable_topk(value_BC: Tensor, k: int) -> Tensor:
    """[B, k] indices of the largest float32 values, descending, the lowest index first among equals.

    torch.topk leaves the order of equals open. Here each value becomes an integer of its own: the float's bits, made to
    ascend as the floats do, then the index, reversed, in the low half.
    """
    num_columns = value_BC.shape[1]
    # Adding zero turns -0.0 into 0.0, which has other bits.
    bits_BC = (value_BC.float() + 0.0).contiguous().view(torch.int32).long()
    ascending_BC = torch.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC)
    reversed_C = torch.arange(num_columns - 1, -1, -1, device=value_BC.device)
    key_BC = (ascending_BC << 32) | reversed_C
    key_BK = key_BC.topk(k, dim=1).values
    return num_columns - 1 - (key_BK & 0xFFFFFFFF)
