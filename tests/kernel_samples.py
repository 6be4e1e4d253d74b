"""Heads, features and exact answers for tests of the head's kernels.

Shape letters: B rows, D features, C cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoloc_kernels.fold import fold_layer_norm
from geoloc_kernels.posterior import HeadTopk

# Of logits up to 10: float32 products round by some 1e-6.
TOLERANCE = {"logit_BK": 1e-5, "lse_B": 1e-5, "mean_B3": 5e-6, "entropy_B": 2e-5}


def make_head(num_cells: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = 2 * torch.randn(num_cells, dim, generator=generator) / dim**0.5
    norm = 1 + 0.1 * torch.randn(2, dim, generator=generator)
    folded = fold_layer_norm(norm[0], norm[1], weight, torch.randn(num_cells, generator=generator))
    return *folded, make_xyz(num_cells, seed)


def make_twins(num_cells: int, dim: int, generator: torch.Generator) -> Tensor:
    """[C, D] weights of which each stands twice, half of the cells apart, as far as two cells are left for it.

    Two columns of each are not zero, the same power of two with both signs: a logit is then rounded once, in whatever
    order its products are added. Others differ from their twin's on some processors, by where the cell stands.
    """
    weight_CD = torch.zeros(num_cells, dim)
    for row in weight_CD:
        size = 2.0 ** torch.randint(-1, 2, (1,), generator=generator).item()
        row[torch.randperm(dim, generator=generator)[:2]] = torch.tensor([size, -size])
    half = num_cells // 2
    weight_CD[half : 2 * half] = weight_CD[:half]
    return weight_CD


def make_xyz(num_cells: int, seed: int = 0) -> Tensor:
    xyz = torch.randn(num_cells, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(xyz, dim=1)


def make_features(num_rows: int, dim: int, seed: int = 1) -> Tensor:
    return 0.3 + 1.7 * torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def exact_logits(feature: Tensor, weight: Tensor, bias: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, C] float64."""
    feature = feature.double()
    centred = feature - feature.mean(dim=1, keepdim=True)
    scale = ((centred**2).mean(dim=1, keepdim=True) + 1e-5).rsqrt()
    return ((feature * scale) @ weight.double().T + bias.double()) / temperature


def exact_topk(logit: Tensor, xyz: Tensor, k: int) -> HeadTopk:
    """What is kept of float64 logits, by a stable sort and a soft-max of all."""
    order = logit.argsort(dim=1, descending=True, stable=True)[:, :k]
    prob, log_prob = logit.softmax(dim=1), logit.log_softmax(dim=1)
    entropy = -torch.where(prob > 0, prob * log_prob, 0.0).sum(dim=1)
    return HeadTopk(order, logit.gather(1, order), logit.logsumexp(dim=1), prob @ xyz.double(), entropy)


def assert_close(found: HeadTopk, expected: HeadTopk, *, times: float = 1.0) -> None:
    """All but the ids."""
    for name, tolerance in TOLERANCE.items():
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name).double(), rtol=0, atol=times * tolerance, msg=name
        )


def same_bits(a: HeadTopk, b: HeadTopk) -> bool:
    return all(torch.equal(x.nan_to_num(nan=7e7), y.nan_to_num(nan=7e7)) for x, y in zip(a, b, strict=True))


def assert_same(found: HeadTopk, feature: Tensor, head: tuple[Tensor, Tensor, Tensor], k: int, **options: Any) -> None:
    """The values of the exact definition, and ids whose exact logits are those of its best."""
    weight, bias, xyz = head
    logit = exact_logits(feature, weight, bias, **options)
    expected = exact_topk(logit, xyz, k)
    assert_close(found, expected)
    torch.testing.assert_close(logit.gather(1, found.id_BK), expected.logit_BK, rtol=0, atol=TOLERANCE["logit_BK"])
    assert all(len(set(row)) == len(row) for row in found.id_BK.tolist())


def assert_only_bad(found: HeadTopk, expected: HeadTopk, row: int) -> None:
    good = torch.arange(len(found.lse_B)) != row
    assert same_bits(HeadTopk(*(part[good] for part in found)), HeadTopk(*(part[good] for part in expected)))
    assert (found.id_BK[row] == -1).all()
    assert all(part[row].isnan().all() for part in found[1:])
