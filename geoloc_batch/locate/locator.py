"""Locator: whatever turns features into places. The engine runs a list of them and knows nothing else.

Shape letters: B rows, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import torch

from geoloc_batch.geo.located import Located


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
    def identity(self) -> Mapping[str, str | int]:
        """What its answers depend on, for the pinned config of a run: hashes and sizes."""
        ...

    def locate(self, features_BD: torch.Tensor) -> Located:
        """Places of B >= 0 rows of raw (not normalised), finite features; a row's answer depends on that row alone."""
        ...

    def to(self, device: str | torch.device) -> Self:
        """The same locator with its weights on `device`."""
        ...
