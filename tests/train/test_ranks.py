"""Several ranks train one head: as one process would, to the same bits each time, whatever becomes of a rank."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_world import tree_bytes
from train_samples import World, flags_of, make_world

from geoloc_batch.cli import main
from geoloc_batch.locate.head_file import read_head

PROGRAM = Path(__file__).resolve().parents[1] / "train_ranks.py"
# Sums in another order, over all steps of a training. The largest difference seen was 7.2e-7 of a weight, and 1.5e-6 of
# a figure.
TOLERANCE = 5e-6
IN_TIME_S = 30
# Odd on purpose: batches of 7 and 6, of which ranks have 3 or 4.
FLAGS = ("--group-by", "spot", "--epochs", 12, "--patience", 12, "--batch-size", 7)


@dataclass(frozen=True)
class Ended:
    """How a training ended."""

    codes: list[int]
    seconds: float


def train_all(*trainings: dict[str, Any]) -> list[Ended]:
    """Run trainings one after the other; see train_ranks.py."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(trainings)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    sys.stderr.write(done.stderr)
    return [Ended(codes, seconds) for codes, seconds in json.loads(done.stdout)]


def assert_alike(ours: Path, theirs: Path) -> None:
    """Two heads and their histories differ by no more than rounding."""
    heads = [read_head(out / "best.pt") for out in (ours, theirs)]
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        torch.testing.assert_close(*(getattr(head, name) for head in heads), atol=TOLERANCE, rtol=0, msg=name)
    figures = []
    for out in (ours, theirs):
        with (out / "metrics.csv").open() as file:
            rows = [[float(value) for name, value in row.items() if name != "seconds"] for row in csv.DictReader(file)]
        figures.append(np.array(rows))
    np.testing.assert_allclose(*figures, rtol=1e-5, atol=1e-5)


def assert_same_bits(ours: Path, theirs: Path) -> None:
    first, second = tree_bytes(ours), tree_bytes(theirs)
    assert first.keys() == second.keys()
    # The seconds differ.
    for name in first.keys() - {"metrics.csv", "head.json"}:
        assert first[name] == second[name], name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_places=60)


def test_two_ranks_train_the_head_of_one_process_and_one_that_is_killed_or_stopped_costs_no_bit(
    world: World, tmp_path: Path
) -> None:
    def of(name: str, **more: Any) -> dict[str, Any]:
        return {"size": 2, "arguments": flags_of(world, tmp_path / name, *FLAGS), **more}

    whole, stopped, killed, ended = train_all(
        of("whole"), of("cut", signals={0: signal.SIGTERM}), of("cut", signals={1: signal.SIGKILL}), of("cut")
    )
    assert whole.codes == ended.codes == [0, 0]
    # A signal to one rank stops all of them; a rank that is lost ends the other.
    assert stopped.codes == [75, 75]
    assert killed.codes == [75, -signal.SIGKILL]
    assert max(stopped.seconds, killed.seconds) < IN_TIME_S
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    assert main(flags_of(world, tmp_path / "alone", *FLAGS)) == 0
    assert_alike(tmp_path / "whole", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "num_places", "more"),
    [
        (3, 60, ("--fusion", "logit", "--view-dropout", 0.3, "--loss", "smooth")),
        (3, 60, ("--view-dropout", 0.3, "--loss", "ce+haversine")),
        # Two places in val, batches of 2 and 1: some ranks have none of either.
        (4, 24, ("--fusion", "logit", "--loss", "weighted-ce", "--batch-size", 2)),
        (4, 24, ("--batch-size", 1, "--loss", "weighted-ce+haversine")),
    ],
)
def test_any_number_of_ranks_trains_the_same_head_to_the_same_bits_again(
    tmp_path: Path, size: int, num_places: int, more: tuple[object, ...]
) -> None:
    world = make_world(tmp_path, num_places=num_places)
    arguments = {name: flags_of(world, tmp_path / name, *FLAGS, *more) for name in ("alone", "once", "again")}
    ended = train_all(*({"size": size, "arguments": arguments[name]} for name in ("once", "again")))
    assert [each.codes for each in ended] == [[0] * size] * 2
    assert_same_bits(tmp_path / "once", tmp_path / "again")
    assert main(arguments["alone"]) == 0
    assert_alike(tmp_path / "once", tmp_path / "alone")


