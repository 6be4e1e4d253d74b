"""head_topk against plain float64: ids, ties, chunks, types, borders, rows that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_samples import (
    assert_close,
    assert_only_bad,
    assert_same,
    exact_logits,
    exact_topk,
    make_features,
    make_head,
    make_twins,
    make_xyz,
    same_bits,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geoloc_kernels import posterior
from geoloc_kernels.head import head_definition, head_logits, head_topk, prepare_head
from geoloc_kernels.posterior import HeadTopk, posterior_topk

SIZES = [(1, 1, 1, 1), (3, 5, 8, 10), (17, 127, 24, 5), (2, 1000, 200, 32), (300, 129, 51, 7), (5, 1025, 16, 40)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few cells, tiles of a few rows."""
    monkeypatch.setattr(posterior, "_CHUNK_LOGITS", 56)
    monkeypatch.setattr(posterior, "_ROWS_AT_ONCE", 8)


@pytest.mark.parametrize(("num_rows", "num_cells", "dim", "k"), SIZES)
def test_a_head_says_what_float64_says(num_rows: int, num_cells: int, dim: int, k: int) -> None:
    head, feature = make_head(num_cells, dim), make_features(num_rows, dim)
    found = head_topk(feature, *head, k)
    assert [part.dtype for part in found] == [torch.int64, torch.float32, torch.float64, torch.float64, torch.float32]
    assert found.id_BK.shape == (num_rows, min(k, num_cells))
    assert_same(found, feature, head, k)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("k", [1, 7, 60, 200])
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_chunks_of_cells_and_of_rows_make_no_difference(k: int, is_shuffled: bool) -> None:
    head, feature = make_head(131, 24), make_features(19, 24)
    assert len(list(posterior.cell_chunks(8, 131, 7))) > 10
    assert_same(prepare_head(*head, is_shuffled=is_shuffled).topk(feature, k), feature, head, k)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_equals_come_in_ascending_order_of_their_original_ids(is_shuffled: bool) -> None:
    # Of the best equals some are left out.
    weight = make_twins(97, 12, torch.Generator().manual_seed(0))
    head = weight, torch.zeros(97), make_xyz(97)
    feature = make_features(9, 12)
    found = prepare_head(*head, is_shuffled=is_shuffled).topk(feature, 7)
    logit = head_logits(feature, *head[:2])
    assert torch.equal(found.id_BK, exact_topk(logit.double(), head[2], 7).id_BK)
    nothing = torch.zeros_like(head[0]), torch.zeros(97), head[2]
    assert (prepare_head(*nothing, is_shuffled=is_shuffled).topk(feature, 9).id_BK == torch.arange(9)).all()


@pytest.mark.parametrize("k", [1, 5])
def test_the_posterior_of_a_heads_logits_is_the_heads_to_the_bit(k: int) -> None:
    head, feature = make_head(1898, 64), make_features(300, 64)
    logit = head_logits(feature, *head[:2], k=k)
    assert same_bits(posterior_topk(logit, head[2], k), head_topk(feature, *head, k))
    assert torch.equal(prepare_head(*head, is_shuffled=True).logits(feature, k=k), logit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_and_weights_are_taken_for_what_they_are(dtype: torch.dtype) -> None:
    weight, bias, xyz = make_head(37, 48)
    feature, half = make_features(9, 48).to(dtype), weight.to(dtype)
    for weights in (weight, half):
        assert_same(head_topk(feature, weights, bias, xyz, 5), feature, (weights, bias, xyz), 5)
    # Half weights have no mean of exactly zero. From float32 rows their own is taken off first.
    centred = feature.double() - feature.double().mean(dim=1, keepdim=True)
    assert_same(head_topk(feature.float(), half, bias, xyz.float(), 5), centred, (half, bias, xyz), 5)
    logit = head_logits(feature, weight, bias).to(dtype)
    assert_close(posterior_topk(logit, xyz, 5), exact_topk(logit.double(), xyz, 5))


def test_memory_layout_does_not_count() -> None:
    head, feature = make_head(130, 48), make_features(70, 48)
    expected = head_topk(feature, *head, 5)
    wide = torch.zeros(70, 96)
    wide[:, ::2] = feature
    for rows in (feature.T.contiguous().T, wide[:, ::2]):
        assert same_bits(head_topk(rows, *head, 5), expected)
    turned = [part.T.contiguous().T if part.ndim == 2 else part.repeat_interleave(2)[::2] for part in head]
    assert_close(head_topk(feature, *turned, 5), expected)
    logit = head_logits(feature, *head[:2])
    assert same_bits(posterior_topk(logit.T.contiguous().T, head[2], 5), posterior_topk(logit, head[2], 5))


def test_given_tensors_are_left_as_they_are() -> None:
    weight, bias, xyz = make_head(130, 48)
    feature = make_features(3, 48)
    logit = head_logits(feature, weight, bias)
    before = [part.clone() for part in (feature, weight, bias, xyz, logit)]
    head_topk(feature, weight, bias, xyz, 5)
    posterior_topk(logit, xyz, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, (feature, weight, bias, xyz, logit), strict=True))


