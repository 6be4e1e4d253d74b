"""What many units add up to is read once for all ranks; and never believed where it is no longer so."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from end_samples import Full
from store_samples import (
    CONFIG,
    crowd,
    make_units,
    rows_of,
    run_rank,
    take,
    with_steps,
    work,
    write_unit,
)

from geoloc_batch.errors import OutputError
from geoloc_batch.store import adding, some, sums
from geoloc_batch.store import ledger as ledger_room
from geoloc_batch.store.execution import Totals
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Ledger

NUM_UNITS = 11
"""Five folders of two, and one that is not full."""
EXPECTED = Totals(
    units=NUM_UNITS,
    done=NUM_UNITS,
    units_failed=0,
    samples=sum(rows_of(unit) + 1 for unit in make_units(NUM_UNITS)),
    rows=sum(map(rows_of, make_units(NUM_UNITS))),
    errors=NUM_UNITS,
)


FOLDER = Totals(
    units=2,
    done=2,
    units_failed=0,
    samples=sum(rows_of(unit) + 1 for unit in make_units(2)),
    rows=sum(map(rows_of, make_units(2))),
    errors=2,
)
"""What the first folder adds up to."""


@pytest.fixture(autouse=True)
def crowded(monkeypatch: pytest.MonkeyPatch, quick_disk: None) -> None:
    crowd(monkeypatch)
    # Sums are looked for at once, and no folder is too young for one to be believed later.
    monkeypatch.setattr(sums, "LOOK_S", 0.0)
    monkeypatch.setattr(sums, "YOUNG_S", -3600.0)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A run that is complete, and that nobody has added up."""
    run_rank(tmp_path / "out", NUM_UNITS)
    # A claim was made there, and given back.
    (tmp_path / "out" / "_sums").rmdir()
    return tmp_path / "out"


class Counted(OsFiles):
    """Counts what is asked of the markers."""

    def __init__(self) -> None:
        self.read_markers: list[str] = []
        self.listed: list[str] = []

    def read(self, path: Path) -> bytes:
        if path.parent.parent.name == "_done":
            self.read_markers.append(path.name)
        return super().read(path)

    def names(self, path: Path) -> list[str]:
        if path.parent.name == "_done":
            self.listed.append(path.name)
        return super().names(path)


def opened(out: Path, files: OsFiles | None = None, num_units: int = NUM_UNITS, beat_s: float = 15.0) -> Ledger:
    ledger = Ledger(out, files=files, beat_s=beat_s)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(num_units))
    return ledger


def totals(out: Path, files: OsFiles | None = None) -> Totals:
    ledger = opened(out, files)
    assert ledger.acquire() is None
    found = ledger.totals()
    ledger.close()
    return found


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "_sums").iterdir())


def test_the_second_rank_reads_sums_and_the_markers_of_no_full_folder(done: Path) -> None:
    first, second = Counted(), Counted()
    assert totals(done, first) == EXPECTED
    assert sorted(first.read_markers)[:NUM_UNITS] == [f"{unit:06d}.json" for unit in range(NUM_UNITS)]
    assert [name.split(".")[0] for name in names(done)] == ["000", "001", "002", "003", "004", "total"]
    assert totals(done, second) == EXPECTED
    assert {name[:6] for name in second.read_markers} == {"000010"}
    assert set(second.listed) == {"005"}


def test_ranks_that_live_at_the_end_read_no_marker_of_a_full_folder_twice(done: Path) -> None:
    files = [Counted() for _ in range(5)]
    ranks = [opened(done, port) for port in files]
    assert ranks[0].acquire() is None
    assert [rank.acquire() for rank in ranks[1:]] == ["wait"] * 4
    found = [ranks[0].totals()]
    for rank in ranks[1:]:
        assert rank.acquire() is None
        found.append(rank.totals())
    assert found == [EXPECTED] * 5
    read = [name for port in files for name in port.read_markers if not name.startswith("000010")]
    assert sorted(read) == [f"{unit:06d}.json" for unit in range(NUM_UNITS - 1)]
    for rank in ranks:
        rank.close()
    assert not [name for name in names(done) if name.endswith(".claim")]


