"""Commits: from a staging folder to files under their final names, with exactly one winner a unit.

1. The staged files are brought to the disk, measured and hashed.
2. The marker is written in the staging folder, then published by publish.py. Here the race is decided.
3. The files move to their names. Whoever finds this step cut off does the rest: the marker tells all.
4. The staging folder goes.

A staging folder is removed by its owner, or by anybody once its unit has a marker (then the owner can only lose), or
once its owner is certainly gone. A lease that is merely stale does not suffice: its owner may wake up between two
steps of its commit and publish a marker for files that were just swept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.lease import SECOND_NS, Lease, Leases
from geoloc_batch.store.marker import FileRecord, Marker, marker_path, read_marker, staged_name
from geoloc_batch.store.publish import discard, publish, remove_file, remove_tree, stage_candidate

MOVE_TRIES = 4
MOVE_WAIT_S = 0.25


class Commits:
    """Publishing, rolling forward and sweeping in one OUT."""

    def __init__(self, files: FilePort, out: Path, *, has_links: bool) -> None:
        self.files = files
        self.out = out
        self.has_links = has_links
        self._known_folders: set[Path] = set()

    def staging(self, unit: int, token: str) -> Path:
        """Folder of an execution."""
        return self.out / "_staging" / f"{unit:06d}.{token}"

    def measure(self, staging: Path, outputs: Sequence[str]) -> tuple[FileRecord, ...]:
        """Bring the staged files to the disk; their sizes and checksums."""
        records = []
        for relative in outputs:
            path = staging / staged_name(relative)
            self.files.sync(path)
            records.append(FileRecord(relative, *self.files.digest(path)))
        if records:
            self.files.sync_folder(staging)
            # Its own name too: else a power cut could leave a marker whose files have gone with their folder.
            self.files.sync_folder(staging.parent)
        return tuple(records)

    def publish_marker(self, marker: Marker) -> bool:
        """Publish a marker; False where the unit has another.

        Raises:
            FileNotFoundError: the staging folder was taken away before anybody won.
        """
        target = marker_path(self.out, marker.unit)
        data = marker.to_bytes()
        candidate = stage_candidate(self.files, self.out / marker.staging, target.name, data)
        self._ensure_folder(target.parent)
        return publish(self.files, candidate, target, data, has_links=self.has_links)

    def move_in(self, marker: Marker) -> None:
        """Move a committed unit's files to their names, from wherever that was cut off; then drop its staging.

        Raises:
            OutputError: a file is in neither place, or stands there with another size.
        """
        folders = sorted({(self.out / file.path).parent for file in marker.files})
        for folder in folders:
            self._ensure_folder(folder)
        for file in marker.files:
            self._move(self.out / marker.staging / staged_name(file.path), self.out / file.path, file.size)
        for folder in folders:
            self.files.sync_folder(folder)
        remove_tree(self.files, self.out / marker.staging)

    def _move(self, source: Path, target: Path, size: int) -> None:
        for left in reversed(range(MOVE_TRIES)):
            try:
                self.files.rename(source, target)
                return
            except FileNotFoundError:
                # Another rank was faster; over a network its doing may show a little later.
                found = self.files.stat(target)
                if found is not None and found.size == size:
                    return
                self.files.make_folder(target.parent)
            if left:
                self.files.sleep(MOVE_WAIT_S)
        unit = source.parent.name.partition(".")[0]
        raise OutputError(
            f"{target} was committed with {size} bytes, and neither it nor {source} is there; remove "
            f"{marker_path(self.out, int(unit))} and run the same command again"
        )

    def _ensure_folder(self, folder: Path) -> None:
        """Make a folder durably, once per process."""
        if folder in self._known_folders:
            return
        missing = [folder, *folder.parents][: len(folder.relative_to(self.out).parts)]
        self.files.make_folder(folder)
        for made in missing:
            self.files.sync_folder(made.parent)
        self._known_folders.add(folder)

    def sweep(self, leases: Leases) -> None:
        """Roll cut-off commits forward; remove what can serve nobody any more: staging folders and leases."""
        now_ns = leases.server_now_ns()
        # Folders before leases before markers: an execution makes its lease first and its marker last, so what is
        # seen here is never newer than what is decided on.
        names = self.files.names(self.out / "_staging")
        found = leases.all()
        for name in names:
            unit, _, token = name.partition(".")
            folder = self.out / "_staging" / name
            if unit.isdecimal():
                lease = next((lease for lease in found.get(int(unit), []) if lease.token == token), None)
                self._sweep_staging(folder, int(unit), lease, leases, now_ns)
            else:
                self._sweep_scratch(folder, leases, now_ns)
        for number, of_unit in found.items():
            # A dead lease counts towards quarantine until its unit is committed.
            if self.files.stat(marker_path(self.out, number)) is not None:
                for lease in of_unit:
                    if not leases.is_live(lease, now_ns):
                        remove_file(self.files, lease.path)
        leases.sweep_clocks(now_ns)

    def _sweep_staging(self, folder: Path, unit: int, lease: Lease | None, leases: Leases, now_ns: int) -> None:
        # Asked before the marker is read: who is gone now publishes nothing later.
        is_gone = lease is not None and leases.is_gone(lease)
        is_live = lease is not None and leases.is_live(lease, now_ns)
        marker = read_marker(self.out, unit, self.files.read)
        if marker is not None and self.out / marker.staging == folder:
            # Its owner may not have come to that yet, and files must not outlive their marker.
            self.files.sync_folder(marker_path(self.out, unit).parent)
            self.move_in(marker)
        elif (marker is not None and not is_live) or is_gone:
            discard(self.files, folder)

    def _sweep_scratch(self, folder: Path, leases: Leases, now_ns: int) -> None:
        """What a start leaves that was killed between two steps. Whoever loses it here makes it again."""
        found = self.files.stat(folder)
        if found is not None and now_ns - found.mtime_ns > leases.stale_s * SECOND_NS:
            discard(self.files, folder)
