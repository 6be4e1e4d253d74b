"""The demo's head: LayerNorm and Linear on stored features, by a plain loop of a few seconds.

Shape letters: N photos, D features, C cells.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 24, 512, 1e-2, 0.05, 0.1


def train_head(
    feature_ND: NDArray[np.float32], cell_N: NDArray[np.int64], num_cells: int, *, seed: int = 0
) -> dict[str, Tensor]:
    """Train a head on frozen features.

    Features of an encoder that has learned nothing differ by little around a large mean. So LayerNorm's scale and
    shift are not learned: they are set to make each normed feature one of mean 0 and deviation 1.

    Args:
        feature_ND: [N, D] raw features.
        cell_N: [N] the cell of each, from 0 to num_cells - 1.
        num_cells: C.
        seed: of the order.

    Returns:
        The weights by the names that published heads have (head.0 is the LayerNorm, head.2 the Linear).
    """
    generator = torch.Generator().manual_seed(seed)
    cell = torch.from_numpy(cell_N)
    normed = functional.layer_norm(torch.from_numpy(feature_ND), feature_ND.shape[1:])
    mean, deviation = normed.mean(dim=0), normed.std(dim=0).clamp(min=1e-6)
    normed = (normed - mean) / deviation
    linear = nn.Linear(feature_ND.shape[1], num_cells)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(normed) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(normed), generator=generator), BATCH):
            loss = functional.cross_entropy(linear(normed[rows]), cell[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return {
        "head.0.weight": 1 / deviation,
        "head.0.bias": -mean / deviation,
        "head.2.weight": linear.weight.detach(),
        "head.2.bias": linear.bias.detach(),
    }
