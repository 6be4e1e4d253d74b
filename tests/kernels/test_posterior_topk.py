"""posterior_topk against plain float64: ids, ties, chunks, logits that are not finite, and such as are far apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import assert_close, assert_only_bad, exact_topk, make_xyz

from geoloc_kernels import posterior
from geoloc_kernels.head import prepare_head
from geoloc_kernels.posterior import posterior_topk


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few cells, tiles of a few rows."""
    monkeypatch.setattr(posterior, "_CHUNK_LOGITS", 56)
    monkeypatch.setattr(posterior, "_ROWS_AT_ONCE", 8)


logits = st.sampled_from([-3.0, -0.5, -0.0, 0.0, 1e-30, 0.5, 2.0, 30.0]) | st.floats(-80, 80, width=32)


@given(
    st.lists(st.lists(logits, min_size=9, max_size=9), min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 9)
)
@settings(deadline=None, max_examples=60)
def test_the_best_of_given_logits_are_a_stable_sort_of_all(rows: list[list[float]], k: int, chunk: int) -> None:
    logit, xyz = torch.tensor(rows, dtype=torch.float32), make_xyz(9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior, "_CHUNK_LOGITS", chunk * len(rows))
        found = posterior_topk(logit, xyz, k)
        bias = logit[0]
        shuffled = prepare_head(torch.zeros(9, 4), bias, xyz, is_shuffled=True).topk(torch.ones(1, 4), k)
    # Adding zero turns -0.0, which a sort may tell from 0.0, into it.
    expected = exact_topk(logit.double() + 0.0, xyz, k)
    assert torch.equal(found.id_BK, expected.id_BK)
    assert torch.equal(found.logit_BK.double(), expected.logit_BK)
    assert_close(found, expected, times=0.1)
    assert (found.entropy_B >= 0).all()
    assert not found.entropy_B.signbit().any()
    assert torch.equal(shuffled.id_BK[0], expected.id_BK[0])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cell", [0, 6, 96])
def test_a_logit_that_is_not_finite_spoils_its_row_in_whatever_chunk_it_is(bad: float, cell: int) -> None:
    logit, xyz = torch.randn(9, 97, generator=torch.Generator().manual_seed(0)), make_xyz(97)
    expected = posterior_topk(logit, xyz, 5)
    logit[3, cell] = bad
    assert_only_bad(posterior_topk(logit, xyz, 5), expected, 3)


@pytest.mark.usefixtures("small_chunks")
def test_logits_as_far_apart_as_float32_allows_are_no_error() -> None:
    logit = torch.full((2, 20), -3e38)
    logit[0, 13], logit[1, 2], logit[1, 19] = 3e38, 5.0, 5.0
    found = posterior_topk(logit, make_xyz(20), 3)
    assert found.id_BK.tolist() == [[13, 0, 1], [2, 19, 0]]
    torch.testing.assert_close(found.entropy_B, torch.tensor([0, math.log(2)]))
    torch.testing.assert_close(found.mean_B3[0], make_xyz(20)[13])


def test_cells_at_one_place_have_their_mean_there_however_probabilities_round() -> None:
    xyz = make_xyz(1).repeat(5000, 1)
    mean = posterior_topk(3 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0)), xyz, 1).mean_B3
    torch.testing.assert_close(mean, xyz[:20], rtol=0, atol=1e-14)


def test_a_head_without_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one cell"):
        posterior_topk(torch.empty(2, 0), torch.empty(0, 3), 1)
