"""Several jobs on one OUT: by intention, by mistake, with other shards, with another config."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import FLAGS, Submit, World, committed_by, num_executed, same_results, workers

from geoloc_batch.cli import main

pytestmark = pytest.mark.slurm


def test_two_jobs_and_an_array_share_an_out_though_the_shards_changed_in_between(
    submit: Submit, cluster: Cluster, world: World, gate: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second = world.gated(world.shards[:6]), world.gated(world.shards[3:12])
    job = submit("embed.sh", *first, *FLAGS, "--out", out, options="--nodes=1", GATE=str(gate))
    job.wait_for(lambda: len(workers(out)) == 1, "a rank at work")
    # Three shards are gone from the list, six are new, and they stand in another order.
    array = submit("embed.sh", *reversed(second), *FLAGS, "--out", out, options="--nodes=1 --array=0-1", GATE=str(gate))
    array.wait_for(lambda: len(workers(out)) == 3, "three ranks at work")
    gate.touch()
    assert job.end() == 0, job.text()
    cluster.wait(lambda: not cluster.run("squeue", "--noheader", f"--jobs={array.name}"), 60, "the end of the array")
    assert array.codes() == [0, 0]
    for shards in (first, list(reversed(second))):
        assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "whole")]) == 0
    same_results(out, tmp_path / "whole")
    assert main(["verify", str(out)]) == 0
    # By all three, and nothing by two of them.
    assert len(committed_by(out)) == 3
    assert num_executed(out) == 12


def test_another_config_on_an_out_in_work_is_refused_and_not_requeued(
    submit: Submit, world: World, gate: Path, tmp_path: Path
) -> None:
    out, shards = tmp_path / "out", [str(world.shards[0]), *world.gated(world.shards[1:3])]
    job = submit("embed.sh", *shards, *FLAGS, "--out", out, options="--nodes=1", GATE=str(gate))
    job.wait_for(lambda: len(workers(out)) == 1, "a rank at work")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = submit("embed.sh", *shards, "--encoder", "demo", "--batch-size", 2, "--out", out, options="--nodes=1")
    assert other.end() == 2, other.text()
    assert (other.state(), other.restarts()) == ("FAILED", 0)
    assert "batch_size" in other.text()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    gate.touch()
    assert job.end() == 0, job.text()
    same_results(out, world.whole("embed", *shards, *FLAGS))
