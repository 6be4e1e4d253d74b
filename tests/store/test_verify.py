"""verify proves it from the files; status tells how far a run is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from store_samples import NUM_FINISHED, make_units, retry_rank, rows_of, run_rank, tree

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import digest
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.status import status
from geoloc_batch.store.verify import verify


def test_a_finished_run_is_whole(out: Path) -> None:
    found = verify(out)

    rows = sum(rows_of(unit) for unit in make_units(NUM_FINISHED))
    assert found.ok
    assert dataclasses.asdict(found) == {
        "units": NUM_FINISHED,
        "samples": rows + NUM_FINISHED,
        "rows": rows,
        "errors": NUM_FINISHED,
        "missing": 0,
        "duplicates": 0,
        "problems": [],
    }


def change_a_byte(out: Path) -> None:
    path = out / "img_emb/img_emb_000002.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove_a_file(out: Path) -> None:
    (out / "predictions/predictions_000002.parquet").unlink()


def remove_a_marker_and_its_files(out: Path) -> None:
    for path in [*out.rglob("*_000002.*"), out / "_done/000/000002.json"]:
        path.unlink()


def edit_marker(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = out / "_done/000/000002.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def count_one_photo_more(out: Path) -> None:
    edit_marker(out, lambda fields: fields["counts"].update(samples=fields["counts"]["samples"] + 1))


def count_one_row_more(out: Path) -> None:
    edit_marker(out, lambda fields: fields["counts"].update(rows=fields["counts"]["rows"] + 1))


def pin_another_config(out: Path) -> None:
    edit_marker(out, lambda fields: fields.update(config="0123456789abcdef"))


def break_a_marker(out: Path) -> None:
    (out / "_done/000/000002.json").write_text("{")


def move_a_marker_to_another_unit(out: Path) -> None:
    shutil.copy(out / "_done/000/000001.json", out / "_done/000/000002.json")


def empty_a_marker_to_a_folder(out: Path) -> None:
    (out / "_done/000/000002.json").unlink()
    (out / "_done/000/000002.json").mkdir()


def name_no_photos(out: Path) -> None:
    """As if another program had written the table and the marker."""
    path = out / "predictions/predictions_000002.parquet"
    pq.write_table(pq.ParquetFile(path).read(["lat", "lon"]), path)
    size, sha256 = digest(path)

    def change(fields: dict[str, Any]) -> None:
        fields["files"] = [{"path": "predictions/predictions_000002.parquet", "size": size, "sha256": sha256}]

    edit_marker(out, change)


def add_a_file(out: Path) -> None:
    shutil.copy(out / "img_emb/img_emb_000002.npy", out / "img_emb/img_emb_000009.npy")


@pytest.mark.parametrize(
    ("harm", "thing", "remedy"),
    [
        (change_a_byte, "img_emb_000002.npy is not what was committed", "--unit 2 makes it again"),
        (remove_a_file, "predictions_000002.parquet is missing", "--unit 2 makes it again"),
        (remove_a_marker_and_its_files, "1 of 4 units are not done", "run the same command again"),
        (count_one_photo_more, "unit 2 (shards/00002.tar) saw 6 photos and has 4 rows + 1", "--unit 2 makes it again"),
        (count_one_row_more, "committed with 5 rows", "--unit 2 makes it again"),
        (pin_another_config, "two runs are mixed", "--unit 2 makes it again"),
        (break_a_marker, "000002.json is not a marker", "remove it and run the same command again"),
        (move_a_marker_to_another_unit, "000002.json is not a marker of unit 2", "remove it and run the same"),
        (empty_a_marker_to_a_folder, "000002.json is a folder without the file", "remove the folder and run the same"),
        (name_no_photos, "predictions_000002.parquet does not name its photos", "--unit 2 makes it again"),
        (add_a_file, "img_emb_000009.npy belongs to no committed unit", "remove it"),
    ],
)
def test_each_harm_is_named_with_what_mends_it_and_that_mends_it(
    out: Path, finished: Path, harm: Callable[[Path], None], thing: str, remedy: str
) -> None:
    harm(out)

    found = verify(out)
    assert not found.ok
    told = [problem for problem in found.problems if thing in problem]
    assert told, found.problems
    assert remedy in told[0]

    (out / "img_emb/img_emb_000009.npy").unlink(missing_ok=True)
    marker = out / "_done/000/000002.json"
    if "makes it again" in remedy:
        assert retry_rank(out, forced=(2,)) == [Goal(2, 1)]
    elif marker.is_dir():
        marker.rmdir()
    elif "remove it and run" in remedy:
        marker.unlink()
    run_rank(out, NUM_FINISHED)
    assert verify(out).problems == []
    assert verify(out).ok
    assert tree(out) == tree(finished)


def test_missing_counts_units_and_files(out: Path) -> None:
    remove_a_file(out)
    (out / "errors/errors_000001.parquet").unlink()
    (out / "_done/000/000003.json").unlink()

    assert verify(out).missing == 3


def test_a_cut_off_move_is_told_from_a_lost_file(out: Path) -> None:
    marker = json.loads((out / "_done/000/000002.json").read_text())
    staging = out / marker["staging"]
    staging.mkdir()
    (out / "errors/errors_000002.parquet").rename(staging / "errors%2Ferrors_000002.parquet.part")

    (problem,) = verify(out).problems
    assert problem.endswith("errors_000002.parquet is missing; run the same command again")

    run_rank(out, NUM_FINISHED)
    assert verify(out).ok
    assert not staging.exists()


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    for look in (verify, status):
        with pytest.raises(OutputError, match="not an output folder of geoloc"):
            look(tmp_path)
        with pytest.raises(OutputError):
            look(tmp_path / "nowhere")


def test_the_checksum_is_sha256_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 3_000_001)

    assert digest(tmp_path / "file") == (
        3_000_001,
        __import__("hashlib").sha256(b"a" * 3_000_001).hexdigest(),
    )
