"""`geoloc predict --group-by` from shards: a location lies in one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from grouped_samples import errors_of, write_shard
from small_world import World, draw_jpeg, predictions

Geoloc = Callable[..., tuple[int, dict[str, Any]]]

PAIRS = [["a", "b", "a", "c"], ["c", None, "a", "d", "a", "a", "a", "a"], ["d", "e", "b", "c", "c"]]
COUNTS = {"a": 7, "b": 2, "c": 4, "d": 2, "e": 1}


def test_shards_and_their_embeddings_give_the_same_locations(world: World, geoloc: Geoloc, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    write_shard(shards / "0.tar", ["a", "b", "a", "c", "a", "b", "c", "a", "b", "a"])
    write_shard(shards / "1.tar", ["d"] * 5 + ["e"], first_photo=10)
    flags = [*world.head_flags, "--group-by", "place"]
    code, summary = geoloc("predict", shards, "--out", out, "--save-embeddings", *world.encoder_flags, *flags)
    assert (code, summary["samples"], summary["rows"], summary["errors"]) == (0, 16, 5, 0)
    assert [pq.read_metadata(path).num_rows for path in sorted((out / "metadata").iterdir())] == [10, 6]
    assert geoloc("verify", out)[0] == 0
    code, _ = geoloc("predict", "--from-embeddings", out, "--out", tmp_path / "stored", *flags)
    assert code == 0
    for direct, stored in zip(predictions(out), predictions(tmp_path / "stored"), strict=True):
        same = ("key", "shard", "row", "num_views", "meta_place", "meta_town", "meta_heading")
        assert [direct[name] for name in same] == [stored[name] for name in same]
        probs = dict(zip(stored["topk_cell"], stored["topk_prob"], strict=True))
        assert all(
            abs(probs.get(cell, prob) - prob) < 2e-3
            for cell, prob in zip(direct["topk_cell"], direct["topk_prob"], strict=True)
        )


def test_photos_without_the_field_and_damaged_ones_are_error_rows_and_missing_from_their_location(
    world: World, geoloc: Geoloc, tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "0.tar", ["a", None, "b", "a", "gone"])
    data = bytearray(shard.read_bytes())
    for row in (0, 4):
        at = data.find(draw_jpeg(row))
        data[at : at + 3] = b"bad"
    shard.write_bytes(data)
    flags = ["--group-by", "place", "--save-embeddings", *world.encoder_flags, *world.head_flags]
    code, summary = geoloc("predict", shard, "--out", tmp_path / "out", *flags)
    assert (code, summary["samples"], summary["rows"], summary["errors"]) == (3, 5, 2, 3)
    assert [(row["key"], row["row"], row["num_views"]) for row in predictions(tmp_path / "out")] == [
        ("b", 2, 1), ("a", 3, 1),
    ]  # fmt: skip
    assert [error[1:] for error in errors_of(tmp_path / "out")] == [(0, "decode"), (1, "group"), (4, "decode")]
    assert geoloc("verify", tmp_path / "out")[0] == 0
    code, summary = geoloc("predict", shard, "--out", tmp_path / "none", *flags[2:], "--group-by", "absent")
    assert (code, summary["rows"], summary["errors"]) == (3, 0, 5)
    assert geoloc("verify", tmp_path / "none")[0] == 0


def test_a_location_in_two_shards_is_told_with_the_remedy(
    world: World, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    write_shard(shards / "0.tar", ["a", "b", "b"])
    write_shard(shards / "1.tar", ["c", "b", "a"], first_photo=3)
    command = ["predict", shards, "--out", out, "--group-by", "place", *world.encoder_flags, *world.head_flags]
    for _ in range(2):
        caplog.clear()
        code, summary = geoloc(*command)
        assert (code, summary["rows"]) == (3, 5)
        assert "2 locations have rows in more than one unit, the first is a" in caplog.text
        assert "predict --from-embeddings with --group-by place" in caplog.text
    assert geoloc("verify", out)[0] == 0
