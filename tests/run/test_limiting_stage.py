"""The stage that limits a run, on runs that are made to be limited by it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_world import COUNTS, World, draw_jpeg, write_tar

from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.model.encoder import Encoder
from geoloc_batch.store import tables
from geoloc_batch.store.features import StoredFeatures


def slowed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
    """Make a function take longer."""
    function = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


def last_log(out: Path) -> dict[str, Any]:
    (log,) = (out / "_logs").glob("*.jsonl")
    values: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return values


@pytest.fixture
def predicted(world: World, geoloc: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run predict on shards; gives the last line of the log, whose limiting stage the summary repeats."""

    def run(shards: object) -> dict[str, Any]:
        code, summary = geoloc("predict", shards, "--out", tmp_path / "out", *world.encoder_flags, *world.head_flags)
        assert code == 0
        log = last_log(tmp_path / "out")
        assert log["limiting_stage"] == summary["limiting_stage"]
        assert log["limiting_stage"] == max(log["busy"], key=log["busy"].__getitem__)
        assert all(0 <= share <= 1 for share in log["busy"].values())
        return log

    return run


def test_a_slow_pipe_makes_reading_the_limit(
    world: World, predicted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    shard = next(iter(sorted(world.shards.iterdir())))
    log = predicted(f"pipe:sleep 1; cat {shard}; sleep 1")
    assert log["limiting_stage"] == "read"
    assert log["busy"]["read"] > 0.5
    assert log["busy"]["decode"] < 0.3
    assert log["queues"]["photos"]["mean"] < 2


def test_large_photos_make_decoding_the_limit(predicted: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    large = draw_jpeg(0, width=3000, height=2200)
    log = predicted(write_tar(tmp_path / "large.tar", [(f"{number}.jpg", large) for number in range(24)]))
    assert log["limiting_stage"] == "decode"
    assert log["queues"]["photos"]["mean"] > 3
    assert log["queues"]["batches"]["mean"] < 1


@pytest.mark.parametrize(
    ("stage", "owner", "name"),
    [
        ("encode", Encoder, "encode"),
        ("locate", HeadLocator, "located"),
        ("write", tables, "write_predictions"),
    ],
)
def test_a_slow_stage_of_the_engine_is_named(
    stage: str,
    owner: Any,
    name: str,
    world: World,
    predicted: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowed(monkeypatch, owner, name, 0.2)
    log = predicted(world.shards)
    assert log["rows"] == sum(COUNTS)
    assert log["limiting_stage"] == stage
    assert {"photos", "batches", "locate", "write"} == set(log["queues"])


def test_stored_embeddings_are_read(
    world: World, geoloc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geoloc("embed", world.shards, "--out", tmp_path / "emb", *world.encoder_flags)
    slowed(monkeypatch, StoredFeatures, "features", 0.3)
    code, summary = geoloc("predict", "--from-embeddings", tmp_path / "emb", "--out", tmp_path / "p", *world.head_flags)
    assert (code, summary["limiting_stage"]) == (0, "read")
