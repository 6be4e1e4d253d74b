"""Several jobs on one OUT: by intention, by mistake, with other shards, with another config."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import FLAGS, Submit, World, num_leased, same_results

from geoloc_batch.cli import main

pytestmark = pytest.mark.slurm


def test_two_jobs_and_an_array_share_an_out_though_the_shards_changed_in_between(
    submit: Submit, cluster: Cluster, world: World, tmp_path: Path
) -> None:
    out, gate = tmp_path / "out", tmp_path / "gate"
    first, second = world.gated(gate, world.shards[:6]), world.gated(gate, world.shards[3:10])
    job = submit("embed.sh", *first, *FLAGS, "--out", out, options="--nodes=1")
    job.wait_for(lambda: num_leased(out) >= 1, "a rank at work")
    # Three shards are gone from the list, four are new.
    array = submit("embed.sh", *second, *FLAGS, "--out", out, options="--nodes=1 --array=0-1")
    array.wait_for(lambda: num_leased(out) >= 3, "three ranks at work")
    gate.touch()
    assert job.end() == 0, job.text()
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), 60, "the end of the array")
    assert array.codes() == [0, 0]
    for shards in (first, second):
        assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "whole")]) == 0
    same_results(out, tmp_path / "whole")
    assert main(["verify", str(out)]) == 0


def test_another_config_on_the_same_out_is_refused_and_not_requeued(
    submit: Submit, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = list(map(str, world.shards[:2]))
    assert main(["embed", *shards, *FLAGS, "--out", str(tmp_path / "out")]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    job = submit("embed.sh", *shards, "--encoder", "demo", "--batch-size", 2, "--out", tmp_path / "out")
    assert job.end() == 2, job.text()
    assert (job.state(), job.restarts()) == ("FAILED", 0)
    assert "batch_size" in job.text()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
