"""The recipe of slurm/README.md: embed -> train -> predict -> evaluate, each after the one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import FLAGS, Submit, World

pytestmark = pytest.mark.slurm


# One rank after the other: a job beside it that is killed again and again has the time.
@pytest.mark.usefixtures("ten_kills")
def test_a_chain_of_jobs_runs_to_its_scores_and_training_survives_a_requeue(
    submit: Submit, cluster: Cluster, world: World, tmp_path: Path
) -> None:
    emb, head, pred = tmp_path / "emb", tmp_path / "head", tmp_path / "pred"
    cells = world.head_flags[-1]
    embed = submit("embed.sh", world.root / "shards", *FLAGS, "--out", emb, options="--nodes=1")
    train = submit(
        "train_head.sh", emb, "--cells", cells, "--out", head, "--epochs", 300, "--patience", 300,
        options=f"--dependency=afterok:{embed.name}",
    )  # fmt: skip
    predict = submit(
        "predict.sh", "--from-embeddings", emb, "--out", pred, "--head", head / "best.pt",
        options=f"--dependency=afterok:{train.name}",
    )  # fmt: skip
    evaluate = submit(
        "train_head.sh", options=f"--dependency=afterok:{predict.name}",
        wrap=f"$GEOLOC evaluate {pred} --out {tmp_path / 'scores'}",
    )  # fmt: skip
    train.wait_for(lambda: (head / "_checkpoint.pt").exists(), "an epoch")
    cluster.run("scontrol", "requeue", train.name)
    assert [job.end() for job in (embed, train, predict, evaluate)] == [0, 0, 0, 0], train.text() + evaluate.text()
    assert train.restarts() == 1
    scores = json.loads(evaluate.text().splitlines()[-1])
    assert scores["coverage"] == 100
