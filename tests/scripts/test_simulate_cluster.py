"""The simulator drives the production ledger, and says so where that is broken."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from geoloc_batch.store.done import Done
from geoloc_batch.store.lease import Lease, Leases
from geoloc_batch.store.ledger import Ledger

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = ("--ranks", "6", "--units", "60", "--ranks-per-job", "3", "--start-spread-s", "3")
# Within a run of two minutes some ranks die and some jobs are preempted.
ROUGH = ("--death-h", "0.08", "--restart-s", "20", "--preempt-h", "0.02", "--requeue-s", "20", "--grace-s", "5")


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("simulate_cluster")


def run(simulator: Any, *flags: str) -> tuple[Any, list[str]]:
    """(figures, faults) of a run."""
    cluster, _ = simulator.simulate(simulator.setting_of(simulator.parse(flags)))
    return importlib.import_module("cluster_figures").figures(cluster), simulator.faults_of(cluster)


def test_an_undisturbed_run_does_each_unit_once_near_the_ideal_time(simulator: Any) -> None:
    quiet = ("--death-h", "0", "--preempt-h", "0", "--slow-share", "0")
    found, faults = run(simulator, *SMALL, *quiet)
    assert faults == []
    assert found.executions == 60
    assert found.doubled == pytest.approx(0)
    assert 1 <= found.over_ideal < 1.3
    assert found.ideal_s == pytest.approx(60 * 10 / 6, abs=3)


def test_ranks_that_die_and_jobs_that_are_preempted_cost_work_and_no_unit(simulator: Any) -> None:
    found, faults = run(simulator, *SMALL, *ROUGH)
    assert faults == []
    assert found.deaths > 0
    assert found.preemptions > 0
    assert found.executions > 60
    assert found.doubled > 0


def test_the_same_seed_gives_the_same_run(simulator: Any) -> None:
    assert run(simulator, *SMALL, *ROUGH, "--seed", "3") == run(simulator, *SMALL, *ROUGH, "--seed", "3")


def test_a_slow_server_holds_ranks_up(simulator: Any) -> None:
    found, faults = run(simulator, *SMALL, "--capacity", "25")
    assert faults == []
    assert found.peak_load > 0.9
    assert found.over_ideal > 1.3


def test_names_that_show_late_cost_no_unit(simulator: Any) -> None:
    assert run(simulator, *SMALL, *ROUGH, "--filesystem", "nfs", "--stale-s", "5")[1] == []


def test_a_link_that_replaces_what_stands_is_a_fault(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = importlib.import_module("cluster_disk")

    def link(self: Any, source: str, target: str) -> None:
        folder, name = self._place(target)
        folder.names[name] = self._file(source)

    monkeypatch.setattr(disk.Disk, "link", link)
    # Units of the living are taken up too, and no commit looks whether there is a marker.
    monkeypatch.setattr(Leases, "is_live", lambda self, lease, now_ns: lease.token in self._held)
    commit, look = Ledger.commit, Done.look

    def blind(self: Ledger, *given: Any, **named: Any) -> bool:
        self._done.is_blind = True  # type: ignore[attr-defined]
        try:
            return commit(self, *given, **named)
        finally:
            self._done.is_blind = False  # type: ignore[attr-defined]

    monkeypatch.setattr(Ledger, "commit", blind)
    monkeypatch.setattr(Done, "look", lambda self, unit: not getattr(self, "is_blind", False) and look(self, unit))
    assert any("published twice" in fault for fault in run(simulator, *SMALL, *ROUGH)[1])


def test_leases_that_two_ranks_can_take_show_as_work_done_twice(
    simulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = importlib.import_module("cluster_disk")
    monkeypatch.setattr(disk.Disk, "create", lambda self, path: self.write(path, b"", 0) or self.now_ns)
    monkeypatch.setattr(disk.Disk, "write", _overwrite)
    found, _ = run(simulator, *SMALL, "--death-h", "0", "--preempt-h", "0")
    assert found.doubled > 0.5


def _overwrite(self: Any, path: str, data: bytes, size: int) -> None:
    folder, name = self._place(path)
    folder.names[name] = importlib.import_module("cluster_disk").File(data, size, self.now_ns)


def test_leases_that_never_grow_stale_lose_the_units_of_the_dead(
    simulator: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def is_live(self: Leases, lease: Lease, now_ns: int) -> bool:
        return True

    monkeypatch.setattr(Leases, "is_live", is_live)
    monkeypatch.setattr("geoloc_batch.store.schedule.Schedule.is_slow", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["simulate_cluster.py", *SMALL, *ROUGH])
    assert simulator.main() == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert any("has no marker" in line for line in lines)
    assert next(bar for bar in json.loads(last)["bars"] if bar["name"] == "faults")["met"] is False


@pytest.mark.slow
def test_the_sweep_meets_no_fault_and_ends_in_one_line_of_json(
    simulator: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate_cluster.py", "--sweep", "--max-ranks", "100"])
    assert simulator.main() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [run["ranks"] for run in last["runs"]] == [10, 100]
