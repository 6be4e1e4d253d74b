"""bank_topk: exact search, its ties, types, borders, and queries that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoloc_kernels import posterior
from geoloc_kernels.bank import bank_topk


def make_rows(num_rows: int, dim: int, seed: int) -> Tensor:
    rows = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def exact(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    score = query.double() @ bank.double().T
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return score.gather(1, order), order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_queries", "num_rows", "dim", "k"), [(1, 1, 1, 1), (3, 5, 8, 10), (17, 127, 24, 5), (300, 1000, 200, 32)]
)
def test_the_best_are_those_of_float64(num_queries: int, num_rows: int, dim: int, k: int, dtype: torch.dtype) -> None:
    query, bank = make_rows(num_queries, dim, 0).to(dtype), make_rows(num_rows, dim, 1).to(dtype)
    score, found = bank_topk(query, bank, k)
    expected, order = exact(query, bank, k)
    assert (score.dtype, found.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(score.double(), expected, rtol=0, atol=1e-6)
    apart = (expected[:, 1:] < expected[:, :-1] - 2e-6).all(dim=1)
    assert torch.equal(found[apart][:, :-1], order[apart][:, :-1])
    assert apart.float().mean() > 0.4


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_of_equals_the_lowest_row_comes_first(queries: int, rows: int, k: int, chunk: int, seed: int) -> None:
    # Small whole numbers: products are exact, and most of them stand several times.
    generator = torch.Generator().manual_seed(seed)
    query, bank = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (queries, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior, "_CHUNK_LOGITS", chunk * queries)
        score, found = bank_topk(query, bank, k)
    expected, order = exact(query, bank, k)
    assert torch.equal(found, order)
    assert torch.equal(score.double(), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_finds_nothing_and_the_others_what_they_would(bad: float) -> None:
    query, bank = make_rows(5, 24, 0), make_rows(127, 24, 1)
    expected = bank_topk(query, bank, 6)
    query[2, 7] = bad
    score, found = bank_topk(query, bank, 6)
    assert (found[2] == -1).all()
    assert score[2].isnan().all()
    good = [0, 1, 3, 4]
    assert torch.equal(found[good], expected[1][good])
    assert torch.equal(score[good], expected[0][good])


def test_no_queries_find_nothing_and_layout_does_not_count() -> None:
    query, bank = make_rows(5, 24, 0), make_rows(127, 24, 1)
    score, found = bank_topk(query[:0], bank, 6)
    assert (score.shape, found.shape, score.dtype, found.dtype) == ((0, 6), (0, 6), torch.float32, torch.int64)
    expected = bank_topk(query, bank, 6)
    turned = bank_topk(query.T.contiguous().T, bank.T.contiguous().T, 6)
    assert torch.equal(turned[1], expected[1])
    torch.testing.assert_close(turned[0], expected[0])


@pytest.mark.parametrize(
    ("query", "bank", "k", "words"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), 1, "queries have 3 features and the bank 5"),
        (torch.ones(2, 3), torch.ones(0, 3), 1, "at least one"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, "k must be at least 1, got 0"),
        (torch.ones(3), torch.ones(4, 3), 1, "query_BD must have 2 dimensions"),
        (torch.ones(2, 3), torch.ones(4, 3).double(), 1, "bank_CD must .* of torch.float64"),
    ],
)
def test_what_does_not_fit_together_is_refused(query: Tensor, bank: Tensor, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bank_topk(query, bank, k)
