"""One cluster a session, a small world on it, and how jobs are submitted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from slurm.cluster import Cluster, why_absent
from slurm.jobs import BESIDE, FLAGS, REPO, SCRIPTS, Begin, Halves, Job, Submit, TenKills, World
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
    logs, plain = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("plain")
    # As users have it: a test's dependency that open_clip would load for nothing, a second of every start.
    (plain / "transformers.py").write_text("raise ImportError('not here')\n")
    paths = f"{plain}:{REPO}:{REPO / 'kernels'}"
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
    if left := of_tests(cluster):
        cluster.run("scancel", *left)
        cluster.wait(lambda: not of_tests(cluster), 30, "an empty queue")


def of_tests(cluster: Cluster) -> list[str]:
    """Jobs in the queue, but those that go on beside the tests."""
    lines = [line.split() for line in cluster.run("squeue", "--noheader", "--format=%A %j").splitlines()]
    return [job for job, name in lines if name != BESIDE]


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


@pytest.fixture(scope="session")
def ten_kills(submit: Submit, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenKills]:
    """Begins with the first test that asks for it."""
    is_over = Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield TenKills.begin(submit, world, tmp_path_factory.mktemp("killed") / "out", pool, is_over)
        is_over.set()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that is not there yet; who waits for it goes on when the test is over."""
    path = tmp_path / "gate"
    yield path
    path.touch()


@pytest.fixture
def begin(submit: Submit, world: World, gate: Path, tmp_path: Path) -> Begin:
    """Submit embed.sh over shards the second half of which waits for the gate."""

    def run(options: str, **environment: str) -> Halves:
        out = tmp_path / "out"
        arguments = [*Halves.shards(world), *FLAGS, "--out", out]
        job = submit("embed.sh", *arguments, options=options, GATE=str(gate), **environment)
        return Halves(job, world, out, gate)

    return run
