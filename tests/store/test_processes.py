"""Real processes on one OUT: killed at each step, racing, stopped and continued, killed by what they read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_samples import run_rank, tree

from geoloc_batch.store.status import status
from geoloc_batch.store.verify import verify

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[list[str]]:
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    return [line.split() for line in stdout.splitlines()]


@pytest.mark.parametrize(
    "how",
    [pytest.param(("links", 1, 2), marks=pytest.mark.slow), ("no-links", 2, 4), ("links", 2, 6, "again")],
    ids=str,
)
def test_a_run_killed_at_any_step_resumes_to_the_files_of_an_undisturbed_one(
    tmp_path: Path, how: tuple[object, ...]
) -> None:
    steps = int(finish(start(TESTS / "store_kill_loop.py", tmp_path, *how))[0][0])

    # So many steps that nothing was left out, and the last process ran through.
    assert steps > 100


def test_three_ranks_on_one_folder_publish_each_unit_once(tmp_path: Path) -> None:
    run_rank(tmp_path / "alone", 17)
    out = tmp_path / "together"

    ranks = [start(TESTS / "store_rank.py", out, 17, 5, "seconds=0.01") for _ in range(3)]
    said = [line for rank in ranks for line in finish(rank)]

    assert sorted(int(unit) for word, unit in said if word == "committed") == list(range(17))
    assert tree(out) == tree(tmp_path / "alone")
    assert verify(out).ok


def test_a_rank_stopped_before_its_marker_loses_in_order_when_it_is_continued(tmp_path: Path) -> None:
    run_rank(tmp_path / "alone", 3)
    out = tmp_path / "out"
    stopped = start(TESTS / "store_rank.py", out, 3, 0.1, "stop-at-link")
    deadline = time.monotonic() + 30
    while Path(f"/proc/{stopped.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.02)

    took_over = finish(start(TESTS / "store_rank.py", out, 3, 0.1))
    files_meanwhile = tree(out)
    stopped.send_signal(signal.SIGCONT)
    continued = finish(stopped)

    assert [word for word, _ in took_over] == ["committed"] * 3
    assert [word for word, _ in continued] == ["lost"] * 2
    assert tree(out) == files_meanwhile == tree(tmp_path / "alone")
    assert not list((out / "_staging").iterdir())
    assert verify(out).ok


def test_a_unit_that_kills_its_process_three_times_is_quarantined_and_all_others_are_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    attempts = 0
    # Another unit is always in hand when the poisoned one kills: it must not be blamed.
    while True:
        rank = start(TESTS / "store_rank.py", out, 4, 5, "die-at-unit-1")
        rank.communicate(timeout=60)
        if rank.returncode == 0:
            break
        assert rank.returncode == -signal.SIGKILL
        attempts += 1

    found = status(out)
    assert attempts == 3
    assert (found.done, found.quarantined, found.unit_errors) == (4, 1, 1)
    assert found.rows == sum(2 + unit % 5 for unit in (0, 2, 3))
    assert verify(out).ok


def test_a_rerun_right_after_a_kill_does_not_wait_for_the_lease_to_grow_stale(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = start(TESTS / "store_rank.py", out, 2, 15, "die-at-unit-0")
    killed.communicate(timeout=60)
    assert list((out / "_leases").glob("000000.1"))

    began = time.monotonic()
    finish(start(TESTS / "store_rank.py", out, 2, 15))

    assert time.monotonic() - began < 15
    assert verify(out).ok
