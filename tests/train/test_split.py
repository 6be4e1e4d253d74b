"""Splits: whole places, whole blocks, the shares that were asked for, and leaks that are found."""

from __future__ import annotations

import math
from typing import Any

import h3.api.basic_int as h3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoloc_batch.demo.world import make_places
from geoloc_batch.errors import ConfigError, PartitionError, SplitError
from geoloc_batch.geo.shapes.h3 import h3_indexes
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.train.split import block_resolution, check_leaks, split_places


def europe(num_places: int = 1501) -> tuple[Any, Any]:
    """Places, and the H3 cell of each."""
    point_deg = make_places(num_places).point_deg
    return point_deg, np.unique(h3_indexes(point_deg, 3), return_inverse=True)[1]


def shares_of(split: Any) -> list[float]:
    return [float((split == code).mean()) for code in (0, 1, 2)]


def nearest_km(point_deg: Any, split: Any) -> float:
    """From train to val or test, by all pairs."""
    return float(haversine_km(point_deg[split == 0][:, None], point_deg[split > 0][None]).min())


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.5, 0.3, 0.2), (0.9, 0.08, 0.02)])
def test_shares_are_met_over_all_and_within_each_cell(shares: Any) -> None:
    point_deg, cell = europe()
    split = split_places(point_deg, cell, shares=shares)
    np.testing.assert_allclose(shares_of(split), shares, atol=0.5 / len(split) + 1e-9)
    held_share = (1 - shares[0]) * len(split) / (len(split) - len(np.unique(cell)))
    for one in np.unique(cell):
        inside = split[cell == one]
        assert (inside == 0).any()
        assert abs((inside > 0).sum() - held_share * (len(inside) - 1)) < 1 + 1e-9


def test_cells_of_one_place_go_to_train_and_cells_of_two_do_not_all_round_alike() -> None:
    point_deg = np.random.default_rng(0).uniform([40, 0], [50, 10], (3000, 2))
    cell = np.concatenate([np.arange(1000), np.repeat(np.arange(1000, 2000), 2)])
    split = split_places(point_deg, cell)
    assert (split[:1000] == 0).all()
    held_out_of_cell = (split[1000:] > 0).reshape(1000, 2).sum(axis=1)
    assert set(held_out_of_cell.tolist()) == {0, 1}
    assert shares_of(split) == pytest.approx([0.8, 0.1, 0.1])


def test_seeds_differ_and_one_seed_does_not() -> None:
    point_deg, cell = europe()
    for options in ({}, {"block_km": 50.0}):
        splits = [split_places(point_deg, cell, seed=seed, **options) for seed in (0, 0, 1, 2)]
        np.testing.assert_array_equal(splits[0], splits[1])
        assert (splits[1] != splits[2]).mean() > 0.2
        assert (splits[2] != splits[3]).mean() > 0.2


few_places = st.lists(st.tuples(st.floats(40, 60), st.floats(-5, 20), st.integers(0, 3)), min_size=8, max_size=60)


@settings(deadline=None, max_examples=30)
@given(few_places, st.randoms(use_true_random=False), st.sampled_from([None, 20.0, 100.0]), st.integers(0, 9))
def test_neither_the_order_of_the_rows_nor_their_number_matters(
    rows: list[Any], random: Any, block_km: float | None, seed: int
) -> None:
    # Cells belong to places, as they do where a partition assigns them.
    cell_of = {(round(lat, 6), round(lon, 6)): cell for lat, lon, cell in reversed(rows)}
    point_deg = np.array([[lat, lon] for lat, lon, _ in rows])
    cell = np.array([cell_of[round(lat, 6), round(lon, 6)] for lat, lon, _ in rows])
    try:
        split = split_places(point_deg, cell, block_km=block_km, seed=seed)
    except SplitError:
        return
    order = list(range(len(rows))) + random.choices(range(len(rows)), k=random.randrange(30))
    random.shuffle(order)
    np.testing.assert_array_equal(
        split_places(point_deg[order], cell[order], block_km=block_km, seed=seed), split[order]
    )


