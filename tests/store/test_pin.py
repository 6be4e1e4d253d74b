"""What makes an OUT usable and ours, and what a second run with another config is told."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from store_samples import CONFIG, make_units, tree, work

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Ledger


def open_with(out: Path | str, config: dict[str, Any], files: OsFiles | None = None, **options: Any) -> dict[str, Any]:
    ledger = Ledger(Path(out), files=files)
    try:
        return ledger.open(config, **options)
    finally:
        ledger.close()


def test_the_first_config_is_pinned_and_the_same_one_is_accepted(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"

    assert open_with(out, CONFIG) == CONFIG
    assert open_with(out, dict(reversed(CONFIG.items()))) == CONFIG
    assert json.loads((out / "run.json").read_text())["config"] == CONFIG


def test_another_config_is_refused_naming_every_key_both_values_and_the_remedy(tmp_path: Path) -> None:
    open_with(tmp_path, CONFIG)

    with pytest.raises(OutputError) as refusal:
        open_with(tmp_path, {**CONFIG, "top_k": 5, "encoder": "large"})

    told = str(refusal.value)
    for part in ("top_k", "5", "3", "encoder", '"large"', '"tiny"', "another --out", "same flags"):
        assert part in told
    assert "precision" not in told


def test_the_innermost_keys_that_differ_are_named_whatever_stands_before_them(tmp_path: Path) -> None:
    def config(name: str, sha256: str, **more: Any) -> dict[str, Any]:
        head = {"cells_sha256": "0" * 64, "kind": "mlp", "path": "/" + "long/" * 30 + name, "name": name}
        return {**CONFIG, "heads": [head, {"name": "world", "sha256": sha256, **more}]}

    open_with(tmp_path, config("europe", "a" * 64))

    with pytest.raises(OutputError) as refusal:
        open_with(tmp_path, config("europa", "b" * 64, scale=2))
    told = str(refusal.value)
    assert 'heads[0].name is pinned to "europe", now "europa"' in told
    assert f'heads[1].sha256 is pinned to "{"a" * 64}", now "{"b" * 64}"' in told
    assert "heads[1].scale is not pinned, now 2" in told
    assert 'long/europe", now ...' in told
    assert "cells_sha256" not in told
    with pytest.raises(OutputError, match=r"2 entries, now 1; .*heads\[0\]\.name is pinned to"):
        open_with(tmp_path, {**CONFIG, "heads": [{"name": "other"}]})


@pytest.mark.parametrize("side", ["given", "pinned"])
def test_a_key_that_only_one_side_has_is_refused(tmp_path: Path, side: str) -> None:
    more = {**CONFIG, "tap": "pooled"}
    open_with(tmp_path, CONFIG if side == "given" else more)

    with pytest.raises(OutputError, match="tap"):
        open_with(tmp_path, more if side == "given" else CONFIG)


def test_what_an_earlier_version_did_not_pin_is_told_as_that_and_not_as_a_flag(tmp_path: Path) -> None:
    open_with(tmp_path, CONFIG)
    later = {**CONFIG, "sdpa": "math", "compile_mode": "default"}

    with pytest.raises(OutputError) as refusal:
        open_with(tmp_path, later, adoptable=["sdpa", "compile_mode"])
    told = str(refusal.value)
    assert f"--out {tmp_path} was begun by an earlier version of geoloc, which did not pin compile_mode, sdpa: " in told
    assert told.endswith("Give another --out, or go on with that version")
    assert "same flags" not in told
    # Another kind of run lacks more.
    with pytest.raises(OutputError, match=r"another config: .*dim is not pinned.*sdpa is not pinned"):
        open_with(tmp_path, {**later, "dim": 64})


def test_a_key_left_open_adopts_the_pinned_value(tmp_path: Path) -> None:
    open_with(tmp_path, CONFIG)

    assert open_with(tmp_path, {**CONFIG, "precision": "bf16"}, adoptable=["precision"]) == CONFIG


@pytest.mark.parametrize("out", ["s3://bucket/out", "gs://bucket/out", "hf://datasets/a/b", "az://c/out"])
def test_an_object_store_is_refused_before_anything_is_touched(out: str) -> None:
    for given in (out, Path(out)):
        with pytest.raises(OutputError, match=f"--out {out} is a URL.* local or shared folder"):
            Ledger(given)


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"photo")

    with pytest.raises(OutputError, match=r"holiday\.jpg"):
        open_with(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_a_folder_whose_first_run_died_before_it_was_pinned_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / "_staging" / "pin.0123" / "publish").mkdir(parents=True)
    (tmp_path / "_logs").mkdir()

    assert open_with(tmp_path, CONFIG) == CONFIG


def test_a_foreign_run_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[1, 2")

    with pytest.raises(OutputError, match="not written by geoloc"):
        open_with(tmp_path, CONFIG)


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="is a file"):
        open_with(tmp_path / "file", CONFIG)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EROFS, "writable"), (errno.EACCES, "writable"), (errno.ENOSPC, "free some space")]
)
def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    class FailingFiles(OsFiles):
        def write(self, path: Path, data: bytes) -> None:
            raise OSError(number, os.strerror(number))

    with pytest.raises(OutputError, match=remedy):
        open_with(tmp_path, CONFIG, FailingFiles())


def test_a_full_disk_is_refused_at_the_start(tmp_path: Path) -> None:
    class FullFiles(OsFiles):
        def free_bytes(self, path: Path) -> int:
            return 4096

    with pytest.raises(OutputError, match="4096 bytes left"):
        open_with(tmp_path, CONFIG, FullFiles())


class NoLinks(OsFiles):
    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")


def test_without_hard_links_folders_are_renamed_and_a_rank_with_links_understands_them(tmp_path: Path) -> None:
    for out, ports in {"linked": [OsFiles()], "mixed": [NoLinks(), OsFiles(), NoLinks()]}.items():
        ranks = [Ledger(tmp_path / out, files=port) for port in ports]
        for ledger in ranks:
            ledger.open(CONFIG)
            ledger.adopt_plan(make_units(4))
        for ledger in ranks:
            next(iter(work(ledger)))
        assert len(list(work(ranks[-1]))) == 4 - len(ranks)
        for ledger in ranks:
            assert ledger.totals().done == 4
            ledger.close()

    assert (tmp_path / "mixed" / "run.json").is_dir()
    kinds = {path.is_dir() for path in (tmp_path / "mixed/_done/000").glob("*.json")}
    assert kinds == {True, False}
    assert tree(tmp_path / "mixed") == tree(tmp_path / "linked")


def test_a_filesystem_that_can_neither_link_nor_refuse_a_rename_is_refused(tmp_path: Path) -> None:
    class Careless(NoLinks):
        def rename(self, source: Path, target: Path) -> None:
            if target.is_dir():
                for path in target.iterdir():
                    path.unlink()
            super().rename(source, target)

    with pytest.raises(OutputError, match="another filesystem"):
        open_with(tmp_path, CONFIG, Careless())
