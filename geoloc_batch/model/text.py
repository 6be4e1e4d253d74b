"""The text tower: sentences to features in the space of the `projected` tap.

Shape letters: N texts, L tokens, D features
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geoloc_batch.model.clip import Clip

TEXTS_PER_STEP = 256


class TextTower:
    """CLIP's own text tower, always in fp32: it computes once a run.

    Args:
        clip: whose text tower it is; it moves to the device at the first text.
        device: where it computes.
    """

    def __init__(self, clip: Clip, device: torch.device) -> None:
        self._clip, self._device, self._is_placed = clip, device, False

    def encode(self, texts: Sequence[str] | Tensor) -> Tensor:
        """[N, D] float32; see Encoder.encode_text."""
        if not isinstance(texts, Tensor):
            texts = self._clip.tokenize([texts] if isinstance(texts, str) else texts)
        ids_NL = self._checked_ids(texts)
        if not self._is_placed:
            _place_text(self._clip.module, self._device)
            self._is_placed = True
        with torch.inference_mode():
            steps = torch.split(ids_NL.to(self._device), TEXTS_PER_STEP)
            return torch.cat([self._clip.module.encode_text(step) for step in steps]).float()

    def _checked_ids(self, ids_NL: Tensor) -> Tensor:
        """Ids padded to the context length. What follows a text's end is never looked at: attention is causal."""
        length, vocab = self._clip.context_length, self._clip.vocab_size
        if ids_NL.ndim != 2 or not 1 <= ids_NL.shape[1] <= length or len(ids_NL) == 0:
            raise ValueError(f"token ids must be [N, 1..{length}] with N from 1, got {list(ids_NL.shape)}")
        lowest, highest = int(ids_NL.min()), int(ids_NL.max())
        if lowest < 0 or (vocab and highest >= vocab):
            raise ValueError(f"token ids must be from 0 to {vocab - 1}, got {lowest} to {highest}")
        return nn.functional.pad(ids_NL.long(), (0, length - ids_NL.shape[1]))


def _place_text(module: Any, device: torch.device) -> None:
    """Move everything but the image tower, which keeps its own precision."""
    visual, module.visual = module.visual, None
    try:
        module.to(device)
    finally:
        module.visual = visual
