"""`geoloc predict --group-by` where something is wrong with what it is given, or more than one unit can say."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from grouped_samples import DIM, NUM_CELLS, write_embeddings, write_shard
from small_world import World, draw_jpeg, make_head, predictions
from store_samples import make_units

from geoloc_batch.cli import main
from geoloc_batch.records import RowError
from geoloc_batch.run import drive, view_window
from geoloc_batch.run.location_source import LocationSource
from geoloc_batch.run.sources import FeatureBatch
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.store import locations
from geoloc_batch.store.execution import Totals
from geoloc_batch.store.features import StoredFeatures, plan_embeddings
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.tables import errors_path, write_errors

Geoloc = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path, _ = make_head(tmp_path_factory.mktemp("head"), num_cells=NUM_CELLS, dim=DIM)
    return ["--head", str(path)]


def test_a_pair_that_stands_twice_is_refused_before_anything_is_written(
    head: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emb = write_embeddings(tmp_path / "emb", [["a", "b"], ["a", "c", "d"]])
    for name in ("img_emb/img_emb_{}.npy", "metadata/metadata_{}.parquet"):
        shutil.copy(emb / name.format("000001"), emb / name.format("000002"))
    command = ["predict", "--from-embeddings", str(emb), *head, "--group-by", "place", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "3 photos, of 1 shards, stand in more than one embedding pair, those of shards/1.tar in" in message
    assert "embed only one of the two" in message
    assert not (tmp_path / "out").exists()


def test_a_location_in_shards_of_two_calls_is_told_by_the_later_one(
    world: World, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(tmp_path / "0.tar", ["a", "b"])
    write_shard(tmp_path / "1.tar", ["c", "b"], first_photo=2)
    flags = ["--out", tmp_path / "out", "--group-by", "place", *world.encoder_flags, *world.head_flags]
    assert geoloc("predict", tmp_path / "0.tar", *flags)[0] == 0
    assert geoloc("predict", tmp_path / "1.tar", *flags)[0] == 3
    assert "1 locations have rows in more than one unit, the first is b, in" in caplog.text


def test_a_misspelt_field_is_told_after_the_first_unit_and_in_the_end(
    world: World, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(2):
        write_shard(tmp_path / f"{index}.tar", ["a", "b"], first_photo=2 * index)
    flags = ["--group-by", "plaza", *world.encoder_flags, *world.head_flags]
    command = ["predict", tmp_path / "0.tar", tmp_path / "1.tar", "--out", tmp_path / "out", *flags]
    code, summary = geoloc(*command)
    assert (code, summary["rows"], summary["errors"]) == (3, 0, 4)
    first, last = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "none of the 2 photos of" in first
    assert "has 'plaza' in its json, by which locations are to be told apart; there are heading, town, place" in first
    assert "no photo that could be read has 'plaza' in its json" in last
    caplog.clear()
    assert geoloc(*command)[0] == 3
    assert caplog.text.count("no photo that could be read has 'plaza'") == 1


def test_a_stopped_process_does_not_tell_from_its_own_units_alone_that_no_photo_has_the_field(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard, path = make_units(2)[0], tmp_path / errors_path(0)
    path.parent.mkdir()
    write_errors(path, [RowError("a", shard.source, 0, "group", "no place", False)])
    ledger = cast(Ledger, SimpleNamespace(out=tmp_path, units=make_units(2)))
    own = Totals(units=2, done=1, units_failed=0, samples=1, rows=0, errors=1)
    drive._tell_without_locations(ledger, own, "place")
    assert not caplog.records
    drive._tell_without_locations(ledger, dataclasses.replace(own, done=2), "place")
    assert "no photo that could be read has 'place' in its json" in caplog.text


def test_a_pair_that_has_gone_from_a_finished_folder_is_missed(
    world: World, geoloc: Geoloc, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(2):
        write_shard(tmp_path / f"{index}.tar", ["a", "b", "a"], first_photo=3 * index)
    emb = tmp_path / "emb"
    assert geoloc("embed", tmp_path / "0.tar", tmp_path / "1.tar", "--out", emb, *world.encoder_flags)[0] == 0
    gone = [emb / "img_emb" / "img_emb_000001.npy", emb / "metadata" / "metadata_000001.parquet"]
    kept = [path.read_bytes() for path in gone]
    for path in gone:
        path.unlink()
    command = ["predict", "--from-embeddings", emb, *world.head_flags]
    grouped = [*command, "--group-by", "place", "--out", tmp_path / "grouped"]
    assert geoloc(*grouped)[0] == 75
    assert f"1 of its units are missing; {gone[0]} is gone: `geoloc verify {emb}` names what is" in caplog.text
    assert not (tmp_path / "grouped").exists()
    caplog.clear()
    code, summary = geoloc(*command, "--out", tmp_path / "photos")
    assert (code, summary["rows"]) == (75, 3)
    assert "geoloc verify" in caplog.text
    for path, data in zip(gone, kept, strict=True):
        path.write_bytes(data)
    assert geoloc(*grouped)[0] == 0
    assert [row["num_views"] for row in predictions(tmp_path / "grouped")] == [4, 2]


def test_scattered_views_are_read_in_few_passes_however_little_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    pairs = [[f"p{n}" for n in rng.integers(1, 200, 50).tolist()] for _ in range(8)]
    emb = write_embeddings(tmp_path / "emb", pairs)
    monkeypatch.setattr(locations, "BUCKET_VIEWS", 20)
    found = locations.index_locations([unit.source for unit in plan_embeddings(emb)], "place")
    units = locations.plan_locations(str(emb), found, row_bytes=2 * DIM)
    assert len(units) > 15
    reads: list[Path] = []
    read = view_window.read_features

    def counted(npy: Path) -> StoredFeatures:
        reads.append(npy)
        return read(npy)

    monkeypatch.setattr(view_window, "read_features", counted)

    def look(num_bytes: int) -> tuple[list[Any], int, int]:
        """What the views are, how many pairs were read for it, and how much was held."""
        reads.clear()
        held, views = [0], []
        source = LocationSource(found)
        window = source._window = view_window.ViewWindow(found, num_bytes)
        for item in source.features(units, Telemetry(None)):
            if isinstance(item, FeatureBatch):
                with item.flight.landed() as features:
                    views.append((item.samples, features.host_BD.tobytes()))
                held.append(sum(part.table.nbytes for part in window._parts.values()))
        return views, len(reads), max(held)

    everything, num_reads, num_bytes = look(1 << 30)
    assert num_reads == len(pairs)
    few, num_few_reads, num_few_bytes = look(num_bytes // 4)
    assert few == everything
    assert len(pairs) < num_few_reads < 9 * len(pairs)
    assert num_few_bytes <= num_bytes // 4
    none, num_none_reads, _ = look(1)
    assert none == everything
    assert num_none_reads > 9 * len(pairs)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos of two places and one of none, as files with a json beside them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, place in enumerate(["a", "b", "a", None]):
        (folder / f"{number}.jpg").write_bytes(draw_jpeg(number))
        (folder / f"{number}.json").write_text(json.dumps({"place": place} if place else {"town": "x"}))
    return folder


def test_photos_as_files_are_grouped_by_the_json_beside_them(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = make_head(tmp_path / "head", dim=192)
    command = ["predict", str(photos), "--encoder", "demo", "--head", str(path), "--group-by"]
    assert main([*command, "place", "--max-error-rate", "1"]) == 0
    title, *lines, summary = capsys.readouterr().out.splitlines()
    assert title.split()[:2] == ["location", "photos"]
    assert [line.split()[:2] for line in lines] == [["3", "group:"], ["a", "2"], ["b", "1"]]
    assert {"samples": 4, "rows": 2, "errors": 1}.items() <= json.loads(summary).items()
    assert main([*command, "plaza", "--out", str(tmp_path / "out")]) == 2
    assert "what is known of them is path, place, town. Name one of these" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
