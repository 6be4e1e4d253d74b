"""Locator: whatever turns features into places. The engine runs a list of them and knows nothing else.

Shape letters: B rows, V views, L locations, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch

from geoloc_batch.geo.located import Located
from geoloc_batch.locate.views import Fusion, Int64s, LocatedViews


class Locator(Protocol):
    """Features in, places out."""

    @property
    def name(self) -> str:
        """Names its folder of results, unique among the locators of a run: letters, digits, dot, underscore, dash."""
        ...

    @property
    def dim(self) -> int:
        """D, the width of the features it takes."""
        ...

    @property
    def tap(self) -> str:
        """Which of the encoder's features it takes: pooled or projected."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its answers depend on, for the pinned config of a run: hashes and sizes, as JSON has them."""
        ...

    @property
    def position(self) -> str:
        """What `position_deg` of its answers is: top1 or mean."""
        ...

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """How views are fused, by each head that it asks."""
        ...

    def locate(self, features_BD: torch.Tensor) -> Located:
        """Places of B >= 0 rows of raw (not normalised), finite features; a row's answer depends on that row alone."""
        ...

    def located(self, features_BD: torch.Tensor) -> Located:
        """The same of float32 rows on its device that are known to be finite: nothing is waited for but the answer."""
        ...

    def locate_views(self, features_VD: torch.Tensor, offset_L1: Int64s) -> LocatedViews:
        """Places of L locations, the views of location i being rows offset[i] to offset[i + 1] of raw features."""
        ...

    def to(self, device: str | torch.device) -> Self:
        """The same locator with its weights on `device`."""
        ...
