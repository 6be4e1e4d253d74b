"""The head in training: LayerNorm's scale and shift and a linear layer, with gradients written by hand.

Three matrix products a step are all that costs anything: logits = y W^T, dW = G^T y, dy = G W.

Shape letters: B places of a batch, C cells, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from geoloc_batch.locate.head_file import TENSORS
from geoloc_batch.train.batches import Batch, Buffers

NUM_TOLD = 4
"""Numbers that ranks may sum in one go with their gradients."""


class Network:
    """The four tensors of a head, and AdamW on them.

    Args:
        state: the tensors by the names in TENSORS; they are copied.
        device: where training is.
        precision: of the matrix products, fp32 or bf16. Sums and results are float32 in both.
        weight_decay: on the linear layer's weight alone.
    """

    def __init__(
        self, state: Mapping[str, Tensor], device: torch.device, *, precision: str, weight_decay: float
    ) -> None:
        self._is_bf16 = precision == "bf16"
        copies = [state[name].detach().to(device=device, dtype=torch.float32, copy=True) for name in TENSORS]
        self.scale_D, self.shift_D, self.weight_CD, self.bias_C = copies
        plain = {"params": [self.scale_D, self.shift_D, self.bias_C], "weight_decay": 0.0}
        decayed = {"params": [self.weight_CD], "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW([plain, decayed], lr=0.0, fused=True)
        # Kept from step to step: fresh pages for a batch's logits cost more than what is computed on them.
        self._buffers = Buffers(device)
        self._input_BD = torch.empty(0)
        sizes = [tensor.numel() for tensor in (self.weight_CD, self.bias_C, self.scale_D, self.shift_D)]
        self.gradient = torch.zeros(sum(sizes) + NUM_TOLD, device=device)
        """All gradients of the last `backward` in one piece, to be summed over ranks, and `told_K` behind them."""
        weight, bias, scale, shift, self.told_K = torch.split(self.gradient, [*sizes, NUM_TOLD])
        self.weight_CD.grad, self.bias_C.grad = weight.view_as(self.weight_CD), bias
        self.scale_D.grad, self.shift_D.grad = scale, shift

    def logits(self, batch: Batch) -> Tensor:
        """[B, C] in training, good until the next call; what `learn` needs is kept."""
        num_places, dim = batch.scaled_BD.shape
        self._input_BD = self._buffers.get("input", num_places, dim)
        if batch.shifted_BD is None:
            torch.addcmul(self.shift_D, batch.scaled_BD, self.scale_D, out=self._input_BD)
        else:
            torch.mul(batch.scaled_BD, self.scale_D, out=self._input_BD).addcmul_(batch.shifted_BD, self.shift_D)
        logit_BC = self._buffers.get("logits", num_places, len(self.bias_C))
        return self._product(self._input_BD, self.weight_CD.T, logit_BC).add_(self.bias_C)

    def evaluated(self, feature_BD: Tensor) -> Tensor:
        """[B, C] logits of normed features in fp32, nothing dropped."""
        return torch.addmm(self.bias_C, torch.addcmul(self.shift_D, feature_BD, self.scale_D), self.weight_CD.T)

    def learn(self, batch: Batch, grad_BC: Tensor, rate: float) -> None:
        """One step of AdamW: `backward`, then `step`."""
        self.backward(batch, grad_BC)
        self.step(rate)

    def backward(self, batch: Batch, grad_BC: Tensor) -> None:
        """The gradients of the four tensors.

        Args:
            batch: the one whose `logits` were asked for last.
            grad_BC: the loss's gradient at them.
        """
        weight, bias, scale, shift = (
            tensor.grad for tensor in (self.weight_CD, self.bias_C, self.scale_D, self.shift_D)
        )
        assert weight is not None
        self._product(grad_BC.T, self._input_BD, weight)
        torch.sum(grad_BC, dim=0, out=bias)
        grad_BD = self._product(grad_BC, self.weight_CD, self._buffers.get("gradient", *batch.scaled_BD.shape))
        if batch.shifted_BD is None:
            torch.sum(grad_BD, dim=0, out=shift)
        else:
            torch.sum(torch.mul(grad_BD, batch.shifted_BD, out=self._input_BD), dim=0, out=shift)
        torch.sum(grad_BD.mul_(batch.scaled_BD), dim=0, out=scale)

    def step(self, rate: float) -> None:
        """AdamW with the gradients at hand, at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    @property
    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        tensors = (self.scale_D, self.shift_D, self.weight_CD, self.bias_C)
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def state(self) -> dict[str, Tensor]:
        """Copies of the tensors by the names in TENSORS, on the CPU."""
        tensors = (self.scale_D, self.shift_D, self.weight_CD, self.bias_C)
        return {name: tensor.detach().cpu().clone() for name, tensor in zip(TENSORS, tensors, strict=True)}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take up AdamW's moments, as `optimizer.state_dict()` gave them."""
        self.optimizer.load_state_dict(state)

    def _product(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        if not self._is_bf16:
            return torch.mm(left, right, out=out)
        if left.device.type == "cuda":
            return torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32, out=out)
        with _bf16_products():
            return torch.mm(left, right, out=out)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Products of float32 matrices on the CPU's bf16 tiles, with sums and results in float32."""
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def learning_rate(step: int, num_steps: int, num_warmup: int, highest: float) -> float:
    """A straight line up to `highest` over the first `num_warmup` steps, then a cosine to 0 at `num_steps`.

    Args:
        step: from 0.
        num_steps: of the whole training.
        num_warmup: less than num_steps, or all steps warm up.
        highest: the peak.
    """
    if step < num_warmup:
        return highest * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * progress))


def first_state(num_cells: int, deviation_D: Tensor, mean_D: Tensor) -> dict[str, Tensor]:
    """A head that finds all cells alike, its LayerNorm set so that features of this mean and deviation become plain.

    Args:
        num_cells: C.
        deviation_D: [D] of the normed features.
        mean_D: [D] of them.
    """
    scale_D = 1 / deviation_D.clamp(min=1e-6)
    tensors = (scale_D, -mean_D * scale_D, torch.zeros(num_cells, len(mean_D)), torch.zeros(num_cells))
    return dict(zip(TENSORS, tensors, strict=True))