def test_one_place_has_one_split_however_it_is_written() -> None:
    names = (
        [(48.2, 16.4), (48.2000001, 16.4), (48.2, 16.3999996)],
        [(10, 180), (10, -179.9999999)],
        [(90, 5), (89.9999999, -170)],
    )
    names += [(-90.0, 0.0), (-90, 77)], [(0.0, 0.0), (-0.0, -0.0), (1e-8, -1e-8)]
    point_deg = np.array([point for place in names for point in place])
    place = np.repeat(np.arange(5), [len(place) for place in names])
    for seed in range(40):
        split = split_places(point_deg, place * 0, seed=seed)
        for one in range(5):
            assert len(set(split[place == one].tolist())) == 1
    # A difference that can be told is another place.
    apart = np.array([(48.2, 16.4 + 1e-5 * step) for step in range(30)])
    assert set(split_places(apart).tolist()) == {0, 1, 2}


def test_a_place_whose_rows_name_two_cells_is_not_torn() -> None:
    rng = np.random.default_rng(2)
    point_deg, cell = np.repeat(rng.uniform(0, 50, (50, 2)), 2, axis=0), rng.integers(0, 4, 100)
    split = split_places(point_deg, cell)
    np.testing.assert_array_equal(split[::2], split[1::2])
    np.testing.assert_array_equal(split_places(point_deg[::-1], cell[::-1]), split[::-1])


