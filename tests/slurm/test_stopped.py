"""Time limits, requeues and cancellations: what was committed stays, and who starts again goes on from there."""

from __future__ import annotations

import time

import pytest
from slurm.cluster import Cluster
from slurm.jobs import Begin, num_done, num_leased

pytestmark = pytest.mark.slurm


def test_a_job_that_is_requeued_goes_on_where_it_was(begin: Begin, cluster: Cluster) -> None:
    run = begin("--nodes=1")
    run.until_some()
    times = {path: path.stat().st_mtime_ns for path in (run.out / "img_emb").iterdir()}
    cluster.run("scontrol", "requeue", run.job.name)
    run.ends_whole()
    assert run.job.restarts() == 1
    assert "restart 0:" in run.job.text()
    assert "restart 1:" in run.job.text()
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_a_time_limit_requeues_the_job_in_time_and_the_next_start_completes_it(begin: Begin, cluster: Cluster) -> None:
    run = begin("--nodes=2 --time=10 --signal=B:USR2@110")
    job = run.job
    job.wait_for(lambda: num_done(run.out) >= 3 and job.text().count("encoder: ") == 2, "two ranks at work")
    # The limit comes near only now: nobody knows how long a busy machine takes to start.
    cluster.run("scontrol", "update", f"jobid={job.name}", "TimeLimit=2")
    job.wait_for(lambda: "restart 0: requeued" in job.text(), "the signal")
    cluster.run("scontrol", "update", f"jobid={job.name}", "TimeLimit=10")
    # Of the ranks too, each of which has ended by itself.
    assert "restart 0: exit code 75\n" in job.text()
    assert num_done(run.out) >= 3
    assert num_leased(run.out) == 0
    run.ends_whole()
    assert job.restarts() >= 1


def test_a_job_that_is_cancelled_stays_so(begin: Begin, cluster: Cluster) -> None:
    run = begin("--nodes=1")
    run.until_some()
    cluster.run("scancel", run.job.name)
    run.job.end()
    time.sleep(1)
    assert run.job.state() == "CANCELLED"
    assert "not requeued: SLURM is ending the job" in run.job.text()
    # What they were at is free for the next rank at once.
    assert num_leased(run.out) == 0
