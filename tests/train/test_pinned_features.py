"""What a training rests on: the features that it began with, and the files that head.json stands for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_world import tree_bytes
from train_samples import World, flags_of, make_world, stop_after

from geoloc_batch.cli import main
from geoloc_batch.train import jobs
from geoloc_batch.train.config import TrainConfig
from geoloc_batch.train.features import Kind, load_features
from geoloc_batch.train.places import read_places

FLAGS = ("--group-by", "spot", "--epochs", 4, "--batch-size", 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_places=60)


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    out = world.emb.parent / "whole"
    assert main(flags_of(world, out, *FLAGS)) == 0
    return out


def copy_of(world: World, folder: Path) -> tuple[World, Path]:
    """The world once more, and its first features, to be tampered with."""
    shutil.copytree(world.emb, folder / "emb")
    copied = World(folder / "emb", world.cells, world.point_deg_L2, world.feature_ND, world.place_N)
    return copied, min((folder / "emb" / "img_emb").iterdir())


def described(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "head.json").read_text())
    return values


def test_a_digest_is_that_of_the_rows_however_they_are_stored_and_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = read_places(TrainConfig(embeddings=(str(world.emb),), cells=("c",), out="o", group_by="spot"))

    def digest(kind: Kind = "fused", hold: str = "memory") -> str:
        return load_features(places, kind, torch.device("cpu"), hold=hold, scratch=tmp_path).sha256

    found = {digest(), digest("raw-views"), digest("normed-views", "disk")}
    monkeypatch.setattr("geoloc_batch.train.features.CHUNK_ROWS", 7)
    assert len(found | {digest()}) == 1


def test_other_features_between_stop_and_resume_are_refused_and_the_old_ones_end_with_the_same_bits(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied, npy = copy_of(world, tmp_path)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(flags_of(copied, out, *FLAGS)) == 75
    assert (out / "_checkpoint.pt").exists()
    capsys.readouterr()
    before, rows = tree_bytes(out), np.load(npy)
    np.save(npy, np.roll(rows, 1, axis=0))
    assert main(flags_of(copied, out, *FLAGS)) == 2
    message = capsys.readouterr().err
    for words in (str(copied.emb), str(out), "have changed", "as they were", "another --out"):
        assert words in message
    assert tree_bytes(out) == before
    np.save(npy, rows)
    assert main(flags_of(copied, out, *FLAGS)) == 0
    assert (out / "best.pt").read_bytes() == (whole / "best.pt").read_bytes()
    assert described(out)["train"]["features_sha256"] == described(whole)["train"]["features_sha256"]


def test_the_heads_of_a_sweep_are_trained_on_the_same_features(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied, npy = copy_of(world, tmp_path)
    arguments = flags_of(copied, tmp_path / "out", *FLAGS, "--sweep", "--seed", 0, "--seed", 1, "--epochs", 1)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(arguments) == 75
    np.save(npy, np.roll(np.load(npy), 1, axis=0))
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "have changed since training in" in message
    assert "_seed0 began" in message


def test_a_head_that_is_done_asks_for_no_features(
    world: World, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(jobs, "load_features")
    assert main(flags_of(world, whole, *FLAGS)) == 0
    assert "is done" in caplog.text


@pytest.mark.parametrize("name", ["best.pt", "splits.parquet"])
def test_a_head_whose_files_are_gone_is_trained_again_and_says_so(
    world: World, whole: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / name).unlink()
    assert main(flags_of(world, out, *FLAGS)) == 0
    assert f"lacks {name}: the head is trained again" in caplog.text
    assert "is done: nothing is left" not in caplog.text
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_places_without_features_stand_in_no_split(world: World, tmp_path: Path) -> None:
    copied, npy = copy_of(world, tmp_path)
    rows = np.load(npy)
    rows[::2] = np.nan
    np.save(npy, rows)
    out = tmp_path / "out"
    assert main(flags_of(copied, out, *FLAGS, "--epochs", 1)) == 0
    is_bad_N = np.zeros(len(world.place_N), dtype=np.bool_)
    is_bad_N[: len(rows) : 2] = True
    num_lost = 60 - len(set(world.place_N[~is_bad_N].tolist()))
    assert num_lost > 3
    split, values = pq.read_table(out / "splits.parquet")["split"].to_pylist(), described(out)
    assert split.count(None) == values["split"]["left_out"] == num_lost
    for name in ("train", "val", "test"):
        assert split.count(name) == values["split"][name]
    for name in ("val", "test"):
        assert values["metrics"][name]["top1"]["rows"] == values["split"][name]
    assert values["train"]["left_out"] == {
        "rows whose features hold NaN or infinities": int(is_bad_N.sum()),
        "places without a row of finite features": num_lost,
    }