def test_a_rank_with_nothing_to_do_adds_up_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(some, "LONGEST_REST_S", 0.0)
    out = tmp_path / "out"
    busy, idle = opened(out), opened(out)
    held = take(busy)
    full = {f"{folder:03d}" for folder in range(NUM_UNITS // 2)} - {f"{held.unit.index // 2:03d}"}
    while not (out / "_sums").exists() or {name[:3] for name in names(out)} != full:
        execution = idle.acquire()
        assert execution is not None
        if execution != "wait":
            idle.commit(execution, *write_unit(execution))
    assert all(name.endswith(".json") for name in names(out)), names(out)
    busy.abandon(held)
    busy.close()
    assert list(work(idle))
    assert idle.totals() == EXPECTED
    idle.close()


def test_a_rank_with_nothing_to_do_leaves_a_folder_that_has_only_just_changed_for_later(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = opened(done)
    assert ledger._adding is not None
    with monkeypatch.context() as young:
        young.setattr(sums, "YOUNG_S", 3600.0)
        ledger._done.look_all(range(NUM_UNITS))
        ledger._adding.go_on(may_begin=True)
        assert names(done) == []
    ledger._adding.go_on(may_begin=True)
    assert len(names(done)) == 5
    ledger.close()


def test_a_marker_that_was_removed_is_missed_though_there_is_a_sum(done: Path) -> None:
    totals(done)
    (done / "_done" / "001" / "000002.json").unlink()
    ledger = opened(done)
    assert [execution.unit.index for execution in work(ledger)] == [2]
    assert ledger.totals() == EXPECTED
    ledger.close()
    assert len([name for name in names(done) if name.startswith("001.")]) == 1


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"layout": 1}', b'{"layout": 2, "units": 2}', b"\xff"])
def test_a_sum_that_cannot_be_read_is_made_again(done: Path, damage: bytes) -> None:
    totals(done)
    for name in names(done):
        (done / "_sums" / name).write_bytes(damage)
    assert totals(done) == EXPECTED
    assert totals(done) == EXPECTED
    assert json.loads(max((done / "_sums").glob("000.*")).read_text())["units"] == 2


def test_a_sum_that_another_rank_has_put_a_better_one_in_place_of_is_found_there(done: Path) -> None:
    files = Counted()
    first, late = opened(done, files), opened(done)
    assert first.acquire() is None
    assert first._done.sums is not None
    first._done.sums.write(0, FOLDER, 0)
    # Of a folder that had just changed: who comes later believes nothing.
    late._done.sums = sums.Sums(OsFiles(), done, late._leases)
    assert late._done.sums.look() == []
    late._done.sums.write(0, FOLDER, (done / "_done" / "000").stat().st_mtime_ns)
    assert [name for name in names(done) if name.startswith("000.0.")] == []
    assert first.totals() == EXPECTED
    assert [name for name in files.read_markers if name in ("000000.json", "000001.json")] == []
    for rank in (first, late):
        rank.close()


def test_a_folder_that_has_only_just_changed_has_no_time_to_be_believed_by(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "YOUNG_S", 3600.0)
    totals(done)
    assert {name.split(".")[1] for name in names(done) if name[0].isdigit()} == {"0"}
    again = Counted()
    assert totals(done, again) == EXPECTED
    assert len(again.read_markers) >= NUM_UNITS


def test_others_wait_for_who_has_claimed_a_sum_and_take_over_from_the_dead(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "LONGEST_WAIT_S", 0.05)
    (done / "_sums").mkdir()
    claim = done / "_sums" / "1.claim"
    # Of a rank whose server's clock has been set back since.
    claim.touch()
    ledger, found = opened(done, beat_s=0.1), list[Totals]()
    thread = threading.Thread(target=lambda: found.append(ledger.totals()), daemon=True)
    thread.start()
    for number in range(10):
        time.sleep(0.1)
        os.utime(claim, (2**33, 2**33 + number))
    assert thread.is_alive()
    thread.join(20)
    assert found == [EXPECTED]
    assert not claim.exists()
    ledger.close()


def test_there_is_no_sum_over_all_before_all_are_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = opened(out)
    held = take(first)
    second = opened(out)
    for _ in range(NUM_UNITS - 1):
        execution = take(second)
        second.commit(execution, *write_unit(execution))
    third = opened(out)
    assert third.totals().done == NUM_UNITS - 1
    assert not [name for name in names(out) if name.startswith("total")]
    assert second.acquire() == "wait"
    for ledger in (first, second, third):
        ledger.close()
    last = opened(out)
    assert [execution.unit.index for execution in work(last)] == [held.unit.index]
    last.close()
    assert totals(out) == EXPECTED


def test_the_markers_of_a_folder_are_on_the_disk_before_its_sum_is(done: Path) -> None:
    steps: list[tuple[str, str]] = []

    def at_step(name: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[1 if name == "rename" else 0]
        if name == "sync_folder" and path.parent.name == "_done":
            steps.append((name, path.name))
        elif name == "rename" and path.parent.name == "_sums" and path.name[0].isdigit():
            steps.append((name, path.name[:3]))

    assert totals(done, with_steps(at_step)) == EXPECTED
    folders = [f"{folder:03d}" for folder in range(NUM_UNITS // 2)]
    assert sorted(folder for _, folder in steps[::2]) == folders
    assert steps[::2] == [("sync_folder", folder) for _, folder in steps[1::2]]
    assert {name for name, _ in steps[1::2]} == {"rename"}


def test_a_full_disk_at_the_end_costs_no_figure(done: Path) -> None:
    assert totals(done, Full()) == EXPECTED


def test_a_broken_marker_is_named_as_ever(done: Path) -> None:
    (done / "_done" / "003" / "000006.json").write_text("{}")
    with pytest.raises(OutputError, match=r"003/000006.json is not a marker of unit 6"):
        totals(done)
    assert not [name for name in names(done) if name.endswith(".claim")]


def test_a_sum_over_other_units_is_not_taken_for_ours(done: Path) -> None:
    ledger = opened(done, num_units=NUM_UNITS - 1)
    found = ledger.totals()
    ledger.close()
    assert (found.units, found.done, found.rows) == (10, 10, EXPECTED.rows - rows_of(make_units(11)[10]))
    assert totals(done) == EXPECTED


def test_a_stopped_rank_of_a_long_plan_reads_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_room, "MANY_UNITS", 5)
    out, files = tmp_path / "out", Counted()
    first = opened(out)
    for _, execution in zip(range(4), work(first), strict=False):
        assert execution
    first.close()
    second = opened(out, files)
    execution = next(work(second))
    files.read_markers.clear()
    found = second.totals(in_haste=lambda: True)
    assert files.read_markers == []
    assert (found.units, found.done, found.rows) == (NUM_UNITS, 5, rows_of(execution.unit))
    assert second.totals().done == 5
    second.close()
