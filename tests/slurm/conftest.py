"""One cluster a session, a small world on it, and how jobs are submitted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster, why_absent
from slurm.jobs import REPO, SCRIPTS, Job, Submit, World
from small_world import draw_jpeg, make_head, write_tar

DEMO_DIM = 192


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_absent()
    if reason:
        pytest.skip(reason)
    with Cluster() as running:
        yield running


@pytest.fixture(scope="session")
def submit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Submit:
    """Submit a script of slurm/: its name, its arguments, sbatch's options, more environment."""
    logs = tmp_path_factory.mktemp("logs")
    paths = f"{REPO}:{REPO / 'kernels'}"
    usual = {"GEOLOC": f"{sys.executable} -m geoloc_batch", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}

    def run(script: str, *arguments: object, options: str = "--nodes=2", wrap: str = "", **environment: str) -> Job:
        options = f"--parsable --time=5 --output={logs}/%A.%a.log {options}"
        words = [f"--wrap={wrap}"] if wrap else [SCRIPTS / script, *arguments]
        name = cluster.run("sbatch", *options.split(), *words, **{**usual, **environment}).strip()
        return Job(cluster, name, logs)

    return run


@pytest.fixture(autouse=True)
def empty_queue(cluster: Cluster) -> Iterator[None]:
    """What a failed test left in the queue must not stand in the way of the next one."""
    yield
    if cluster.run("squeue", "--noheader"):
        cluster.run("scancel", "--user=root")
        cluster.wait(lambda: not cluster.run("squeue", "--noheader"), 30, "an empty queue")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    (root / "shards").mkdir()
    shards = []
    for index in range(40):
        members: list[tuple[str, bytes]] = []
        for row in range(1 + index % 7):
            lat, lon = 38 + (7 * index + row) % 28, (11 * index + 3 * row) % 30
            members.append((f"{index:02d}/{row}.jpg", draw_jpeg(100 * index + row)))
            members.append((f"{index:02d}/{row}.json", f'{{"lat": {lat}, "lon": {lon}}}'.encode()))
        shards.append(write_tar(root / "shards" / f"{index:06d}.tar", members))
    head, cells = make_head(root / "head", dim=DEMO_DIM)
    return World(root, shards, ["--head", str(head), "--cells", str(cells)])
