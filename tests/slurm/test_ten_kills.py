"""A job that is killed again and again. It has gone on beside the tests before this one."""

from __future__ import annotations

import pytest
from slurm.jobs import FLAGS, KILLS, TenKills, World, same_results

from geoloc_batch.cli import main

pytestmark = pytest.mark.slurm


def test_a_job_killed_ten_times_at_random_moments_loses_nothing(ten_kills: TenKills, world: World) -> None:
    job, done = ten_kills.last.result()
    assert len(done) == KILLS == 10
    assert job.end() == 0, f"{done}\n{job.text()}"
    same_results(ten_kills.out, world.whole("embed", *ten_kills.shards, *FLAGS))
    assert main(["verify", str(ten_kills.out)]) == 0
