"""Markers tell who made a unit and what that process waited for; status sums it up."""

from __future__ import annotations

import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_world import World

import geoloc_batch
from geoloc_batch.run.telemetry import STAGES
from geoloc_batch.store.files import process_name


def test_a_run_tells_who_worked_what_limited_it_and_which_stage_refused_photos(
    world: World, tmp_path: Path, geoloc: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.add(tmp_path / "bad.jpg", "bad.jpg")
    shards = [world.shards / "000000.tar", tmp_path / "bad.tar"]

    _, run = geoloc("embed", *shards, "--out", tmp_path / "emb", *world.encoder_flags)

    code, found = geoloc("status", tmp_path / "emb")
    (rank,) = found["ranks"]
    assert (code, found["state"], found["done"], found["rows"]) == (0, "complete", 2, run["rows"])
    assert found["errors_by_stage"] == {"decode": 1}
    assert found["limiting_stage"] in STAGES
    assert (rank["name"], rank["units"]) == (f"{socket.gethostname()}-{process_name()}-r0", 2)
    assert (tmp_path / "emb" / "_logs" / f"{rank['name']}.jsonl").is_file()
    assert geoloc_batch.merge(tmp_path / "emb", out=tmp_path / "all", embeddings=True).rows == run["rows"]
