"""Every route of the head's and the bank's op on CPU tensors, compared with the definitions: a line of JSON a case.

Run with TRITON_INTERPRET=1, which Triton reads when it is imported: hence a program of its own.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from kernel_samples import make_twins
from torch import Tensor

from geoloc_kernels import routes
from geoloc_kernels.bank import bank_definition
from geoloc_kernels.head import head_definition, prepare_head
from geoloc_kernels.routes import Route, bank_best, head_posterior

TAKEN: list[Route] = []
WAYS: tuple[Route, ...] = ("product", "fused", "split")


def compare(op: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **facts: Any) -> None:
    """Print how far apart two answers are: ids, logits and, of heads, the rest."""
    parts = ("ids", "logit", "lse", "mean", "entropy")
    bad = expected[0][:, 0] == -1
    facts["bad_rows"] = int(bad.sum())
    facts["bad_found"] = sum(
        bool((row[0] == -1).all()) and all(bool(part.isnan().all()) for part in row[1:])
        for row in zip(*(part[bad] for part in found), strict=True)
    )
    for name, ours, theirs in zip(parts, found, expected, strict=False):
        ours, theirs = ours[~bad].double(), theirs[~bad].double()
        if name == "ids":
            facts["ids_differ"] = int((ours != theirs).sum())
        else:
            facts[f"{name}_off"] = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    print(json.dumps({"op": op, "taken": list(TAKEN), **facts}))
    TAKEN.clear()


def main() -> None:
    """All cases."""
    routes.observers.append(TAKEN.append)
    # The product of 17 rows and 260 cells goes in three chunks, the last of which overlaps.
    routes._DEFAULT_L2_BYTES = 2 * 4 * 260 * 7
    generator = torch.Generator().manual_seed(0)
    for num_rows, num_cells, dim, k, dtype, spoiled in [
        (1, 5, 8, 8, torch.float32, False),
        (17, 260, 24, 5, torch.float32, True),
        (5, 129, 40, 3, torch.bfloat16, True),
    ]:
        feature = (0.3 + 1.7 * torch.randn(num_rows, dim, generator=generator)).to(dtype)
        weight = make_twins(num_cells, dim, generator).to(dtype)
        bias = torch.zeros(num_cells)
        xyz = torch.nn.functional.normalize(torch.randn(num_cells, 3, generator=generator), dim=1)
        if spoiled:
            feature[1, 3], feature[-1, 0] = torch.nan, torch.inf
        for is_shuffled in (False, True):
            head = prepare_head(weight, bias, xyz, is_shuffled=is_shuffled)
            for asked in WAYS:
                found = head_posterior(
                    feature, head.weight_CD, head.bias_C, head.xyz_C3, head.id_C, k, 0.5, 1e-5, chosen=asked
                )  # fmt: skip
                expected = head_definition(feature, weight, bias, xyz.double(), None, k, 0.5, 1e-5, ())
                compare("head", found, expected, asked=asked, is_shuffled=is_shuffled, dtype=str(dtype))
        # As sizes alone decide, on a chip so small, and cells so few, that each way is reached.
        for most_cells, num_sms, way in ((1000, 4, "product"), (1, 4, "split"), (1, 1, "fused")):
            routes.PRODUCT_CELLS, routes._DEFAULT_SMS = most_cells, num_sms
            found = head_posterior(feature, weight, bias, xyz, None, k, 0.5, 1e-5)
            expected = head_definition(feature, weight, bias, xyz.double(), None, k, 0.5, 1e-5, ())
            compare("head", found, expected, asked=way, is_shuffled=False, by_size=True)
            score, ids = bank_best(feature / 8, weight, k)
            exact_score, exact_ids = bank_definition(feature / 8, weight, k)
            way = "split" if way == "product" else way
            compare("bank", (ids, score), (exact_ids, exact_score), asked=way, is_shuffled=False, by_size=True)
        routes.PRODUCT_CELLS, routes._DEFAULT_SMS = 8192, 132
        query = feature / 8
        for asked in WAYS[1:]:
            score, ids = bank_best(query, weight, k, chosen=asked)
            exact_score, exact_ids = bank_definition(query, weight, k)
            compare("bank", (ids, score), (exact_ids, exact_score), asked=asked, is_shuffled=False, dtype=str(dtype))


if __name__ == "__main__":
    main()
