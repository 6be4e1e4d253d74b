"""Several processes on one output folder, some of them stopped, killed or misled: all rows once, no work lost."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from reliability_ranks import Executions, Family, Rank, catch, units_done, units_held, wait_for
from small_world import draw_jpeg, make_shards, tree_bytes, write_tar

from geoloc_batch.store.marker import standing_marker

NUM_UNITS, PHOTOS_EACH = 12, 6
FLAGS = ["--encoder", "demo", "--batch-size", "8"]
# A lease is stale after four of them.
BEAT_S = 0.5
READ_S = 0.15
"""Each shard takes so long to arrive, so that a run lasts while ranks start and end."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    family = Family(tmp_path_factory.mktemp("ranks"))
    yield family
    family.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return [f"pipe:sleep {READ_S}; cat {path}" for path in make_shards(folder, [PHOTOS_EACH] * NUM_UNITS)]


@pytest.fixture(scope="module")
def undisturbed(family: Family, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one rank's run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert family.run("embed", *shards, "--out", out, *FLAGS) == 0
    return tree_bytes(out)


def start(family: Family, shards: list[str], out: Path) -> Rank:
    return family.start("embed", *shards, "--out", out, "--heartbeat-s", BEAT_S, *FLAGS)


def check(family: Family, out: Path, undisturbed: dict[str, bytes], *, is_swept: bool = True) -> None:
    """Complete, nothing doubled, nothing left lying about, byte for byte what an undisturbed run writes."""
    assert family.run("verify", out) == 0
    assert tree_bytes(out) == undisturbed
    assert not is_swept or not list((out / "_staging").iterdir())
    keys = [key for path in sorted((out / "metadata").iterdir()) for key in pq.read_table(path)["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == NUM_UNITS * PHOTOS_EACH


@pytest.mark.parametrize(
    ("num_ranks", "num_stopped", "num_killed"), [(2, 1, 0), (2, 0, 1), (4, 1, 1)], ids=["2-stop", "2-kill", "4-both"]
)
def test_ranks_do_the_units_of_one_that_was_stopped_or_killed_and_of_nobody_else(
    num_ranks: int,
    num_stopped: int,
    num_killed: int,
    family: Family,
    shards: list[str],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with Executions(out) as executions:
        victims, taken_away = [], set()
        for _ in range(num_stopped + num_killed):
            # One after another: on a busy machine one that starts late would find nothing left to do.
            victims.append(start(family, shards, out))
            taken_away |= catch(victims[-1], out)
        others = [start(family, shards, out) for _ in range(num_ranks - len(victims))]
        for rank in victims[num_stopped:]:
            rank.kill()
        for rank in others:
            # Nobody waits for ever for a rank that does not answer.
            assert rank.wait() == 0
        for rank in victims[:num_stopped]:
            assert rank.code is None
            rank.signal(signal.SIGCONT)
            assert rank.wait() == 0
        counts = executions.by_unit()
    assert counts.keys() == set(range(NUM_UNITS))
    again = {unit for unit, count in counts.items() if count > 1}
    assert again <= taken_away
    assert max(counts.values()) <= 2
    check(family, out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_run_killed_at_a_random_moment_is_completed_by_the_next_or_by_its_companion(
    trial: int, family: Family, shards: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, dice = tmp_path / "out", random.Random(trial)
    ranks = [start(family, shards, out) for _ in range(1 + trial % 2)]
    wait_for(lambda: units_done(out), "no unit is done")
    time.sleep(dice.uniform(0, NUM_UNITS * READ_S / len(ranks)))
    # Of two ranks one is killed, or both.
    for rank in ranks[: 1 + trial % 4 // 3]:
        rank.kill()
    for rank in ranks:
        if rank.code is None or rank.code >= 0:
            assert rank.wait() == 0
    assert start(family, shards, out).wait() == 0
    check(family, out, undisturbed)


def test_a_photo_that_kills_the_decoder_costs_its_unit_alone(family: Family, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    make_shards(folder, [3] * 5)
    deadly = tmp_path / "deadly.jpg"
    deadly.write_bytes(draw_jpeg(99))
    write_tar(folder / "000002.tar", [("a.jpg", draw_jpeg(7)), ("b.jpg", deadly.read_bytes())])
    out, codes = tmp_path / "out", []
    with Executions(out) as executions:
        while not codes or codes[-1] < 0:
            assert len(codes) < 4
            codes.append(family.run("embed", folder, "--out", out, *FLAGS, kill_on=deadly))
        # Three executions, and the folder from which the quarantine is published.
        assert executions.by_unit()[2] == 3 + 1
    assert codes == [-signal.SIGSEGV] * 3 + [3]
    assert units_done(out) == set(range(5))
    markers = {unit: standing_marker(out, unit) for unit in range(5)}
    assert [unit for unit, marker in markers.items() if marker is not None and marker.quarantined] == [2]
    assert markers[2] is not None
    error = markers[2].counts.unit_error
    assert error is not None
    assert error.retryable
    assert "3 executions ended without a commit" in error.message
    rows = [len(pq.read_table(out / "metadata" / f"metadata_{unit:06d}.parquet")) for unit in (0, 1, 3, 4)]
    assert rows == [3] * 4
    assert family.run("verify", out) == 0


def test_two_jobs_with_other_settings_never_share_an_output_folder(
    family: Family, shards: list[str], tmp_path: Path
) -> None:
    flags = ["--out", tmp_path / "out", "--encoder", "demo", "--batch-size"]
    ranks = [family.start("embed", *shards[:4], *flags, size) for size in (8, 16)]
    codes = [rank.wait() for rank in ranks]
    assert sorted(codes) == [0, 2]
    assert "batch_size is pinned to" in ranks[codes.index(2)].said
    assert family.run("verify", tmp_path / "out") == 0


def left_by_another_machine(family: Family, shards: list[str], out: Path) -> set[int]:
    """Units whose rank has ended, on a machine from which nobody here can learn that."""
    rank = start(family, shards, out)
    held = catch(rank, out)
    rank.kill()
    for unit in held:
        lease = out / "_leases" / f"{unit:06d}.1"
        fields: dict[str, Any] = json.loads(lease.read_text())
        fields["owner"]["boot"] = "another"
        lease.write_text(json.dumps(fields))
    return held


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-1, 1], ids=["into-the-past", "into-the-future"])
def test_leases_of_the_dead_are_taken_over_though_the_clock_has_jumped(
    hours: int, family: Family, shards: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    held = left_by_another_machine(family, shards, out)
    for unit in held:
        moment = time.time() + 3600 * hours
        os.utime(out / "_leases" / f"{unit:06d}.1", (moment, moment))
    assert start(family, shards, out).wait() == 0
    # While a lease lies in the future its owner's folder is kept, for the owner may live.
    check(family, out, undisturbed, is_swept=hours < 0)


def test_a_clock_that_makes_live_leases_look_old_costs_work_but_no_row(
    family: Family, shards: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, is_over = tmp_path / "out", threading.Event()

    def turn_back() -> None:
        while not is_over.wait(0.01):
            for path in (out / "_leases").glob("[0-9]*.[0-9]"):
                if path.exists():
                    os.utime(path, (0, 0))

    with Executions(out) as executions:
        ranks = [start(family, shards, out)]
        wait_for(lambda: units_held(out, ranks[0].pid), "the rank takes no unit")
        turner = threading.Thread(target=turn_back)
        turner.start()
        ranks.append(start(family, shards, out))
        codes = [rank.wait() for rank in ranks]
        is_over.set()
        turner.join()
        counts = executions.by_unit()
    assert codes == [0, 0]
    assert max(counts.values()) <= 3
    check(family, out, undisturbed)
