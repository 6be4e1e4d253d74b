"""Plans of more units than one folder has markers, and more ranks than each of them can look at."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_ranks import run_scenario
from ledger_scenarios import make_end_duel, make_retry_duel, make_scenario
from store_samples import CONFIG, crowd, make_units, take

from geoloc_batch.store import schedule
from geoloc_batch.store.adding import Adding
from geoloc_batch.store.commit import Commits
from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.lease import Leases
from geoloc_batch.store.ledger import Ledger, UnitCounts
from geoloc_batch.store.schedule import Schedule
from geoloc_batch.store.some import some


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two units fill a folder, more are a long plan, and of what others have one is looked at, not all."""
    crowd(monkeypatch)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 40), st.randoms(use_true_random=False), st.floats(0, 1), st.floats(0, 1))
def test_a_rank_comes_to_every_unit_that_is_not_done_once(
    crowded: None, num_units: int, random: Random, done_share: float, hit_share: float
) -> None:
    units = make_units(num_units)
    done = {unit.index for unit in units if random.random() < done_share}
    order = schedule.Order.of(units, done)
    plan = Schedule([], order=order)
    found = []
    while plan.has_fresh:
        unit = plan.next_fresh()
        if unit is not None:
            found.append(unit.index)
            if random.random() < hit_share:
                plan.hit()
    assert order.is_long == (num_units - len(done) > 2)
    assert sorted(found) == [unit.index for unit in units if unit.index not in done]
    assert [unit.index for unit in plan.left_over(set(found), 1)] == []
    assert plan.next_fresh() is None


def test_a_unit_that_is_put_back_comes_next() -> None:
    plan = Schedule(make_units(5))
    first, second = plan.next_fresh(), plan.next_fresh()
    assert first is not None and second is not None  # noqa: PT018
    plan.put_back(first)
    plan.put_back(second)
    assert [plan.next_fresh(), plan.next_fresh()] == [second, first]


def test_units_may_be_put_back_while_another_thread_looks_for_the_next() -> None:
    units = make_units(3000)
    plan = Schedule(units)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor() as pool:
            putting = pool.submit(lambda: [plan.put_back(unit) for unit in units])
            found = []
            while plan.has_fresh or not putting.done():
                unit = plan.next_fresh()
                found += [] if unit is None else [unit.index]
            putting.result()
    finally:
        sys.setswitchinterval(before)
    # Each once as a fresh one, and once as it was put back.
    assert sorted(found) == sorted([unit.index for unit in units] * 2)


