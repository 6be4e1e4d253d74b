"""Commits: from a staging folder to files under their final names, with exactly one winner a unit.

1. The staged files are brought to the disk, measured and hashed.
2. The marker is written in the staging folder, then published by publish.py. Here the race is decided.
3. The files move to their names. Whoever finds this step cut off does the rest: the marker tells all. Files of the
   result before that a retry does not have move the other way, into the staging folder.
4. The staging folder goes.

Of what stands nothing is touched before step 2, and all of an earlier goal's steps are done before a later one is
published ("settled"). So who stood still in the midst of step 3 finds no staging folder any more to move anything out
of or into. After a power cut the folder may be back: what is superseded is never rolled forward, only removed.
Nothing moves before its marker is on the disk: else the cut could leave files of a result that nobody has committed.

A staging folder is removed by its owner, or by anybody once its unit has a marker (then the owner can only lose), or
once its owner is certainly gone. A lease that is merely stale does not suffice: its owner may wake up between two
steps of its commit and publish a marker for files that were just swept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from geoloc_batch.errors import OutputError
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import Goal, marker_path, parse_goal
from geoloc_batch.store.lease import SECOND_NS, Lease, Leases
from geoloc_batch.store.marker import FileRecord, Marker, read_marker, staged_name
from geoloc_batch.store.publish import discard, publish, remove_file, remove_tree, stage_candidate
from geoloc_batch.store.some import some

# What another machine has done may show only when a network filesystem's cache is a minute old (acdirmax in nfs(5)).
LATE_WAITS_S = (0.25, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class Commits:
    """Publishing, rolling forward and sweeping in one OUT."""

    def __init__(self, files: FilePort, out: Path, *, has_links: bool) -> None:
        self.files = files
        self.out = out
        self.has_links = has_links
        self._known_folders: set[Path] = set()

    def staging(self, goal: Goal, token: str) -> Path:
        """Folder of an execution."""
        return self.out / "_staging" / f"{goal.label}.{token}"

    def measure(self, staging: Path, outputs: Sequence[str]) -> tuple[FileRecord, ...]:
        """Bring the staged files to the disk; their sizes and checksums."""
        records = []
        for relative in outputs:
            path = staging / staged_name(relative)
            self.files.sync(path)
            records.append(FileRecord(relative, *self.files.digest(path)))
        if records:
            self.files.sync_folder(staging)
        # Its own name too: else a power cut could leave a marker whose files have gone with their folder. One without
        # files needs the folder as well: by that it is seen that files of the result before have to go.
        self.files.sync_folder(staging.parent)
        return tuple(records)

    def publish_marker(self, marker: Marker) -> bool:
        """Publish a marker; False where its goal has another.

        Raises:
            FileNotFoundError: the staging folder was taken away before anybody won.
        """
        target = marker_path(self.out, marker.goal)
        data = marker.to_bytes()
        candidate = stage_candidate(self.files, self.out / marker.staging, target.name, data)
        self._ensure_folder(target.parent)
        return publish(self.files, candidate, target, data, has_links=self.has_links)

    def move_in(self, marker: Marker) -> None:
        """Move a committed unit's files to their names, from wherever that was cut off; then drop its staging.

        Raises:
            OutputError: a file is in neither place, or stands there with another size.
        """
        if not marker.kept:
            for file in self._move_files(marker):
                self._find(marker, file)
        self._end(marker)

    def roll_forward(self, marker: Marker) -> None:
        """Do what is left of a commit that was cut off: its marker was seen, and may not be on the disk yet."""
        self.files.sync_folder(marker_path(self.out, marker.goal).parent)
        self.move_in(marker)

    def settle(self, marker: Marker) -> None:
        """The same before a retry, which is there to mend what is missing: nothing is asked of what is not there."""
        staging = self.out / marker.staging
        if self.files.stat(staging) is None:
            return
        self.files.sync_folder(marker_path(self.out, marker.goal).parent)
        for wait_s in (0.0, *LATE_WAITS_S):
            # Over a network it may stay for a while: for a name that shows late, or a file that is held open.
            self.files.sleep(wait_s)
            if not marker.kept:
                self._move_files(marker)
            self._end(marker)
            if self.files.stat(staging) is None:
                return
        raise OutputError(f"{staging} cannot be removed; remove it and run the same command again")

    def clear(self, goal: Goal, token: str) -> None:
        """Drop the staging folder of an execution of ours, unless it has won after all."""
        staging = self.staging(goal, token)
        # A commit that failed may still have published its marker. Without its candidate it cannot do so any more,
        # so what is read afterwards is final.
        remove_tree(self.files, staging / "publish")
        marker = read_marker(self.out, goal, self.files.read)
        if marker is not None and marker.token == token:
            self.roll_forward(marker)
        else:
            remove_tree(self.files, staging)

    def _end(self, marker: Marker) -> None:
        self._move_out(marker)
        for folder in sorted({(self.out / path).parent for path in (*marker.paths, *marker.obsolete)}):
            # Gone where somebody has removed it with all results in it.
            with contextlib.suppress(FileNotFoundError):
                self.files.sync_folder(folder)
        remove_tree(self.files, self.out / marker.staging)

    def _move_out(self, marker: Marker) -> None:
        for relative in marker.obsolete:
            # Not removed where it stands: whoever comes to this late would remove what a later retry has put there.
            with contextlib.suppress(FileNotFoundError):
                self.files.rename(self.out / relative, self.out / marker.staging / staged_name(relative))

    def _move_files(self, marker: Marker) -> list[FileRecord]:
        """Move what can be moved; the others."""
        for folder in sorted({(self.out / file.path).parent for file in marker.files}):
            self._ensure_folder(folder)
        return [file for file in marker.files if not self._move(self._staged(marker, file), self.out / file.path)]

    def _staged(self, marker: Marker, file: FileRecord) -> Path:
        return self.out / marker.staging / staged_name(file.path)

    def _move(self, source: Path, target: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self.files.rename(source, target)
            return True
        return False

    def _find(self, marker: Marker, file: FileRecord) -> None:
        """Another rank was faster with a file; over a network its doing may show a little later."""
        source, target = self._staged(marker, file), self.out / file.path
        for wait_s in (0.0, *LATE_WAITS_S):
            self.files.sleep(wait_s)
            found = self.files.stat(target)
            if (found is not None and found.size == file.size) or self._is_superseded(marker.goal):
                return
            self.files.make_folder(target.parent)
            if self._move(source, target):
                return
        raise OutputError(
            f"{target} was committed with {file.size} bytes, and neither it nor {source} is there; remove "
            f"{source.parent}, then geoloc retry {self.out} --unit {marker.unit} makes it again"
        )

    def _is_superseded(self, goal: Goal) -> bool:
        """Whether a later retry has been published."""
        return self.files.stat(marker_path(self.out, Goal(goal.unit, goal.retry + 1))) is not None

    def _ensure_folder(self, folder: Path) -> None:
        """Make a folder durably, once per process."""
        if folder in self._known_folders:
            return
        missing = [folder, *folder.parents][: len(folder.relative_to(self.out).parts)]
        self.files.make_folder(folder)
        for made in missing:
            self.files.sync_folder(made.parent)
        self._known_folders.add(folder)

    def sweep(self, leases: Leases, few: tuple[int, int] | None = None) -> None:
        """Roll cut-off commits forward; remove what can serve nobody any more: staging folders and leases.

        Args:
            leases: of this rank.
            few: for a start, as not every one of thousands is to look at what all others have in work. (a, b): of more
                than a staging folders look at a, by chance, and at the leases in the slots 1 to b of their goals.
        """
        now_ns = leases.server_now_ns()
        # Folders before leases before markers: an execution makes its lease first and its marker last, so what is
        # seen here is never newer than what is decided on.
        names: Sequence[str] = self.files.names(self.out / "_staging")
        is_part = few is not None and len(names) > few[0]
        if few is not None:
            names = some(names, few[0])
        goals = {name: parse_goal(name.partition(".")[0]) for name in names}
        known = {goal for goal in goals.values() if goal is not None}
        found = leases.of(known, few[1]) if few is not None and is_part else leases.all()
        for name, goal in goals.items():
            token = name.partition(".")[2]
            folder = self.out / "_staging" / name
            if goal is not None:
                lease = next((lease for lease in found.get(goal, []) if lease.token == token), None)
                self._sweep_staging(folder, goal, lease, leases, now_ns)
            else:
                self._sweep_scratch(folder, leases, now_ns)
        for goal, of_goal in found.items():
            # A dead lease counts towards quarantine until its goal is reached.
            if self.files.stat(marker_path(self.out, goal)) is not None:
                for lease in of_goal:
                    if not leases.is_live(lease, now_ns):
                        remove_file(self.files, lease.path)
        leases.sweep_clocks(now_ns)

    def _sweep_staging(self, folder: Path, goal: Goal, lease: Lease | None, leases: Leases, now_ns: int) -> None:
        # Asked before the marker is read: who is gone now publishes nothing later.
        is_gone = lease is not None and leases.is_gone(lease)
        is_live = lease is not None and leases.is_live(lease, now_ns)
        marker = read_marker(self.out, goal, self.files.read)
        if marker is not None and self.out / marker.staging == folder and not self._is_superseded(goal):
            self.roll_forward(marker)
        elif (marker is not None and not is_live) or is_gone:
            discard(self.files, folder)

    def _sweep_scratch(self, folder: Path, leases: Leases, now_ns: int) -> None:
        """What a start leaves that was killed between two steps. Whoever loses it here makes it again."""
        found = self.files.stat(folder)
        if found is not None and now_ns - found.mtime_ns > leases.stale_s * SECOND_NS:
            discard(self.files, folder)
