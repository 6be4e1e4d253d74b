"""Which rows show which place, and what becomes of their features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from train_samples import DIM, World, make_world, write_photos

from geoloc_batch.errors import InputError
from geoloc_batch.train.config import TrainConfig
from geoloc_batch.train.features import CHUNK_ROWS, Features, Kind, load_features
from geoloc_batch.train.places import Places, read_places

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_places=40)


def places_of(emb: Path, **flags: str) -> Places:
    return read_places(TrainConfig(embeddings=(str(emb),), cells=("c.json",), out="o", **flags))  # type: ignore[arg-type]


def load(places: Places, kind: Kind, tmp_path: Path, hold: str = "memory") -> Features:
    return load_features(places, kind, CPU, hold=hold, scratch=tmp_path)


def layer_norm(feature_ND: np.ndarray) -> torch.Tensor:
    return nn.LayerNorm(DIM, elementwise_affine=False)(torch.from_numpy(feature_ND).double()).float()


def test_feature_fusion_of_1_2_4_and_7_views_is_layer_norm_of_the_mean_of_raw_features(
    world: World, tmp_path: Path
) -> None:
    places = places_of(world.emb, group_by="spot")
    assert set(np.bincount(places.place_R)) == {1, 2, 4, 7}
    order = [int(name) for name in places.name_L.to_pylist()]
    np.testing.assert_array_equal(places.point_deg_L2, world.point_deg_L2[order])
    mean_LD = np.stack([world.feature_ND[world.place_N == place].mean(axis=0) for place in order])
    all_L = torch.arange(len(places))
    expected = layer_norm(mean_LD)
    # Stored rows are float16: 5e-4 of their length.
    for kind in ("fused", "raw-views"):
        found = load(places, kind, tmp_path).fused(all_L)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    stored_R = np.concatenate([pair.features_ND for pair in places.pairs])
    exact_LD = np.stack([stored_R[places.place_R == place].mean(axis=0) for place in range(len(places))])
    torch.testing.assert_close(load(places, "fused", tmp_path).fused(all_L), layer_norm(exact_LD), atol=1e-5, rtol=0)
    # What a reader that forgot the lengths would give: far off.
    unit_R = stored_R / np.linalg.norm(stored_R, axis=1, keepdims=True)
    wrong_LD = np.stack([unit_R[places.place_R == place].mean(axis=0) for place in range(len(places))])
    assert (layer_norm(wrong_LD) - expected).abs().max() > 0.1


def test_logit_fusion_is_the_mean_of_the_views_logits(world: World, tmp_path: Path) -> None:
    from geoloc_batch.train.network import Network, first_state

    places = places_of(world.emb, group_by="spot")
    torch.manual_seed(0)
    state = first_state(5, 0.5 + torch.rand(DIM), torch.randn(DIM))
    state["head.2.weight"], state["head.2.bias"] = torch.randn(5, DIM), torch.randn(5)
    head = nn.Sequential(nn.LayerNorm(DIM), nn.Dropout(0.3), nn.Linear(DIM, 5)).eval()
    head.load_state_dict({name.removeprefix("head."): value for name, value in state.items()})
    stored_R = torch.from_numpy(np.concatenate([pair.features_ND for pair in places.pairs]))
    with torch.no_grad():
        expected = torch.stack([head(stored_R[places.place_R == place]).mean(dim=0) for place in range(len(places))])
    network = Network(state, CPU, precision="fp32", weight_decay=0)
    found = network.evaluated(load(places, "normed-views", tmp_path).fused(torch.arange(len(places))))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_scratch_file_holds_the_same_bits_as_memory_and_has_no_name(world: World, tmp_path: Path) -> None:
    places = places_of(world.emb, group_by="spot")
    for kind in ("fused", "normed-views", "raw-views"):
        in_memory, on_disk = (load(places, kind, tmp_path, hold) for hold in ("memory", "disk"))
        assert (in_memory.is_mapped, on_disk.is_mapped) == (False, True)
        chosen = torch.tensor([3, 0, 39])
        assert torch.equal(in_memory.fused(chosen), on_disk.fused(chosen))
    assert list(tmp_path.iterdir()) == []


def test_rows_without_a_number_or_a_place_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    metas: list[dict[str, object]] = [{"lat": 50.0, "lon": 5.0 + row, "spot": row} for row in range(8)]
    metas[1] = {"lat": 50.0, "spot": 1}
    metas[2] = {"lat": 95.0, "lon": 7.0, "spot": 2}
    metas[3] = {"lat": 50.0, "lon": 8.0}
    metas[7] = {"lat": 50.02, "lon": 11.0, "spot": 6}
    features = rng.normal(0, 1, (8, DIM)).astype(np.float32)
    npy = write_photos(tmp_path / "emb", 0, metas, features)
    stored = np.load(npy)
    stored[4, 5] = np.nan
    np.save(npy, stored)
    parquet = tmp_path / "emb" / "metadata" / "metadata_000000.parquet"
    table = pq.read_table(parquet)
    norms = table["emb_norm"].to_numpy().copy()
    norms[5] = np.nan
    pq.write_table(table.set_column(table.column_names.index("emb_norm"), "emb_norm", pa.array(norms)), parquet)
    # A pair whose photos have no json at all.
    write_photos(tmp_path / "emb", 1, [{}, {}], rng.normal(0, 1, (2, DIM)).astype(np.float32))
    places = places_of(tmp_path / "emb", group_by="spot")
    assert places.left_out == {
        "rows without a length that could restore their features": 1,
        "rows without 'spot'": 3,
        "rows without a position": 4,
        "locations whose photos lie more than 1 km apart": 1,
    }
    assert places.name_L.to_pylist() == ["0", "4"]
    fused = load(places, "fused", tmp_path)
    assert fused.num_bad_rows == 1
    np.testing.assert_array_equal(fused.is_good_L, [True, False])
    ungrouped = places_of(tmp_path / "emb")
    assert ungrouped.name_L.to_pylist() == ["0/0", "0/3", "0/4", "0/6", "0/7"]


def test_keys_that_repeat_are_told_apart_by_their_shard(tmp_path: Path) -> None:
    meta = {"lat": 1.0, "lon": 2.0}
    for index in range(2):
        write_photos(tmp_path / "emb", index, [meta], np.ones((1, DIM), np.float32))
        path = tmp_path / "emb" / "metadata" / f"metadata_{index:06d}.parquet"
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.column_names.index("key"), "key", pa.array(["same"])), path)
    assert places_of(tmp_path / "emb").name_L.to_pylist() == ["shards/0.tar/same", "shards/1.tar/same"]


@pytest.mark.parametrize("group_by", ["", "spot"])
def test_a_table_of_the_truth_goes_before_the_photos_own_json(world: World, tmp_path: Path, group_by: str) -> None:
    own = places_of(world.emb, group_by=group_by)
    keys = own.name_L.to_pylist()[::-1]
    truth = pa.table({"key": keys, "breite": np.linspace(-60, 60, len(keys)), "lon": np.full(len(keys), 33.0)})
    pq.write_table(truth.slice(1), tmp_path / "truth.parquet")
    found = places_of(world.emb, group_by=group_by, truth=str(tmp_path / "truth.parquet"), lat="breite")
    assert found.left_out == {"places without a position in --truth": 1}
    assert found.name_L.to_pylist() == own.name_L.to_pylist()[:-1]
    np.testing.assert_allclose(found.point_deg_L2[:, 0], np.linspace(-60, 60, len(keys))[::-1][:-1])
    assert found.digest != own.digest


def test_features_of_different_widths_are_refused(world: World, tmp_path: Path) -> None:
    write_photos(tmp_path / "other", 0, [{"lat": 1.0, "lon": 2.0}], np.ones((1, 7), np.float32))
    config = TrainConfig(embeddings=(str(world.emb), str(tmp_path / "other")), cells=("c.json",), out="o")
    with pytest.raises(InputError, match=r"holds 24 pooled features .* 7 pooled features .*; leave out one of them"):
        read_places(config)


def test_sums_do_not_depend_on_where_chunks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path, num_places=30)
    places = places_of(world.emb, group_by="spot")
    whole = load(places, "fused", tmp_path).value_SD
    assert len(places.place_R) < CHUNK_ROWS
    monkeypatch.setattr("geoloc_batch.train.features.CHUNK_ROWS", 5)
    torch.testing.assert_close(load(places, "fused", tmp_path).value_SD, whole, atol=1e-5, rtol=0)
