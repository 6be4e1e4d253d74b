"""Image towers that benchmarks run on, by their sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A tower, and how many photos it sees at a time."""

    name: str
    layers: int
    width: int
    patch: int
    side: int
    batch: int

    @property
    def heads(self) -> int:
        """Of attention, 64 wide each, as in all of CLIP's."""
        return self.width // 64


SMALL_SIZE = ModelSize(name="ViT 4x384", layers=4, width=384, patch=32, side=224, batch=32)
"""For a CPU."""
LARGE_SIZE = ModelSize(name="ViT-L/14-336", layers=24, width=1024, patch=14, side=336, batch=256)
"""StreetCLIP's, for CUDA."""


def vision_config(size: ModelSize, **more: Any) -> Any:
    """The CLIPVisionConfig of transformers."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        image_size=size.side,
        patch_size=size.patch,
        **more,
    )
