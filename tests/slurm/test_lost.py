"""Ranks, jobs and nodes that are lost on the way: every unit is done, by whoever is left, and no bytes differ."""

from __future__ import annotations

import json
import os
import signal

import pytest
from slurm.cluster import Cluster
from slurm.jobs import Begin, num_done, workers

from geoloc_batch.cli import main
from geoloc_batch.store.files import process_state

pytestmark = pytest.mark.slurm


def test_the_first_rank_is_killed_the_others_do_all_units_and_status_tells(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin("--nodes=2 --ntasks-per-node=2")
    run.until_held_by(4)
    (lost,) = (name for name in workers(run.out) if name.endswith("-r0"))
    killed = run.job.ranks()[0]
    os.kill(killed, signal.SIGKILL)
    # It shows no rank any more as soon as its memory is given back, which takes a while, and has not ended before.
    run.job.wait_for(lambda: (process_state(killed) or "Z")[0] in "ZX", "a rank lost")
    assert sorted(run.job.ranks()) == [1, 2, 3]
    assert main(["status", str(run.out), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert {rank["name"] for rank in seen["ranks"] if rank["state"] == "working"} == workers(run.out) - {lost}
    ((silent, held),) = ((rank["name"], rank["holds"]) for rank in seen["ranks"] if rank["state"] == "silent")
    assert silent == lost
    # What the lost one held waits for somebody else.
    num_held = len(list((run.out / "_leases").glob("0*"))) - len(held)
    assert (seen["state"], seen["units"], seen["silent"], seen["running"]) == ("running", 12, 1, num_held)
    assert seen["done"] == num_done(run.out) == 12 - num_held - seen["waiting"]
    run.ends_whole()
    assert "exit code 0, though ranks ended with up to 137" in run.job.text()
    assert run.job.restarts() == 0
    capsys.readouterr()
    assert main(["status", str(run.out), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["state"], seen["done"], seen["waiting"], seen["silent"]) == ("complete", 12, 0, 0)
    assert (
        seen["samples"] == sum(rank["samples"] for rank in seen["ranks"]) == sum(1 + index % 7 for index in range(12))
    )


def test_a_node_goes_down_and_the_other_does_all_units(begin: Begin, cluster: Cluster) -> None:
    run = begin("--nodes=2")
    run.until_held_by(2)
    with cluster.down("n2"):
        run.job.wait_for(lambda: cluster.fields(run.job.name)["NodeList"] == "n1", "a node lost")
        run.ends_whole()
    assert run.job.restarts() == 0


def test_the_first_node_goes_down_and_the_job_starts_again_on_the_other(begin: Begin, cluster: Cluster) -> None:
    run = begin("--nodes=1")
    run.until_some()
    node = cluster.fields(run.job.name)["NodeList"]
    with cluster.down(node):
        run.go_on()
        run.job.wait_for(lambda: run.job.restarts() == 1, "started again")
        run.ends_whole()
    assert cluster.fields(run.job.name)["NodeList"] != node
