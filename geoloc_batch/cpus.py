"""How many CPUs this process may use: affinity and the quota of its cgroups, not what the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cpus() -> int:
    """CPUs that this process may keep busy, at least 1.

    Returns:
        The smallest of: the CPUs of the affinity mask, and each CPU quota of the process's cgroups (v1 and v2, its
        own group and those above it), a broken quota rounded up. A SLURM step or a container that was given 4 of
        128 cores gets 4.
    """
    quota = quota_cpus()
    allowed = affinity_cpus()
    return max(1, allowed if math.isinf(quota) else min(allowed, math.ceil(quota)))


def affinity_cpus() -> int:
    """CPUs that the scheduler may put this process on; the machine's number where there is no affinity."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota_cpus(proc_self: Path = Path("/proc/self")) -> float:
    """The tightest CPU quota of this process's cgroups, in CPUs; infinity where there is none.

    Args:
        proc_self: the folder with the files ``cgroup`` and ``mountinfo``.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_*).
    """
    quotas = [_folder_quota(folder) for folder in _cgroup_folders(proc_self)]
    return min(quotas, default=math.inf)


def _cgroup_folders(proc_self: Path) -> Iterator[Path]:
    """The folders of the groups that hold this process, from its own up to each mount's top."""
    groups: dict[str, PurePosixPath] = {}
    for line in _lines(proc_self / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups["cgroup2"] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            groups["cgroup"] = PurePosixPath(path)
    for line in _lines(proc_self / "mountinfo"):
        fields, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ", 2)
        if kind not in groups or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        root, mount = (text.replace("\\040", " ") for text in fields.split(" ")[3:5])
        # In a container the group's path is told as the host sees it, and only the part below `root` is mounted.
        group = groups[kind]
        inner = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
        for part in (inner, *inner.parents):
            yield Path(mount) / part


def _folder_quota(folder: Path) -> float:
    """CPUs that one group allows: cpu.max of v2, or cpu.cfs_quota_us over cpu.cfs_period_us of v1."""
    limit = " ".join(_lines(folder / "cpu.max")).split()
    if not limit:
        limit = " ".join([*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]).split()
    try:
        quota, period = (float(number) for number in limit)
    except ValueError:
        # "max 100000", an absent file, or a form that this program does not know: no limit is known.
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
