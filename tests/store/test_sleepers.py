"""Ranks that stand still at the worst moment, found by the model: none of them fails, and nothing half stands."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_samples import CONFIG, make_units, retry_rank, take, tree, with_steps, work, write_unit

from geoloc_batch.store.files import OsFiles
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.ledger import Execution, Ledger, UnitCounts
from geoloc_batch.store.plan import load_plan
from geoloc_batch.store.verify import verify

Hook = Callable[[str, tuple[Any, ...]], None]


def refuse_links(files: OsFiles) -> OsFiles:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    files.link = link  # type: ignore[method-assign]
    return files


def opened(out: Path, num_units: int = 1, files: OsFiles | None = None) -> Ledger:
    ledger = Ledger(out, beat_s=5.0, files=files)
    ledger.open(CONFIG)
    ledger.adopt_plan(make_units(num_units))
    return ledger


def make_old(path: Path) -> None:
    """As if its owner had stood still for long."""
    os.utime(path, (1000, 1000))


def once(hook: Callable[[str, Path], bool]) -> Hook:
    """A hook that is asked until it says that it has done its work."""
    is_done = False

    def at_step(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_done
        if not is_done and hook(name, Path(arguments[0])):
            is_done = True

    return at_step


def noting(steps: list[tuple[str, Path]]) -> Hook:
    """A hook that notes each step with the path that it changes."""
    return lambda name, arguments: steps.append((name, [one for one in arguments if isinstance(one, Path)][-1]))


def test_a_rank_that_stands_still_between_the_two_steps_of_a_lease_finds_its_unit_done(tmp_path: Path) -> None:
    def stand_still(name: str, path: Path) -> bool:
        if name != "fill" or path.name != "000000.1":
            return False
        make_old(path)
        other = opened(tmp_path / "out")
        assert len(list(work(other))) == 1
        other.close()
        assert not path.exists()
        return True

    ledger = opened(tmp_path / "out", files=with_steps(once(stand_still)))

    assert ledger.acquire() is None
    ledger.close()


@pytest.mark.parametrize("wrap", [lambda files: files, refuse_links], ids=["links", "no-links"])
@pytest.mark.parametrize("step", ["make_folder", "write", "sync", "rename"])
def test_a_probe_that_is_swept_while_its_rank_stands_still_is_made_again(
    tmp_path: Path, step: str, wrap: Callable[[OsFiles], OsFiles]
) -> None:
    swept = []

    def stand_still(name: str, path: Path) -> bool:
        scratch = next((part for part in path.parents if part.name.startswith("probe.")), None)
        if name != step or scratch is None:
            return False
        shutil.rmtree(scratch, ignore_errors=True)
        swept.append(scratch)
        return True

    ledger = opened(tmp_path / "out", files=wrap(with_steps(once(stand_still))))

    # With hard links the probe renames nothing.
    assert bool(swept) or step == "rename"
    assert len(list(work(ledger))) == 1
    ledger.close()


def test_a_plan_that_is_swept_by_halves_is_not_published_empty(tmp_path: Path) -> None:
    """Without hard links the plan's folder is renamed: a sweep that is cut off in it must not leave it so."""
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    def die_in_the_sweep(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "remove_folder" and arguments[0].name == "publish" and arguments[0].parent.name not in ("a", "b"):
            raise Killed

    def stand_still(name: str, path: Path) -> bool:
        if name != "rename" or not path.parent.name.startswith("plan."):
            return False
        make_old(path.parent)
        sweeper = Ledger(out, beat_s=5.0, files=refuse_links(with_steps(die_in_the_sweep)))
        with pytest.raises(Killed):
            sweeper.open(CONFIG)
        return True

    opened(out, 1, refuse_links(OsFiles())).close()
    ledger = opened(out, 2, refuse_links(with_steps(once(stand_still))))

    assert [unit.index for unit in load_plan(out).units] == [0, 1]
    assert len(list(work(ledger))) == 2
    ledger.close()


def test_two_ranks_may_quarantine_a_unit_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    opened(out).close()
    for slot in (1, 2, 3):
        (out / "_leases" / f"000000.{slot}").write_text("")
        make_old(out / "_leases" / f"000000.{slot}")

    def stand_still(name: str, path: Path) -> bool:
        if name != "write" or path.name != "000000.json":
            return False
        other = opened(out)
        assert other.acquire() is None
        other.close()
        assert not path.parent.exists()
        return True

    ledger = opened(out, files=with_steps(once(stand_still)))

    assert ledger.acquire() is None
    assert ledger.totals().units_failed == 1
    ledger.close()


def test_a_close_that_fails_lets_the_lease_grow_stale(tmp_path: Path) -> None:
    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "remove_folder" and is_failing:
            raise OSError(errno.EIO, "the disk fails")

    is_failing = False
    ledger = opened(tmp_path / "out", files=with_steps(fail))
    assert isinstance(ledger.acquire(), Execution)
    others = threading.active_count()
    is_failing = True

    with pytest.raises(OSError, match="the disk fails"):
        ledger.close()

    assert threading.active_count() == others - 1
    assert (tmp_path / "out/_leases/000000.1").exists()


def test_names_that_results_stand_on_are_brought_to_the_disk_first(tmp_path: Path) -> None:
    """A power cut takes back names that were not synced: the folder of OUT, and that of staged files."""
    steps: list[tuple[str, Path]] = []
    out = tmp_path / "new" / "out"
    ledger = opened(out, files=with_steps(noting(steps)))
    assert ("sync_folder", tmp_path) in steps
    assert ("sync_folder", tmp_path / "new") in steps
    execution = ledger.acquire()
    assert isinstance(execution, Execution)

    ledger.commit(execution, *write_unit(execution))

    link = steps.index(("link", out / "_done/000/000000.json"))
    assert ("sync_folder", out / "_staging") in steps[:link]
    ledger.close()


def test_a_cut_off_commit_is_rolled_forward_only_once_its_marker_is_on_the_disk(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die_before_the_sync(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "sync_folder" and arguments[0].name == "000" and is_published():
            raise Killed

    def is_published() -> bool:
        return (out / "_done/000/000000.json").exists()

    out = tmp_path / "out"
    ledger = opened(out, files=with_steps(die_before_the_sync))
    execution = ledger.acquire()
    assert isinstance(execution, Execution)
    outputs, counts = write_unit(execution)
    with pytest.raises(Killed):
        ledger.commit(execution, outputs, counts)
    assert tree(out) == {}

    steps: list[tuple[str, Path]] = []
    other = opened(out, files=with_steps(noting(steps)))

    assert sorted(tree(out)) == sorted(outputs)
    moves = [number for number, (name, path) in enumerate(steps) if name == "rename" and path.parent.name == "img_emb"]
    assert steps.index(("sync_folder", out / "_done/000")) < moves[0]
    assert verify(out).ok
    other.close()


def write_without_errors(execution: Execution) -> tuple[list[str], UnitCounts]:
    """Like write_unit, and the photo that could not be read is not there any more."""
    outputs, counts = write_unit(execution)
    return outputs[:-1], dataclasses.replace(counts, samples=counts.rows, errors=0)


@pytest.mark.parametrize("step", ["rename", "sync_folder", "remove_folder"])
def test_a_rank_that_stands_still_among_its_moves_harms_no_retry_that_came_since(tmp_path: Path, step: str) -> None:
    out = tmp_path / "out"
    files: dict[str, bytes] = {}

    def stand_still(name: str, path: Path) -> bool:
        if name != step or not (out / "_done/000/000000.json").exists():
            return False
        assert retry_rank(out, write_without_errors, forced=(0,)) == [Goal(0, 1)]
        files.update(tree(out))
        return True

    ledger = opened(out, files=with_steps(once(stand_still)))

    # The first is told that it stands, as it did, for a moment.
    assert len(list(work(ledger))) == 1
    ledger.close()
    assert len(files) == 3
    assert tree(out) == files
    assert verify(out).ok


def test_a_retry_builds_on_no_marker_that_a_power_cut_could_take_back(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die_before_the_sync(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "sync_folder" and (out / "_done/000/000000.json").exists():
            raise Killed

    steps: list[tuple[str, Path]] = []
    out = tmp_path / "out"
    killed = opened(out, files=with_steps(die_before_the_sync))
    # It has opened before the marker is there: its sweep has not seen it.
    other = opened(out, files=with_steps(noting(steps)))
    execution = take(killed)
    outputs, counts = write_unit(execution)
    with pytest.raises(Killed):
        killed.commit(execution, outputs, counts)
    assert tree(out) == {}

    other.adopt_retries(lambda counts: False, (0,))
    assert len(list(work(other, write_without_errors))) == 1

    moves = [number for number, (name, path) in enumerate(steps) if name == "rename" and path.parent.parent == out]
    assert (
        steps.index(("sync_folder", out / "_done/000"))
        < moves[0]
        < steps.index(("link", out / "_done/000/000000r1.json"))
    )
    assert sorted(tree(out)) == sorted(outputs[:-1])
    other.close()
