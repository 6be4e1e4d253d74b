"""Kernels of geolocation heads and of the sphere, for anybody who has PyTorch: each op with its plain definition.

Triton is needed on CUDA alone, and imported there.
"""

from __future__ import annotations

from geoloc_kernels.bank import bank_topk
from geoloc_kernels.fold import fold_layer_norm
from geoloc_kernels.great_circle import great_circle_km, pairwise_km
from geoloc_kernels.haversine import EARTH_RADIUS_KM
from geoloc_kernels.head import PreparedHead, head_logits, head_topk, prepare_head
from geoloc_kernels.nearest import Nearest, nearest
from geoloc_kernels.posterior import HeadTopk, posterior_topk

__all__ = [
    "EARTH_RADIUS_KM",
    "HeadTopk",
    "Nearest",
    "PreparedHead",
    "bank_topk",
    "fold_layer_norm",
    "great_circle_km",
    "head_logits",
    "head_topk",
    "nearest",
    "pairwise_km",
    "posterior_topk",
    "prepare_head",
]
