"""The activations that a CLIP checkpoint of transformers may name, as torch modules.

Left out are prelu and xielu, which have weights of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class _Formula(nn.Module):
    """An activation that torch has no module for."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def _quick_gelu() -> nn.Module:
    from open_clip.transformer import QuickGELU

    activation: nn.Module = QuickGELU()
    return activation


def _clipped_gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x).clip(-10, 10)


def _squared_relu(x: Tensor) -> Tensor:
    return nn.functional.relu(x).square()


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _sqrt_softplus(x: Tensor) -> Tensor:
    return nn.functional.softplus(x).sqrt()


_tanh_gelu = partial(nn.GELU, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_10": partial(_Formula, _clipped_gelu),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": nn.GELU,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": nn.Hardswish,
    "laplace": partial(_Formula, _laplace),
    "leaky_relu": nn.LeakyReLU,
    "linear": nn.Identity,
    "mish": nn.Mish,
    "quick_gelu": _quick_gelu,
    "relu": nn.ReLU,
    "relu2": partial(_Formula, _squared_relu),
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "sqrtsoftplus": partial(_Formula, _sqrt_softplus),
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}
"""By transformers' name for `hidden_act`."""
