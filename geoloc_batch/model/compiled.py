"""A compiled tower: the compiler's own settings stand around its first call alone, in the thread that makes it.

Shape letters: B batch, S image side, D features
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geoloc_batch.model.attention import attending

# All towers share one forward, and dynamo counts its graphs for all of them together: by default it gives up at the
# ninth. A process that compares precisions, modes or batch sizes may need more.
GRAPHS_PER_PROCESS = 256


class CompiledTower:
    """Calls a tower through torch.compile, which makes one graph at the first call.

    Args:
        tower: [B, S, S, 3] uint8 to [B, D].
        sdpa: see attention.py. It goes into the graph: later calls need no context of their own.
        mode: torch.compile's.
    """

    def __init__(self, tower: nn.Module, *, sdpa: str, mode: str) -> None:
        self._run: Any = torch.compile(tower, dynamic=False, fullgraph=True, mode=mode)
        self._sdpa, self._is_cold = sdpa, True

    def __call__(self, pixels_BSS3: Tensor) -> Tensor:
        """[B, S, S, 3] uint8 to [B, D]."""
        if not self._is_cold:
            features_BD: Tensor = self._run(pixels_BSS3)
            return features_BD
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        # Here and not around several threads: torch keeps these settings thread by thread.
        limit = max(GRAPHS_PER_PROCESS, dynamo.recompile_limit)
        with dynamo.patch(recompile_limit=limit), inductor.patch(fx_graph_cache=True), attending(self._sdpa):
            features_BD = self._run(pixels_BSS3)
        self._is_cold = False
        return features_BD
