"""How many CPUs a process may use, from files as Linux shows them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from geoloc_batch.cpus import quota_cpus, usable_cpus


def _proc(folder: Path, groups: str, mounts: list[tuple[str, Path, str, str]]) -> Path:
    """The files cgroup and mountinfo; each mount is (root, mount point, type, options of its file system)."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    lines = [
        f"36 35 0:28 {root} {point} rw,nosuid shared:9 - {kind} {kind} {opts}\n" for root, point, kind, opts in mounts
    ]
    (proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + "".join(lines))
    return proc


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_tightest_quota_of_version_2_counts_wherever_it_stands_above_the_process(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    _write(top / "slurm/job_7/step_0/cpu.max", "max 100000\n")
    _write(top / "slurm/job_7/cpu.max", "250000 100000\n")
    _write(top / "slurm/cpu.max", "1600000 100000\n")
    assert quota_cpus(_proc(tmp_path, "0::/slurm/job_7/step_0\n", [("/", top, "cgroup2", "rw")])) == 2.5


def test_a_containers_quota_stands_at_the_top_of_its_mount(tmp_path: Path) -> None:
    _write(tmp_path / "cgroup/cpu.max", "50000 100000\n")
    for number, (group, root) in enumerate([("/", "/"), ("/docker/abc", "/docker/abc"), ("/../x", "/docker/abc")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        proc = _proc(folder, f"0::{group}\n", [(root, tmp_path / "cgroup", "cgroup2", "rw")])
        assert quota_cpus(proc) == 0.5, group


def test_version_1_gives_quota_over_period_of_the_cpu_controller_alone(tmp_path: Path) -> None:
    _write(tmp_path / "cpu/box/cpu.cfs_quota_us", "600000\n")
    _write(tmp_path / "cpu/box/cpu.cfs_period_us", "200000\n")
    _write(tmp_path / "cpu/cpu.cfs_quota_us", "-1\n")
    _write(tmp_path / "cpu/cpu.cfs_period_us", "200000\n")
    _write(tmp_path / "cpuset/box/cpu.cfs_quota_us", "1\n")
    _write(tmp_path / "cpuset/box/cpu.cfs_period_us", "200000\n")
    mounts = [
        ("/", tmp_path / "cpu", "cgroup", "rw,cpu,cpuacct"),
        ("/", tmp_path / "cpuset", "cgroup", "rw,cpuset"),
    ]
    assert quota_cpus(_proc(tmp_path, "5:cpu,cpuacct:/box\n4:cpuset:/box\n1:name=systemd:/\n", mounts)) == 3.0


@pytest.mark.parametrize("text", ["max 100000\n", "-1 100000\n", "garbage\n", "", "100000\n", "1 0\n"])
def test_no_quota_and_one_that_cannot_be_read_limit_nothing(tmp_path: Path, text: str) -> None:
    _write(tmp_path / "cgroup/cpu.max", text)
    assert quota_cpus(_proc(tmp_path, "0::/\n", [("/", tmp_path / "cgroup", "cgroup2", "rw")])) == math.inf


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert quota_cpus(tmp_path / "absent") == math.inf


def test_a_broken_quota_is_rounded_up_and_never_exceeds_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoloc_batch.cpus.affinity_cpus", lambda: 8)
    for quota, expected in [(2.5, 3), (0.1, 1), (64.0, 8), (math.inf, 8)]:
        monkeypatch.setattr("geoloc_batch.cpus.quota_cpus", lambda quota=quota: quota)
        assert usable_cpus() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_bound_to_one_cpu_may_use_one() -> None:
    script = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    script += "from geoloc_batch.cpus import usable_cpus; print(usable_cpus())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"1\n"