def test_no_place_of_a_cell_is_always_the_one_that_goes_to_train() -> None:
    point_deg = np.random.default_rng(2).uniform(0, 50, (40, 2))
    splits = np.stack([split_places(point_deg, np.arange(40) // 8, seed=seed) for seed in range(60)])
    assert (splits > 0).any(axis=0).all()


@pytest.mark.parametrize("block_km", [15.0, 50.0, 120.0])
def test_blocks_stay_whole_and_train_keeps_its_distance(block_km: float) -> None:
    point_deg, cell = europe()
    split = split_places(point_deg, cell, block_km=block_km)
    block = h3_indexes(point_deg, block_resolution(block_km))
    for one in np.unique(block):
        # A block of train may lose places to the buffer.
        assert set(split[block == one].tolist()) in ({0}, {1}, {2}, {-1}, {0, -1})
    assert shares_of(split)[1:] == pytest.approx([0.1, 0.1], abs=0.004)
    assert nearest_km(point_deg, split) >= block_km / 2
    check_leaks(point_deg, split, block_km=block_km)
    # Without a buffer nothing is lost, and there are nearer pairs.
    touching = split_places(point_deg, cell, block_km=block_km, buffer_km=0)
    assert shares_of(touching) == pytest.approx([0.8, 0.1, 0.1], abs=0.004)
    assert nearest_km(point_deg, touching) < block_km / 2
    np.testing.assert_array_equal(split[split > 0], touching[split > 0])
    left_out = split == -1
    assert (touching[left_out] == 0).all()
    near_km = haversine_km(point_deg[left_out][:, None], point_deg[split > 0][None]).min(axis=1)
    assert (near_km < block_km / 2 + 0.002).all()


def test_large_blocks_are_held_out_now_and_then_and_the_shares_are_met_all_the_same() -> None:
    # Half of the places in 5 towns, the others scattered.
    rng = np.random.default_rng(0)
    towns = np.repeat([(40, 0), (44, 5), (48, 10), (52, 15), (56, 20)], 200, axis=0) + rng.normal(0, 0.01, (1000, 2))
    point_deg = np.concatenate([towns, rng.uniform([36, -10], [70, 30], (1000, 2))])
    held_out = 0
    for seed in range(20):
        split = split_places(point_deg, block_km=20, buffer_km=0, seed=seed)
        assert shares_of(split) == pytest.approx([0.8, 0.1, 0.1], abs=0.005)
        held_out += sum(bool(split[town] > 0) for town in range(0, 1000, 200))
    # A fifth of the 100 in the mean, less where a second town found no room any more.
    assert 6 <= held_out <= 32


@pytest.mark.parametrize("res", [0, 1, 3, 5])
def test_a_block_is_wider_than_block_km_wherever_it_lies(res: int) -> None:
    block_km = h3.average_hexagon_edge_length(res, unit="km")
    assert block_resolution(block_km) == res
    assert block_resolution(block_km * 1.001) == res - 1 if res else True
    rng = np.random.default_rng(0)
    blocks = [h3.latlng_to_cell(*point, res) for point in rng.uniform([-90, -180], [90, 180], (30, 2))]
    for block in [*blocks, *h3.get_pentagons(res)]:
        corner = np.array(h3.cell_to_boundary(block))
        middle_km = haversine_km(corner, h3.cell_to_latlng(block))
        side_km = haversine_km(corner, np.roll(corner, -1, axis=0))
        other_km = np.roll(middle_km, -1)
        # Heron's height over each side, by the plane: a little too low on the sphere.
        half = (middle_km + other_km + side_km) / 2
        area = np.sqrt(half * (half - middle_km) * (half - other_km) * (half - side_km))
        long_sides = side_km > 0.2 * side_km.max()
        assert (2 * (2 * area / side_km)[long_sides]).min() >= block_km


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (2, {}, "(val|test) would have no place. 2 distinct places are too few"),
        (1, {}, "val and test would have no place"),
        (100, {"block_km": 1000.0}, "--block-km"),
        (100, {"block_km": 100.0, "buffer_km": 5000.0}, "train would have no place"),
    ],
)
def test_a_split_that_would_leave_one_empty_is_refused(rows: int, options: dict[str, Any], words: str) -> None:
    point_deg = np.random.default_rng(0).uniform([45, 5], [50, 12], (rows, 2))
    with pytest.raises(SplitError, match=words):
        split_places(point_deg, **options)
    with pytest.raises(SplitError, match="too few to a cell"):
        split_places(point_deg, np.arange(rows))


def test_three_places_are_enough() -> None:
    assert sorted(split_places([(1, 1), (2, 2), (3, 3)]).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shares": (0.8, 0.2, 0.0)}, "--shares"),
        ({"shares": (0.8, 0.1, 0.2)}, "--shares"),
        ({"shares": (0.8, 0.2)}, "--shares"),
        ({"shares": (math.nan, 0.1, 0.1)}, "--shares"),
        ({"block_km": 0.0}, "--block-km must be above 0"),
        ({"block_km": -5.0}, "got -5.0"),
        ({"block_km": 1500.0}, "--block-km"),
        ({"block_km": math.nan}, "--block-km"),
        ({"block_km": 50.0, "buffer_km": -1.0}, "--buffer-km"),
        ({"block_km": 50.0, "buffer_km": math.nan}, "--buffer-km"),
        ({"buffer_km": 10.0}, "give --block-km too"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_places(europe(50)[0], **options)


def test_a_point_that_is_no_place_is_refused() -> None:
    with pytest.raises(PartitionError, match="point 1 is no place on Earth"):
        split_places([(1, 1), (math.nan, 3), (4, 4)])
    with pytest.raises(PartitionError, match="point 0"):
        check_leaks([(91, 1), (2, 3), (4, 4)], [0, 1, 2])


def test_a_split_that_tears_a_place_is_named_with_its_first_example() -> None:
    point_deg, cell = europe(400)
    point_deg = np.concatenate([point_deg, point_deg[[10, 20]]])
    split = split_places(point_deg, cell[[*range(400), 10, 20]])
    check_leaks(point_deg, split)
    split[10], split[400], split[20], split[401] = 0, 2, 1, 0
    with pytest.raises(SplitError, match=r"mine\.csv leaks: 2 places .* row 10 in train, row 400 in test"):
        check_leaks(point_deg, split, source="mine.csv")
    # A row that is in no split tells nothing to anybody.
    split[10], split[401] = -1, -1
    check_leaks(point_deg, split)


def test_train_that_comes_too_near_is_named() -> None:
    point_deg = np.array([(50.0, 10.0), (50.0, 10.1), (50.0, 11.0), (50.0, 12.0)])
    split = np.array([0, 1, 0, 2])
    check_leaks(point_deg, split)
    check_leaks(point_deg, split, block_km=14)
    with pytest.raises(SplitError, match=r"1 row of train is nearer than 10 km .* row 0, 7.15 km from row 1 of val"):
        check_leaks(point_deg, split, block_km=20)
    with pytest.raises(SplitError, match="2 rows of train are nearer than 72 km"):
        check_leaks(point_deg, split, block_km=20, buffer_km=72)
    split[0] = -1
    check_leaks(point_deg, split, block_km=20)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ([0, 1, 3], r"row 2 has the code 3 \(1 such rows\)"),
        ([0, 1, -2], "row 2 has the code -2"),
        ([0, 1, 256], "row 2 has the code 256"),
        ([0, 1], "3 places need so many codes"),
        ([0, 1, 1], "test would have no place"),
        ([-1, 1, 2], "train would have no place"),
    ],
)
def test_a_split_that_is_none_is_refused(split: list[int], words: str) -> None:
    with pytest.raises(SplitError, match=words):
        check_leaks([(1, 1), (2, 2), (3, 3)], np.array(split))
