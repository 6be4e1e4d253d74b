"""A training that is killed goes on where it was, to the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_world import tree_bytes
from train_samples import flags_of, make_world

from geoloc_batch.cli import main

LOOP = Path(__file__).resolve().parents[1] / "train_kill_loop.py"


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--loss", "weighted-ce+haversine"), ("--fusion", "logit", "--view-dropout", "0.3")])
def test_a_training_killed_at_random_moments_ends_with_the_same_head_bit_for_bit(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    world = make_world(tmp_path, num_places=60)
    flags = ("--group-by", "spot", "--epochs", 40, "--patience", 40, *more)
    assert main(flags_of(world, tmp_path / "whole", *flags)) == 0
    command = [sys.executable, str(LOOP), "5", *flags_of(world, tmp_path / "cut", *flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked, *codes = (int(word) for word in done.stdout.split())
    assert asked == 75
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-signal.SIGKILL}
    whole, cut = (tree_bytes(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    # The seconds differ.
    for name in whole.keys() - {"metrics.csv", "head.json"}:
        assert whole[name] == cut[name], name
