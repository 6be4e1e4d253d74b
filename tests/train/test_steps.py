"""Batches, dropout's masks, the hand-written gradients, the schedule: a step of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_samples import DIM, World, make_partition, make_world

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.metrics import summarise
from geoloc_batch.train.batches import Buffers, Mask, epoch_batches
from geoloc_batch.train.config import FitConfig, TrainConfig
from geoloc_batch.train.features import Features, Kind, load_features
from geoloc_batch.train.fit import State, Task, batch_size, first_head
from geoloc_batch.train.group import Group
from geoloc_batch.train.losses import HeadLoss
from geoloc_batch.train.network import Network, first_state, learning_rate
from geoloc_batch.train.places import read_places
from geoloc_batch.train.recipes import Cells, recipes_of
from geoloc_batch.train.scores import decode, rank

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_places=40)


def features_of(world: World, kind: Kind, scratch: Path) -> Features:
    config = TrainConfig(embeddings=(str(world.emb),), cells=("c.json",), out="o", group_by="spot")
    return load_features(read_places(config), kind, CPU, hold="memory", scratch=scratch)


def random_state(num_cells: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    state = first_state(num_cells, 0.5 + torch.rand(DIM), torch.randn(DIM))
    state["head.2.weight"], state["head.2.bias"] = torch.randn(num_cells, DIM), torch.randn(num_cells)
    return state


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["fused", "normed-views"])
def test_the_written_gradients_are_those_of_autograd(world: World, tmp_path: Path, kind: Kind, dropout: float) -> None:
    features = features_of(world, kind, tmp_path)
    settings = {"seed": 3, "epoch": 2, "batch_size": 17, "dropout": dropout}
    batch = next(epoch_batches(features, np.arange(40), **settings))  # type: ignore[arg-type]
    state = random_state(11)
    network = Network(state, CPU, precision="fp32", weight_decay=0)
    logits = network.logits(batch).clone()
    grad_BC = torch.randn(logits.shape)
    network.learn(batch, grad_BC.clone(), rate=0.0)

    # The same by the layers' own words: every view through LayerNorm, dropout and Linear, then the mean of its logits.
    slot_V, count_B = (
        (batch.place_B, torch.ones(len(batch.place_B), dtype=torch.int64))
        if kind == "fused"
        else features.views(batch.place_B)
    )
    mask_VD = Mask(3, 2, dropout, Buffers(CPU)).draw(len(slot_V), DIM)
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    normed_VD = features.value_SD[slot_V] * leaves["head.0.weight"] + leaves["head.0.bias"]
    view_VC = nn.functional.linear(
        normed_VD if mask_VD is None else normed_VD * mask_VD, leaves["head.2.weight"], leaves["head.2.bias"]
    )
    expected = torch.stack([part.mean(dim=0) for part in torch.split(view_VC, count_B.tolist())])
    torch.autograd.backward(expected, grad_BC)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    ours = (network.scale_D, network.shift_D, network.weight_CD, network.bias_C)
    for name, parameter in zip(leaves, ours, strict=True):
        torch.testing.assert_close(parameter.grad, leaves[name].grad, atol=1e-3, rtol=1e-4, msg=name)


def test_dropout_keeps_the_share_and_the_mean_and_follows_seed_and_epoch() -> None:
    kept = Mask(0, 0, 0.3, Buffers(CPU)).draw(1001, 333)
    assert kept is not None
    assert float((kept > 0).float().mean()) == pytest.approx(0.7, abs=0.003)
    assert float(kept.mean()) == pytest.approx(1, abs=0.004)
    assert float(kept.max()) == pytest.approx(1 / 0.7, rel=1e-4)
    # Neighbours come of one random number, and are independent all the same.
    both = ((kept[:, :-1] > 0) & (kept[:, 1:] > 0)).float().mean()
    assert float(both) == pytest.approx(0.49, abs=0.003)
    again, other = (Mask(0, epoch, 0.3, Buffers(CPU)).draw(1001, 333) for epoch in (0, 1))
    assert again is not None
    assert other is not None
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)
    assert Mask(0, 0, 0.0, Buffers(CPU)).draw(2, 2) is None


def test_an_epoch_holds_every_place_once_in_batches_of_nearly_one_size(world: World, tmp_path: Path) -> None:
    features = features_of(world, "fused", tmp_path)
    places = np.arange(3, 40)
    orders = []
    for epoch in (0, 1, 0):
        batches = epoch_batches(features, places, seed=0, epoch=epoch, batch_size=10, dropout=0.0)
        parts = [batch.place_B.tolist() for batch in batches]
        assert [len(part) for part in parts] == [10, 9, 9, 9]
        orders.append([place for part in parts for place in part])
    assert sorted(orders[0]) == places.tolist()
    assert orders[0] == orders[2] != orders[1]


def test_view_dropout_leaves_views_out_and_always_keeps_one(world: World, tmp_path: Path) -> None:
    views = features_of(world, "normed-views", tmp_path)
    single = {tuple(row) for row in views.value_SD.tolist()}
    batch = next(epoch_batches(views, np.arange(40), seed=0, epoch=0, batch_size=40, dropout=0.0, view_dropout=0.999))
    # With nearly all dropped each place is one of its own views.
    assert all(tuple(row) in single for row in batch.scaled_BD.tolist())
    raw = features_of(world, "raw-views", tmp_path)
    whole = raw.fused(torch.arange(40))
    changed = 0
    for epoch in range(20):
        batch = next(
            epoch_batches(raw, np.arange(40), seed=0, epoch=epoch, batch_size=40, dropout=0.0, view_dropout=0.3)
        )
        assert batch.scaled_BD.isfinite().all()
        changed += int(((batch.scaled_BD - whole[batch.place_B]).abs().amax(dim=1) > 1e-4).sum())
    # One view in four places of ten cannot be left out; of 2, 4 and 7 views all stay with 0.49, 0.24, 0.08.
    expected = 20 * 10 * ((1 - 0.49) + (1 - 0.24) + (1 - 0.082))
    assert changed == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize(("kind", "view_dropout"), [("fused", 0.0), ("raw-views", 0.3), ("normed-views", 0.0)])
def test_the_parts_that_ranks_take_of_a_batch_are_the_batch(
    world: World, tmp_path: Path, kind: Kind, view_dropout: float, num_ranks: int
) -> None:
    features, state, cell_L = features_of(world, kind, tmp_path), random_state(9), torch.arange(40) % 9
    settings: Any = {"seed": 1, "epoch": 2, "batch_size": 4, "dropout": 0.3, "view_dropout": view_dropout}
    xyz_C3 = torch.nn.functional.normalize(torch.randn(9, 3), dim=1)
    loss = HeadLoss("weighted-ce+haversine", xyz_C3, torch.arange(9) % 4)

    def steps(group: Group) -> Iterator[tuple[list[int], list[int], Tensor, Tensor]]:
        network = Network(state, CPU, precision="fp32", weight_decay=0)
        # 27 places: batches of 4 and 3, of which some ranks have nothing.
        for batch in epoch_batches(features, np.arange(27), group=group, **settings):
            cell_B, all_cell = cell_L[batch.place_B], cell_L[batch.all_place]
            value, _, grad_BC = loss.value_and_grad(network.logits(batch), cell_B, xyz_C3[cell_B], all_cell)
            network.backward(batch, grad_BC)
            yield batch.place_B.tolist(), batch.all_place.tolist(), value, network.gradient.clone()

    whole = list(steps(Group()))
    parts = [list(steps(Group(rank=rank, size=num_ranks))) for rank in range(num_ranks)]
    assert len(whole) == 7
    for number, (places, _, value, gradient) in enumerate(whole):
        ours = [part[number] for part in parts]
        assert [place for each in ours for place in each[0]] == places
        assert all(each[1] == places for each in ours)
        torch.testing.assert_close(sum(each[2] for each in ours), value, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(sum(each[3] for each in ours), gradient, atol=1e-3, rtol=1e-4)


def test_bf16_products_differ_from_fp32_in_the_third_digit_and_sum_in_fp32(world: World, tmp_path: Path) -> None:
    features = features_of(world, "fused", tmp_path)
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    logits = []
    for precision in ("fp32", "bf16"):
        batch = next(epoch_batches(features, np.arange(40), seed=0, epoch=0, batch_size=40, dropout=0.3))
        network = Network(random_state(128), CPU, precision=precision, weight_decay=0)
        logits.append(network.logits(batch).clone())
    assert logits[1].dtype == torch.float32
    error = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert error < 0.01
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


def test_the_learning_rate_rises_straight_then_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, 100, 10, 2.0) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(2 * 0.5 * (1 + np.cos(np.pi * 89 / 90)))
    assert learning_rate(0, 1, 0, 2.0) == 2.0


def test_a_sweep_holds_every_combination_and_lam_only_where_it_has_a_part() -> None:
    config = TrainConfig(
        embeddings=("e",), cells=("c",), out="o", group_by="spot", sweep=True,
        fusion=("feature", "logit"), loss=("ce", "ce+haversine", "smooth"), lam=(0.01, 0.05), seed=(0, 3),
    )  # fmt: skip
    cells = Cells(name="h3", partition=make_partition())
    recipes = recipes_of(config, [cells])
    assert len({recipe.name for recipe in recipes}) == len(recipes) == 2 * (1 + 2 + 1) * 2
    # Those of one fusion follow one another: the features are stored once for each.
    assert [recipe.fusion for recipe in recipes] == ["feature"] * 8 + ["logit"] * 8
    assert recipes[3].name == "h3_ce-haversine-lam0.01_feature_seed3"


def test_no_two_heads_of_a_sweep_share_a_folder() -> None:
    config = TrainConfig(embeddings=("e",), cells=("c",), out="o", sweep=True, lam=(0.1234567, 0.1234568, 1.0, 0.05))
    cells = Cells(name="h3", partition=make_partition())
    names = [recipe.name for recipe in recipes_of(config, [cells])]
    assert [name.removeprefix("h3_weighted-ce-haversine-lam").split("_")[0] for name in names] == [
        "0.1234567", "0.1234568", "1", "0.05"
    ]  # fmt: skip
    # Whatever else might make them equal.
    with pytest.raises(ConfigError, match="one folder, h3_weighted-ce-haversine-lam"):
        recipes_of(config, [cells, cells])


@pytest.mark.parametrize(("places", "size"), [(63_315, 1024), (16_000, 1000), (320, 32), (1600, 100)])
def test_small_sets_are_trained_in_smaller_batches(places: int, size: int) -> None:
    assert batch_size(FitConfig(), places) == size
    assert batch_size(FitConfig(batch_size=700), places) == 700


def test_the_first_head_standardises_the_training_places_and_prefers_no_cell(world: World, tmp_path: Path) -> None:
    features = features_of(world, "normed-views", tmp_path)
    split = np.zeros(40, dtype=np.int8)
    split[30:] = 1
    task = Task(
        features=features,
        point_deg_L2=world.point_deg_L2,
        cell_L=np.zeros(40, dtype=np.int64),
        split_L=split,
        partition=make_partition(),
    )
    head = first_head(task, is_standard=True)
    seen = features.fused(torch.arange(30)) * head["head.0.weight"] + head["head.0.bias"]
    torch.testing.assert_close(seen.mean(dim=0), torch.zeros(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(dim=0, correction=0), torch.ones(DIM), atol=1e-4, rtol=0)
    assert not head["head.2.weight"].any()
    assert torch.equal(first_head(task, is_standard=False)["head.0.weight"], torch.ones(DIM))


def test_ranks_and_means_are_those_of_the_posterior() -> None:
    logit_NC = torch.tensor([[2.0, 2.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    xyz_C3 = torch.eye(4)[:, :3]
    best, place, mean = decode(logit_NC.clone(), torch.tensor([1, 2]), xyz_C3)
    assert best.tolist() == [3, 0]
    # Equal logits: the lower row goes first.
    assert place.tolist() == [3, 3]
    torch.testing.assert_close(mean, logit_NC.softmax(dim=1) @ xyz_C3)


def test_one_lucky_place_of_few_does_not_outweigh_the_other_bands() -> None:
    lucky = summarise([10.0, 190.0, *[2000.0] * 38])
    better = summarise([*[100.0] * 20, *[700.0] * 20])
    assert lucky.balscore > better.balscore == 0
    assert rank(better) > rank(lucky)
    many = [summarise([*[10.0] * near, *[300.0] * (5000 - near)]) for near in (700, 701)]
    assert rank(many[1]) > rank(many[0])


def test_patience_ends_where_neither_rank_nor_median_gets_better() -> None:
    state = State(head={}, epoch=20, best_epoch=3, better_epoch=6)
    assert state.is_over(FitConfig(patience=14))
    assert not state.is_over(FitConfig(patience=15))
    assert state.is_over(FitConfig(patience=15, epochs=20))
