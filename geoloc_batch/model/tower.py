"""The image tower: what runs on every batch.

Shape letters: B batch, S image side, D features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geoloc_batch.errors import CheckpointError, ConfigError
from geoloc_batch.model.arithmetic import DTYPES
from geoloc_batch.model.attention import AttentionShape
from geoloc_batch.model.checkpoint import Normalization
from geoloc_batch.model.fp8 import quantize_tower
from geoloc_batch.model.vit import PlainViT


def build_tower(
    visual: nn.Module, normalization: Normalization, *, tap: str, precision: str, name: str
) -> PlainViT | OpenClipTower:
    """The tower that runs: our own for a plain transformer, open_clip's forward for every other kind.

    Args:
        visual: the image tower of an open_clip model, in fp32; it may share its weights with what is built.
        normalization: of the pixels.
        tap: pooled or projected.
        precision: fp32, bf16, fp16 or fp8.
        name: of the encoder, for messages.

    Returns:
        A module from [B, S, S, 3] uint8 to [B, D] float32, with the length of a feature as `dim`.

    Raises:
        CheckpointError: the tower has no class token and the pooled tap was asked for.
        ConfigError: it cannot be computed in fp8.
    """
    if is_plain_vit(visual):
        tower = PlainViT(visual, normalization, is_projected=tap == "projected", dtype=DTYPES[precision])
        return quantize_tower(tower) if precision == "fp8" else tower
    if precision == "fp8":
        raise ConfigError(f"--precision fp8 is for plain image transformers, {name} is of another kind; pass bf16")
    if tap == "pooled":
        raise CheckpointError(f"{name} has no class token to take the pooled feature from; pass --tap projected")
    return OpenClipTower(visual, normalization, dtype=DTYPES[precision])


def attention_shape(tower: nn.Module) -> AttentionShape | None:
    """What a tower's attention is asked for; None of one that is not our own."""
    if not isinstance(tower, PlainViT):
        return None
    # The class token's width, before any projection.
    width = tower.class_token_1W.shape[1]
    return AttentionShape(
        num_heads=tower.num_heads,
        num_tokens=tower.num_tokens,
        head_width=width // tower.num_heads,
        dtype=tower.dtype,
    )


class OpenClipTower(nn.Module):
    """A tower of another kind (a ResNet, a ConvNeXt, CoCa, ...) through open_clip's own forward."""

    num_tokens = None
    """Of no use to those who cut batches: such towers have no tokens, or other ones."""

    def __init__(self, visual: nn.Module, normalization: Normalization, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.visual, self.dtype = visual, dtype
        # A tower that was moved already, as for a second precision, is asked where it is.
        device = next(visual.parameters()).device
        self.mean_3 = nn.Buffer(torch.tensor(normalization.mean, device=device)[:, None, None], persistent=False)
        self.std_3 = nn.Buffer(torch.tensor(normalization.std, device=device)[:, None, None], persistent=False)
        tower: Any = visual
        size = tower.image_size
        height, width = (size, size) if isinstance(size, int) else size
        with torch.inference_mode():
            self.dim = int(self(torch.zeros(1, height, width, 3, dtype=torch.uint8, device=device)).shape[1])

    def forward(self, pixels_BSS3: Tensor) -> Tensor:
        """[B, S, S, 3] uint8 to [B, D] float32."""
        image_B3SS = (pixels_BSS3.permute(0, 3, 1, 2).float() / 255 - self.mean_3) / self.std_3
        if self.dtype == torch.float32:
            return _first(self.visual(image_B3SS))
        # Autocast knows which sums of an architecture that we do not know have to stay in fp32.
        with torch.autocast(image_B3SS.device.type, self.dtype):
            return _first(self.visual(image_B3SS)).float()


def is_plain_vit(visual: nn.Module) -> bool:
    """Whether a tower is open_clip's own transformer with a class token and nothing that PlainViT leaves out.

    Hugging Face's CLIP has no other kind.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if not isinstance(visual, VisionTransformer):
        return False
    blocks = list(visual.transformer.resblocks)
    return (
        visual.attn_pool is None
        and visual.pool_type == "tok"
        and len(blocks) > 0
        and all(type(block) is ResidualAttentionBlock for block in blocks)
    )


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    # CoCa's tower returns its tokens as well.
    return output[0] if isinstance(output, tuple) else output
