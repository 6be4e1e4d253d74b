"""`accelerate launch` and torchrun on a machine without GPUs: what the documentation says of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_world import draw_jpeg, tree_bytes, write_tar
from train_samples import flags_of, make_world

from geoloc_batch.cli import main

pytestmark = pytest.mark.slow

ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ONE_ONLY = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")


def launched(launcher: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run geoloc by a launcher."""
    # No GPU, also where there is one; threads as the launcher has them.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", *launcher, "-m", "geoloc_batch", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN])
def test_two_processes_embed_what_one_does(launcher: tuple[str, ...], tmp_path: Path) -> None:
    shards = []
    for index in range(5):
        photos = [(f"{index}/{row}.jpg", draw_jpeg(10 * index + row)) for row in range(3)]
        shards.append(write_tar(tmp_path / f"{index}.tar", photos))
    arguments = ["embed", *shards, "--encoder", "demo", "--batch-size", 4]
    done = launched(launcher, *arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    # Each tells of its own.
    assert done.stdout.count('"units"') == 2
    assert main([str(each) for each in [*arguments, "--out", tmp_path / "one"]]) == 0
    one, two = (tree_bytes(tmp_path / name) for name in ("one", "two"))
    assert len(one) >= 10
    assert one == two


@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN])
def test_two_processes_train_one_head(launcher: tuple[str, ...], tmp_path: Path) -> None:
    world = make_world(tmp_path, num_places=40)
    done = launched(launcher, *flags_of(world, tmp_path / "out", "--group-by", "spot", "--epochs", 2))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 ranks on 1 machine train together") == 1
    assert done.stderr.count("epoch 2/2") == 1
    assert done.stdout.count('"heads"') == 1
    assert (tmp_path / "out" / "best.pt").exists()


def test_accelerate_starts_one_process_where_it_is_told_to_use_cpus(tmp_path: Path) -> None:
    world = make_world(tmp_path, num_places=40)
    done = launched(ONE_ONLY, *flags_of(world, tmp_path / "out", "--group-by", "spot", "--epochs", 1))
    assert done.returncode == 0, done.stderr
    assert "ranks" not in done.stderr
    assert done.stdout.count('"heads"') == 1
