"""Views fused: the quick start's mean, the mean of logits, and how far the views agree."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations, pairwise
from typing import Any

import locate_samples as samples
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoloc_batch.geo.located import Located
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.locate import views
from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.locate.views import mean_pairwise_km

CELLS, DIM = 37, 51
RAGGED = [1, 7, 2, 4, 1, 3]


def make_locator(**options: Any) -> HeadLocator:
    state = samples.make_state(CELLS, DIM, sharpness=1.5 / DIM**0.5)
    return HeadLocator(samples.head_of(state), samples.make_partition(CELLS), top_k=CELLS, **options)


def make_views(counts: list[int], seed: int = 1) -> tuple[Tensor, np.ndarray]:
    """Features of very different lengths, as no encoder gives them: whoever normalises them is found out."""
    features = samples.make_features(sum(counts), DIM, seed=seed)
    lengths = torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 5, (len(features), 1))).float()
    return features * lengths, np.cumsum([0, *counts])


def sequential(features: Tensor) -> Tensor:
    """Logits of the published quick start's head."""
    state = samples.make_state(CELLS, DIM, sharpness=1.5 / DIM**0.5)
    layers = torch.nn.Sequential(torch.nn.LayerNorm(DIM), torch.nn.Dropout(0.3), torch.nn.Linear(DIM, CELLS)).eval()
    layers.load_state_dict({name.removeprefix("head."): tensor for name, tensor in state.items()})
    with torch.no_grad():
        answer: Tensor = layers(features)
    return answer


def probabilities(located: Located) -> np.ndarray:
    """[L, C] by cell."""
    dense = np.empty_like(located.topk_prob)
    np.put_along_axis(dense, located.topk_cell.astype(np.intp), located.topk_prob, axis=1)
    return dense


def same_bits(a: Located, b: Located) -> bool:
    return all(getattr(a, each.name).tobytes() == getattr(b, each.name).tobytes() for each in fields(Located))


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_fused_features_are_the_quick_starts_mean_over_views(count: int) -> None:
    features, offset = make_views([count] * 19)
    found = make_locator().locate_views(features, offset)
    expected = sequential(features.reshape(19, count, DIM).mean(dim=1)).softmax(-1)
    np.testing.assert_allclose(probabilities(found.located), expected.numpy(), rtol=0, atol=1e-5)
    assert found.views.num_views.tolist() == [count] * 19


@pytest.mark.parametrize("fusion", ["feature", "logit"])
def test_ragged_locations_get_what_each_would_get_alone(fusion: Any) -> None:
    locator = make_locator(fusion=fusion)
    features, offset = make_views(RAGGED)
    found = locator.locate_views(features, offset)
    for number, views_of_one in enumerate(torch.split(features, RAGGED)):
        if fusion == "feature":
            expected = sequential(views_of_one.mean(dim=0, keepdim=True)).softmax(-1)
        else:
            expected = sequential(views_of_one).mean(dim=0, keepdim=True).softmax(-1)
        np.testing.assert_allclose(probabilities(found.located)[number], expected[0].numpy(), rtol=0, atol=1e-5)
        alone = locator.locate_views(views_of_one, np.array([0, len(views_of_one)]))
        assert same_bits(alone.located, found.located.take(np.array([number])))


def test_the_two_fusions_differ_and_a_single_view_is_what_the_photo_alone_gives() -> None:
    features, offset = make_views([3] * 5)
    by_feature, by_logit = (make_locator(fusion=fusion) for fusion in ("feature", "logit"))
    different = probabilities(by_feature.locate_views(features, offset).located) - probabilities(
        by_logit.locate_views(features, offset).located
    )
    assert np.abs(different).max() > 1e-3
    for locator in (by_feature, by_logit):
        single = locator.locate_views(features, np.arange(len(features) + 1))
        assert same_bits(single.located, locator.locate(features))
        assert (single.views.view_km == 0).all()


@pytest.mark.parametrize("fusion", ["feature", "logit"])
def test_the_order_of_the_views_does_not_matter(fusion: Any) -> None:
    locator = make_locator(fusion=fusion)
    features, offset = make_views([7, 7])
    order = np.random.default_rng(3).permutation(7)
    shuffled = torch.cat([features[:7][order], features[7:][order]])
    a, b = (locator.locate_views(rows, offset) for rows in (features, shuffled))
    np.testing.assert_allclose(probabilities(a.located), probabilities(b.located), rtol=0, atol=1e-6)
    np.testing.assert_allclose(a.views.view_km, b.views.view_km, rtol=1e-6)


