"""The ledger in one process: who gets which unit, who wins, and what is refused."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from store_samples import age, take, tree, with_steps, work, write_unit

from geoloc_batch.store.ledger import Execution, Ledger


def test_the_largest_units_come_first(opened: Any) -> None:
    ledger = opened(3)

    assert [take(ledger).unit.num_bytes for _ in range(3)] == [1074, 1037, 1000]


def test_ranks_share_the_units_and_wait_for_each_other(opened: Any) -> None:
    first, second = opened(3), opened(3)
    executions = [take(first), take(second), take(first)]

    assert sorted(execution.unit.index for execution in executions) == [0, 1, 2]
    assert second.acquire() == "wait"
    for ledger, execution in zip((first, second, first), executions, strict=True):
        assert ledger.commit(execution, *write_unit(execution))
    assert first.acquire() is None
    assert second.acquire() is None


def test_a_stale_lease_is_taken_over_and_the_late_first_owner_loses(opened: Any) -> None:
    first, second = opened(1), opened(1)
    late = take(first)
    outputs, counts = write_unit(late)
    age(second.out, "000000.1", 1000)

    backup = take(second)
    assert backup.number == 2
    assert second.commit(backup, *write_unit(backup))

    assert first.is_lost(late)
    assert first.commit(late, outputs, counts) is False
    assert second.acquire() is None
    assert not list((first.out / "_staging").iterdir())


def test_there_is_one_backup_at_most(opened: Any) -> None:
    ranks = [opened(1) for _ in range(4)]
    take(ranks[0])
    age(ranks[0].out, "000000.1", 1000)

    taken = [rank.acquire() for rank in ranks[1:]]

    assert [type(answer) for answer in taken] == [Execution, str, str]


def test_the_staging_of_a_stale_lease_stays_until_the_unit_is_decided(opened: Any) -> None:
    sleeper = opened(1)
    execution = take(sleeper)
    outputs, counts = write_unit(execution)
    age(sleeper.out, "000000.1", 1000)

    # A start sweeps. Had it taken the files, the sleeper would publish a marker without them.
    opened(1)

    assert sleeper.commit(execution, outputs, counts)
    assert sorted(tree(sleeper.out)) == sorted(outputs)


def test_losing_the_staging_folder_to_a_sweep_means_lost_not_failed(opened: Any) -> None:
    first, second = opened(1), opened(1)
    late = take(first)
    outputs, counts = write_unit(late)
    age(second.out, "000000.1", 1000)
    backup = take(second)
    second.commit(backup, *write_unit(backup))

    assert second.acquire() is None
    assert not late.staging.exists()
    assert first.commit(late, outputs, counts) is False


def test_a_lease_is_kept_alive_by_the_heartbeat(opened: Any) -> None:
    ledger = opened(1, beat_s=0.02, stale_beats=10)
    take(ledger)
    path = ledger.out / "_leases" / "000000.1"
    before_ns = path.stat().st_mtime_ns

    assert threading.Event().wait(0.2) is False
    assert path.stat().st_mtime_ns > before_ns
    assert opened(1, beat_s=0.02, stale_beats=10).acquire() == "wait"


def test_three_dead_executions_quarantine_a_unit(opened: Any) -> None:
    ledger = opened(2)
    for slot in (1, 2, 3):
        (ledger.out / "_leases" / f"000001.{slot}").write_text("")
        age(ledger.out, f"000001.{slot}", 1000)

    done = [execution.unit.index for execution in work(ledger)]

    assert done == [0]
    totals = ledger.totals()
    assert (totals.units, totals.done, totals.units_failed) == (2, 2, 1)
    assert "3 executions" in (ledger.out / "_done/000/000001.json").read_text()


def test_two_dead_executions_do_not_quarantine_yet(opened: Any) -> None:
    ledger = opened(1)
    for slot in (1, 2):
        (ledger.out / "_leases" / f"000000.{slot}").write_text("")
        age(ledger.out, f"000000.{slot}", 1000)

    assert [execution.number for execution in work(ledger)] == [3]
    assert ledger.totals().units_failed == 0
    assert not [name for name in os.listdir(ledger.out / "_leases") if name[0].isdigit()]


def test_a_unit_left_by_the_dead_comes_last_and_alone(opened: Any) -> None:
    ledger = opened(3)
    (ledger.out / "_leases" / "000002.1").write_text("")
    age(ledger.out, "000002.1", 1000)
    fresh = [take(ledger), take(ledger)]

    assert [execution.unit.index for execution in fresh] == [1, 0]
    assert ledger.acquire() == "wait"
    for execution in fresh:
        ledger.commit(execution, *write_unit(execution))
    suspect = take(ledger)
    assert (suspect.unit.index, suspect.number) == (2, 2)
    assert ledger.acquire() == "wait"


def test_an_abandoned_unit_comes_back_first_and_counts_towards_nothing(opened: Any) -> None:
    ledger = opened(2)
    for _ in range(5):
        execution = take(ledger)
        assert (execution.unit.index, execution.number) == (1, 1)
        execution.stage("img_emb/x.npy").write_bytes(b"half")
        ledger.abandon(execution)
        assert not execution.staging.exists()

    assert len(list(work(ledger))) == 2


def test_close_gives_back_what_is_held(opened: Any) -> None:
    ledger = opened(2)
    take(ledger)
    ledger.close()

    assert not list((ledger.out / "_leases").iterdir())
    assert not list((ledger.out / "_staging").iterdir())
    assert len(list(work(opened(2)))) == 2


def test_a_slow_live_execution_gets_a_backup_from_an_idle_rank_only(opened: Any) -> None:
    slow, idle = opened(3), opened(3)
    held = take(slow)
    for execution in work_until_wait(idle):
        assert execution.unit.index != held.unit.index
    path = idle.out / "_leases" / f"{held.unit.index:06d}.1"
    lease = json.loads(path.read_text())
    assert idle.acquire() == "wait"

    path.write_text(json.dumps({**lease, "taken_ns": lease["taken_ns"] - int(1e12)}))

    backup = take(idle)
    assert (backup.unit, backup.number) == (held.unit, 2)


def test_a_slow_execution_with_a_live_backup_gets_no_second_one(opened: Any) -> None:
    ranks = [opened(3) for _ in range(3)]
    held = take(ranks[0])
    assert len(list(work_until_wait(ranks[1]))) == 2
    for slot, backup in ((1, ranks[1]), (2, None)):
        path = ranks[0].out / "_leases" / f"{held.unit.index:06d}.{slot}"
        lease = json.loads(path.read_text())
        path.write_text(json.dumps({**lease, "taken_ns": lease["taken_ns"] - int(1e12)}))
        if backup is not None:
            assert take(backup).unit == held.unit

    assert ranks[2].acquire() == "wait"


def test_nothing_is_taken_beside_a_unit_that_a_dead_execution_has_left(opened: Any) -> None:
    first, second = opened(2), opened(2)
    (first.out / "_leases" / "000000.1").write_text("")
    age(first.out, "000000.1", 1000)
    held = take(first)
    suspect = take(second)
    assert (held.unit.index, suspect.unit.index) == (1, 0)

    first.abandon(held)

    assert second.acquire() == "wait"
    second.commit(suspect, *write_unit(suspect))
    assert take(second).unit.index == 1


def test_a_unit_that_is_committed_while_its_lease_is_taken_is_not_done_again(opened: Any) -> None:
    def commit_before_the_lease(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "create" and arguments[0].name == "000000.1" and outputs:
            assert first.commit(execution, outputs.pop(), counts)

    first = opened(1)
    execution = take(first)
    paths, counts = write_unit(execution)
    outputs = [paths]
    second = opened(1, files=with_steps(commit_before_the_lease))

    assert second.acquire() is None
    assert not outputs
    assert not list((first.out / "_leases").glob("0*"))


def work_until_wait(ledger: Ledger) -> Iterator[Execution]:
    while isinstance(execution := ledger.acquire(), Execution):
        ledger.commit(execution, *write_unit(execution))
        yield execution
