"""Whatever somebody does to the files of the ledger, verify says so and nothing ends in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from store_samples import CONFIG, NUM_FINISHED, run_rank

from geoloc_batch.errors import OutputError
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.status import status
from geoloc_batch.store.verify import verify


def edit_marker(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = out / "_done/000/000002.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


WRONG = ("x", None, -1.5, [], {}, True)
PLACES = [("unit",), ("source",), ("token",), ("staging",), ("files",), ("counts",), ("config",), ("seconds",)]
PLACES += [("layout",), ("quarantined",)]
PLACES += [("counts", name) for name in ("samples", "rows", "errors", "unit_error", "warnings")]
PLACES += [("files", 0), *(("files", 0, name) for name in ("path", "size", "sha256"))]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_no_value_in_a_marker_ends_in_a_traceback(out: Path, place: tuple[Any, ...]) -> None:
    path = out / "_done/000/000002.json"
    whole = path.read_text()
    for value in WRONG:
        fields = json.loads(whole)
        inner: Any = fields
        for name in place[:-1]:
            inner = inner[name]
        if inner[place[-1]] == value and type(inner[place[-1]]) is type(value):
            continue
        inner[place[-1]] = value
        path.write_text(json.dumps(fields))
        # Any other text may stand for a token, and any other number for the seconds.
        is_plausible = (place, value) in [(("token",), "x"), (("seconds",), -1.5)]
        assert verify(out).ok is is_plausible, value


@pytest.mark.parametrize("text", ['"text"', "[1]", "7", "null", "[" * 100_000, '{"layout": 1}', "\udcff"])
@pytest.mark.parametrize("name", ["_done/000/000002.json", "run.json"])
def test_no_text_in_place_of_a_file_ends_in_a_traceback(out: Path, name: str, text: str) -> None:
    (out / name).write_bytes(text.encode(errors="surrogateescape"))

    assert any(name in problem for problem in verify(out).problems)


@pytest.mark.parametrize("path", ["../x.parquet", "/etc/passwd", "", "a/../../b", "a\0b"])
def test_a_marker_that_leads_out_of_the_folder_is_none(out: Path, path: str) -> None:
    edit_marker(out, lambda fields: fields["files"][0].update(path=path))
    assert "is not a marker" in verify(out).problems[0]
    with pytest.raises(OutputError, match="is not a marker"):
        status(out)


@pytest.mark.parametrize("staging", ["", ".", "_staging", "_staging/..", "img_emb/x", "_staging/a/b", "/tmp/x"])
def test_a_marker_whose_staging_folder_is_none_removes_nothing(out: Path, staging: str) -> None:
    edit_marker(out, lambda fields: fields.update(staging=staging))
    assert "is not a marker" in verify(out).problems[0]


def unlink_plan(out: Path) -> None:
    (out / "plan.parquet").unlink()


def flip_plan(out: Path) -> None:
    data = bytearray((out / "plan.parquet").read_bytes())
    data[40] ^= 1
    (out / "plan.parquet").write_bytes(data)


def empty_plan(out: Path) -> None:
    pq.write_table(pq.ParquetFile(out / "plan.parquet").read().slice(0, 0), out / "plan.parquet")


def plan_to_folder(out: Path) -> None:
    (out / "plan.parquet").unlink()
    (out / "plan.parquet").mkdir()


def run_json_to_folder(out: Path) -> None:
    (out / "run.json").unlink()
    (out / "run.json").mkdir()


def lose_the_last_part(out: Path) -> None:
    run_rank(out, NUM_FINISHED + 2)
    (out / "plan_000001.parquet").unlink()


@pytest.mark.parametrize(
    ("harm", "thing", "remedy"),
    [
        (unlink_plan, "has no plan.parquet, and 4 markers and 16 files of results", "put the plan back"),
        (flip_plan, "plan.parquet is not a plan, or was changed", "put it back as it was"),
        (empty_plan, "plan.parquet is not a plan, or was changed", "put it back as it was"),
        (plan_to_folder, "plan.parquet is a folder without the file", "put that back"),
        (run_json_to_folder, "run.json is a folder without the file", "put that back"),
        (lose_the_last_part, "2 units are marked done that the plan does not have, the first in", "put it back"),
    ],
)
def test_a_run_that_lost_what_it_is_held_against_is_not_proved(
    out: Path, harm: Callable[[Path], None], thing: str, remedy: str
) -> None:
    harm(out)

    found = verify(out)

    assert not found.ok
    told = [problem for problem in found.problems if thing in problem]
    assert len(told) == 1, found.problems
    assert remedy in told[0]
    assert not [problem for problem in found.problems if problem.endswith("belongs to no committed unit; remove it")]


def test_a_marker_in_another_place_than_its_own_marks_nothing(out: Path) -> None:
    (out / "_done/001").mkdir()
    (out / "_done/000/000002.json").rename(out / "_done/001/000002.json")
    (out / "_done/000/.nfs0001").write_text("a file server's own")

    found = verify(out)
    assert found.missing == 1
    assert [problem for problem in found.problems if "_done" in problem] == [
        f"{out / '_done/001/000002.json'} is not a marker; remove it"
    ]


def test_a_folder_in_which_nothing_was_planned_proves_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open(CONFIG)
    ledger.close()

    (problem,) = verify(tmp_path).problems
    assert problem == f"nothing was planned in {tmp_path}, so nothing is proved; run the same command again"
