"""The image tower: what runs on every batch.

Shape letters: B batch, S image side, D features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geoloc_batch.errors import CheckpointError
from geoloc_batch.model.checkpoint import Normalization

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VisionTower(nn.Module):
    """uint8 pixels to raw features, all on the device: the module that is compiled."""

    def __init__(self, visual: nn.Module, normalization: Normalization, *, precision: str) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.is_plain = is_plain_vit(visual)
        if self.is_plain and self.dtype != torch.float32:
            _lower(visual, self.dtype)
        self.visual = visual
        self.mean_3 = nn.Buffer(torch.tensor(normalization.mean)[:, None, None], persistent=False)
        self.std_3 = nn.Buffer(torch.tensor(normalization.std)[:, None, None], persistent=False)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 to [B, D] float32."""
        image_B3SS = (pixels_B3SS.float() / 255 - self.mean_3) / self.std_3
        if self.dtype == torch.float32 or self.is_plain:
            return _first(self.visual(image_B3SS.to(self.dtype))).float()
        # open_clip can cast only its own transformers; other towers leave it to autocast which sums to keep in fp32.
        with torch.autocast(image_B3SS.device.type, self.dtype):
            return _first(self.visual(image_B3SS)).float()


def is_plain_vit(visual: nn.Module) -> bool:
    """Whether a tower is open_clip's own transformer with a class token, the only kind that Hugging Face's CLIP has."""
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    # CoCa's tower returns its tokens as well.
    return output[0] if isinstance(output, tuple) else output


def _lower(visual: nn.Module, dtype: torch.dtype) -> None:
    """Cast the matrices of a tower, and let its layer norms compute in fp32."""
    from open_clip import convert_weights_to_lp
    from open_clip.transformer import LayerNormFp32

    for parent in list(visual.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                norm = LayerNormFp32(child.normalized_shape, eps=child.eps)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm.requires_grad_(False).eval())
    convert_weights_to_lp(visual, dtype=dtype)


def drop_projection(visual: nn.Module, name: str) -> None:
    """Make a tower give its pooled feature.

    Raises:
        CheckpointError: it is of a kind that has none.
    """
    if not is_plain_vit(visual):
        raise CheckpointError(f"{name} has no class token to take the pooled feature from; pass --tap projected")
    tower: Any = visual
    tower.proj = None
