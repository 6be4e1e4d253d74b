"""Ranks of two nodes write what one process writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm.jobs import FLAGS, Submit, World, same_results

from geoloc_batch.cli import main

pytestmark = pytest.mark.slurm


def test_two_nodes_with_two_ranks_each_embed_what_one_process_embeds(
    submit: Submit, world: World, tmp_path: Path
) -> None:
    arguments = [world.root / "shards", *FLAGS]
    job = submit("embed.sh", *arguments, "--out", tmp_path / "four", options="--nodes=2 --ntasks-per-node=2")
    assert main(["embed", *map(str, arguments), "--out", str(tmp_path / "one")]) == 0
    assert job.end() == 0, job.text()
    assert {line[0] for line in job.text().splitlines() if line[1:4] == ": {"} == set("0123")
    same_results(tmp_path / "four", tmp_path / "one")
    assert main(["verify", str(tmp_path / "four")]) == 0


def test_two_nodes_with_two_ranks_each_predict_what_one_process_predicts(
    submit: Submit, world: World, tmp_path: Path
) -> None:
    arguments = [world.root / "shards", "--save-embeddings", *FLAGS, *world.head_flags]
    job = submit("predict.sh", *arguments, "--out", tmp_path / "four", options="--nodes=2 --ntasks-per-node=2")
    assert main(["predict", *map(str, arguments), "--out", str(tmp_path / "one")]) == 0
    assert job.end() == 0, job.text()
    same_results(tmp_path / "four", tmp_path / "one")
    assert main(["verify", str(tmp_path / "four")]) == 0
