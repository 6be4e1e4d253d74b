"""Located: what a locator says of a batch of features; Views: what stands behind places that several photos show.

Shape letters: B rows, K cells kept, L locations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """Places of B photos."""

    position_deg: NDArray[np.float64]
    """[B, 2] (lat, lon) in degrees: the position chosen by `--position`."""
    topk_cell: NDArray[np.int32]
    """[B, K] ids of the most probable cells, best first."""
    topk_prob: NDArray[np.float32]
    """[B, K] their probabilities."""
    mean_deg: NDArray[np.float64]
    """[B, 2] (lat, lon) of the posterior mean on the sphere."""
    spread_km: NDArray[np.float32]
    """[B] circular standard deviation of the posterior on the sphere."""
    entropy: NDArray[np.float32]
    """[B] entropy of the posterior, nats."""

    def __len__(self) -> int:
        return len(self.entropy)

    def take(self, order: NDArray[np.intp]) -> Located:
        """The rows named by `order`, in that order."""
        return Located(**{field.name: getattr(self, field.name)[order] for field in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[Located]) -> Located:
        """One Located of all the rows of `parts`, in order. `parts` must not be empty."""
        return Located(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Located)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What L places were made from, where each stands for a location that several photos show."""

    num_views: NDArray[np.int32]
    """[L] photos of each location."""
    view_km: NDArray[np.float32]
    """[L] how far the places that each photo alone gives lie apart: the mean over pairs; 0 for a single photo."""

    def __len__(self) -> int:
        return len(self.num_views)
