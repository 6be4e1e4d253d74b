"""Head training on two nodes at once: ranks meet, a lost one ends the start and not the job, and no bit is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import Job, Submit
from small_world import tree_bytes
from train_samples import flags_of, make_world

pytestmark = pytest.mark.slurm


def until_another_epoch(job: Job, out: Path) -> None:
    """Wait until a checkpoint is written after now."""
    path = out / "_checkpoint.pt"
    before = path.stat().st_mtime_ns if path.exists() else 0
    job.wait_for(lambda: path.exists() and path.stat().st_mtime_ns > before, "an epoch")


def test_two_nodes_train_one_head_through_a_lost_rank_and_a_time_limit(
    submit: Submit, cluster: Cluster, tmp_path: Path
) -> None:
    world = make_world(tmp_path)
    flags = ("--group-by", "spot", "--epochs", 150, "--patience", 150)

    def begin(name: str) -> Job:
        return submit("train_head.sh", *flags_of(world, tmp_path / name, *flags)[1:], options="--nodes=2")

    cut, out = begin("cut"), tmp_path / "cut"
    until_another_epoch(cut, out)
    os.kill(cut.ranks()[1], signal.SIGKILL)
    whole = begin("whole")
    cut.wait_for(lambda: "restart 0: requeued" in cut.text(), "the end of the rank that is left", seconds=60)
    assert "restart 0: exit code 75, though ranks ended with up to 137" in cut.text()
    cut.wait_for(lambda: "restart 1:" in cut.text(), "a second start")
    until_another_epoch(cut, out)
    cluster.run("scancel", "--batch", "--signal=USR2", cut.name)
    cut.wait_for(lambda: "restart 1: requeued" in cut.text(), "the end of both ranks", seconds=60)
    assert "restart 1: exit code 75\n" in cut.text()
    assert [job.end() for job in (cut, whole)] == [0, 0], cut.text() + whole.text()
    assert cut.restarts() == 2
    for start in (cut.text().split("restart 1:")[0], whole.text()):
        assert "2 ranks on" in start
    first, second = tree_bytes(tmp_path / "whole"), tree_bytes(out)
    assert first.keys() == second.keys()
    # The seconds differ.
    assert all(first[name] == second[name] for name in first.keys() - {"metrics.csv", "head.json"})


def test_gpus_give_a_rank_each_and_what_the_first_refuses_ends_the_job_as_misuse(
    submit: Submit, tmp_path: Path
) -> None:
    world = make_world(tmp_path, num_places=40)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "foreign").touch()
    job = submit("train_head.sh", *flags_of(world, tmp_path / "out")[1:], options="--nodes=1 --gpus-per-node=2")
    assert job.end() == 2, job.text()
    assert job.text().count("holds 'foreign'") == 2
    assert job.restarts() == 0
