"""A plain CLIP image transformer, rewritten to do less work for the same features.

Every rewrite is exact but for rounding; open_clip's own forward is the definition that it is tested against:

- pixels go in as uint8: 1/255, mean and deviation are folded into the patch weights and into a bias, and 128 is
  subtracted from the pixels, so that weights that were rounded to 8 bits meet small numbers;
- the convolution over patches is a matrix product, its inner side padded with zeros to a multiple of 8;
- one product gives queries, keys and values;
- QuickGELU, x sigmoid(1.702 x), is SiLU between scaled weights: fc1 times 1.702, fc2 divided by it;
- the last layer computes its queries and its MLP for the class token alone, since nobody reads the other tokens.

Below fp32 the matrices are in the lower precision, while layer norms, soft-max and the running sum of the layers are
fp32. A sum in bf16 costs three times the error: over 12 layers x 768 with random weights 0.0094 of a feature's length
instead of 0.0033, over 4 x 384 0.0061 instead of 0.0020, at the same speed on a CPU.

Shape letters: B batch, S image side, P patch side, G patches a side, K a patch's values, T tokens, W width, H heads,
E width of a head, D features, M width of the MLP
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from geoloc_batch.model.checkpoint import Normalization

QUICK_GELU_SCALE = 1.702
# Flipping a byte's top bit and reading it as signed subtracts exactly this.
CENTRE = 128
_K_MULTIPLE = 8


class PlainViT(nn.Module):
    """uint8 pixels to the raw feature of the class token.

    Args:
        visual: an open_clip VisionTransformer of which `tower.is_plain_vit` holds, in fp32; it is left as it is, and
            weights that need no change are shared with it.
        normalization: of the pixels.
        is_projected: multiply by CLIP's projection, or give the class token as it comes from the last layer norm.
        dtype: of the matrices.
    """

    def __init__(
        self, visual: nn.Module, normalization: Normalization, *, is_projected: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        source: Any = visual
        self.patch_side = int(source.conv1.kernel_size[0])
        self.grid = int(source.grid_size[0])
        patch_WK, bias_W = _fold_pixels(source.conv1.weight, normalization)
        self.num_padding = -patch_WK.shape[1] % _K_MULTIPLE
        self.embed_patches = _linear(functional.pad(patch_WK, (0, self.num_padding)), None, dtype)
        position_TW = source.positional_embedding
        self.class_token_1W = _frozen(source.class_embedding + position_TW[:1])
        self.position_W = _frozen(position_TW[1:] + bias_W)
        self.norm_before = _Norm(source.ln_pre, torch.float32) if isinstance(source.ln_pre, nn.LayerNorm) else None
        blocks = source.transformer.resblocks
        last = len(blocks) - 1
        self.layers = nn.ModuleList(_Layer(block, dtype, is_last=number == last) for number, block in enumerate(blocks))
        self.norm_after = _Norm(source.ln_post, torch.float32)
        self.projection_WD = _frozen(source.proj) if is_projected else None
        self.num_tokens, width = position_TW.shape
        self.num_heads = int(blocks[0].attn.num_heads)
        self.dtype = dtype
        self.dim = width if self.projection_WD is None else int(self.projection_WD.shape[1])

    def forward(self, pixels_BSS3: Tensor) -> Tensor:
        """[B, S, S, 3] uint8 to [B, D] float32. What fills no patch is cut off, as a convolution does."""
        patch_BTK = self._patches(pixels_BSS3)
        position_BTW = self.embed_patches(patch_BTK) + self.position_W
        token_BTW = torch.cat([self.class_token_1W.expand(len(pixels_BSS3), 1, -1), position_BTW], dim=1)
        if self.norm_before is not None:
            token_BTW = self.norm_before(token_BTW)
        for layer in self.layers:
            token_BTW = layer(token_BTW)
        feature_BW: Tensor = self.norm_after(token_BTW[:, 0])
        return feature_BW if self.projection_WD is None else feature_BW @ self.projection_WD

    def _patches(self, pixels_BSS3: Tensor) -> Tensor:
        """[B, G * G, K], each patch's values in the order row, column, channel, less CENTRE."""
        batch, grid, side = len(pixels_BSS3), self.grid, self.patch_side
        cut = pixels_BSS3[:, : grid * side, : grid * side]
        rows = cut.reshape(batch, grid, side, grid, side * 3).transpose(2, 3)
        patch_BTK = functional.pad(rows.reshape(batch, grid * grid, side * side * 3), (0, self.num_padding))
        return (patch_BTK ^ CENTRE).view(torch.int8).to(self.embed_patches.weight.dtype)