@pytest.mark.slow
def test_ranks_are_killed_again_and_again_and_their_number_may_change(world: World, tmp_path: Path) -> None:
    def of(name: str, size: int, **signals: int) -> dict[str, Any]:
        flags = flags_of(world, tmp_path / name, *FLAGS, "--epochs", 60, "--patience", 60)
        return {"size": size, "arguments": flags, "signals": {rank[1:]: number for rank, number in signals.items()}}

    kill, user = signal.SIGKILL, signal.SIGUSR2
    cut = [of("cut", 3, r0=kill), of("cut", 3, r2=kill), of("cut", 3, r1=user), of("cut", 3, r0=user, r1=user, r2=user)]
    ended = train_all(of("whole", 3), *cut, of("cut", 3))
    assert [each.codes for each in ended[1:5]] == [[-kill, 75, 75], [75, 75, -kill], [75, 75, 75], [75, 75, 75]]
    assert ended[0].codes == ended[5].codes == [0, 0, 0]
    assert max(each.seconds for each in ended[1:5]) < IN_TIME_S
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    # As many as there are now; beyond rounding nothing depends on it.
    changed = train_all(of("changed", 2, r0=user), of("changed", 1, r0=user), of("changed", 3))
    assert [each.codes for each in changed] == [[75, 75], [75], [0, 0, 0]]
    assert_alike(tmp_path / "whole", tmp_path / "changed")


@pytest.mark.slow
def test_what_the_first_rank_refuses_all_refuse_and_an_error_of_another_ends_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    once = flags_of(world, out, *FLAGS, "--epochs", 1)
    other, new = [*once, "--seed", "3"], flags_of(world, tmp_path / "new", *FLAGS)
    sweep = flags_of(world, tmp_path / "sweep", *FLAGS, "--sweep", "--seed", 1)
    ended = train_all(
        {"size": 2, "arguments": once},
        {"size": 2, "arguments": other},
        {"size": 3, "arguments": new, "others": [*new, "--seed", "3"]},
        {"size": 2, "arguments": [*sweep, "--seed", "2"], "others": sweep},
        # A process may train again, also after it was refused.
        {"size": 2, "arguments": new, "before": other},
    )
    assert [each.codes for each in ended] == [[0, 0], [2, 2], [2, 2, 2], [2, 2], [0, 0]]
    assert max(each.seconds for each in ended) < IN_TIME_S
    told = capsys.readouterr().err
    # What all are refused for, none says of another.
    assert "another rank" not in told.partition("3 ranks on 1 machine")[0]
    assert "3 ranks on 1 machine" in told
    for words in (
        "seed is pinned to 0, now 3. Give the same flags",
        "rank 1 was given, or sees, something else than the first rank: seed: the first rank has 0, this one 3. Give",
        "rank 2 was given, or sees, something else than the first rank: seed",
        "the first rank trains 2 heads with --sweep, this one 1 head with --sweep",
    ):
        assert words in told
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_the_first_rank_alone_reads_what_is_pinned(world: World, tmp_path: Path) -> None:
    first, second = ([*flags_of(world, tmp_path / name, *FLAGS), "--precision", "auto"] for name in ("first", "second"))
    (tmp_path / "second").mkdir()
    # What a node sees that OUT's disk is not mounted on: here a file that no rank could read.
    (tmp_path / "second" / "train.json").write_text("nothing of ours")
    assert main([*first, "--epochs", "1", "--precision", "bf16"]) == 0
    (tmp_path / "first" / "head.json").unlink()
    ended = train_all({"size": 2, "arguments": [*first, "--epochs", "1"], "others": [*second, "--epochs", "1"]})
    assert [each.codes for each in ended] == [[0, 0]]
    # Pinned before, whatever auto stands for here.
    assert json.loads((tmp_path / "first" / "head.json").read_text())["train"]["precision"] == "bf16"
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["train.json"]
