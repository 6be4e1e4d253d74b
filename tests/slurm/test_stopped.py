"""Time limits, requeues and cancellations: what was committed stays, and who starts again goes on from there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import FLAGS, Submit, World, num_done, num_leased, same_results

from geoloc_batch.cli import main

pytestmark = pytest.mark.slurm


def test_a_job_that_is_requeued_goes_on_where_it_was(
    submit: Submit, cluster: Cluster, world: World, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    shards = [*world.piped(world.shards[:6]), *world.gated(gate, world.shards[6:10])]
    job = submit("embed.sh", *shards, *FLAGS, "--out", tmp_path / "out", options="--nodes=1")
    job.wait_for(lambda: num_done(tmp_path / "out") >= 3, "some units")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "img_emb").iterdir()}
    cluster.run("scontrol", "requeue", job.name)
    gate.touch()
    assert job.end() == 0, job.text()
    assert job.restarts() == 1
    assert "restart 0:" in job.text()
    assert "restart 1:" in job.text()
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "whole")]) == 0
    same_results(tmp_path / "out", tmp_path / "whole")


def test_a_time_limit_requeues_the_job_in_time_and_the_next_start_completes_it(
    submit: Submit, cluster: Cluster, world: World, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    shards = [*world.piped(world.shards[:8]), *world.gated(gate, world.shards[8:14])]
    arguments = [*shards, *FLAGS, "--out", tmp_path / "out"]
    job = submit("embed.sh", *arguments, options="--nodes=2 --time=10 --signal=B:USR2@110")
    job.wait_for(lambda: num_done(tmp_path / "out") >= 3 and job.text().count("encoder: ") == 2, "two ranks at work")
    # The limit comes near only now: nobody knows how long a busy machine takes to start.
    cluster.run("scontrol", "update", f"jobid={job.name}", "TimeLimit=2")
    job.wait_for(lambda: "restart 0: requeued" in job.text(), "the signal")
    cluster.run("scontrol", "update", f"jobid={job.name}", "TimeLimit=10")
    # Of the ranks too, each of which has ended by itself.
    assert "restart 0: exit code 75\n" in job.text()
    assert num_done(tmp_path / "out") >= 3
    assert num_leased(tmp_path / "out") == 0
    gate.touch()
    assert job.end() == 0, job.text()
    assert job.restarts() >= 1
    assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "whole")]) == 0
    same_results(tmp_path / "out", tmp_path / "whole")


def test_a_job_that_is_cancelled_stays_so(submit: Submit, cluster: Cluster, world: World, tmp_path: Path) -> None:
    shards = [*world.piped(world.shards[:6]), *world.gated(tmp_path / "gate", world.shards[6:10])]
    job = submit("embed.sh", *shards, *FLAGS, "--out", tmp_path / "out", options="--nodes=1")
    job.wait_for(lambda: num_done(tmp_path / "out") >= 3, "some units")
    cluster.run("scancel", job.name)
    job.end()
    time.sleep(1)
    assert job.state() == "CANCELLED"
    assert "not requeued: SLURM is ending the job" in job.text()
    # What they were at is free for the next rank at once.
    assert num_leased(tmp_path / "out") == 0
