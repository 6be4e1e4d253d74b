"""merge overwrites nothing, takes nothing that is harmed, and leaves nothing behind where it fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_samples import make_features, make_samples, retry_rank, run_rank, staging_rows

import geoloc_batch
from geoloc_batch.cli import main
from geoloc_batch.errors import ConfigError, OutputError
from geoloc_batch.store import merge as merging
from geoloc_batch.store import tables
from geoloc_batch.store.ledger import Execution, UnitCounts
from geoloc_batch.store.merge_source import Source
from geoloc_batch.store.tables import read_tables

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.mark.parametrize(
    ("target", "flags", "why"),
    [
        ("there.parquet", {}, "is there already"),
        ("full", {}, "folder that holds something"),
        ("full.parquet", {}, "folder that holds something"),
        ("out", {}, "folder that holds something"),
        ("out/all.parquet", {}, "lies in .* name a place outside"),
        ("x.npy", {"embeddings": True}, "name a folder for both"),
        ("x.npy", {}, "what is merged is Parquet"),
        ("s3://bucket/x", {}, "is a URL"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_anything_is_read(
    out: Path, tmp_path: Path, target: str, flags: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.parquet").write_bytes(b"mine")
    for folder in ("full", "full.parquet"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine").write_bytes(b"mine")
    monkeypatch.setattr(Source, "markers", None)
    with pytest.raises(OutputError, match=why):
        geoloc_batch.merge(out, out=target if "://" in target else tmp_path / target, **flags)
    assert (tmp_path / "there.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["all.parquet", "all"])
def test_what_comes_to_stand_at_the_target_meanwhile_stays(
    out: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / name, merging._write

    def write_late(*arguments: Any) -> Any:
        mine = target if target.suffix else target / "mine"
        mine.parent.mkdir(exist_ok=True)
        mine.write_bytes(b"mine")
        return write(*arguments)

    monkeypatch.setattr(merging, "_write", write_late)
    with pytest.raises(OutputError, match="has come to be there meanwhile"):
        geoloc_batch.merge(out, out=target)
    assert (target if target.suffix else target / "mine").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == sorted(["out", name])


def test_without_hard_links_the_file_is_renamed(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    geoloc_batch.merge(out, out=tmp_path / "all.parquet")
    assert sorted(os.listdir(tmp_path)) == ["all.parquet", "out"]


def lose(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def rewrite(path: Path) -> None:
    """Whole and sound, and not what was committed."""
    if path.suffix == ".npy":
        np.save(path, np.load(path)[::-1])
    else:
        pq.write_table(pq.read_table(path), path, compression="snappy")


@pytest.mark.parametrize("harm", [lose, flip, cut, rewrite])
@pytest.mark.parametrize("name", ["predictions_000003.parquet", "metadata_000003.parquet", "img_emb_000003.npy"])
def test_a_file_that_is_harmed_is_named_with_what_mends_it(
    out: Path, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(out / name.rpartition("_")[0] / name)
    with pytest.raises(OutputError, match=f"{name} .*geoloc retry {out} --unit 3 makes it again"):
        geoloc_batch.merge(out, out=tmp_path / "all", embeddings="predictions" not in name)
    assert os.listdir(tmp_path) == ["out"]


def test_a_move_that_was_cut_off_asks_for_the_command_again(out: Path, tmp_path: Path) -> None:
    marker = json.loads((out / "_done/000/000002.json").read_text())
    path = tables.predictions_path(2)
    (out / marker["staging"]).mkdir()
    os.rename(out / path, out / marker["staging"] / (path.replace("/", "%2F") + ".part"))
    with pytest.raises(OutputError, match=r"predictions_000002.parquet .*run the same command again"):
        geoloc_batch.merge(out, out=tmp_path / "all.parquet")


def test_a_retry_while_it_merges_is_told(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = merging._write

    def write_late(*arguments: Any) -> Any:
        retry_rank(out, staging_rows(9, seed=4), forced=[1])
        return write(*arguments)

    monkeypatch.setattr(merging, "_write", write_late)
    with pytest.raises(OutputError, match="replaced by a retry meanwhile; run the same command again"):
        geoloc_batch.merge(out, out=tmp_path / "all.parquet")
    monkeypatch.undo()
    assert geoloc_batch.merge(out, out=tmp_path / "all.parquet").rows == read_tables(out / "predictions").num_rows


def test_units_of_two_runs_are_not_merged(out: Path, tmp_path: Path) -> None:
    path = out / "_done/000/000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": "0" * 16}))
    with pytest.raises(OutputError, match=r"unit 1 .* two runs are mixed"):
        geoloc_batch.merge(out, out=tmp_path / "all.parquet")


def test_the_command_says_what_it_has_merged(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / ".all.parquet.abc.part"
    left.write_bytes(b"of a merge that was killed")
    assert main(["merge", str(out), "--out", str(tmp_path / "all.parquet")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"units", "rows", "files", "bytes", "seconds", "out"} <= found.keys()
    assert str(left) in caplog.text
    assert left.exists()
    assert main(["merge", str(out), "--out", str(tmp_path / "all.parquet")]) == 2
    assert main(["merge", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.parquet")]) == 2
    with pytest.raises(ConfigError, match="--out must be given"):
        geoloc_batch.merge(out, out="")


def test_embeddings_of_several_kinds_are_refused(tmp_path: Path) -> None:
    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        unit, paths = execution.unit, tables.embedding_paths(execution.unit.index)
        npy, parquet = map(execution.stage, paths)
        tables.write_embeddings(npy, parquet, make_samples(unit, 2), make_features(2, width=5 + unit.index))
        return list(paths), UnitCounts(samples=2, rows=2, errors=0, unit_error=None, warnings=())

    run_rank(tmp_path / "out", 2, write)
    with pytest.raises(OutputError, match="of several kinds"):
        geoloc_batch.merge(tmp_path / "out", out=tmp_path / "all", embeddings=True)
