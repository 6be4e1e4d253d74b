"""The registered ops: what PyTorch's own checks ask of them, compiled whole graphs, and fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from geoloc_kernels.bank import bank_topk
from geoloc_kernels.head import head_topk
from geoloc_kernels.posterior import posterior_topk


def arguments(op: str, num_rows: int = 3, num_cells: int = 7) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    feature, weight, bias, xyz, logit = (
        torch.randn(shape, generator=generator)
        for shape in ((num_rows, 4), (num_cells, 4), (num_cells,), (num_cells, 3), (num_rows, num_cells))
    )
    return {
        "head_topk": (feature, weight, bias, xyz, torch.randperm(num_cells), 5, 2.0, 1e-5, []),
        "posterior_topk": (logit, xyz, 5),
        "bank_topk": (feature, weight, 5),
    }[op]


OPS = ["head_topk", "posterior_topk", "bank_topk"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("num_rows", "num_cells"), [(3, 7), (0, 7), (1, 1)])
def test_an_op_passes_the_checks_of_pytorch(op: str, num_rows: int, num_cells: int) -> None:
    torch.library.opcheck(getattr(torch.ops.geoloc, op).default, arguments(op, num_rows, num_cells))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("num_rows", "num_cells"), [(3, 7), (0, 7), (2, 3)])
def test_fake_tensors_have_the_shapes_and_types_of_real_ones(op: str, num_rows: int, num_cells: int) -> None:
    given = arguments(op, num_rows, num_cells)
    real = getattr(torch.ops.geoloc, op)(*given)
    with FakeTensorMode() as mode:
        fake = getattr(torch.ops.geoloc, op)(
            *(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in given)
        )
    assert [(each.shape, each.dtype) for each in fake] == [(each.shape, each.dtype) for each in real]


def test_parameters_are_taken_as_numbers_by_themselves_and_compiled() -> None:
    feature, weight, bias, xyz, *_ = arguments("head_topk")
    feature, weight, bias = (part.requires_grad_() for part in (feature, weight, bias))

    def located(feature_BD: Tensor) -> tuple[Tensor, ...]:
        topk = head_topk(feature_BD, weight, bias, xyz, 3)
        return *topk, *posterior_topk(feature_BD @ weight.T, xyz, 2), *bank_topk(feature_BD, weight, 2)

    compiled = torch.compile(located, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(feature), located(feature), strict=True):
        assert not expected.requires_grad
        assert torch.equal(found, expected)


@pytest.fixture
def coarse_products() -> Iterator[None]:
    """A process that allows bf16 in products of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_a_process_that_allows_coarse_products_gets_the_same_answers(coarse_products: None) -> None:
    generator = torch.Generator().manual_seed(0)
    feature, weight = torch.randn(64, 512, generator=generator), torch.randn(300, 512, generator=generator)
    bias, xyz = torch.zeros(300), torch.nn.functional.normalize(torch.randn(300, 3, generator=generator), dim=1)
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    allowed = backend.fp32_precision
    found = [*head_topk(feature, weight, bias, xyz, 5), *bank_topk(feature, weight, 5)]
    assert backend.fp32_precision == allowed
    torch.set_float32_matmul_precision("highest")
    for part, expected in zip(
        found, [*head_topk(feature, weight, bias, xyz, 5), *bank_topk(feature, weight, 5)], strict=True
    ):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_ops_stand_in_whole_compiled_graphs(dynamic: bool) -> None:
    feature, weight, bias, xyz, *_ = arguments("head_topk")

    def located(feature_BD: Tensor) -> tuple[Tensor, ...]:
        topk = head_topk(feature_BD * 2, weight, bias, xyz, 3, temperature=0.5)
        again = posterior_topk(topk.logit_BK, xyz[:3], 2)
        return topk.id_BK + 1, again.entropy_B, *bank_topk(feature_BD, weight, 2)

    compiled = torch.compile(located, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (feature, feature[:2]):
        for found, expected in zip(compiled(rows), located(rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
