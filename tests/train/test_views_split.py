"""Splits of places that have several views: all of their coordinates count, not the first one's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_samples import DIM, make_partition, write_photos

from geoloc_batch.cli import main
from geoloc_batch.errors import SplitError
from geoloc_batch.geo.shapes.h3 import h3_indexes
from geoloc_batch.geo.sphere import haversine_km
from geoloc_batch.train.config import SplitConfig, TrainConfig
from geoloc_batch.train.inputs import Inputs, read_inputs
from geoloc_batch.train.recipes import load_cells
from geoloc_batch.train.split import block_resolution, check_leaks, split_places

views = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 25), st.integers(0, 2)), min_size=8, max_size=60)


@settings(deadline=None, max_examples=25)
@given(views, st.sampled_from([None, 20.0]), st.integers(0, 5))
def test_what_shares_a_coordinate_or_a_label_is_never_parted(
    rows: list[Any], block_km: float | None, seed: int
) -> None:
    # 41 spots in a row, 5 km apart: labels meet on some of them by chance.
    point_deg = np.array([(50.0, 0.07 * spot) for spot, _, _ in rows])
    label, cell = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    try:
        split = split_places(point_deg, cell, together_N=label, block_km=block_km, seed=seed)
    except SplitError:
        return
    for key in (label, np.array([row[0] for row in rows])):
        for one in np.unique(key):
            assert len(set(split[key == one].tolist())) == 1
    check_leaks(point_deg, split, block_km=block_km)
    if block_km is not None:
        held_out, train = point_deg[split > 0], point_deg[split == 0]
        assert haversine_km(train[:, None], held_out[None]).min() >= block_km / 2
        return
    # Blocks know a label by its first row; else neither the order nor the labels' own numbers are of account.
    order = np.random.default_rng(seed).permutation(len(rows))
    again = split_places(point_deg[order], cell[order], together_N=-label[order], seed=seed)
    np.testing.assert_array_equal(again, split[order])


def test_labels_of_one_row_each_change_nothing_and_a_block_is_that_of_the_first_views() -> None:
    rng = np.random.default_rng(1)
    point_deg, cell = rng.uniform([45, 5], [50, 12], (400, 2)), rng.integers(0, 9, 400)
    for options in ({}, {"block_km": 40.0}, {"block_km": 40.0, "buffer_km": 0.0}):
        alone = split_places(point_deg, cell, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(
            split_places(point_deg, cell, together_N=np.arange(400)[::-1], **options),  # type: ignore[arg-type]
            alone,
        )
    # A second view of each, some 700 m off.
    both = np.concatenate([point_deg, point_deg + 0.006])
    split = split_places(both, together_N=np.tile(np.arange(400), 2), block_km=40, buffer_km=0)
    np.testing.assert_array_equal(split[:400], alone)
    np.testing.assert_array_equal(split[:400], split[400:])
    block = h3_indexes(point_deg, block_resolution(40))
    assert all(len(set(split[:400][block == one].tolist())) == 1 for one in np.unique(block))
    # Only by their second views are some of them so near to one another.
    apart = split_places(both, together_N=np.tile(np.arange(400), 2), block_km=40, buffer_km=10)
    check_leaks(both, apart, block_km=40, buffer_km=10)


def meeting_locations(folder: Path, num_places: int = 90) -> tuple[Path, list[str], np.ndarray]:
    """Locations of two photos; the second photos of each two neighbours were taken at the same spot, 300 m off."""
    rng = np.random.default_rng(0)
    centre = make_partition().centroids_deg[np.arange(num_places) % 9] + rng.uniform(-0.5, 0.5, (num_places, 2))
    north = np.array([0.0027, 0.0])
    centre[1::2] = centre[::2] + 2 * north
    point_deg = np.repeat(centre, 2, axis=0)
    point_deg[1::2] = np.repeat(centre[::2] + north, 2, axis=0)
    names = [f"spot {row // 2}" for row in range(len(point_deg))]
    metas: list[dict[str, object]] = [
        {"lat": lat, "lon": lon, "spot": name} for (lat, lon), name in zip(point_deg.tolist(), names, strict=True)
    ]
    write_photos(folder / "emb", 0, metas, rng.normal(0, 1, (len(metas), DIM)).astype(np.float32))
    make_partition().save(folder / "cells.json")
    return folder / "emb", names, point_deg


def inputs_of(emb: Path, **flags: Any) -> Inputs:
    cells = str(emb.parent / "cells.json")
    config = TrainConfig(embeddings=(str(emb),), cells=(cells,), out="o", group_by="spot", **flags)
    return read_inputs(config, load_cells([cells]))


@pytest.mark.parametrize("flags", [{}, {"split": SplitConfig(block_km=20)}])
def test_locations_that_meet_in_any_of_their_photos_go_the_same_way(tmp_path: Path, flags: dict[str, Any]) -> None:
    emb, names, point_deg = meeting_locations(tmp_path)
    inputs = inputs_of(emb, **flags)
    code_of = dict(zip(inputs.places.name_L.to_pylist(), inputs.split_L.tolist(), strict=True))
    by_photo = np.array([code_of[name] for name in names])
    assert {0, 1, 2} <= set(by_photo.tolist())
    check_leaks(point_deg, by_photo, block_km=20 if flags else None)
    np.testing.assert_array_equal(inputs.split_L[::2], inputs.split_L[1::2])


def test_a_file_that_parts_locations_that_meet_is_refused_by_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emb, names, _ = meeting_locations(tmp_path)
    rows = [f"{name},{('train', 'test', 'val')[number % 3]}" for number, name in enumerate(dict.fromkeys(names))]
    (tmp_path / "split.csv").write_text("\n".join(["key,split", *rows]))
    command = ["train", emb, "--cells", tmp_path / "cells.json", "--out", tmp_path / "out", "--group-by", "spot"]
    assert main([str(word) for word in [*command, "--split-file", tmp_path / "split.csv"]]) == 2
    message = capsys.readouterr().err
    for words in ("split.csv leaks: 45 places stand in more than one split", "'spot 0' in train, 'spot 1' in test"):
        assert words in message
