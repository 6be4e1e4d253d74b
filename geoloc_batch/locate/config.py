"""Settings of locating. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from geoloc_batch.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LocateConfig:
    """Which heads propose places, and what is kept of their answer."""

    head: tuple[str, ...] = ()
    """A head's file (best.pt or .safetensors), or hf:OWNER/REPO/PATH; repeat the flag for several heads in one pass.
    NAME=FILE names its output folder. None given takes the published European head."""
    cells: tuple[str, ...] = ()
    """geocell_info.json of the head's partition: one for all heads, or one for each in the same order."""
    top_k: int = 5
    """Cells kept per photo."""
    position: Literal["top1", "mean"] = "top1"
    """What lat and lon are: the best cell's centroid, or the posterior mean on the sphere."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top-k must be at least 1, got {self.top_k}")
        if len(self.cells) > 1 and len(self.cells) != len(self.head):
            raise ConfigError(
                f"--cells was given {len(self.cells)} times for {len(self.head)} --head; "
                "give it once, or once for each head"
            )