def test_ranks_come_to_the_folders_of_a_long_plan_in_different_orders() -> None:
    units = make_units(5000)
    order = schedule.Order.of(units)
    firsts = set()
    for _ in range(20):
        first = Schedule([], order=order).next_fresh()
        assert first is not None
        group = [unit for unit in units if unit.index // 1000 == first.index // 1000]
        assert first.num_bytes == max(unit.num_bytes for unit in group)
        firsts.add(first.index // 1000)
    assert len(firsts) > 1


def test_a_rank_that_finds_all_taken_goes_where_more_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd(monkeypatch, 100)
    units = make_units(200)
    plan = Schedule([], order=schedule.Order.of(units))
    first = plan.next_fresh()
    assert first is not None
    here = first.index // 100
    # Others have done all but ten here, and a half there.
    done = {index for index in range(200) if (index % 100 < 90 if index // 100 == here else index % 2)}
    plan._done = done
    tried = [plan.next_fresh() for _ in range(schedule.MANY_MISSES)]
    there = [plan.next_fresh() for _ in range(20)]
    assert {unit.index // 100 for unit in tried[: schedule.MANY_MISSES - 1] if unit} == {here}
    assert {unit.index // 100 for unit in there if unit} == {1 - here}
    # And comes back for what is left here.
    found = [unit for unit in (*tried, *there) if unit]
    while plan.has_fresh:
        unit = plan.next_fresh()
        found += [unit] if unit is not None else []
    assert {unit.index for unit in found} >= set(range(200)) - done - {first.index}
    assert len({unit.index for unit in found}) == len(found)


@pytest.mark.parametrize("num_others", [4, 9])
def test_ranks_that_share_a_folder_go_where_more_is_left_while_there_is_work_here(num_others: int) -> None:
    plan = Schedule([], order=schedule.Order.of(make_units(3000)))
    left = [list(range(1000 * folder, 1000 * folder + 1000)) for folder in range(3)]
    done: set[int] = set()
    plan._done = done
    first = schedule.THOUSAND // schedule.HIT_SHARE
    for _ in range(180):
        while (unit := plan.next_fresh()) is None or unit.index in done:
            assert plan.has_fresh
        plan.hit()
        here = left[unit.index // 1000]
        here.remove(unit.index)
        done.update([unit.index, *here[:num_others]])
        del here[:num_others]
        # No folder is behind another by more than was taken between two looks.
        counts = [len(folder) for folder in left]
        assert max(counts) - min(counts) <= (1 + num_others) * (first + 1)
    assert max(counts) < 1000


@pytest.mark.parametrize(("kind", "num_others"), [("shard", 0), ("shard", 1), ("locations", 0), ("locations", 9)])
def test_a_rank_sees_its_folder_through_where_few_are_and_where_what_comes_next_is_known(
    kind: Literal["shard", "locations"], num_others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [dataclasses.replace(unit, kind=kind) for unit in make_units(3000)]
    plan = Schedule([], order=schedule.Order.of(units))
    looked: list[int] = []
    not_done = plan._not_done
    monkeypatch.setattr(plan, "_not_done", lambda units: looked.append(len(units)) or not_done(units))
    done: set[int] = set()
    plan._done = done
    found: list[int] = []
    while len(done) < 900:
        unit = plan.next_fresh()
        assert unit is not None
        plan.hit()
        found.append(unit.index)
        others = [other.index for other in reversed(plan._fresh) if other.index not in done][:num_others]
        done.update([unit.index, *others])
    assert len({index // 1000 for index in found}) == 1
    if kind == "locations":
        assert found == list(range(found[0], found[0] + len(found)))
    assert len(looked) <= 9


class Clocked(OsFiles):
    """The machine, with seconds that pass when it is told so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def every(self, seconds: float, task: Callable[[], None]) -> Callable[[], None]:
        return lambda: None


def opened(out: Path, files: OsFiles, num_units: int) -> Ledger:
    ledger = Ledger(out, files=files)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(num_units))
    return ledger


NOTHING = UnitCounts(samples=0, rows=0, errors=0, unit_error=None, warnings=())


def test_a_rank_sees_the_end_soon_however_many_units_were_in_the_hands_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_disk: None
) -> None:
    crowd(monkeypatch, 100)
    files, out = Clocked(), tmp_path / "out"
    busy, idle = opened(out, files, 120), opened(out, files, 120)
    held = [take(busy) for _ in range(120)]
    for _ in range(120):
        assert idle.acquire() == "wait"
        busy._leases.beat()
        files.sleep(1.0)
    for execution in held:
        busy.commit(execution, [], NOTHING)
    ended_s = files.now_s
    while idle.acquire() is not None:
        files.sleep(1.0)
    # It rests for up to a quarter of a minute, and then sees it at once.
    assert files.now_s - ended_s < 20
    assert idle.totals().done == 120
    busy.close()
    idle.close()


@pytest.mark.parametrize("is_given_back", [False, True])
def test_a_rank_does_not_rest_once_its_last_unit_has_left_its_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_disk: None, is_given_back: bool
) -> None:
    crowd(monkeypatch)
    files = Clocked()
    ledger = opened(tmp_path / "out", files, 5)
    held = [take(ledger) for _ in range(5)]
    for execution in held[1:]:
        ledger.commit(execution, [], NOTHING)
    # A long last unit, during which there is nothing else to do.
    for _ in range(100):
        assert ledger.acquire() == "wait"
        ledger._leases.beat()
        files.sleep(1.0)
    if is_given_back:
        ledger.abandon(held[0])
        assert take(ledger).unit == held[0].unit
    else:
        ledger.commit(held[0], [], NOTHING)
        assert ledger.acquire() is None
    ledger.close()


def test_faults_and_interleavings_lose_and_double_nothing_of_a_long_plan(crowded: None) -> None:
    for seed in range(25):
        run_scenario(make_scenario(Random(seed)))
        run_scenario(dataclasses.replace(make_retry_duel(Random(seed)), seed=seed))


def fault_at_the_end(seeds: range) -> None:
    for seed in seeds:
        run_scenario(make_end_duel(Random(seed)))


def test_who_clears_up_for_all_at_the_end_leaves_nothing_wherever_it_is_hit(crowded: None) -> None:
    fault_at_the_end(range(50))


# As in test_ledger_model: a search that does not find each of these proves nothing.


def call_it_cleared_up(self: Adding, clear_up: Callable[[], None]) -> bool:
    return True


def sweep_at_the_start_alone(self: Commits, leases: Leases, few: tuple[int, int] | None = None) -> None:
    if few is not None:
        _sweep(self, leases, few)


_sweep = Commits.sweep


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (Adding, "end", call_it_cleared_up),
        (Commits, "sweep", sweep_at_the_start_alone),
        (Ledger, "is_through", property(lambda self: True, lambda self, value: None)),
    ],
    ids=["nobody clears up", "nobody sweeps", "it is always through"],
)
def test_an_end_that_is_broken_on_purpose_is_found_out(
    crowded: None, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, broken: Any
) -> None:
    monkeypatch.setattr(where, name, broken, raising=False)
    with pytest.raises(AssertionError):
        fault_at_the_end(range(200))


def test_some_are_all_in_order_or_so_many_different_ones() -> None:
    assert some("abc", 3) == "abc"
    for _ in range(20):
        found = some(range(100), 3)
        assert len(set(found)) == 3
