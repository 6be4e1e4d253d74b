"""Ranks in containers, as GEOLOC starts them: same results, signals that arrive, and nobody taken for another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.jobs import REPO, Begin, num_executed, num_leased, workers

pytestmark = pytest.mark.slurm

# These launchers stand between SLURM and the process inside, and would end by a signal that is for it alone.
DEAF = "env --ignore-signal=USR2,TERM"


def bubblewrap(_: Path) -> str:
    """A namespace of processes of its own: there every rank is number 2."""
    return f"{DEAF} bwrap --dev-bind / / --proc /proc --unshare-pid --die-with-parent"


def unshare(_: Path) -> str:
    """Likewise, and every rank is number 1, to which a signal that it does not handle is none."""
    return f"{DEAF} unshare --pid --fork --mount-proc --kill-child"


def charliecloud(image: Path) -> str:
    """An image that is a folder, with what this machine has bound into it. Nothing stands in between."""
    for name in ("dev", "etc", "home", "proc", "root", "sys", "tmp", "usr", "var"):
        (image / name).mkdir(parents=True)
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (image / "etc" / name).touch()
    bound = {Path(path).parts[1] for path in (sys.prefix, sys.base_prefix, REPO, image)} | {"usr"}
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path("/", name).is_symlink():
            (image / name).symlink_to(Path("/", name).readlink())
        elif Path("/", name).exists():
            bound.add(name)
    for name in bound:
        (image / name).mkdir(exist_ok=True)
    return " ".join(["ch-run", *(f"--bind=/{name}:/{name}" for name in sorted(bound)), str(image), "--"])


LAUNCHERS = {"bwrap": bubblewrap, "unshare": unshare, "ch-run": charliecloud}


def test_ranks_in_containers_end_in_order_come_back_and_write_the_same_bytes(
    begin: Begin, cluster: Cluster, tmp_path: Path
) -> None:
    inside, absent = {}, []
    for name, launcher in LAUNCHERS.items():
        words = launcher(tmp_path / "image")
        tried = subprocess.run(f"USER=root {words} true", shell=True, capture_output=True, text=True)
        if tried.returncode == 0:
            inside[name] = words
        else:
            absent.append(f"{name} cannot start a container here: {tried.stderr.strip()}")
    if not inside:
        pytest.skip("; ".join(absent))
    # One rank in each kind.
    script = tmp_path / "launch"
    cases = [f'{rank}) exec {words} "$@" ;;' for rank, words in enumerate(inside.values())]
    script.write_text("\n".join(["#!/bin/bash", "case $SLURM_PROCID in", *cases, "esac"]))
    script.chmod(0o755)
    run = begin(f"--nodes=1 --ntasks={len(inside)}", GEOLOC=f"{script} {sys.executable} -m geoloc_batch", USER="root")
    run.until_held_by(len(inside))
    run.until_some()
    names = workers(run.out)
    cluster.run("scancel", "--batch", "--signal=USR2", run.job.name)
    run.job.wait_for(lambda: "restart 0: requeued" in run.job.text(), "the signal")
    # By their own word, not their launcher's: 140 were the signal's.
    assert "restart 0: exit code 75\n" in run.job.text()
    assert num_leased(run.out) == 0
    run.ends_whole()
    assert run.job.restarts() == 1
    # Nobody was called dead who lived, and none has another's name and log.
    assert num_executed(run.out) == 12
    assert len({name.rpartition("-r")[0] for name in names}) == len(inside)
    if absent:
        pytest.skip(
            f"passed in {', '.join(inside)}; {'; '.join(absent)} (apt-get install bubblewrap charliecloud-runtime)"
        )
