"""A head at work: the published quick start's numbers, ties, borders, and what rows may depend on."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import locate_samples as samples
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoloc_batch.geo.located import Located
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, haversine_km, unit_vectors
from geoloc_batch.locate.head import HeadLocator
from geoloc_kernels.fold import fold_layer_norm
from geoloc_kernels.head import head_topk

SIZES = [(1, 5), (2, 1), (3, 64), (37, 48), (63, 51), (129, 1024), (1025, 33), (1898, 1024)]


@pytest.mark.parametrize(("num_cells", "dim"), SIZES)
def test_answers_are_those_of_the_published_quick_start(num_cells: int, dim: int) -> None:
    # Logits of standard deviation 1.5: larger ones round by more than the tolerance in float32, there as here.
    state = samples.make_state(num_cells, dim, sharpness=1.5 / dim**0.5)
    features = samples.make_features(71, dim)
    k = min(5, num_cells)
    prob_BK, cell_BK = samples.quick_start(state, features, k)
    located = HeadLocator(samples.head_of(state), samples.make_partition(num_cells)).locate(features)
    np.testing.assert_allclose(located.topk_prob, prob_BK.numpy(), rtol=0, atol=1e-6)
    # Where two cells are as probable as each other to rounding, either may come first.
    all_BK = samples.quick_start(state, features, min(k + 1, num_cells))[0].numpy()
    apart = np.abs(np.diff(all_BK, axis=1, prepend=2, append=-1)) > 2e-6
    assert (located.topk_cell == cell_BK.numpy())[(apart[:, 1:] & apart[:, :-1])[:, :k]].all()
    assert apart.mean() > 0.9 or dim == 1


@pytest.mark.parametrize(("num_cells", "dim"), SIZES)
def test_a_sharp_head_is_no_further_from_the_truth_than_the_quick_start(num_cells: int, dim: int) -> None:
    state, features = samples.make_state(num_cells, dim), samples.make_features(300, dim)
    k = min(5, num_cells)
    exact, _ = samples.quick_start({name: tensor.double() for name, tensor in state.items()}, features.double(), k)
    theirs, _ = samples.quick_start(state, features, k)
    ours = samples.make_locator(num_cells, dim).locate(features).topk_prob
    their_error = float((theirs - exact).abs().max())
    assert np.abs(ours - exact.numpy()).max() < 2 * their_error + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_float_type_are_taken_for_what_they_are(dtype: torch.dtype) -> None:
    features = samples.make_features(9, 48).to(dtype)
    locator = samples.make_locator(37, 48)
    assert samples.same_bits(locator.locate(features), locator.locate(features.float()))


def test_features_are_taken_as_they_are_not_normalised() -> None:
    # LayerNorm's epsilon tells large from small only where the features are tiny.
    features = 1e-3 * samples.make_features(5, 48)
    prob_BK, cell_BK = samples.quick_start(samples.make_state(37, 48), features, 5)
    located = samples.make_locator(37, 48).locate(features)
    assert (located.topk_cell == cell_BK.numpy()).all()
    np.testing.assert_allclose(located.topk_prob, prob_BK.numpy(), rtol=0, atol=1e-6)
    unit = torch.nn.functional.normalize(features)
    assert np.abs(samples.make_locator(37, 48).locate(unit).topk_prob - located.topk_prob).max() > 1e-3


def test_mean_entropy_and_spread_are_those_of_the_whole_posterior() -> None:
    state, partition = samples.make_state(63, 51, sharpness=0.3), samples.make_partition(63)
    features = samples.make_features(40, 51)
    prob_BK, cell_BK = samples.quick_start(state, features, 63)
    prob_BC = torch.zeros(40, 63).scatter(1, cell_BK, prob_BK).double().numpy()
    vector_B3 = prob_BC @ unit_vectors(partition.centroids_deg) / prob_BC.sum(axis=1, keepdims=True)
    length_B = np.linalg.norm(vector_B3, axis=1)
    x, y, z = vector_B3.T
    mean_B2 = np.degrees(np.stack([np.arcsin(z / length_B), np.arctan2(y, x)], axis=1))
    located = HeadLocator(samples.head_of(state), partition, top_k=2).locate(features)
    assert haversine_km(located.mean_deg, mean_B2).max() < 0.05
    np.testing.assert_allclose(located.spread_km, EARTH_RADIUS_KM * np.sqrt(-2 * np.log(length_B)), rtol=1e-4)
    np.testing.assert_allclose(located.entropy, -(prob_BC * np.log(prob_BC)).sum(axis=1), atol=1e-5)
    assert located.topk_cell.shape == (40, 2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("num_cells", "dim"), [(1, 5), (37, 48), (1025, 33), (1898, 1024)])
def test_a_row_is_the_same_to_the_bit_whatever_comes_with_it(num_cells: int, dim: int, threads: int) -> None:
    locator = samples.make_locator(num_cells, dim, top_k=7, position="mean")
    features = samples.make_features(131, dim)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = locator.locate(features)
        for start, end in [(0, 1), (130, 131), (5, 8), (60, 70), (3, 66), (0, 64), (1, 66), (2, 130)]:
            assert samples.same_bits(locator.locate(features[start:end]), whole.take(np.arange(start, end)))
        order = np.random.default_rng(0).permutation(131)
        assert samples.same_bits(locator.locate(features[torch.from_numpy(order)]), whole.take(order))
        # Neither do memory layout or rows of another size beside it count.
        assert samples.same_bits(locator.locate(features.T.contiguous().T), whole)
        wild = torch.cat([1e6 * features[:3], features[50:51]])
        assert samples.same_bits(locator.locate(wild).take(np.array([3])), whole.take(np.array([50])))
    finally:
        torch.set_num_threads(before)


def test_the_device_is_waited_for_once_however_many_blocks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    real = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: copies.append(len(tensor)) or real(tensor))
    samples.make_locator(37, 48).locate(samples.make_features(200, 48))
    assert copies == [200]


@pytest.mark.parametrize("position", ["top1", "mean"])
def test_a_row_without_finite_logits_has_no_cell_and_no_place(position: Any) -> None:
    # So sharp that about every other row overflows.
    state, features = samples.make_state(37, 48, sharpness=2e37), samples.make_features(70, 48)
    locator = HeadLocator(samples.head_of(state), samples.make_partition(37), position=position)
    located = locator.locate(features)
    bad_B = ~np.isfinite(located.topk_prob).all(axis=1)
    assert 0 < bad_B.sum() < 70
    assert (located.topk_cell[bad_B] == -1).all()
    assert (located.topk_cell[~bad_B] >= 0).all()
    for name in ("position_deg", "mean_deg", "topk_prob", "spread_km", "entropy"):
        assert (np.isnan(getattr(located, name).reshape(70, -1)).any(axis=1) == bad_B).all(), name


@pytest.mark.parametrize("position", ["top1", "mean"])
def test_no_rows_give_no_places_in_the_shape_of_some(position: Any) -> None:
    locator = samples.make_locator(37, 48, top_k=3, position=position)
    nothing, one = locator.locate(torch.empty(0, 48)), locator.locate(torch.ones(1, 48))
    assert len(nothing) == 0
    for each in fields(Located):
        empty, full = getattr(nothing, each.name), getattr(one, each.name)
        assert (empty.shape, empty.dtype) == ((0, *full.shape[1:]), full.dtype)
    assert samples.same_bits(Located.concatenate([nothing, one, nothing]), one)


def test_types_are_those_of_the_tables() -> None:
    located = samples.make_locator(37, 48).locate(samples.make_features(3, 48))
    types = {each.name: str(getattr(located, each.name).dtype) for each in fields(Located)}
    assert types == {
        "position_deg": "float64",
        "topk_cell": "int32",
        "topk_prob": "float32",
        "mean_deg": "float64",
        "spread_km": "float32",
        "entropy": "float32",
    }


def test_more_cells_asked_for_than_there_are_gives_all_of_them() -> None:
    located = samples.make_locator(3, 64, top_k=50).locate(samples.make_features(11, 64))
    assert located.topk_cell.shape == (11, 3)
    assert (np.sort(located.topk_cell, axis=1) == [0, 1, 2]).all()
    np.testing.assert_allclose(located.topk_prob.sum(axis=1), 1, rtol=1e-6)


def test_a_single_cell_is_certain() -> None:
    located = samples.make_locator(1, 5, position="mean").locate(samples.make_features(4, 5))
    assert (located.topk_prob == 1).all()
    assert (located.topk_cell == 0).all()
    assert (located.entropy == 0).all()
    assert not np.signbit(located.entropy).any()
    assert located.spread_km.max() < 0.001
    assert haversine_km(located.position_deg, samples.make_partition(1).centroids_deg).max() < 1e-6


@pytest.mark.parametrize("num_cells", [2, 65, 1000])
def test_equals_come_in_ascending_order_of_id(num_cells: int) -> None:
    locator = samples.posterior_of([0.0] * num_cells, samples.make_partition(num_cells).centroids_deg, top_k=num_cells)
    located = locator.locate(samples.make_features(66, 3))
    assert (located.topk_cell == np.arange(num_cells)).all()
    np.testing.assert_allclose(located.entropy, math.log(num_cells), rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.sampled_from([-3.0, -0.5, -0.0, 0.0, 1e-30, 0.5, 2.0, 30.0]) | st.floats(-40, 40, width=32),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 45),
)
def test_the_best_cells_are_a_stable_sort_of_all(logits: list[float], k: int) -> None:
    locator = samples.posterior_of(logits, samples.make_partition(len(logits)).centroids_deg, top_k=k)
    located = locator.locate(samples.make_features(2, 3))
    # The bias is the logit but for LayerNorm's shift, which a weight of zero takes away.
    expected = np.argsort(-np.array(logits, dtype=np.float32), kind="stable")[:k]
    assert located.topk_cell[0].tolist() == expected.tolist()
    assert (np.diff(located.topk_prob, axis=1) <= 0).all()
    assert located.topk_prob.min() >= 0
    assert 0 <= located.entropy[0] <= math.log(len(logits)) + 1e-5
    assert 0 <= located.spread_km[0] <= math.pi * EARTH_RADIUS_KM * (1 + 1e-6)
    assert np.isfinite(located.mean_deg).all()


def test_values_whose_squares_overflow_are_located_all_the_same() -> None:
    locator = samples.make_locator(37, 48)
    features = samples.make_features(6, 48)
    expected = locator.locate(features.double() * 1e6)
    for scale in (1e18, 1e20, 1e30, 3e37):
        located = locator.locate(features * scale)
        assert (located.topk_cell == expected.topk_cell).all()
        np.testing.assert_allclose(located.topk_prob, expected.topk_prob, atol=1e-5)
        assert np.isfinite(located.mean_deg).all()


def test_a_large_common_offset_cancels_in_the_layer_norm() -> None:
    locator = samples.make_locator(37, 48)
    features = (samples.make_features(6, 48) * 8).round() / 8
    np.testing.assert_allclose(locator.locate(features + 4096).topk_prob, locator.locate(features).topk_prob, atol=1e-6)


@pytest.mark.parametrize("position", ["top1", "mean"])
@pytest.mark.parametrize(
    "centroids",
    [[(0, 0), (0, 180)], [(90, 0), (-90, 0)], [(0, 0), (0, 120), (0, -120)], [(40, 10), (-40, -170)]],
    ids=["equator", "poles", "three", "antipodes"],
)
def test_where_the_posterior_cancels_the_mean_is_the_best_cell(centroids: list[Any], position: Any) -> None:
    located = samples.posterior_of([0.0] * len(centroids), centroids, position=position).locate(torch.ones(1, 3))
    assert located.mean_deg[0].tolist() == list(centroids[0])
    assert located.position_deg[0].tolist() == list(centroids[0])
    assert located.spread_km[0] == pytest.approx(math.pi * EARTH_RADIUS_KM, rel=1e-6)


def test_spread_is_the_root_mean_square_distance_of_a_narrow_posterior() -> None:
    # Two cells as probable as each other, each 50 km from the mean.
    degrees = math.degrees(50 / EARTH_RADIUS_KM)
    located = samples.posterior_of([1.0, 1.0], [(degrees, 7), (-degrees, 7)]).locate(torch.ones(1, 3))
    assert located.spread_km[0] == pytest.approx(50, rel=1e-4)
    np.testing.assert_allclose(located.mean_deg, [[0, 7]], atol=1e-6)
    # At a right angle the resultant has the length sqrt(1/2), so that the angle is sqrt(ln 2).
    located = samples.posterior_of([1.0, 1.0], [(0, 0), (0, 90)]).locate(torch.ones(1, 3))
    assert located.spread_km[0] == pytest.approx(EARTH_RADIUS_KM * math.sqrt(math.log(2)), rel=1e-6)


def test_a_posterior_over_one_place_has_no_spread_however_its_probabilities_round() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 1000).tolist()
    located = samples.posterior_of(logits, [(47.3, 8.5)] * 1000).locate(torch.ones(1, 3))
    # An error of 1e-7 in the sum of the probabilities alone would make 3 km.
    assert located.spread_km[0] < 0.001
    assert haversine_km(located.mean_deg[0], (47.3, 8.5)) < 1e-6


def test_position_is_the_best_cell_or_the_mean() -> None:
    # Probabilities 3/7 and 4/7 on perpendicular vectors: the mean stands at atan(4/3).
    logits, centroids = [math.log(3), math.log(4)], [(0, 0), (0, 90)]
    top1 = samples.posterior_of(logits, centroids).locate(torch.ones(1, 3))
    mean = samples.posterior_of(logits, centroids, position="mean").locate(torch.ones(1, 3))
    assert top1.position_deg.tolist() == [[0, 90]]
    assert top1.topk_cell.tolist() == [[1, 0]]
    np.testing.assert_allclose(mean.position_deg, [[0, math.degrees(math.atan2(4, 3))]], atol=1e-5)
    assert (mean.position_deg == mean.mean_deg).all()
    assert (mean.mean_deg == top1.mean_deg).all()
    np.testing.assert_allclose(top1.topk_prob, [[4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_allclose(top1.entropy, -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7)), rtol=1e-6)


def test_a_mean_across_the_antimeridian_lies_on_it() -> None:
    located = samples.posterior_of([0.0, 0.0], [(10, 179), (10, -179)], position="mean").locate(torch.ones(1, 3))
    assert abs(located.position_deg[0, 1]) == pytest.approx(180)
    assert located.spread_km[0] == pytest.approx(109.5, rel=0.01)


def test_temperature_divides_the_logits() -> None:
    weight, bias = fold_layer_norm(torch.ones(3), torch.zeros(3), torch.zeros(2, 3), torch.tensor([0.0, 2.0]))
    xyz = torch.from_numpy(unit_vectors([(0, 0), (0, 90)]))
    posterior = head_topk(torch.ones(1, 3), weight, bias, xyz, 2, temperature=4.0)
    odds = math.exp(0.5)
    prob_BK = (posterior.logit_BK - posterior.lse_B[:, None]).exp()
    np.testing.assert_allclose(prob_BK, [[odds / (1 + odds), 1 / (1 + odds)]], rtol=1e-6)
    assert posterior.id_BK.tolist() == [[1, 0]]
    # A logit that vanishes from below is as large as one that vanishes from above.
    posterior = head_topk(torch.ones(1, 3), weight, torch.tensor([-1e-30, 1e-30]), xyz, 2, temperature=1e30)
    assert posterior.id_BK.tolist() == [[0, 1]]


def test_a_folded_head_gives_the_same_logits_with_one_scale_afterwards() -> None:
    state = {name: tensor.double() for name, tensor in samples.make_state(37, 48).items()}
    features = samples.make_features(20, 48).double()
    weight, bias = fold_layer_norm(*(state[name] for name in sorted(state, key=list(state).index)))
    scale = (features.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    ours = features @ weight.double().T / scale + bias.double()
    normed = torch.nn.functional.layer_norm(features, (48,), state["head.0.weight"], state["head.0.bias"])
    torch.testing.assert_close(ours, normed @ state["head.2.weight"].T + state["head.2.bias"], atol=1e-5, rtol=0)