def test_many_views_go_through_in_turns_and_a_location_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    locator = make_locator(fusion="logit", position="mean")
    features, offset = make_views([5, 1, 9, 2, 2, 3, 70, 1])
    at_once = locator.locate_views(features, offset)
    monkeypatch.setattr(views, "_VIEWS_AT_ONCE", 6)
    in_turns = locator.locate_views(features, offset)
    assert same_bits(at_once.located, in_turns.located)
    assert at_once.views.view_km.tobytes() == in_turns.views.view_km.tobytes()


@pytest.mark.parametrize("fusion", ["feature", "logit"])
def test_a_location_of_many_views_holds_the_logits_of_a_few_at_a_time(
    fusion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    locator = make_locator(fusion=fusion)
    held: list[int] = []
    real = locator.joined
    monkeypatch.setattr(locator, "joined", lambda logits: held.append(len(logits[0])) or real(logits))
    monkeypatch.setattr(views, "_VIEWS_AT_ONCE", 64)
    features, offset = make_views([3, 500, 2])
    found = locator.locate_views(features, offset)
    # Where features are fused, nobody needs them, and the op keeps none.
    assert sum(held) == (505 + 3 if fusion == "logit" else 0)
    assert max(held, default=0) <= 64
    logits = [sequential(features[start:stop]) for start, stop in pairwise(offset)]
    if fusion == "logit":
        expected = torch.stack([each.double().mean(dim=0) for each in logits]).softmax(dim=1)
        np.testing.assert_allclose(probabilities(found.located), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("position", ["top1", "mean"])
def test_the_views_agreement_is_the_mean_distance_of_what_each_alone_gives(position: Any) -> None:
    locator = make_locator(position=position)
    features, offset = make_views(RAGGED)
    alone = locator.locate(features).position_deg
    for number, km in enumerate(locator.locate_views(features, offset).views.view_km):
        points = alone[offset[number] : offset[number + 1]]
        pairs = [float(haversine_km(a, b)) for a, b in combinations(points, 2)]
        assert km == pytest.approx(np.mean(pairs) if pairs else 0.0, rel=1e-6)


def test_a_view_without_finite_probabilities_is_named() -> None:
    state = samples.make_state(CELLS, DIM)
    state["head.2.weight"] = torch.where(state["head.2.weight"] > 0, 3e38, -3e38)
    locator = HeadLocator(samples.head_of(state), samples.make_partition(CELLS))
    features, offset = make_views([2, 1, 3])
    expected = np.isfinite(locator.locate(features).topk_prob).all(axis=1)
    assert (locator.locate_views(features, offset).is_sound_V == expected).all()
    assert not expected.all()


def test_no_locations_and_wrong_features_are_answered_like_no_photos_and_wrong_ones() -> None:
    locator = make_locator()
    nothing = locator.locate_views(torch.empty(0, DIM), np.array([0]))
    assert (len(nothing.located), len(nothing.views), nothing.located.topk_prob.shape) == (0, 0, (0, CELLS))
    with pytest.raises(ValueError, match=r"shape \[B, 51\]"):
        locator.locate_views(torch.ones(2, 3), np.array([0, 2]))
    with pytest.raises(ValueError, match="row 1 of the features holds NaN"):
        locator.locate_views(torch.tensor([[1.0] * DIM, [torch.nan] * DIM]), np.array([0, 2]))


places = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@given(st.lists(st.lists(places, min_size=1, max_size=5), max_size=4))
@settings(deadline=None, max_examples=40)
def test_mean_pairwise_distances_are_those_of_all_pairs_one_by_one(groups: list[list[tuple[float, float]]]) -> None:
    points = np.array([point for group in groups for point in group], dtype=np.float64).reshape(-1, 2)
    found = mean_pairwise_km(points, np.cumsum([0, *map(len, groups)]))
    expected = [np.mean([haversine_km(a, b) for a, b in combinations(g, 2)]) if len(g) > 1 else 0.0 for g in groups]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
