"""What a simulated run has left, held against what it was to make: nothing lost, nothing doubled, nothing mixed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from cluster_disk import Disk
from cluster_ranks import EMBED, OUT

MAX_SHOWN = 20


def faults(disk: Disk, num_units: int, photos: int, dead: Collection[str]) -> list[str]:
    """What is wrong, the first of it in words.

    Args:
        disk: after the run.
        num_units: that were planned.
        photos: in each.
        dead: how the tokens of processes begin that were killed: their staging may remain.
    """
    found: list[str] = []
    for fault in _faults(disk, num_units, photos, dead):
        found.append(fault)
        if len(found) == MAX_SHOWN:
            found.append("and so on")
            break
    return found


def _faults(disk: Disk, num_units: int, photos: int, dead: Collection[str]) -> Iterator[str]:
    sizes = {table.path: table.bytes_per_photo * photos for table in EMBED}
    for unit in range(num_units):
        yield from _faults_of_unit(disk, unit, sizes)
    num_markers = sum(len(folder.names) for path, folder in disk.folders.items() if path.startswith(f"{OUT}/_done/"))
    if num_markers != num_units:
        yield f"{num_markers} markers for {num_units} units"
    for table in EMBED:
        folder = disk.folders.get(f"{OUT}/{table.path.partition('/')[0]}")
        num_files = len(folder.names) if folder is not None else 0
        if num_files != num_units:
            yield f"{num_files} files of {num_units} like {table.path}"
    for name in disk.names(f"{OUT}/_staging"):
        # A token begins with the number of its process.
        if name.partition(".")[2][:8] not in dead:
            yield f"_staging/{name} is left, and its process was not killed"
    for name in disk.names(f"{OUT}/_leases"):
        if not name.startswith("clock."):
            yield f"_leases/{name} is left"


def _faults_of_unit(disk: Disk, unit: int, sizes: dict[str, int]) -> Iterator[str]:
    path = f"{OUT}/_done/{unit // 1000:03d}/{unit:06d}.json"
    try:
        marker = json.loads(disk.read(path).data)
    except OSError:
        yield f"unit {unit} has no marker"
        return
    if marker["quarantined"]:
        yield f"unit {unit} is in quarantine"
        return
    listed = {file["path"]: file["size"] for file in marker["files"]}
    if listed != {path.format(unit): size for path, size in sizes.items()}:
        yield f"the marker of unit {unit} names {listed}"
    for relative, size in listed.items():
        try:
            file = disk.read(f"{OUT}/{relative}")
        except OSError:
            yield f"{relative} has a marker and is not there"
            continue
        if file.size != size or file.data.decode() != f"{marker['token']} {relative}":
            whose = file.data.decode()[:16]
            yield f"{relative} has {file.size} bytes of execution {whose}, its marker says {size} of {marker['token']}"
