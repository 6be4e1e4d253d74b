"""Matrix products in 8 bits: weights once, activations as they come, one scale to a row of each.

Rows are scaled by themselves, so that one photo's features know nothing of its neighbours. Numbers are float8_e4m3fn:
3 bits after the point, 448 at most; sums are fp32 in the hardware, results bf16.

Shape letters: B batch, T tokens, R rows, K inner side, N columns
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geoloc_batch.errors import ConfigError
from geoloc_batch.model.vit import PlainViT

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# The hardware multiplies pieces of this many numbers.
MULTIPLE = 16
# A row of zeros is divided by this.
_SMALLEST_SCALE = 1e-12


def quantize_rows(value_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Scale every row so that its largest magnitude becomes 448, and round to 8 bits.

    Args:
        value_RK: [R, K] floats.

    Returns:
        [R, K] float8_e4m3fn and the scales [R, 1] fp32; their product is the value, to 1/16 of each number at most,
        or to 1/1024 of a scale where that is more. A row that holds nan or inf has a scale that is not finite or
        numbers that are nan, and so have its products.
    """
    wide_RK = value_RK.float()
    scale_R1 = (wide_RK.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=_SMALLEST_SCALE)
    return (wide_RK / scale_R1).clamp(-LARGEST, LARGEST).to(FP8), scale_R1


def row_scaled_product(
    value_RK: Tensor, scale_R1: Tensor, weight_KN: Tensor, scale_1N: Tensor, bias_N: Tensor | None
) -> Tensor:
    """[R, N] bf16: the product of two 8-bit matrices, each row of the first and each column of the second scaled.

    Raises:
        RuntimeError: the device, or this torch on it, has no such products.
    """
    return torch._scaled_mm(
        value_RK,
        weight_KN,
        scale_a=scale_R1,
        scale_b=scale_1N,
        bias=bias_N,
        out_dtype=torch.bfloat16,
        # Sums stay in the tensor cores' own registers: what the 8 bits lose is far more.
        use_fast_accum=True,
    )


def try_product(device: torch.device) -> None:
    """Multiply the smallest matrices that there are in 8 bits: some devices that have such products lack those by rows.

    Raises:
        RuntimeError: it cannot be done here.
    """
    one, scale = torch.ones(MULTIPLE, MULTIPLE, device=device).to(FP8), torch.ones(MULTIPLE, 1, device=device)
    bias = torch.zeros(MULTIPLE, dtype=torch.bfloat16, device=device)
    # Fetched, since a kernel that cannot run may say so late.
    row_scaled_product(one, scale, one.T, scale.T.contiguous(), bias).cpu()


class RowScaledLinear(nn.Module):
    """A linear layer in 8 bits, from one in bf16.

    Args:
        linear: its weight [N, K]; N and K are multiples of 16.

    Raises:
        ConfigError: they are not.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        if self.in_features % MULTIPLE or self.out_features % MULTIPLE:
            raise ConfigError(
                f"--precision fp8 needs layers whose sides are multiples of {MULTIPLE}, this encoder has one of "
                f"{self.in_features} x {self.out_features}; pass bf16, or auto"
            )
        weight_NK, scale_N1 = quantize_rows(linear.weight.detach())
        self.weight_NK = nn.Buffer(weight_NK)
        self.scale_1N = nn.Buffer(scale_N1.T.contiguous())
        self.bias = linear.bias

    def forward(self, token: Tensor) -> Tensor:
        """[..., K] to [..., N] bf16."""
        value_RK, scale_R1 = quantize_rows(token.reshape(-1, self.in_features))
        product_RN = row_scaled_product(value_RK, scale_R1, self.weight_NK.T, self.scale_1N, self.bias)
        return product_RN.view(*token.shape[:-1], self.out_features)


def quantize_tower(tower: PlainViT) -> PlainViT:
    """Put every product of a bf16 tower into 8 bits, but the patch embedding's and the last layer's.

    Raises:
        ConfigError: a side of one is no multiple of 16.
    """
    for layer in list(tower.layers)[:-1]:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, RowScaledLinear(child))
    return tower
