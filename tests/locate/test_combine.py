"""Several partitions in one answer: products of posteriors on the finest, by numbers that can be checked by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import locate_samples as samples
import numpy as np
import pytest
import torch

from geoloc_batch.errors import ConfigError, GeolocError, HeadError
from geoloc_batch.geo.cells.h3 import build_h3
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.shapes.boxes import BoxShapes
from geoloc_batch.geo.shapes.h3 import H3Shapes
from geoloc_batch.locate.combine import CombinedLocator, parent_rows
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.factory import build_locators
from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.locate.locator import Locator

FINE_DEG = [[10.0, 0.0], [10.0, 2.0], [10.0, 8.0], [10.0, 20.0], [10.0, 22.0]]
COARSE_DEG = [[10.0, 1.0], [10.0, 21.0], [10.0, 9.0]]
PARENTS = [0, 0, 2, 1, 1]


def log(*values: float) -> list[float]:
    return np.log(values).tolist()


def partition(centroids: Any, **options: Any) -> Partition:
    return Partition(ids=np.arange(len(centroids)), centroids_deg=np.array(centroids), **options)


def answer(logits: list[float], cells: Partition, *, number: int = 0, **options: Any) -> HeadLocator:
    """A head that says the same of every photo."""
    head = samples.constant_head(logits)
    object.__setattr__(head, "sha256", str(number) * 64)
    return HeadLocator(head, cells, **options)


def probabilities(locator: Locator) -> list[float]:
    located = locator.locate(torch.zeros(1, 3))
    order = np.argsort(located.topk_cell[0])
    return located.topk_prob[0][order].tolist()


def test_a_cells_probability_is_the_product_over_levels_of_its_parents() -> None:
    fine = answer(log(0.1, 0.2, 0.3, 0.3, 0.1), partition(FINE_DEG), number=1)
    coarse = answer(log(0.5, 0.2, 0.3), partition(COARSE_DEG), number=2)
    combined = CombinedLocator([coarse, fine])
    product = np.array([0.1 * 0.5, 0.2 * 0.5, 0.3 * 0.3, 0.3 * 0.2, 0.1 * 0.2])
    np.testing.assert_allclose(probabilities(combined), product / product.sum(), rtol=1e-5)
    located = combined.locate(torch.zeros(2, 3))
    assert located.topk_cell[0].tolist() == [1, 2, 3, 0, 4]
    assert located.position_deg[0].tolist() == FINE_DEG[1]
    p = product / product.sum()
    assert located.entropy[0] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


def test_the_mean_and_the_spread_are_those_of_the_combined_posterior() -> None:
    fine = answer(log(0.1, 0.2, 0.3, 0.3, 0.1), partition(FINE_DEG), number=1)
    coarse = answer(log(0.5, 0.2, 0.3), partition(COARSE_DEG), number=2)
    product = [0.1 * 0.5, 0.2 * 0.5, 0.3 * 0.3, 0.3 * 0.2, 0.1 * 0.2]
    expected = answer(log(*product), partition(FINE_DEG), position="mean").locate(torch.zeros(1, 3))
    found = CombinedLocator([fine, coarse], position="mean", top_k=2).locate(torch.zeros(1, 3))
    np.testing.assert_allclose(found.position_deg, expected.position_deg, atol=1e-4)
    np.testing.assert_allclose(found.spread_km, expected.spread_km, rtol=1e-4)
    assert found.topk_cell.shape == (1, 2)


def test_two_heads_on_the_same_partition_multiply_and_equal_ones_sharpen() -> None:
    cells = partition(FINE_DEG[:3])
    a, b = answer(log(0.5, 0.3, 0.2), cells, number=1), answer(log(0.2, 0.2, 0.6), partition(FINE_DEG[:3]), number=2)
    product = np.array([0.10, 0.06, 0.12])
    np.testing.assert_allclose(probabilities(CombinedLocator([a, b])), product / product.sum(), rtol=1e-5)


def test_three_levels_with_ragged_parents_and_a_coarse_cell_that_has_no_part() -> None:
    fine = answer(log(0.1, 0.2, 0.3, 0.3, 0.1), partition(FINE_DEG), number=1)
    # Its second cell lies far from all fine ones: what it says of that one is nobody's.
    odd = answer(log(0.3, 0.6, 0.1), partition([[10.0, 1.0], [-60.0, 100.0], [10.0, 15.0]]), number=2)
    one = answer([3.0], partition([[0.0, 0.0]]), number=3)
    product = np.array([0.1 * 0.3, 0.2 * 0.3, 0.3 * 0.3, 0.3 * 0.1, 0.1 * 0.1])
    assert parent_rows(fine.partition, odd.partition).tolist() == [0, 0, 0, 2, 2]
    np.testing.assert_allclose(probabilities(CombinedLocator([odd, one, fine])), product / product.sum(), rtol=1e-5)


def test_parents_are_the_cells_that_hold_the_centroids_where_there_are_shapes() -> None:
    # The border lies at 3 degrees: nearer to the second centroid than to the first.
    boxes = BoxShapes(np.array([[0.0, -10.0, 20.0, 9.0], [0.0, 9.0, 20.0, 40.0]]))
    shaped = partition([[10.0, -9.0], [10.0, 10.0]], shapes=boxes)
    assert parent_rows(partition(FINE_DEG), shaped).tolist() == [0, 0, 0, 1, 1]
    assert parent_rows(partition(FINE_DEG), partition(shaped.centroids_deg)).tolist() == [0, 1, 1, 1, 1]


def test_given_parents_are_believed_only_of_the_partition_that_they_are_of(caplog: pytest.LogCaptureFixture) -> None:
    given = partition(FINE_DEG, parents=np.array([0, 2, 2, 1, 1]))
    # The second cell is nearer to the first centroid, and still part of the third.
    assert parent_rows(given, partition(COARSE_DEG)).tolist() == [0, 2, 2, 1, 1]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    elsewhere = partition([[-50.0, 100.0], [10.0, 1.0], [10.0, 21.0]])
    assert parent_rows(given, elsewhere).tolist() == [1, 1, 1, 2, 2]
    assert "only 0 % of its cells lie in them" in caplog.text
    other_ids = partition(COARSE_DEG[:2])
    assert parent_rows(given, other_ids).tolist() == [0, 0, 0, 1, 1]


def test_given_parents_are_believed_though_a_coarse_cell_has_no_child() -> None:
    given = partition(FINE_DEG, parents=np.array([0, 2, 2, 1, 1]))
    with_one_more = partition([*COARSE_DEG, [10.0, 40.0]])
    assert parent_rows(given, with_one_more).tolist() == [0, 2, 2, 1, 1]


def test_the_order_of_the_heads_does_not_change_the_answer() -> None:
    rng = np.random.default_rng(3)
    heads = [
        answer((rng.normal(size=len(points)) * 200).tolist(), partition(points), number=number)
        for number, points in enumerate((FINE_DEG, COARSE_DEG, COARSE_DEG[:2]))
    ]
    forth, back = (CombinedLocator(order) for order in (heads, heads[::-1]))
    np.testing.assert_allclose(probabilities(forth), probabilities(back), rtol=1e-6)


def test_h3_cells_of_two_resolutions_lie_in_one_another() -> None:
    import h3.api.basic_int as h3

    points = np.random.default_rng(0).uniform([40, 0], [55, 20], (600, 2))
    fine, coarse = (build_h3(points, resolution)[0] for resolution in (3, 2))
    assert isinstance(fine.shapes, H3Shapes)
    assert isinstance(coarse.shapes, H3Shapes)
    found = coarse.shapes.index_C[parent_rows(fine, coarse)]
    # H3's cells hold their children's centres, and the means of the points in them but for some at the border.
    expected = np.array([h3.cell_to_parent(cell, 2) for cell in fine.shapes.index_C.tolist()], dtype=np.uint64)
    assert (found == expected).mean() > 0.9
    assert len(fine) > 3 * len(coarse)


def test_views_are_fused_by_each_head_in_its_own_way_before_the_heads_are_joined() -> None:
    dim, counts = 24, [3, 1, 4]
    features, offset = samples.make_features(sum(counts), dim), np.cumsum([0, *counts])
    cells = {number: samples.make_partition(number, seed=number) for number in (17, 5)}
    states = {number: samples.make_state(number, dim, seed=number) for number in (17, 5)}
    heads = {}
    for number, fusion in ((17, "logit"), (5, "feature")):
        head = samples.head_of(states[number])
        object.__setattr__(head, "sha256", str(number))
        heads[number] = HeadLocator(head, cells[number], top_k=17, fusion=fusion)  # type: ignore[arg-type]
    combined = CombinedLocator([heads[5], heads[17]], top_k=17)
    assert combined.fusions == ("feature", "logit")
    found = combined.locate_views(features, offset)
    rows = parent_rows(cells[17], cells[5])
    for number, views in enumerate(torch.split(features, counts)):
        logits = heads[17].logits(views)[0].mean(dim=0)
        pooled = heads[5].logits(views.mean(dim=0, keepdim=True))[0][0]
        expected = (logits.log_softmax(-1) + pooled.log_softmax(-1)[rows]).softmax(-1).numpy()
        cell_K = found.located.topk_cell[number]
        np.testing.assert_allclose(found.located.topk_prob[number], expected[cell_K], rtol=0, atol=1e-6)
    single = combined.locate_views(features, np.arange(len(features) + 1))
    assert single.located.topk_prob.tobytes() == combined.locate(features).topk_prob.tobytes()


def test_a_rows_answer_does_not_depend_on_its_neighbours() -> None:
    heads = []
    for number in (37, 11):
        head = samples.head_of(samples.make_state(number, 48, seed=number))
        object.__setattr__(head, "sha256", str(number))
        heads.append(HeadLocator(head, samples.make_partition(number)))
    combined, features = CombinedLocator(heads), samples.make_features(71, 48)
    whole = combined.locate(features)
    alone = combined.locate(features[67:68])
    assert alone.topk_prob.tobytes() == whole.topk_prob[67:68].tobytes()
    assert alone.mean_deg.tobytes() == whole.mean_deg[67:68].tobytes()
    assert len(combined.locate(features[:0])) == 0


def build(*heads: Path, **options: Any) -> list[Locator]:
    config = LocateConfig(head=tuple(map(str, heads)), **options)
    none = {"encoder_sha256": None, "device": "cpu", "fetch": lambda *_: Path()}
    return build_locators(config, encoder_dim=5, encoder_tap="pooled", **none)  # type: ignore[arg-type]


def test_combined_heads_of_files_are_one_locator_that_names_them_all(tmp_path: Path) -> None:
    a = samples.write_head(tmp_path / "a", num_cells=7, seed=1)
    b = samples.write_head(tmp_path / "b", num_cells=19, seed=2)
    (combined,) = build(a, b, combine=True)
    assert isinstance(combined, CombinedLocator)
    assert len(combined.partition) == 19
    assert [part["num_cells"] for part in combined.identity["combined"]] == [7, 19]
    assert [locator.name for locator in build(a, b)] == ["a", "b"]


@pytest.mark.parametrize(
    ("heads", "error", "words"),
    [
        (["a"], ConfigError, "--combine needs at least two heads, got 1; repeat --head"),
        ([], ConfigError, "--combine needs at least two heads, got 0; repeat --head"),
        (["a", "a"], HeadError, "are the same head; give each once"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    heads: list[str], error: type[GeolocError], words: str, tmp_path: Path
) -> None:
    samples.write_head(tmp_path / "a", seed=1)
    with pytest.raises(error, match=words):
        build(*(tmp_path / head / "best.pt" for head in heads), combine=True)


def test_the_combined_position_is_the_heads_own_where_they_agree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a, b = (samples.write_head(tmp_path / name, num_cells=cells, seed=cells) for name, cells in (("a", 7), ("b", 9)))
    samples.write_remarks(a.parent, {"position": "mean", "fusion": "logit"})
    assert build(a, b, combine=True)[0].position == "top1"
    samples.write_remarks(b.parent, {"position": "mean"})
    (combined,) = build(a, b, combine=True)
    assert (combined.position, combined.fusions) == ("mean", ("logit", "feature"))
    assert build(a, b, combine=True, position="top1", fusion="feature")[0].fusions == ("feature", "feature")
