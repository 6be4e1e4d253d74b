"""Which head comes out: runaways, the position that chooses, a warm start that training only makes worse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from train_samples import World, flags_of, make_world

from geoloc_batch.cli import main
from geoloc_batch.locate.head_file import read_head

FLAGS = ("--group-by", "spot", "--loss", "weighted-ce", "--epochs", 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_places=90)


@pytest.fixture(scope="module")
def head(world: World) -> Path:
    out = world.emb.parent / "head"
    assert main(flags_of(world, out, *FLAGS, "--select-position", "top1")) == 0
    return out


# Finite weights may have logits that are none.
@pytest.mark.parametrize(
    ("lr", "what"), [("1e38", "holds weights that are no numbers"), ("3e37", "answers to 9 of 9 places are no numbers")]
)
def test_a_head_that_runs_away_in_the_last_step_of_an_epoch_says_so(
    world: World, tmp_path: Path, lr: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ("--lr", lr, "--weight-decay", 0, "--batch-size", 1000, "--epochs", 1)
    assert main(flags_of(world, tmp_path / "out", *FLAGS, *rates)) == 1
    message = capsys.readouterr().err
    for words in (what, "run away", "--lr", "another --out"):
        assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "out" / "best.pt").exists()


@pytest.mark.parametrize("position", ["top1", "mean"])
def test_the_position_that_chose_the_epoch_is_the_heads(
    world: World, head: Path, tmp_path: Path, position: str
) -> None:
    out = head
    if position != "top1":
        out = tmp_path / "out"
        assert main(flags_of(world, out, *FLAGS, "--select-position", position)) == 0
    assert json.loads((out / "head.json").read_text())["position"] == position
    assert torch.load(out / "best.pt", weights_only=True)["head"]["position"] == position


def test_a_warm_start_that_only_becomes_worse_is_given_back(
    world: World, head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ruin = ("--warm-start", head / "best.pt", "--lr", 1000, "--select-position", "top1")
    assert main(flags_of(world, out, *FLAGS, *ruin)) == 0
    assert "the head to start from is the best on val" in capsys.readouterr().out
    first, found = read_head(head / "best.pt"), read_head(out / "best.pt")
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        assert torch.equal(getattr(first, name), getattr(found, name))
    values, before = (json.loads((folder / "head.json").read_text()) for folder in (out, head))
    assert values["metrics"] == before["metrics"]
    assert (values["train"]["best_epoch"], values["train"]["epochs_done"]) == (0, 3)
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    assert (rows[0]["lr"], rows[0]["train_loss"]) == ("", "")
    assert float(rows[0]["val_top1_median_km"]) == values["metrics"]["val"]["top1"]["median_km"]
    assert float(rows[1]["val_top1_median_km"]) > float(rows[0]["val_top1_median_km"])
