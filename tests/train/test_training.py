"""`geoloc train` from end to end: what it learns, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_world import tree_bytes
from train_samples import DIM, NUM_CELLS, World, flags_of, make_partition, make_world

from geoloc_batch.cli import main
from geoloc_batch.geo.ceiling import ceiling
from geoloc_batch.geo.metrics import distances_km
from geoloc_batch.geo.partition import Partition, load_partition
from geoloc_batch.locate.head import load_head
from geoloc_batch.locate.head_file import TENSORS, read_head
from geoloc_batch.train.split import check_leaks

GROUPED = ("--group-by", "spot", "--loss", "weighted-ce")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def head(world: World) -> Path:
    out = world.emb.parent / "head"
    assert main(flags_of(world, out, *GROUPED)) == 0
    return out


def read_splits(out: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(out / "splits.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def described(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "head.json").read_text())
    return values


def test_a_head_learns_what_is_in_the_features_and_comes_as_near_as_its_cells_allow(world: World, head: Path) -> None:
    test = described(head)["metrics"]["test"]
    splits = read_splits(head)
    points = np.stack([splits["lat"], splits["lon"]], axis=1)[splits["split"] == "test"]
    reach = ceiling(make_partition(), points).assigned
    assert test["top1"]["top_1"] == 100
    assert test["top1"]["median_km"] == pytest.approx(reach.median_km)
    assert test["top1"]["mean_km"] == pytest.approx(reach.mean_km)
    assert test["top1"]["rows"] == len(points) == 27


def test_splits_cover_all_places_without_leaks(world: World, head: Path) -> None:
    splits = read_splits(head)
    codes = np.array([("train", "val", "test").index(name) for name in splits["split"]])
    points = np.stack([splits["lat"], splits["lon"]], axis=1)
    check_leaks(points, codes)
    assert np.bincount(codes).tolist() == [216, 27, 27]
    np.testing.assert_array_equal(points, world.point_deg_L2[splits["key"].astype(int)])
    np.testing.assert_array_equal(splits["cell"], make_partition().assign(*points.T))
    assert described(head)["split"] | {"sha256": "", "cells": ""} == {
        "rule": "by cell", "shares": [0.8, 0.1, 0.1], "seed": 0, "block_km": None, "buffer_km": None,
        "train": 216, "val": 27, "test": 27, "left_out": 0, "sha256": "", "cells": "",
    }  # fmt: skip


def test_both_files_of_a_head_say_what_it_was_made_of(world: World, head: Path) -> None:
    partition = load_partition(world.cells)
    assert load_partition(head / "geocell_info.json") == partition
    for name in ("best.pt", "head.safetensors"):
        found = read_head(head / name)
        assert (found.dim, found.num_cells, found.tap) == (DIM, NUM_CELLS, "pooled")
        assert found.partition_fingerprint == partition.fingerprint
    saved = torch.load(head / "best.pt", weights_only=True)
    assert set(saved["model"]) == set(TENSORS)
    values = described(head)
    assert saved["head"] == {name: values[name] for name in ("tap", "partition_fingerprint", "position", "fusion")}
    assert (values["dim"], values["num_cells"], values["fusion"]) == (DIM, NUM_CELLS, "feature")
    assert values["loss"] == {"kind": "weighted-ce", "label_smoothing": 0.1}
    assert values["train"]["lr"] == 0.02
    assert not [path.name for path in head.iterdir() if path.name.startswith("_")]


def test_every_epoch_has_a_row_of_figures_and_the_best_one_is_the_heads(head: Path) -> None:
    with (head / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = described(head)
    assert [int(row["epoch"]) for row in rows] == list(range(1, values["train"]["epochs_done"] + 1))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert all(float(row["train_loss"]) == float(row["train_ce"]) for row in rows)
    assert [float(row["lr"]) for row in rows[1:3]] == sorted((float(row["lr"]) for row in rows[1:3]), reverse=True)
    best = rows[values["train"]["best_epoch"] - 1]
    for position in ("top1", "mean"):
        for name in ("median_km", "mean_km", "balscore", "within_200_km"):
            assert float(best[f"val_{position}_{name}"]) == pytest.approx(values["metrics"]["val"][position][name])
    assert (head / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_training_says_so_and_changes_nothing(
    world: World, head: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = tree_bytes(head)
    assert main(flags_of(world, head, *GROUPED)) == 0
    assert "is done" in caplog.text
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    values = described(head)
    test = values["metrics"]["test"][values["position"]]
    assert {name: last[name] for name in test} == test
    assert (last["epochs"], last["out"]) == (values["train"]["epochs_done"], str(head))
    assert tree_bytes(head) == before


def test_other_settings_on_the_same_folder_are_refused_by_the_names_that_differ(
    world: World, head: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree_bytes(head)
    others = ("--weight-decay", 0.5, "--loss", "smooth", "--label-smoothing", 0.0, "--split-seed", 3)
    assert main(flags_of(world, head, "--group-by", "spot", *others)) == 2
    message = capsys.readouterr().err
    for words in ("weight_decay is pinned to 0.0001, now 0.5", 'loss.kind is pinned to "weighted-ce", now "smooth"'):
        assert words in message
    assert "split_sha256" in message
    assert "another --out" in message
    assert "dropout" not in message
    assert tree_bytes(head) == before


def test_a_trained_head_predicts_where_its_evaluation_found_the_places(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head"
    assert main(flags_of(world, out, "--loss", "weighted-ce+haversine", "--epochs", 4)) == 0
    predicted = ["predict", "--from-embeddings", world.emb, "--out", tmp_path / "pred", "--head", out / "best.pt"]
    assert main([str(word) for word in predicted]) == 0
    rows = pq.read_table(tmp_path / "pred" / "predictions").to_pydict()
    splits = read_splits(out)
    in_test = dict(zip(splits["key"], splits["split"] == "test", strict=True))
    chosen = np.array([in_test[key] for key in rows["key"]])
    truth = np.stack([rows["meta_lat"], rows["meta_lon"]], axis=1)[chosen]
    means = np.stack([rows["mean_lat"], rows["mean_lon"]], axis=1)[chosen]
    centroids = make_partition().centroids_deg[np.array(rows["cell"])[chosen]]
    metrics = described(out)["metrics"]["test"]
    for position, found in (("top1", centroids), ("mean", means)):
        distance_km = distances_km(found, truth)
        # Features on a disk are float32 products of float16 rows for both; LayerNorm in float64 once or per row.
        assert metrics[position]["mean_km"] == pytest.approx(distance_km.mean(), abs=0.02)
        assert metrics[position]["median_km"] == pytest.approx(np.median(distance_km), abs=0.02)
    own = means if described(out)["position"] == "mean" else centroids
    answered = np.stack([rows["lat"], rows["lon"]], axis=1)[chosen]
    # `--position auto` follows head.json.
    np.testing.assert_allclose(answered, own, atol=1e-9)


def test_a_warm_start_begins_as_the_head_that_it_names(world: World, head: Path, tmp_path: Path) -> None:
    frozen = ("--lr", "1e-12", "--weight-decay", 0, "--epochs", 1)
    arguments = flags_of(world, tmp_path / "warm", *GROUPED, "--warm-start", head / "best.pt")
    assert main([*arguments, *map(str, frozen)]) == 0
    before, after = (read_head(out / "best.pt") for out in (head, tmp_path / "warm"))
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        torch.testing.assert_close(getattr(before, name), getattr(after, name), atol=1e-6, rtol=1e-6)
    figures = [described(out)["metrics"]["test"]["mean"]["mean_km"] for out in (head, tmp_path / "warm")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)
    # Not the starting head alone: training went on from it.
    with (tmp_path / "warm" / "metrics.csv").open() as file:
        found = [float(row["val_mean_mean_km"]) for row in csv.DictReader(file)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_a_sweep_trains_each_combination_on_one_split_and_goes_on_where_it_was_cut_off(
    world: World, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = Partition(ids=np.arange(3), centroids_deg=np.array([[40.0, 1], [45.0, 10], [50.0, 19]]))
    coarse.save(tmp_path / "coarse.json")
    out = tmp_path / "sweep"
    more = ["--cells", tmp_path / "coarse.json", "--loss", "ce", "--loss", "weighted-ce+haversine", "--lam", 0.01]
    more += ["--lam", 0.05, "--fusion", "logit", "--group-by", "spot", "--epochs", 2, "--sweep"]
    # As if the first process had been stopped after one head.
    with monkeypatch.context() as patch:
        from geoloc_batch.train import commands

        train_one = commands.Job.train
        calls: list[str] = []

        def stopped(job: Any, recipe: Any, folder: Path) -> Any:
            calls.append(recipe.name)
            return train_one(job, recipe, folder) if len(calls) < 2 else None

        patch.setattr(commands.Job, "train", stopped)
        assert main(flags_of(world, out, *more)) == 75
    assert "5 heads are left" in capsys.readouterr().out
    first = out / calls[0] / "best.pt"
    stamp = first.stat().st_mtime_ns
    assert main(flags_of(world, out, *more)) == 0
    assert first.stat().st_mtime_ns == stamp
    printed = capsys.readouterr().out.splitlines()
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {row["name"] for row in rows}
    assert len(rows) == len(names) == 6
    assert {path.name for path in out.iterdir() if path.is_dir()} == names
    assert "coarse_ce_logit_seed0" in names
    assert "cells_weighted-ce-haversine-lam0.01_logit_seed0" in names
    scores = [float(row["val_balscore"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [line.split()[1] for line in printed[2:8]] == [row["name"] for row in rows]
    assert json.loads(printed[-1])["best"] == rows[0]["name"]
    assert len({json.dumps(described(out / name)["split"]) for name in names}) == 1
    assert {row["num_cells"] for row in rows} == {"3", "9"}
    # One of a sweep is what the same flags alone would have made.
    alone = tmp_path / "alone"
    flags = ("--group-by", "spot", "--loss", "ce", "--epochs", 2, "--fusion", "logit")
    assert main(flags_of(world, alone, *flags)) == 0
    assert (alone / "best.pt").read_bytes() == (out / "cells_ce_logit_seed0" / "best.pt").read_bytes()
    # Not a sweep any more, and a single head's folder is none.
    assert main(flags_of(world, out, *flags)) == 2
    assert "holds" in capsys.readouterr().err


def test_features_on_disk_and_view_dropout_train_too(world: World, tmp_path: Path) -> None:
    outs = []
    for hold in ("disk", "memory"):
        outs.append(tmp_path / hold)
        more = (*GROUPED, "--epochs", 2, "--view-dropout", 0.4, "--hold", hold)
        assert main(flags_of(world, outs[-1], *more)) == 0
    assert (outs[0] / "best.pt").read_bytes() == (outs[1] / "best.pt").read_bytes()
    assert {path.name for path in outs[0].iterdir()} == {path.name for path in outs[1].iterdir()}


def test_the_splits_of_one_training_serve_another(world: World, head: Path, tmp_path: Path) -> None:
    own = ("--split-file", head / "splits.parquet", "--epochs", 1)
    assert main(flags_of(world, tmp_path / "out", *GROUPED, *own)) == 0
    ours, theirs = read_splits(tmp_path / "out"), read_splits(head)
    assert ours["split"].tolist() == theirs["split"].tolist()
    assert described(tmp_path / "out")["split"]["rule"] == "file"


def test_blocks_keep_train_away_from_test(world: World, tmp_path: Path) -> None:
    blocks = ("--block-km", 80, "--buffer-km", 10, "--epochs", 1)
    assert main(flags_of(world, tmp_path / "out", *GROUPED, *blocks)) == 0
    splits = read_splits(tmp_path / "out")
    points = np.stack([splits["lat"], splits["lon"]], axis=1)
    train, rest = (points[np.isin(splits["split"].astype(str), names)] for names in (["train"], ["val", "test"]))
    assert distances_km(np.repeat(train, len(rest), axis=0), np.tile(rest, (len(train), 1))).min() >= 10
    assert described(tmp_path / "out")["split"]["buffer_km"] == 10
    assert described(tmp_path / "out")["split"]["left_out"] == int((splits["split"] == None).sum())  # noqa: E711


def test_head_json_says_which_buffer_was_kept(world: World, tmp_path: Path) -> None:
    assert main(flags_of(world, tmp_path / "out", *GROUPED, "--block-km", 50, "--epochs", 1)) == 0
    assert described(tmp_path / "out")["split"]["buffer_km"] == 25


def test_a_head_from_python(world: World, tmp_path: Path) -> None:
    import geoloc_batch

    trained = geoloc_batch.train_head(
        world.emb, cells=world.cells, out=tmp_path / "out", group_by="spot", lam=0.02, epochs=1, precision="fp32"
    )
    assert trained.exit_code == 0
    assert trained.heads[0][1]["loss"]["lam"] == 0.02
    located = load_head(tmp_path / "out" / "best.pt", tmp_path / "out" / "geocell_info.json").locate(torch.ones(1, DIM))
    assert located.topk_cell.shape == (1, 5)
