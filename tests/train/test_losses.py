"""The losses of heads: their values by torch's own functions, their gradients by autograd and finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, haversine_km, points_deg, unit_vectors
from geoloc_batch.train.losses import KINDS, HeadLoss, inverse_frequency, smooth_targets

SPECIAL = [(0, 0), (0, 180), (0, -180), (90, 0), (-90, 12), (48.2, 16.4), (48.2, -163.6), (-48.2, -163.6), (10, 179.9)]
points = st.sampled_from(SPECIAL) | st.tuples(st.floats(-90, 90), st.floats(-180, 180))


def problem(num_rows: int, num_cells: int, seed: int = 0, spread: float = 3.0) -> dict[str, Any]:
    """Centroids and places all over Europe, logits, labels, weights of which one is zero; float64."""
    rng = np.random.default_rng(seed)
    centroid, truth = (rng.uniform([36, -10], [70, 30], (count, 2)) for count in (num_cells, num_rows))
    weight = rng.uniform(0.1, 5, num_cells)
    cell = rng.integers(0, max(num_cells - 1, 1), num_rows)
    weight[-1] = 0 if num_cells > 1 else 1
    return {
        "logit": torch.from_numpy(rng.normal(0, spread, (num_rows, num_cells))),
        "cell": torch.from_numpy(cell),
        "truth_deg": truth,
        "centroid_deg": centroid,
        "weight": torch.from_numpy(weight),
    }


def loss_of(case: dict[str, Any], kind: Any, **options: Any) -> HeadLoss:
    weight = case["weight"] if kind.startswith("weighted") else None
    return HeadLoss(kind, unit_vectors(case["centroid_deg"]), weight, **options)


def evaluate(loss: HeadLoss, case: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any, Tensor]:
    xyz = torch.from_numpy(unit_vectors(case["truth_deg"])).to(dtype)
    return loss.value_and_grad(case["logit"].to(dtype, copy=True), case["cell"], xyz)


def definition(case: dict[str, Any], kind: str, logit: Tensor, **options: Any) -> Tensor:
    """The loss in plain words and on autograd."""
    smoothing, lam, tau_km = options.get("label_smoothing", 0.1), options.get("lam", 0.05), options.get("tau_km", 75.0)
    truth = torch.from_numpy(unit_vectors(case["truth_deg"]))
    if kind == "smooth":
        km = torch.from_numpy(haversine_km(case["truth_deg"][:, None], case["centroid_deg"][None]))
        target = torch.exp(-(km - km.min(dim=1, keepdim=True).values) / tau_km)
        if options.get("is_normalised", True):
            target = target / target.sum(dim=1, keepdim=True)
        return -(target * logit.log_softmax(dim=1)).sum(dim=1).mean()
    weight = case["weight"] if kind.startswith("weighted") else None
    ce = functional.cross_entropy(logit, case["cell"], weight=weight, label_smoothing=smoothing)
    if not kind.endswith("haversine"):
        return ce
    mean = logit.softmax(dim=1) @ torch.from_numpy(unit_vectors(case["centroid_deg"]))
    cross = torch.linalg.vector_norm(torch.linalg.cross(mean, truth), dim=1)
    return ce + lam * EARTH_RADIUS_KM * torch.atan2(cross, (mean * truth).sum(dim=1)).mean()


OPTIONS: list[dict[str, Any]] = [{}, {"label_smoothing": 0.0, "lam": 0.01}, {"is_normalised": False, "tau_km": 300.0}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_cells"), [(1, 1), (1, 7), (63, 100), (17, 1)])
def test_value_and_gradient_are_those_of_the_definition(
    kind: Any, options: dict[str, Any], num_rows: int, num_cells: int
) -> None:
    case = problem(num_rows, num_cells)
    logit = case["logit"].clone().requires_grad_()
    expected = definition(case, kind, logit, **options)
    (expected_grad,) = torch.autograd.grad(expected, logit)
    loss, parts, grad = evaluate(loss_of(case, kind, **options), case)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-11)
    rebuilt = sum(value * {"haversine_km": options.get("lam", 0.05)}.get(name, 1.0) for name, value in parts.items())
    torch.testing.assert_close(rebuilt, loss)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind: Any) -> None:
    case, step = problem(3, 5, seed=4, spread=1.0), 1e-5
    loss = loss_of(case, kind)
    grad = evaluate(loss, case)[2]
    for row in range(3):
        for column in range(5):
            values = []
            for sign in (1, -1):
                moved = case | {"logit": case["logit"].clone()}
                moved["logit"][row, column] += sign * step
                values.append(float(evaluate(loss, moved)[0]))
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(grad[row, column]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64_on_a_real_number_of_cells(kind: Any) -> None:
    case = problem(65, 1898, spread=4.0)
    loss = loss_of(case, kind)
    exact, _, exact_grad = evaluate(loss, case)
    found, parts, grad = evaluate(loss, case, torch.float32)
    assert found.dtype == grad.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-5)
    # By the largest of its row: what is left of the haversine's sum is rounding, where a cell's share is small.
    scale = exact_grad.abs().amax(dim=1, keepdim=True)
    assert float(((grad - exact_grad) / scale).abs().max()) < 2e-4
    for name, value in parts.items():
        assert float(value) == pytest.approx(float(evaluate(loss, case)[1][name]), rel=1e-5)


def test_the_gradient_takes_the_memory_of_the_logits() -> None:
    case = problem(9, 11)
    for kind in KINDS:
        logit = case["logit"].clone()
        xyz = torch.from_numpy(unit_vectors(case["truth_deg"]))
        grad = loss_of(case, kind).value_and_grad(logit, case["cell"], xyz)[2]
        assert grad.data_ptr() == logit.data_ptr(), kind


@settings(deadline=None)
@given(
    st.lists(points, min_size=1, max_size=9),
    st.lists(points, min_size=1, max_size=5),
    st.sampled_from([0.0, 1.0, 1e2, 1e4]),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_value_and_gradient_are_finite_wherever_cells_and_truth_lie(
    centroids: Any, truths: Any, scale: float, kind: Any, dtype: Any, seed: int
) -> None:
    case = problem(len(truths), len(centroids), seed) | {"centroid_deg": centroids, "truth_deg": truths}
    # The signs alone, so that at 1e4 posteriors are one-hot, or equal halves.
    case["logit"] = case["logit"].sign() * scale
    loss, parts, grad = evaluate(loss_of(case, kind), case, dtype)
    assert math.isfinite(loss)
    assert all(math.isfinite(value) for value in parts.values())
    assert bool(torch.isfinite(grad).all())


@settings(deadline=None, max_examples=60)
@given(points, points, st.integers(0, 99))
def test_the_gradient_agrees_with_finite_differences_at_the_poles_and_the_antimeridian(
    truth: Any, far: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    near = np.array(truth) + rng.normal(0, 2, (3, 2))
    centroid = np.concatenate([points_deg(unit_vectors(near)), [far]])
    logit = torch.from_numpy(rng.normal(0, 1, (1, 4)))
    case = {"logit": logit, "cell": torch.tensor([1]), "truth_deg": np.array([truth]), "centroid_deg": centroid}
    loss, step = loss_of(case, "ce+haversine", lam=1e-3), 1e-6
    mean = functional.softmax(logit, dim=1).numpy() @ unit_vectors(centroid)
    if np.linalg.norm(mean) < 0.1 or not 1 < haversine_km(points_deg(mean[0]), truth) < 20000:
        return
    grad = evaluate(loss, case)[2]
    for column in range(4):
        ends = [logit.clone(), logit.clone()]
        ends[0][0, column] += step
        ends[1][0, column] -= step
        up, down = (float(evaluate(loss, case | {"logit": end})[0]) for end in ends)
        assert (up - down) / (2 * step) == pytest.approx(float(grad[0, column]), rel=1e-3, abs=1e-5)


@settings(deadline=None)
@given(points, st.lists(points, min_size=1, max_size=6), st.integers(0, 99))
def test_the_haversine_is_that_of_the_mean_direction(truth: Any, centroids: Any, seed: int) -> None:
    logit = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (1, len(centroids))))
    case = {"logit": logit, "cell": torch.tensor([0]), "truth_deg": np.array([truth]), "centroid_deg": centroids}
    mean = (functional.softmax(logit, dim=1).numpy() @ unit_vectors(centroids))[0]
    found = float(evaluate(loss_of(case, "ce+haversine"), case)[1]["haversine_km"])
    if np.linalg.norm(mean) > 1e-5:
        assert found == pytest.approx(float(haversine_km(points_deg(mean), truth)), rel=1e-9, abs=1e-6)
    elif np.linalg.norm(mean) < 1e-7:
        assert found == pytest.approx(math.pi / 2 * EARTH_RADIUS_KM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_on_the_truth_opposite_to_it_or_nowhere_pulls_in_no_direction(dtype: torch.dtype) -> None:
    equator = [(0.0, 0.0), (0.0, 90.0), (0.0, 180.0), (0.0, -90.0)]
    pair = [(0.0, -45.0), (0.0, 45.0)]
    cases = [(equator, [(20.0, 30.0)], 0.5), (pair, [(0.0, 0.0)], 0.0), (pair, [(0.0, 180.0)], 1.0)]
    for centroids, truth, half_turns in cases:
        case = {
            "logit": torch.zeros(1, len(centroids)),
            "cell": torch.tensor([0]),
            "truth_deg": np.array(truth),
            "centroid_deg": np.array(centroids),
        }
        _, plain_parts, plain = evaluate(loss_of(case, "ce"), case, dtype)
        _, parts, grad = evaluate(loss_of(case, "ce+haversine", lam=10.0), case, dtype)
        torch.testing.assert_close(grad, plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(parts["ce"], plain_parts["ce"])
        assert float(parts["haversine_km"]) == pytest.approx(half_turns * math.pi * EARTH_RADIUS_KM, abs=2e-3)


def test_targets_of_smooth_keep_metres_in_float32() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform([-89, -180], [89, 180], (40, 2))
    centroid = np.concatenate([truth + rng.normal(0, 0.5, (40, 2)), rng.uniform([-90, -180], [90, 180], (57, 2))])
    km = haversine_km(truth[:, None], centroid[None])
    expected = np.exp(-(km - km.min(axis=1, keepdims=True)) / 75)
    xyz = [torch.from_numpy(unit_vectors(at)).float() for at in (truth, centroid)]
    found = smooth_targets(*xyz, 75.0, is_normalised=False)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert bool((found.max(dim=1).values == 1).all())
    np.testing.assert_allclose(smooth_targets(*xyz, 75.0).sum(dim=1), np.ones(40), rtol=1e-6)


def test_a_batch_of_cells_without_weight_has_no_loss() -> None:
    case = problem(4, 6)
    case["cell"][:] = 5
    loss, _, grad = evaluate(loss_of(case, "weighted-ce"), case)
    assert float(loss) == 0
    assert not grad.any()


def test_weights_fall_with_the_number_of_places_and_have_a_mean_of_one() -> None:
    weight = inverse_frequency([0, 0, 0, 0, 2, 2, 3], 5)
    assert weight.dtype == torch.float32
    np.testing.assert_allclose(weight, [7 / 12, 0, 7 / 6, 7 / 3, 0], rtol=1e-6)
    assert float(weight[[0, 0, 0, 0, 2, 2, 3]].mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "weight", "options", "words"),
    [
        ("crossentropy", None, {}, "one of ce, weighted-ce"),
        ("weighted-ce", None, {}, "weighted-ce needs weights"),
        ("ce", [1.0, 1.0], {}, "ce takes no weights"),
        ("weighted-ce", [1.0], {}, "weights of 2 cells"),
        ("weighted-ce", [1.0, -1.0], {}, "none negative"),
        ("weighted-ce", [1.0, math.nan], {}, "none negative"),
        ("ce+haversine", None, {"lam": -0.1}, "got -0.1"),
        ("ce+haversine", None, {"lam": math.inf}, "got inf"),
        ("ce", None, {"label_smoothing": 1.5}, "1.5"),
        ("smooth", None, {"tau_km": 0.0}, "0.0"),
        ("smooth", None, {"tau_km": math.nan}, "nan"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(kind: Any, weight: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HeadLoss(kind, unit_vectors([(0, 0), (1, 1)]), weight, **options)
