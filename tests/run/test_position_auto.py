"""--position auto, the default: as the head says, and pinned as it came out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from locate_samples import write_remarks
from small_world import World, predictions

from geoloc_batch.cli import main


def head_that_says(folder: Path, world: World, position: str) -> Path:
    """The world's head and cells, with a head.json beside them."""
    folder.mkdir()
    for file in (world.head, world.cells):
        shutil.copy(file, folder)
    write_remarks(folder, {"position": position})
    return folder / world.head.name


def pinned(out: Path) -> Any:
    return json.loads((out / "run.json").read_text())["config"]["position"]


def test_a_head_whose_file_names_the_mean_gives_the_mean_and_the_run_is_pinned_to_it(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = head_that_says(tmp_path / "mean", world, "mean")
    flags = ["predict", world.shards, "--limit", 5, *world.encoder_flags, "--head", head]
    assert geoloc(*flags, "--out", tmp_path / "auto")[0] == 0
    assert pinned(tmp_path / "auto") == "mean"
    rows = predictions(tmp_path / "auto")
    assert [(row["lat"], row["lon"]) for row in rows] == [(row["mean_lat"], row["mean_lon"]) for row in rows]
    assert geoloc(*flags, "--out", tmp_path / "auto", "--position", "mean")[0] == 0
    assert main([*map(str, flags), "--out", str(tmp_path / "auto"), "--position", "top1"]) == 2
    assert 'position is pinned to "mean", now "top1"' in capsys.readouterr().err


def test_a_run_pinned_to_top1_goes_on_with_the_default_flags_unless_heads_disagree(
    world: World, geoloc: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ["predict", world.shards, "--limit", 5, *world.encoder_flags]
    # As every run was pinned before there was an auto.
    assert geoloc(*flags, *world.head_flags, "--out", tmp_path / "one", "--position", "top1")[0] == 0
    assert pinned(tmp_path / "one") == "top1"
    assert geoloc(*flags, *world.head_flags, "--out", tmp_path / "one")[0] == 0
    heads = ["--head", f"a={world.head}", "--head", f"b={head_that_says(tmp_path / 'mean', world, 'mean')}"]
    assert geoloc(*flags, *heads, "--cells", world.cells, "--out", tmp_path / "two")[0] == 0
    assert pinned(tmp_path / "two") == ["top1", "mean"]
    first, second = (predictions(tmp_path / "two", name) for name in "ab")
    assert [row["cell"] for row in first] == [row["cell"] for row in second]
    assert all(row["lat"] != row["mean_lat"] for row in first)
    assert all(row["lat"] == row["mean_lat"] for row in second)
