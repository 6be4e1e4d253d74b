"""Ranks, jobs and nodes that are lost on the way: every unit is done, by whoever is left, and no bytes differ."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import FLAGS, Submit, World, num_done, num_leased, same_results

from geoloc_batch.cli import main

pytestmark = pytest.mark.slurm


def test_the_first_rank_is_killed_and_the_other_does_all_units(submit: Submit, world: World, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    shards = world.gated(gate, world.shards[:12])
    job = submit("embed.sh", *shards, *FLAGS, "--out", tmp_path / "out")
    job.wait_for(lambda: num_leased(tmp_path / "out") >= 2 and len(job.ranks()) == 2, "two ranks at work")
    os.kill(job.ranks()[0], signal.SIGKILL)
    job.wait_for(lambda: len(job.ranks()) == 1, "a rank lost")
    gate.touch()
    assert job.end() == 0, job.text()
    assert "exit code 0, though ranks ended with up to 137" in job.text()
    assert job.restarts() == 0
    assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "whole")]) == 0
    same_results(tmp_path / "out", tmp_path / "whole")


def test_a_node_goes_down_and_the_other_does_all_units(
    submit: Submit, cluster: Cluster, world: World, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    shards = world.gated(gate, world.shards[:12])
    job = submit("embed.sh", *shards, *FLAGS, "--out", tmp_path / "out")
    job.wait_for(lambda: num_leased(tmp_path / "out") >= 2 and len(job.ranks()) == 2, "two ranks at work")
    with cluster.down("n2"):
        job.wait_for(lambda: cluster.fields(job.name)["NodeList"] == "n1", "a node lost")
        gate.touch()
        assert job.end() == 0, job.text()
    assert job.restarts() == 0
    assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "whole")]) == 0
    same_results(tmp_path / "out", tmp_path / "whole")


def test_the_first_node_goes_down_and_the_job_starts_again_on_the_other(
    submit: Submit, cluster: Cluster, world: World, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    shards = [*world.piped(world.shards[:6]), *world.gated(gate, world.shards[6:10])]
    job = submit("embed.sh", *shards, *FLAGS, "--out", tmp_path / "out", options="--nodes=1")
    job.wait_for(lambda: num_done(tmp_path / "out") >= 3, "some units")
    node = cluster.fields(job.name)["NodeList"]
    with cluster.down(node):
        gate.touch()
        job.wait_for(lambda: job.restarts() == 1, "started again")
        assert job.end() == 0, job.text()
    assert cluster.fields(job.name)["NodeList"] != node
    assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "whole")]) == 0
    same_results(tmp_path / "out", tmp_path / "whole")


def test_a_job_killed_ten_times_at_random_moments_loses_nothing(submit: Submit, world: World, tmp_path: Path) -> None:
    shards = world.piped(world.shards, "sleep 0.2")
    arguments = [*shards, *FLAGS, "--out", tmp_path / "out"]
    dice = random.Random(9)
    kills = []
    job = submit("embed.sh", *arguments, options="--nodes=1")
    for _ in range(10):
        # From before its first breath to well into the work.
        end = num_done(tmp_path / "out") + dice.choice([-1, 0, 0, 1, 2])
        job.wait_for(lambda end=end: num_done(tmp_path / "out") > end, "some units")
        job.cluster.run("scancel", "--full", "--signal=KILL", job.name)
        kills.append(num_done(tmp_path / "out"))
        job = submit("embed.sh", *arguments, options="--nodes=1")
    assert job.end() == 0, f"{kills}\n{job.text()}"
    whole = tmp_path / "whole"
    assert main(["embed", *shards, *FLAGS, "--out", str(whole)]) == 0
    same_results(tmp_path / "out", whole)
