"""Ranks of two nodes write what one process writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm.jobs import FLAGS, Submit, World, committed_by, num_executed, same_results, workers

from geoloc_batch.cli import main

pytestmark = pytest.mark.slurm

NUM_GATED = 12
"""Of the 40 shards: no rank gets past its first ones of these before all four are there."""


@pytest.mark.parametrize("command", ["embed", "predict"])
def test_two_nodes_with_two_ranks_each_write_what_one_process_writes(
    command: str, submit: Submit, world: World, gate: Path, tmp_path: Path
) -> None:
    out = tmp_path / "four"
    arguments = [*world.gated(world.shards[:NUM_GATED]), *world.shards[NUM_GATED:], *FLAGS]
    if command == "predict":
        arguments += ["--save-embeddings", *world.head_flags]
    options = "--nodes=2 --ntasks-per-node=2"
    job = submit(f"{command}.sh", *arguments, "--out", out, options=options, GATE=str(gate))
    expected = world.whole(command, *arguments)
    job.wait_for(lambda: len(workers(out)) == 4, "four ranks at work")
    gate.touch()
    assert job.end() == 0, job.text()
    same_results(out, expected)
    made = committed_by(out)
    assert sorted(name[-2:] for name in made) == ["r0", "r1", "r2", "r3"]
    assert made.total() == num_executed(out) == len(world.shards) == 40
    assert main(["verify", str(out)]) == 0
