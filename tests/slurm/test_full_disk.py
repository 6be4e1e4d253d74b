"""An OUT whose disk fills up under all ranks: they say so and end, and with more room the same job completes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import FLAGS, Submit, World, num_done, num_leased, same_results, workers
from small_world import draw_jpeg, tree_bytes, write_tar

from geoloc_batch.cli import main
from geoloc_batch.store.verify import verify

pytestmark = pytest.mark.slurm

NUM_SHARDS, NOTE_BYTES = 16, 400_000
OPTIONS = "--nodes=2 --ntasks-per-node=2"
# Four ranks start in the 8 MB that they want to see free; the results are 26 MB.
SMALL, LARGE = "18m", "64m"


@pytest.fixture
def disk(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A small disk in memory, which the cluster's jobs see too; the test is skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def heavy(tmp_path: Path) -> list[Path]:
    """Shards whose metadata is heavy: their results fill a small disk."""
    shards = []
    for index in range(NUM_SHARDS):
        members = []
        for row in range(4):
            seed = 4 * index + row
            note = random.Random(seed).randbytes(NOTE_BYTES).hex()
            members += [(f"{row}.jpg", draw_jpeg(seed)), (f"{row}.json", json.dumps({"note": note}).encode())]
        shards.append(write_tar(tmp_path / f"{index:06d}.tar", members))
    return shards


def test_a_disk_that_fills_up_ends_every_rank_with_a_word_and_room_lets_the_same_job_complete(
    submit: Submit,
    world: World,
    disk: Path,
    heavy: list[Path],
    gate: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, arguments = disk / "out", [*world.gated(heavy), *FLAGS]
    job = submit("embed.sh", *arguments, "--out", out, options=OPTIONS, GATE=str(gate))
    expected = world.whole("embed", *arguments)
    job.wait_for(lambda: len(workers(out)) == 4, "four ranks at work")
    gate.touch()
    assert job.end() == 1, job.text()
    assert (job.state(), job.restarts()) == ("FAILED", 0)
    said = [line for line in job.text().splitlines() if ": geoloc: error: " in line]
    remedy = f"geoloc: error: --out {out} cannot be written on: No space left on device; free some space there, then"
    assert sorted(line.partition(remedy)[0] for line in said) == ["0: ", "1: ", "2: ", "3: "], job.text()
    assert "Traceback" not in job.text()

    # What was committed is whole, and nobody holds or has given up anything.
    found, kept = verify(out), tree_bytes(out)
    assert 0 < found.missing < found.units == NUM_SHARDS
    assert (found.duplicates, num_leased(out)) == (0, 0)
    assert kept.items() <= tree_bytes(expected).items()
    assert main(["verify", str(out)]) == 1
    problems = capsys.readouterr().err
    assert f"{found.missing} of {NUM_SHARDS} units are not done" in problems
    assert len(found.problems) == 1

    # Whoever starts now is told at once.
    assert main(["embed", *arguments, "--out", str(out)]) == 2
    assert "free some space, or give another --out" in capsys.readouterr().err
    assert (tree_bytes(out), num_done(out)) == (kept, NUM_SHARDS - found.missing)

    subprocess.run(["mount", "-o", f"remount,size={LARGE}", disk], check=True)
    job = submit("embed.sh", *arguments, "--out", out, options=OPTIONS)
    assert job.end() == 0, job.text()
    same_results(out, expected)
    assert main(["verify", str(out)]) == 0
    assert list((out / "_staging").iterdir()) == []