class _Layer(nn.Module):
    """One layer: attention, then an MLP, each added to what came in."""

    def __init__(self, block: Any, dtype: torch.dtype, *, is_last: bool) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.num_heads = int(attention.num_heads)
        self.norm_attention, self.norm_mlp = _Norm(block.ln_1, dtype), _Norm(block.ln_2, dtype)
        # The last layer needs one token's query and everybody's keys and values.
        width = int(attention.embed_dim)
        parts = [width, 2 * width] if is_last else [3 * width]
        self.in_projections = nn.ModuleList(
            _linear(weight, bias, dtype)
            for weight, bias in zip(
                attention.in_proj_weight.split(parts), attention.in_proj_bias.split(parts), strict=True
            )
        )
        self.out_projection = _linear(*_scaled(attention.out_proj, block.ls_1), dtype)
        is_quick = _is_quick_gelu(mlp.gelu)
        scale = QUICK_GELU_SCALE if is_quick else 1.0
        self.activation = nn.SiLU(inplace=True) if is_quick else mlp.gelu
        self.fc1 = _linear(mlp.c_fc.weight * scale, mlp.c_fc.bias * scale, dtype)
        weight, bias = _scaled(mlp.c_proj, block.ls_2)
        self.fc2 = _linear(weight / scale, bias, dtype)

    def forward(self, token_BTW: Tensor) -> Tensor:
        """[B, T, W] float32 to the same, or to [B, 1, W] in the last layer."""
        mixed = self._attend(self.norm_attention(token_BTW))
        token_BTW = token_BTW[:, : mixed.shape[1]] + self.out_projection(mixed)
        hidden_BTM = self.activation(self.fc1(self.norm_mlp(token_BTW)))
        added_BTW: Tensor = self.fc2(hidden_BTM)
        return token_BTW + added_BTW

    def _attend(self, token_BTW: Tensor) -> Tensor:
        if len(self.in_projections) == 2:
            to_query, to_key_value = self.in_projections
            (query,) = self._heads(to_query(token_BTW[:, :1]))
            key, value = self._heads(to_key_value(token_BTW))
        else:
            query, key, value = self._heads(self.in_projections[0](token_BTW))
        mixed_BHTE: Tensor = functional.scaled_dot_product_attention(query, key, value)
        return mixed_BHTE.transpose(1, 2).flatten(2)

    def _heads(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[B, T, n W] to n tensors of [B, H, T, E]."""
        head_width = self.out_projection.in_features // self.num_heads
        return packed.view(*packed.shape[:2], -1, self.num_heads, head_width).permute(2, 0, 3, 1, 4).unbind()


class _Norm(nn.Module):
    """A layer norm computed in fp32, whatever goes out."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(norm.weight), _frozen(norm.bias)
        self.eps, self.dtype = norm.eps, dtype

    def forward(self, token: Tensor) -> Tensor:
        normed: Tensor = functional.layer_norm(token, self.weight.shape, self.weight, self.bias, self.eps)
        return normed.to(self.dtype)


def _fold_pixels(weight_W3PP: Tensor, normalization: Normalization) -> tuple[Tensor, Tensor]:
    """The patch weights for bytes less CENTRE, [W, K] in the order row, column, channel, and the bias, [W]."""
    weight = weight_W3PP.detach().double()
    mean_3, std_3 = (torch.tensor(part, dtype=torch.float64) for part in (normalization.mean, normalization.std))
    bias_W = weight.sum(dim=(2, 3)) @ ((CENTRE / 255 - mean_3) / std_3)
    scaled = weight / (255 * std_3[:, None, None])
    return scaled.permute(0, 2, 3, 1).flatten(1).float(), bias_W.float()


def _is_quick_gelu(activation: nn.Module) -> bool:
    from open_clip.transformer import QuickGELU

    return isinstance(activation, QuickGELU)


def _scaled(linear: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer with the factors of the LayerScale after it, if there is one."""
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return linear.weight, linear.bias
    return linear.weight * gamma[:, None], linear.bias * gamma


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _frozen(weight.to(dtype))
    if bias is not None:
        linear.bias = _frozen(bias.to(dtype))
    return linear


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
