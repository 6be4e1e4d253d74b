"""What becomes of posteriors over cells: one copy to the host, probabilities, the mean's place, its spread.

Shape letters: B rows, K kept.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, points_deg
from geoloc_kernels.fold import LAYER_NORM_EPS, fold_layer_norm
from geoloc_kernels.posterior import HeadTopk

__all__ = ["LAYER_NORM_EPS", "fold_layer_norm", "mean_and_spread", "packed", "unpacked"]

# A resultant shorter than this is the rounding of vectors that cancel: it points nowhere.
_MIN_RESULTANT = 1e-6


def packed(topk: HeadTopk) -> Tensor:
    """[B, 2 K + 4] float64: cells, probabilities, mean vector, entropy in one tensor, which is one copy to the host."""
    prob_BK = (topk.logit_BK.double() - topk.lse_B[:, None]).exp()
    return torch.cat([topk.id_BK.double(), prob_BK, topk.mean_B3, topk.entropy_B.double()[:, None]], dim=1)


def unpacked(
    packed_BX: NDArray[np.float64],
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float64], NDArray[np.float32]]:
    """Cells [B, K], -1 where logits are not finite, probabilities [B, K], mean vectors [B, 3], entropies [B], nats."""
    cell_BK, prob_BK = np.split(packed_BX[:, :-4], 2, axis=1)
    return (
        cell_BK.astype(np.int32),
        prob_BK.astype(np.float32),
        packed_BX[:, -4:-1],
        packed_BX[:, -1].astype(np.float32),
    )


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
