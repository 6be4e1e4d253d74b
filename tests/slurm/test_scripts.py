"""The scripts alone, with a stand-in for geoloc: who starts what where, which exit code, and who is requeued."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import Submit

pytestmark = pytest.mark.slurm

STAND_IN = """
import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
rank = os.environ["SLURM_PROCID"]
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
(out / "_logs").mkdir(parents=True, exist_ok=True)
(out / "_done").mkdir(exist_ok=True)
def stop(*_):
    raise SystemExit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR2, stop)
names = ("SLURM_PROCID", "SLURMD_NODENAME", "SLURM_LOCALID", "OMP_NUM_THREADS", "PYTHONSAFEPATH")
print("rank", *(os.environ.get(name) for name in names), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """GEOLOC for jobs whose ranks do what --do says."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN + "exec(sys.argv[sys.argv.index('--do') + 1])\n")
    return shlex.join([sys.executable, str(script)])


def test_gpus_alone_give_a_rank_for_each_and_tasks_what_was_asked_for(
    submit: Submit, stand_in: str, tmp_path: Path
) -> None:
    arguments = ["SHARDS", "--out", tmp_path / "out", "--do", "pass"]
    gpus = submit("embed.sh", *arguments, options="--nodes=2 --gpus-per-node=2", GEOLOC=stand_in)
    assert gpus.end() == 0, gpus.text()
    lines = sorted(line.split(" ", 1)[1] for line in gpus.text().splitlines() if line[1:7] == ": rank")
    assert lines == [f"rank {rank} n{1 + rank // 2} {rank % 2} 1 1" for rank in range(4)]
    tasks = submit("embed.sh", *arguments, options="--ntasks=3 --nodes=1 --cpus-per-task=2", GEOLOC=stand_in)
    assert tasks.end() == 0, tasks.text()
    lines = sorted(line.split(" ", 1)[1] for line in tasks.text().splitlines() if line[1:7] == ": rank")
    assert [line.split()[1:2] + line.split()[3:] for line in lines] == [[str(n), str(n), "2", "1"] for n in range(3)]


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        ("sys.exit(0 if rank == '1' else os.kill(os.getpid(), signal.SIGKILL))", 0),
        ("sys.exit(3 if rank == '1' else 1)", 3),
        ("sys.exit(75 if rank == '1' else os.kill(os.getpid(), signal.SIGKILL))", 75),
        ("sys.exit(2)", 2),
        ("sys.exit(1)", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_the_job_ends_as_the_work_did(do: str, expected: int, submit: Submit, stand_in: str, tmp_path: Path) -> None:
    job = submit("embed.sh", "SHARDS", "--out", tmp_path / "out", "--do", do, GEOLOC=stand_in)
    assert job.end() == expected, job.text()
    assert job.restarts() == 0
    assert list((tmp_path / "out" / "_logs").iterdir()) == []


def test_75_is_requeued_as_long_as_something_is_committed_and_no_longer(
    submit: Submit, stand_in: str, tmp_path: Path
) -> None:
    do = "int(restart) < 2 and (out / '_done' / f'{restart}.json').touch(); sys.exit(75)"
    job = submit("embed.sh", "SHARDS", "--out", tmp_path / "out", "--do", do, GEOLOC=stand_in, options="--nodes=1")
    job.wait_for(lambda: "restart 2: not requeued: nothing was committed" in job.text(), "the last start")
    assert job.end() == 75
    assert job.restarts() == 2


def test_a_job_that_must_make_room_stops_in_order_and_comes_back(
    submit: Submit, cluster: Cluster, stand_in: str, tmp_path: Path
) -> None:
    do = "(out / '_done' / f'{restart}.json').touch(); restart == '0' and time.sleep(60)"
    arguments = ["SHARDS", "--out", tmp_path / "out", "--do", do]
    job = submit("embed.sh", *arguments, GEOLOC=stand_in, options="--nodes=2 --exclusive")
    job.wait_for(lambda: (tmp_path / "out" / "_done" / "0.json").exists(), "at work")
    other = ["SHARDS", "--out", tmp_path / "other", "--do", "time.sleep(1)"]
    urgent = submit("embed.sh", *other, GEOLOC=stand_in, options="--nodes=2 --exclusive --partition=urgent")
    assert urgent.end() == 0, urgent.text()
    assert job.end() == 0, job.text()
    assert job.restarts() == 1
    assert "restart 1: exit code 0" in job.text()


def test_ranks_that_are_not_through_in_time_are_ended_and_the_job_comes_back(
    submit: Submit, cluster: Cluster, stand_in: str, tmp_path: Path
) -> None:
    # Once heard, the signal is not obeyed; the second one is not asked.
    stubborn = "signal.signal(signal.SIGUSR2, lambda *_: signal.signal(signal.SIGUSR2, signal.SIG_DFL)); "
    do = stubborn + "(out / '_done' / f'{restart}.json').touch(); [time.sleep(1) for _ in range(60) if restart == '0']"
    arguments = ["SHARDS", "--out", tmp_path / "out", "--do", do]
    job = submit("embed.sh", *arguments, GEOLOC=stand_in, GEOLOC_GRACE_S="2")
    job.wait_for(lambda: (tmp_path / "out" / "_done" / "0.json").exists() and "1: rank" in job.text(), "at work")
    asked = time.monotonic()
    cluster.run("scancel", "--batch", "--signal=USR2", job.name)
    job.wait_for(lambda: "restart 0: requeued" in job.text(), "the end of the grace time")
    assert 2 <= time.monotonic() - asked < 30
    assert "exit code 75, though ranks ended with up to 140" in job.text()
    assert job.end() == 0, job.text()
    assert job.restarts() == 1


def test_an_out_that_is_not_named_is_misuse(submit: Submit, stand_in: str) -> None:
    job = submit("train_head.sh", "EMBEDDINGS", GEOLOC=stand_in, options="")
    assert job.end() == 2
    assert "--out must be among the arguments" in job.text()


def test_what_is_copied_to_nodes_is_what_ranks_are_given(submit: Submit, stand_in: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "a checkpoint".replace(" ", "_")
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("1.5")
    do = "p = pathlib.Path(sys.argv[sys.argv.index('--encoder') + 1]); print(p, (p / 'weights').read_text())"
    for _ in range(2):
        job = submit(
            "predict.sh", "SHARDS", "--out", tmp_path / "out", "--encoder", checkpoint, "--do", do,
            GEOLOC=stand_in, GEOLOC_LOCAL=str(tmp_path / "disk"), GEOLOC_COPY=str(checkpoint),
        )  # fmt: skip
        assert job.end() == 0, job.text()
        copies = list((tmp_path / "disk").iterdir())
        assert len(copies) == 1
        assert job.text().count(f"{copies[0]}/{checkpoint.name} 1.5") == 2