def test_no_rows_give_nothing_in_the_shape_of_something() -> None:
    head = make_head(37, 48)
    none, one = head_topk(torch.empty(0, 48), *head, 5), head_topk(torch.ones(1, 48), *head, 5)
    for empty, full in zip(none, one, strict=True):
        assert (empty.shape, empty.dtype) == ((0, *full.shape[1:]), full.dtype)
    assert posterior_topk(torch.empty(0, 37), head[2], 5).id_BK.shape == (0, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2, 69])
def test_a_row_of_features_that_is_not_finite_gets_no_cell_and_the_others_theirs(bad: float, row: int) -> None:
    head, feature = make_head(130, 48), make_features(70, 48)
    expected = head_topk(feature, *head, 5)
    feature[row, 17] = bad
    assert_only_bad(head_topk(feature, *head, 5), expected, row)


@pytest.mark.parametrize("scale", [1e-12, 1e6, 1e19, 1e30])
def test_features_of_any_size_are_told_by_their_direction(scale: float) -> None:
    head, feature = make_head(37, 48), make_features(6, 48)
    found = head_topk(feature * scale, *head, 5)
    assert_same(found, feature.double() * scale, head, 5)
    if scale > 1:
        huge = (feature.bfloat16().double() * scale).bfloat16()
        assert_same(head_topk(huge, *head, 5), huge, head, 5)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0, 1e4])
def test_temperature_divides_the_logits(temperature: float) -> None:
    head, feature = make_head(37, 48), make_features(6, 48)
    found = head_topk(feature, *head, 5, temperature=temperature)
    expected = exact_topk(exact_logits(feature, *head[:2], temperature), head[2], 5)
    assert torch.equal(found.id_BK, expected.id_BK)
    assert_close(found, expected, times=max(1 / temperature, 1))


def test_a_row_is_the_same_to_the_bit_whatever_comes_with_it() -> None:
    head, feature = make_head(1025, 33), make_features(64, 33)
    expected = head_topk(feature, *head, 7)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = head_topk(feature[order] * torch.where(order == 5, 1e9, 1.0)[:, None], *head, 7)
    kept = order != 5
    assert same_bits(HeadTopk(*(part[kept] for part in found)), HeadTopk(*(part[order][kept] for part in expected)))


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple) else (made,):
            if isinstance(each, Tensor) and not func.is_view:
                self.num_bytes = max(self.num_bytes, each.numel() * each.element_size())
        return made


def test_no_temporary_grows_with_the_number_of_cells() -> None:
    weight, bias, xyz = make_head(50_000, 8)
    with LargestTensor() as largest:
        head_definition(make_features(512, 8), weight, bias, xyz, None, 10, 1.0, 1e-5, ())
    # All logits of 512 rows would be 100 MB.
    assert largest.num_bytes <= 4 << 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_BD": torch.ones(2, 5)}, r"do not fit together: they must be \[B, D\], \[C, D\] and \[C\]"),
        ({"feature_BD": torch.ones(4)}, r"feature_BD must have 2 dimensions"),
        ({"feature_BD": torch.ones(2, 4).double()}, r"feature_BD must .* got \[2, 4\] of torch.float64"),
        ({"bias_C": torch.ones(2)}, "do not fit together"),
        ({"xyz_C3": torch.ones(2, 3)}, r"xyz_C3 must be \[3, 3\] of a float type, got \[2, 3\]"),
        ({"xyz_C3": torch.ones(3, 3).long()}, "of a float type"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"id_C": torch.arange(2)}, r"id_C must be \[3\] int64"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {
        "feature_BD": torch.ones(2, 4),
        "weight_CD": torch.ones(3, 4),
        "bias_C": torch.ones(3),
        "xyz_C3": make_xyz(3),
        "k": 1,
    }
    with pytest.raises(ValueError, match=words):
        head_topk(**(given | change))


def test_ids_and_cells_that_belong_to_another_head_are_refused() -> None:
    feature, weight, bias, xyz = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 3)
    with pytest.raises(ValueError, match="id_C is on meta"):
        head_topk(feature, weight, bias, xyz, 1, id_C=torch.zeros(3, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="packed has 2 cells on cpu, the weight 3"):
        head_topk(feature, weight, bias, xyz, 1, packed=(torch.zeros(4, 2), torch.zeros(2)))
