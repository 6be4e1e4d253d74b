"""The head's Triton kernels themselves, run by Triton's interpreter on the CPU against float64.

Needs TRITON_INTERPRET=1 before Triton is imported: test_triton_head.py runs this file in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geoloc_kernels import fold, triton_scale
from geoloc_kernels.triton_cells import Answer, pack_cells
from geoloc_kernels.triton_head import fused_topk
from geoloc_kernels.triton_rows import rows_topk
from geoloc_kernels.triton_tiles import Tiles

# Many small tiles, so that few cells stand in several tiles and parts.
TILES = Tiles(16, 64, 16, 4, 3)
LSE_ERROR, MEAN_ERROR, ENTROPY_ERROR = 5e-6, 1e-6, 5e-6
SIZES = [
    (1, 1, 8, 1, torch.bfloat16),
    (3, 5, 24, 10, torch.float16),
    (17, 127, 200, 3, torch.bfloat16),
    (3, 129, 8, 32, torch.float32),
    pytest.param(1, 1000, 24, 10, torch.bfloat16, marks=pytest.mark.slow),
]
TEMPERATURE = 0.5
Kernel = Callable[..., Answer]


def three_parts(*arguments: Any, **options: Any) -> Answer:
    return fused_topk(*arguments, **options, num_parts=3)


KERNELS = pytest.mark.parametrize("kernel", [fused_topk, three_parts])
slow = pytest.mark.slow
# NumPy warns of what these kernels are asked to do: to sum numbers that are not finite, or too large.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Few different small ones: exact in every dtype, also their products and sums, and with many equals."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def random_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit_vectors(num_cells: int) -> Tensor:
    return torch.nn.functional.normalize(random_numbers(num_cells, 3, seed=9), dim=1)


def head(num_rows: int, num_cells: int, dim: int, draw: Callable[..., Tensor] = whole_numbers) -> tuple[Tensor, ...]:
    """Features, their scale, weights, bias and unit vectors."""
    scale = 2.0 ** -torch.arange(1, num_rows + 1).remainder(3)
    weight = draw(num_cells, dim, seed=2) / (4 if draw is whole_numbers else 2 * dim**0.5)
    return draw(num_rows, dim, seed=1), scale, weight, draw(num_cells, seed=3) / 4, unit_vectors(num_cells)


def exact_logits(feature: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ((feature.double() @ weight.double().T) * scale.double()[:, None] + bias.double()) / TEMPERATURE


def assert_is_posterior(answer: Answer, logit: Tensor, xyz: Tensor, k: int, *, logit_error: float = 0.0) -> None:
    """Of float64 logits, all finite; ids exactly where logits are."""
    ids, kept, lse, mean, entropy = answer
    assert (ids.dtype, kept.dtype, mean.dtype) == (torch.int64, torch.float32, torch.float64)
    best = logit.sort(dim=1, descending=True, stable=True)
    k = min(k, logit.shape[1])
    torch.testing.assert_close(kept.double(), best.values[:, :k], rtol=0, atol=logit_error)
    torch.testing.assert_close(logit.gather(1, ids), best.values[:, :k], rtol=0, atol=2 * logit_error)
    if logit_error == 0:
        assert torch.equal(ids, best.indices[:, :k])
    log_prob = logit.log_softmax(dim=1)
    expected = (logit.logsumexp(dim=1), log_prob.exp() @ xyz.double(), -(log_prob.exp() * log_prob).sum(dim=1))
    errors = (LSE_ERROR, MEAN_ERROR, ENTROPY_ERROR)
    for found, value, error in zip((lse, mean, entropy), expected, errors, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=0, atol=error)
    assert (entropy >= 0).all()


@pytest.mark.parametrize("tile_cells", [64, pytest.param(None, marks=slow)])
@pytest.mark.parametrize(
    ("num_rows", "num_cells", "k"), [(1, 1, 1), (3, 5, 10), (17, 127, 2), pytest.param(1, 1000, 32, marks=slow)]
)
def test_rows_give_the_posterior_of_float64(num_rows: int, num_cells: int, k: int, tile_cells: int | None) -> None:
    logit, xyz = 3 * random_numbers(num_rows, num_cells, seed=0), unit_vectors(num_cells)
    assert_is_posterior(rows_topk(logit, xyz, k, tile_cells=tile_cells), logit.double(), xyz, k)


@KERNELS
@pytest.mark.parametrize(("num_rows", "num_cells", "dim", "k", "dtype"), SIZES)
def test_features_give_the_posterior_of_float64_and_of_equals_the_lowest_ids(
    num_rows: int, num_cells: int, dim: int, k: int, dtype: torch.dtype, kernel: Kernel
) -> None:
    feature, scale, weight, bias, xyz = head(num_rows, num_cells, dim)
    answer = kernel(feature.to(dtype), scale, weight.to(dtype), bias, xyz, k, 1 / TEMPERATURE, tiles=TILES)
    assert_is_posterior(answer, exact_logits(feature, scale, weight, bias), xyz, k)


@KERNELS
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(d, marks=slow) for d in (torch.float16, torch.float32))]
)
def test_logits_are_never_rounded_to_the_type_of_the_features(dtype: torch.dtype, kernel: Kernel) -> None:
    feature, scale, weight, bias, xyz = head(3, 129, 200, random_numbers)
    feature, weight = feature.to(dtype), weight.to(dtype)
    answer = kernel(feature, scale, weight, bias, xyz, 10, 1 / TEMPERATURE, tiles=TILES)
    assert_is_posterior(answer, exact_logits(feature, scale, weight, bias), xyz, 10, logit_error=3e-6)


@KERNELS
@pytest.mark.parametrize("k", [5, pytest.param(32, marks=slow)])
def test_of_cells_in_another_order_the_lowest_ids_come_first(k: int, kernel: Kernel) -> None:
    feature, scale, weight, bias, xyz = head(2, 300, 8)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(4))
    expected = kernel(feature, scale, weight, bias, xyz, k, 2.0, tiles=TILES)
    found = kernel(feature, scale, weight[order], bias[order], xyz[order], k, 2.0, order, tiles=TILES)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert any(len(row.unique()) < k for row in expected[1])
    shuffled = rows_topk(exact_logits(feature, scale, weight, bias).float()[:, order], xyz[order], k, order)
    assert torch.equal(shuffled[0], expected[0])


@KERNELS
def test_cells_that_are_all_equal_and_in_any_order_have_the_lowest_ids(kernel: Kernel) -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    equal: Any = (torch.ones(1, 8), torch.ones(1), torch.ones(200, 8), None, None, 3, 1.0)
    assert kernel(*equal, order, tiles=TILES)[0].tolist() == [[0, 1, 2]]


@KERNELS
def test_cells_that_are_all_equal_are_the_first_ones(kernel: Kernel) -> None:
    feature, xyz = torch.ones(1, 8), unit_vectors(200)
    answer = kernel(feature, torch.ones(1), torch.ones(200, 8), torch.zeros(200), xyz, 11, 1.0, tiles=TILES)
    assert torch.equal(answer[0], torch.arange(11)[None])
    assert_is_posterior(answer, torch.full((1, 200), 8.0, dtype=torch.float64), xyz, 11)


@pytest.mark.parametrize("num_parts", [2, pytest.param(1, marks=slow), pytest.param(100, marks=slow)])
def test_parts_are_merged_to_what_one_program_finds(num_parts: int) -> None:
    arguments: Any = (*head(2, 250, 24), 6, 1 / TEMPERATURE)
    expected = fused_topk(*arguments, tiles=TILES)
    found = fused_topk(*arguments, tiles=TILES, num_parts=num_parts)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for part in (2, 3, 4):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=1e-6)


@KERNELS
@pytest.mark.parametrize("num_rows", [1, 3])
def test_without_vectors_the_best_of_a_bank_are_found(num_rows: int, kernel: Kernel) -> None:
    query, _, bank, _, _ = head(num_rows, 129, 24)
    ids, score, *rest = kernel(query, torch.ones(num_rows), bank, None, None, 5, 1.0, tiles=TILES)
    best = (query.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, best.indices[:, :5])
    assert torch.equal(score.double(), best.values[:, :5])
    assert [len(part) for part in rest] == [0, 0, 0]


@KERNELS
@pytest.mark.parametrize("with_vectors", [True, False])
@pytest.mark.parametrize("value", [math.inf, *(pytest.param(x, marks=slow) for x in (math.nan, -math.inf))])
def test_a_row_that_is_not_finite_has_no_cells_and_changes_no_other(
    value: float, with_vectors: bool, kernel: Kernel
) -> None:
    feature, scale, weight, bias, xyz = head(3, 70, 24)
    rest: Any = (scale, weight, bias, xyz if with_vectors else None, 3, 2.0)
    expected = kernel(feature, *rest, tiles=TILES)
    feature[[0, 2], 7] = value
    found = kernel(feature, *rest, tiles=TILES)
    is_bad = torch.tensor([True, False, True])
    assert (found[0][is_bad] == -1).all()
    for part, other in zip(found, expected, strict=True):
        if len(part):
            assert torch.equal(part[~is_bad], other[~is_bad])
            assert part[is_bad].isnan().all() or part.dtype == torch.int64


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_of_logits_that_is_not_finite_has_no_cells(value: float) -> None:
    logit = random_numbers(3, 70, seed=0)
    logit[1, 69] = value
    ids, *rest = rows_topk(logit, unit_vectors(70), 5, tile_cells=32)
    assert ids[1].tolist() == [-1] * 5
    for part in rest:
        assert part[1].isnan().all()
        assert part[::2].isfinite().all()


@slow
def test_sums_over_many_tiles_lose_nothing() -> None:
    num_cells = 30_000
    logit, xyz = random_numbers(1, num_cells, seed=0), unit_vectors(num_cells)
    # Added in float32 alone, these would be off by 4e-7.
    xyz = xyz.abs()
    _, _, lse, mean, _ = rows_topk(logit, xyz, 1, tile_cells=16)
    prob = logit.double().softmax(dim=1)
    torch.testing.assert_close(mean, prob @ xyz.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(lse.double(), logit.double().logsumexp(dim=1), rtol=0, atol=1e-6)


def test_logits_far_apart_give_a_certain_cell() -> None:
    logit = torch.tensor([[-3e38, 3e38, 0.0], [-1e4, -1e4 + 200, -2e4], [0.0, -150.0, -1e30]])
    xyz = unit_vectors(3)
    ids, _, lse, mean, entropy = rows_topk(logit, xyz, 3, tile_cells=16)
    assert ids.tolist() == [[1, 2, 0], [1, 0, 2], [0, 1, 2]]
    assert torch.equal(lse, logit.amax(dim=1))
    torch.testing.assert_close(mean, xyz.double()[[1, 1, 0]], rtol=0, atol=1e-7)
    assert (entropy < 1e-30).all()


def test_rows_do_not_depend_on_each_other() -> None:
    feature, *rest = head(5, 100, 8, random_numbers)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    rest[0] = torch.ones(5)
    for kernel in (fused_topk, three_parts):
        one, other = (kernel(rows, *rest, 3, 1.0, tiles=TILES) for rows in (feature, feature[order]))
        for part, shuffled in zip(one, other, strict=True):
            assert torch.equal(part[order], shuffled)


def test_rows_in_any_layout_give_the_same() -> None:
    feature, scale, weight, bias, xyz = head(3, 50, 13)
    logit = exact_logits(feature, scale, weight, bias)
    wide = torch.full((50, 40), math.nan)
    wide[:, 3:16] = weight
    for rows, cells in ((feature, weight), (feature.T.contiguous().T, weight), (feature, wide[:, 3:16])):
        answer = fused_topk(rows, scale, cells, bias, xyz, 2, 1 / TEMPERATURE, tiles=TILES)
        assert_is_posterior(answer, logit, xyz, 2)
    answer = rows_topk(logit.float().T.contiguous().T, xyz, 2)
    assert_is_posterior(answer, logit, xyz, 2)


def test_cells_packed_before_give_the_same() -> None:
    feature, scale, weight, bias, xyz = head(3, 50, 8)
    cells = pack_cells(50, bias, xyz, None)
    one = fused_topk(feature, scale, weight, bias, xyz, 4, 1.0, tiles=TILES, num_parts=None)
    other = fused_topk(feature, scale, weight, bias, xyz, 4, 1.0, cells=cells, tiles=TILES, num_parts=None)
    for part, again in zip(one, other, strict=True):
        assert torch.equal(part, again)


@KERNELS
def test_a_bias_that_makes_a_logit_overflow_gives_no_cell(kernel: Kernel) -> None:
    feature, scale, weight, bias, xyz = head(3, 50, 8)
    bias[7], feature[1], weight[7], scale[1] = 3e38, 1.0, 2e37, 1.0
    ids, logit, *rest = kernel(feature, scale, weight, bias, xyz, 3, 1.0, tiles=TILES)
    assert ids[1].tolist() == [-1] * 3
    assert all(part[1].isnan().all() for part in (logit, *rest))


@KERNELS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bias_that_is_no_number_leaves_no_row_an_answer(kernel: Kernel, value: float) -> None:
    feature, scale, weight, bias, xyz = head(3, 50, 8)
    bias[31] = value
    ids, logit, *rest = kernel(feature, scale, weight, bias, xyz, 3, 1.0, tiles=TILES)
    assert (ids == -1).all()
    assert all(part.isnan().all() for part in (logit, *rest))


@pytest.mark.parametrize("num_features", [1, 24, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_scale_of_rows_is_that_of_layer_norm(num_features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_features)
    feature = (1000 + 3 * torch.randn(num_features, 5, generator=generator)).to(dtype).T
    feature[1, 0] = torch.nan
    torch.testing.assert_close(
        triton_scale.row_scale(feature, 1e-5), fold.row_scale(feature, 1e-5), rtol=2e-7, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        triton_scale.normed_rows(feature, 1e-5), fold.normed_rows(feature, 1e-5), rtol=1e-6, atol=1e-9, equal_nan=True
    )
    assert triton_scale.row_scale(feature[:0], 1e-5).shape == (0,)


def test_no_rows_are_no_rows() -> None:
    feature, scale, weight, bias, xyz = head(0, 5, 8)
    for answer in (
        rows_topk(torch.zeros(0, 5), xyz, 9),
        fused_topk(feature, scale, weight, bias, xyz, 9, 1.0),
        fused_topk(feature, scale, weight, bias, xyz, 9, 1.0, num_parts=None),
    ):
        assert [tuple(part.shape) for part in answer] == [(0, 5), (0, 5), (0,), (0, 3), (0,)]


def test_misuse_is_named() -> None:
    feature, scale, weight, bias, xyz = head(2, 5, 8)
    with pytest.raises(ValueError, match="from 1 to 32 cells, not 33"):
        fused_topk(feature, scale, weight, bias, xyz, 33, 1.0)
    with pytest.raises(ValueError, match="at least one cell"):
        rows_topk(torch.zeros(2, 0), xyz[:0], 1)
    with pytest.raises(ValueError, match=r"float32 logits, got torch\.float16"):
        rows_topk(torch.zeros(2, 5).half(), xyz, 1)
    with pytest.raises(ValueError, match=r"features are torch\.float16 and weights torch\.float32"):
        fused_topk(feature.half(), scale, weight, bias, xyz, 1, 1.0, num_parts=None)
