"""Any interleaving, any fault, against a model: never a lost, doubled or mixed row, and every unit comes to an end.

LEDGER_MODEL_EXAMPLES=20000 makes the search longer, and another one each time.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from ledger_ranks import run_scenario
from ledger_scenarios import Scenario, make_retry_duel, make_scenario
from simulated_turns import Fault

from geoloc_batch.records import Unit
from geoloc_batch.store import commit, outcome
from geoloc_batch.store import search as hunt
from geoloc_batch.store.commit import Commits
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.lease import SECOND_NS, Lease, Leases
from geoloc_batch.store.marker import FileRecord, Marker, staged_name
from geoloc_batch.store.outcome import keeping
from geoloc_batch.store.publish import publish, read_published, remove_file, remove_tree

EXAMPLES = int(os.environ.get("LEDGER_MODEL_EXAMPLES", "0"))


RETRIED = Scenario(
    seed=0, num_units=1, first_units=(1,), num_retriers=2, max_retries=3, is_improving=True, switch_chance=0.02
)


def search(max_examples: int, *phases: Phase) -> None:
    """Look for a scenario that breaks the ledger."""

    @settings(
        max_examples=max_examples,
        phases=phases,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def run_any(random: Random) -> None:
        scenario = make_scenario(random)
        note(repr(scenario))
        run_scenario(scenario)

    run_any()


def search_any() -> None:
    """Scenarios of every kind, as many as the test of the ledger itself looks at."""
    search(EXAMPLES or 160, Phase.generate)


def fault_at_each_step(kind: Any, has_links: bool = True) -> None:
    """One rank, two units, one fault."""
    alone = Scenario(seed=0, num_units=2, first_units=(2,), has_links=has_links)
    num_steps = run_scenario(alone).num_early_steps
    assert num_steps > 100
    for step in range(1, num_steps, 1 if EXAMPLES else 4):
        run_scenario(dataclasses.replace(alone, seed=step, faults=(Fault(kind, 1, "", step, 5.0),)))


def let_ranks_work_and_give_back() -> None:
    """No faults: ranks that hold units for long and give many back."""
    for seed in range(30):
        run_scenario(Scenario(seed=seed, num_units=2, first_units=(2, 2, 2), abandon_chance=0.5, num_late=1))


def sleep_at_each_step_of_a_commit() -> None:
    """Two ranks, one unit: the first is stopped somewhere at its marker until the second has published another."""
    for has_links in (True, False):
        for count in range(1, 13):
            for seed in range(4):
                fault = Fault("stop", 1, "000000.json", count, 2000.0, until="000000.json")
                run_scenario(Scenario(seed=seed, num_units=1, first_units=(1, 1), has_links=has_links, faults=(fault,)))


def stop_at_each_step_of_a_retrys_moves() -> None:
    """One unit, two ranks that retry it: one is stopped among the files until a later goal is reached by another."""
    for place, most in [("img_emb", 6), ("errors", 4), ("errors%2Ferrors_000000.parquet.part", 8)]:
        for count, process, until in product(range(1, most + 1), (1, 2), ("000000r1.json", "000000r2.json")):
            fault = Fault("stop", process, place, count, 5000.0, until)
            run_scenario(dataclasses.replace(RETRIED, seed=count, faults=(fault,)))


def lose_power_after_a_commit_that_failed() -> None:
    """One rank, one unit: an error at its marker, and no power when it has cleared up after that."""
    alone = dataclasses.replace(RETRIED, num_retriers=0, max_retries=0)
    # What the cut takes is left to chance: with the step that matters in several ways.
    for seed, count, (place, number) in product(range(4), range(4, 11), [("img_emb", 3), ("errors", 2)]):
        faults = (Fault("fail", 1, "000", count, errno.EIO), Fault("power", 1, place, number))
        run_scenario(dataclasses.replace(alone, seed=seed, faults=faults))


def lose_power_before_a_file_is_moved_out() -> None:
    """One rank, one unit, whose retry has no table of errors any more, and maybe no files at all."""
    fault = Fault("power", 1, "errors%2Ferrors_000000.parquet.part", 6)
    for seed in range(16, 28):
        run_scenario(dataclasses.replace(RETRIED, seed=seed, num_retriers=0, faults=(fault,)))


def retry_under_faults() -> None:
    """Random ranks that retry the same units."""
    for seed in range(EXAMPLES or 40):
        run_scenario(make_retry_duel(Random(seed)))


def test_no_interleaving_and_no_fault_loses_doubles_or_mixes_a_unit() -> None:
    # Found here, a scenario is made as small as it can be.
    search(EXAMPLES or 160, Phase.generate, Phase.shrink)


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("kind", ["kill", "power", "fail", "fail late"])
def test_a_fault_at_each_single_step_of_two_units_leaves_whole_units(kind: Any, has_links: bool) -> None:
    fault_at_each_step(kind, has_links)


def test_what_is_held_for_long_or_given_back_is_not_quarantined() -> None:
    let_ranks_work_and_give_back()


def test_who_sleeps_through_the_decision_about_its_unit_loses_it() -> None:
    sleep_at_each_step_of_a_commit()


def test_who_sleeps_through_a_retry_finds_nothing_to_move_any_more() -> None:
    stop_at_each_step_of_a_retrys_moves()


def test_no_file_is_moved_before_its_marker_is_on_the_disk() -> None:
    lose_power_after_a_commit_that_failed()


def test_obsolete_files_go_though_the_power_does_first() -> None:
    lose_power_before_a_file_is_moved_out()


def test_retries_of_a_unit_under_faults_replace_it_whole_or_keep_it() -> None:
    retry_under_faults()


def test_a_retry_that_kills_three_times_keeps_what_stood() -> None:
    poisoned = Scenario(seed=0, num_units=2, first_units=(2,) * 9, poison=0, poisons_retries=1, max_retries=3)
    for seed in range(6):
        run_scenario(dataclasses.replace(poisoned, seed=seed))


def test_others_build_on_nothing_that_a_stopped_rank_has_not_brought_to_the_disk() -> None:
    for stop in range(6, 24):
        for place, count in [("_done", 5), ("img_emb", 1), ("img_emb", 3), ("errors", 2), ("", 150)]:
            faults = (Fault("stop", 1, "sync_folder", stop, 2000.0), Fault("power", 2, place, count))
            run_scenario(Scenario(seed=stop, num_units=2, first_units=(2, 2), switch_chance=0.02, faults=faults))


def test_the_same_scenario_runs_the_same_way_again() -> None:
    scenarios = [make_scenario(Random(seed)) for seed in range(5)]

    assert [run_scenario(scenario).steps for scenario in scenarios] == [run_scenario(s).steps for s in scenarios]


# The ledger broken on purpose: a search that does not find each of these proves nothing.


def publish_by_renaming_over(files: FilePort, candidate: Path, target: Path, data: bytes, *, has_links: bool) -> bool:
    if not has_links:
        return publish(files, candidate, target, data, has_links=False)
    files.rename(candidate, target)
    files.sync_folder(target.parent)
    return True


def publish_after_a_look(files: FilePort, candidate: Path, target: Path, data: bytes, *, has_links: bool) -> bool:
    is_taken = read_published(target, files.read) is not None
    return not is_taken and publish_by_renaming_over(files, candidate, target, data, has_links=has_links)


def publish_and_never_lose(files: FilePort, candidate: Path, target: Path, data: bytes, *, has_links: bool) -> bool:
    publish(files, candidate, target, data, has_links=has_links)
    return True


def never_sweep(self: Commits, leases: Leases) -> None:
    pass


def call_the_stale_gone(self: Leases, lease: Lease) -> bool:
    return lease.owner != self._owner and self.server_now_ns() - lease.mtime_ns > self.stale_s * SECOND_NS


def move_before_the_marker(self: Commits, marker: Marker) -> bool:
    for file in marker.files:
        self._ensure_folder((self.out / file.path).parent)
        self.files.rename(self.out / marker.staging / staged_name(file.path), self.out / file.path)
    return _publish_marker(self, marker)


def clear_without_a_look(self: Commits, goal: Goal, token: str) -> None:
    remove_tree(self.files, self.staging(goal, token))


def keep_the_lease(self: Leases, token: str) -> None:
    with self._lock:
        self._held.pop(token, None)


def quarantine_after_two(
    left: Sequence[Unit], leases: Mapping[int, Sequence[Lease]], is_live: Mapping[Path, bool], number: int
) -> Any:
    return _judge(left, leases, is_live, number - 1)


def take_the_live_for_dead(
    left: Sequence[Unit], leases: Mapping[int, Sequence[Lease]], is_live: Mapping[Path, bool], number: int
) -> Any:
    return _judge(left, leases, dict.fromkeys(is_live, False), number)


def measure_without_sync(self: Commits, staging: Path, outputs: Sequence[str]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(path, *self.files.digest(staging / staged_name(path))) for path in outputs)


def leave_the_folders_name_to_luck(self: Commits, staging: Path, outputs: Sequence[str]) -> tuple[FileRecord, ...]:
    records = measure_without_sync(self, staging, outputs)
    for path in outputs:
        self.files.sync(staging / staged_name(path))
    if outputs:
        self.files.sync_folder(staging)
    return records


def settle_nothing(self: Commits, marker: Marker) -> None:
    pass


def remove_in_place(self: Commits, marker: Marker) -> None:
    for path in marker.obsolete:
        remove_file(self.files, self.out / path)


def leave_what_is_obsolete(self: Commits, marker: Marker) -> None:
    pass


def call_nothing_superseded(self: Commits, goal: Goal) -> bool:
    return False


def take_whatever_comes(before: Marker, after: Marker, *, is_forced: bool) -> Marker:
    return dataclasses.replace(after, obsolete=tuple(path for path in before.paths if path not in after.paths))


def take_it_for_kept(before: Marker, after: Marker, *, is_forced: bool) -> Marker:
    return keeping(before, after.token, after.staging)


def roll_forward_at_once(self: Commits, marker: Marker) -> None:
    self.move_in(marker)


def measure_nothing_without_files(self: Commits, staging: Path, outputs: Sequence[str]) -> tuple[FileRecord, ...]:
    return _measure(self, staging, outputs) if outputs else ()


_measure = Commits.measure
_judge, _publish_marker = hunt.judge, Commits.publish_marker


@pytest.mark.parametrize(
    ("where", "name", "broken", "look"),
    [
        (commit, "publish", publish_by_renaming_over, sleep_at_each_step_of_a_commit),
        (commit, "publish", publish_after_a_look, sleep_at_each_step_of_a_commit),
        (commit, "publish", publish_and_never_lose, sleep_at_each_step_of_a_commit),
        (Commits, "sweep", never_sweep, search_any),
        # Shows in one of sixty.
        (Leases, "is_gone", call_the_stale_gone, lambda: search(EXAMPLES or 400, Phase.generate)),
        (Commits, "publish_marker", move_before_the_marker, search_any),
        (Commits, "clear", clear_without_a_look, lambda: fault_at_each_step("fail late")),
        (Leases, "give_back", keep_the_lease, let_ranks_work_and_give_back),
        (hunt, "judge", quarantine_after_two, search_any),
        (hunt, "judge", take_the_live_for_dead, let_ranks_work_and_give_back),
        (Commits, "measure", measure_without_sync, lambda: fault_at_each_step("power")),
        (Commits, "measure", leave_the_folders_name_to_luck, lambda: fault_at_each_step("power")),
        (Commits, "measure", measure_nothing_without_files, lose_power_before_a_file_is_moved_out),
        (Commits, "settle", settle_nothing, stop_at_each_step_of_a_retrys_moves),
        (Commits, "_move_out", remove_in_place, stop_at_each_step_of_a_retrys_moves),
        (Commits, "_move_out", leave_what_is_obsolete, retry_under_faults),
        (Commits, "_is_superseded", call_nothing_superseded, retry_under_faults),
        (Commits, "roll_forward", roll_forward_at_once, lose_power_after_a_commit_that_failed),
        (outcome, "succeeding", take_whatever_comes, retry_under_faults),
        (outcome, "succeeding", take_it_for_kept, retry_under_faults),
    ],
    ids=lambda value: getattr(value, "__name__", "") if getattr(value, "__module__", "") == __name__ else "",
)
def test_a_ledger_that_is_broken_on_purpose_is_found_out(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, broken: Callable[..., Any], look: Callable[[], None]
) -> None:
    monkeypatch.setattr(where, name, broken)

    with pytest.raises(AssertionError):
        look()
