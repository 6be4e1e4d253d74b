"""status tells how far a run is, how fast, who works on it and who has gone silent."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_samples import (
    CONFIG,
    NUM_FINISHED,
    age,
    in_work,
    make_units,
    retry_rank,
    rows_of,
    run_rank,
    staging_rows,
    take,
    write_unit,
)

from geoloc_batch.records import Unit
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.status import Looker, Status, status
from geoloc_batch.store.status_text import MAX_RANKS, format_status
from geoloc_batch.store.verify import verify

pytestmark = pytest.mark.usefixtures("quick_disk")


def edit(out: Path, unit: int, change: Callable[[dict[str, Any]], object], retry: str = "") -> None:
    path = out / f"_done/000/{unit:06d}{retry}.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def worked(out: Path, unit: int, worker: str, began_s: float, ended_s: float, samples: int, stage: str = "") -> None:
    """As if that worker had made that unit then."""
    work = {"worker": worker, "ended_s": ended_s, "seconds": ended_s - began_s, "limiting_stage": stage}
    edit(out, unit, lambda fields: (fields.update(work=work), fields["counts"].update(samples=samples)))


def test_status_tells_done_running_and_waiting(tmp_path: Path) -> None:
    ledger, execution = in_work(tmp_path / "out", 4, num_done=1)
    found = status(ledger.out)

    assert (found.units, found.done, found.running, found.waiting, found.quarantined) == (4, 1, 1, 2, 0)
    assert (found.state, found.samples, found.rows) == ("running", found.rows + 1, rows_of(make_units(3)[2]))
    assert found.ranks[0].holds == (execution.unit.index,)
    ledger.close()
    found = status(ledger.out)
    assert (found.running, found.state, found.eta_seconds) == (0, "stopped", None)
    assert "nobody works on it" in format_status(found)


def test_a_rank_is_as_fast_as_it_was_while_it_worked_and_a_run_as_fast_as_what_it_did(out: Path) -> None:
    worked(out, 0, "a", 1000, 1010, 100)
    worked(out, 1, "a", 1005, 1020, 100)  # Taken while the one before was in hand: these seconds count once.
    worked(out, 2, "a", 1400, 1410, 90)  # After a pause, which does not count.
    worked(out, 3, "b", 1000, 1020, 40)

    found = status(out)

    speeds = {rank.name: (rank.images_per_second, rank.units, rank.samples) for rank in found.ranks}
    assert speeds == {"a": (pytest.approx(290 / 30, abs=0.01), 3, 290), "b": (2.0, 1, 40)}
    assert found.images_per_second == pytest.approx(330 / 30, abs=0.01)
    assert (found.state, found.eta_seconds) == ("complete", 0)


def test_only_the_ten_minutes_before_the_latest_commit_count(out: Path) -> None:
    worked(out, 0, "long ago", 0, 100, 10**6)
    worked(out, 1, "a", 9_300, 9_500, 200)  # Half of it before those ten minutes.
    worked(out, 2, "a", 9_900, 10_000, 300)
    worked(out, 3, "a", 9_500, 9_600, 100)

    found = status(out)

    assert found.images_per_second == pytest.approx((100 + 300 + 100) / 300, abs=0.01)
    assert [rank.name for rank in found.ranks] == ["a"]


def test_the_limiting_stage_is_what_was_waited_for_longest(out: Path) -> None:
    worked(out, 0, "a", 1000, 1010, 10, "decode")
    worked(out, 1, "b", 1000, 1015, 10, "encode")
    worked(out, 2, "a", 1010, 1017, 10, "decode")
    worked(out, 3, "c", 1000, 1100, 10, "none")
    assert status(out).limiting_stage == "decode"


def test_the_time_left_follows_from_the_bytes_that_are_left_and_what_is_begun(tmp_path: Path) -> None:
    out = tmp_path / "out"
    units = [
        Unit(index=n, kind="shard", source=f"{n}.tar", num_bytes=size) for n, size in enumerate((400, 300, 200, 100))
    ]
    ledger = Ledger(out, worker="a")
    ledger.open(CONFIG)
    ledger.adopt_plan(units)
    for _ in range(2):
        execution = take(ledger)
        ledger.commit(execution, *write_unit(execution))
    now = time.time()
    worked(out, 0, "a", now - 70, now - 30, 400)
    worked(out, 1, "a", now - 30, now, 300)
    assert status(out).eta_seconds is None  # Nobody holds a unit.

    take(ledger)
    # 300 bytes are left, 10 were done in each second.
    assert status(out).eta_seconds == pytest.approx(30, abs=1)
    other = Ledger(out, worker="b")
    other.open(CONFIG)
    other.adopt_plan(units)
    take(other)
    # A second rank of which nothing is known yet is taken for as fast as the first.
    assert status(out).eta_seconds == pytest.approx(15, abs=1)

    assert status(out).images_per_second == pytest.approx(10, abs=0.1)
    ledger.close()
    other.close()


def test_error_rows_are_told_by_stage(tmp_path: Path) -> None:
    stages = iter([{"read": 2}, {"decode": 3, "read": 1}])

    def write(execution: Execution) -> tuple[list[str], UnitCounts]:
        told = next(stages)
        outputs, _ = staging_rows(5, sum(told.values()))(execution)
        samples = 5 + sum(told.values())
        return outputs, UnitCounts(
            samples=samples, rows=5, errors=samples - 5, unit_error=None, warnings=(), errors_by_stage=told
        )

    run_rank(tmp_path / "out", 2, write)
    found = status(tmp_path / "out")
    assert (found.errors, found.errors_by_stage) == (6, {"decode": 3, "read": 3})
    assert "6 errors (decode 3, read 3)" in format_status(found)


def test_runs_of_older_versions_are_read_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ledger, _ = in_work(out, NUM_FINISHED, num_done=2)
    lease = next((out / "_leases").glob("0*"))
    lease.write_text(json.dumps({name: json.loads(lease.read_text())[name] for name in ("token", "owner", "taken_ns")}))
    for number, unit in enumerate(sorted(int(path.stem) for path in (out / "_done").rglob("*.json"))):
        edit(out, unit, lambda fields: (fields.pop("work"), fields["counts"].pop("errors_by_stage")))
        edit(out, unit, lambda fields: fields.update(seconds=2.0))
        os.utime(out / f"_done/000/{unit:06d}.json", (1000 + 2 * number, 1000 + 2 * number))

    found = status(out)

    assert (found.done, found.running, found.errors_by_stage) == (2, 1, {"unknown": 2})
    # The second has ended two seconds after the first, and each took two.
    assert found.images_per_second == pytest.approx(found.samples / 4, abs=0.01)
    assert (found.limiting_stage, found.ranks[0].name) == (None, f"{os.uname().nodename}-{os.getpid()}")
    ledger.close()
    run_rank(out, NUM_FINISHED)
    assert status(out).done == NUM_FINISHED
    assert verify(out).ok


@pytest.mark.parametrize(
    ("beat_s", "age_s", "is_silent"), [(15, 50, False), (15, 70, True), (60, 70, False), (1, 5, True)]
)
def test_a_rank_is_silent_when_its_beat_is_older_than_it_says_it_may_be(
    tmp_path: Path, beat_s: float, age_s: float, is_silent: bool
) -> None:
    ledger, execution = in_work(tmp_path / "out", 3, beat_s=beat_s, worker="n2-9-r3")
    age(ledger.out, f"{execution.unit.index:06d}.1", age_s)

    found = status(ledger.out)

    assert (found.silent, found.running, found.waiting) == ((1, 0, 3) if is_silent else (0, 1, 2))
    assert (found.ranks[0].name, found.ranks[0].state) == ("n2-9-r3", "silent" if is_silent else "working")
    assert found.ranks[0].silent_s == pytest.approx(age_s, abs=3)
    assert (f"holds unit {execution.unit.index}" in format_status(found)) is is_silent
    ledger.close()


def test_age_is_told_by_the_file_servers_clock_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, _ = in_work(tmp_path / "out", 2)
    before = sorted(path for path in ledger.out.rglob("*"))
    real = time.time

    monkeypatch.setattr(time, "time", lambda: real() + 3600)

    assert status(ledger.out).running == 1
    assert sorted(path for path in ledger.out.rglob("*")) == before

    def refuse(self: OsFiles, path: Path) -> int:
        raise PermissionError(13, "not yours", str(path))

    # Who may not write has only its own clock.
    monkeypatch.setattr(OsFiles, "create", refuse)
    assert status(ledger.out).silent == 1
    ledger.close()


def test_a_retry_that_changes_nothing_is_told_as_the_work_that_it_was(retryable: Path) -> None:
    before = json.loads((retryable / "_done/000/000000.json").read_text())
    retry_rank(retryable, staging_rows(3), choose=lambda counts: counts.is_retryable, worker="second")

    after = json.loads((retryable / "_done/000/000000r1.json").read_text())

    assert (after["kept"], after["seconds"], after["counts"]) == (True, before["seconds"], before["counts"])
    assert (before["work"]["worker"] != "second", after["work"]["worker"]) == (True, "second")


@pytest.mark.parametrize(
    ("name", "value"),
    [("work", []), ("work", {}), ("work", {"worker": "a", "ended_s": float("nan"), "seconds": 1}), ("work", "a")],
)
def test_a_marker_with_other_work_than_work_is_none(out: Path, name: str, value: object) -> None:
    edit(out, 2, lambda fields: fields.update({name: value}))
    assert "is not a marker" in verify(out).problems[0]


@pytest.mark.parametrize("value", [[], {"read": "x"}, {"read": True}, None])
def test_a_marker_with_other_stages_than_numbers_is_none(out: Path, value: object) -> None:
    edit(out, 2, lambda fields: fields["counts"].update(errors_by_stage=value))
    assert "is not a marker" in verify(out).problems[0]


def test_of_many_ranks_the_silent_ones_are_shown(out: Path) -> None:
    found = status(out)
    rank = found.ranks[0]
    fields = {name: getattr(rank, name) for name in rank.__slots__}
    many = [type(rank)(**{**fields, "name": f"n{n}", "state": "silent" if n == 0 else "idle"}) for n in range(99)]
    shown = format_status(Status(**{**{name: getattr(found, name) for name in found.__slots__}, "ranks": tuple(many)}))
    assert "n0 " in shown
    assert f"and {99 - MAX_RANKS} more" in shown


def test_a_result_that_is_made_anew_is_not_remembered(out: Path) -> None:
    looker = Looker(out)
    assert looker.look().done == NUM_FINISHED
    (out / "_done/000/000001.json").unlink()
    assert looker.look().done == NUM_FINISHED - 1
