"""Outcome: what the marker of an execution says, whether it is a first result, a retry's, or the end of all tries."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from geoloc_batch.errors import OutputError
from geoloc_batch.records import Unit, UnitError
from geoloc_batch.store.commit import Commits
from geoloc_batch.store.execution import Execution
from geoloc_batch.store.goal import Goal, marker_path
from geoloc_batch.store.lease import SECOND_NS
from geoloc_batch.store.marker import Marker, UnitCounts, Work, read_marker
from geoloc_batch.store.publish import remove_tree


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Makes the markers of one run, from what its executions give."""

    commits: Commits
    config: str
    """Hash of the pinned config."""
    sources: Mapping[int, str]
    """Each unit's source as it was pinned."""
    forced: Collection[int] = ()
    """Units that the user named to be made again."""
    worker: str = ""
    """Name of this process, for those who look on."""

    def committed(
        self,
        execution: Execution,
        outputs: Sequence[str],
        counts: UnitCounts,
        seconds: float,
        limiting_stage: str = "",
    ) -> Marker:
        """The marker of what an execution has staged."""
        unit, goal = execution.unit.index, execution.goal
        # First: `measure` then brings to the disk that the staging folder of what stands has gone.
        before = settled(self.commits, goal) if goal.retry else None
        marker = Marker(
            unit=unit,
            retry=goal.retry,
            source=self.sources[unit],
            token=execution.token,
            staging=self._name(execution.staging),
            files=self.commits.measure(execution.staging, outputs),
            counts=counts,
            config=self.config,
            seconds=round(seconds, 3),
            work=Work(
                worker=self.worker,
                # The server's clock at the lease and our own seconds since: it need not be asked again.
                ended_s=round(execution.taken_ns / SECOND_NS + seconds, 3),
                seconds=round(seconds, 3),
                limiting_stage=limiting_stage,
            ),
        )
        return succeeding(before, marker, is_forced=unit in self.forced) if before is not None else marker

    def quarantine(self, unit: Unit, goal: Goal, token: str, max_executions: int) -> None:
        """Publish that no execution of a goal has survived. What stood before a retry stays."""
        marker = self._quarantined(unit, goal, token, max_executions)
        # Gone where another rank has published the same and swept what is left of ours.
        with contextlib.suppress(FileNotFoundError):
            self.commits.publish_marker(marker)
        remove_tree(self.commits.files, self.commits.staging(goal, token))

    def _quarantined(self, unit: Unit, goal: Goal, token: str, max_executions: int) -> Marker:
        staging = self._name(self.commits.staging(goal, token))
        if goal.retry:
            return keeping(settled(self.commits, goal), token, staging)
        source = self.sources[unit.index]
        message = (
            f"{max_executions} executions ended without a commit: either it kills the process that reads it, or the "
            f"jobs were killed from outside that often; geoloc retry tries it again"
        )
        error = UnitError(source, message, offset=-1, bytes_unread=unit.num_bytes or None, retryable=True)
        return Marker(
            unit=unit.index,
            source=source,
            token=token,
            staging=staging,
            files=(),
            counts=UnitCounts(samples=0, rows=0, errors=0, unit_error=error, warnings=()),
            config=self.config,
            seconds=0.0,
            quarantined=True,
        )

    def _name(self, staging: Path) -> str:
        return staging.relative_to(self.commits.out).as_posix()


def settled(commits: Commits, goal: Goal) -> Marker:
    """What stands before a retry, each of its files under its name: else one could yet be moved over ours."""
    before = read_marker(commits.out, goal.before, commits.files.read)
    if before is None:
        raise OutputError(
            f"the marker {marker_path(commits.out, goal.before)} has gone; put it back as it was, or take another --out"
        )
    commits.settle(before)
    return before


def succeeding(before: Marker, after: Marker, *, is_forced: bool) -> Marker:
    """The marker that a retry publishes: its own, or one that keeps what stood.

    Args:
        before: of what stands.
        after: of what the retry gave.
        is_forced: the user named the unit, so that it is replaced unless its shard can be read less far than before,
            or has no good photo any more.
    """
    if is_forced:
        # A tar without any good photo is not what the user meant to put in the place of one that had some.
        is_empty = after.counts.rows == 0 < before.counts.rows
        is_taken = not is_empty and (after.counts.unit_error is None or not after.counts.is_worse_than(before.counts))
    else:
        is_taken = after.counts.is_better_than(before.counts)
    if not is_taken:
        return keeping(before, after.token, after.staging, after.work)
    obsolete = tuple(path for path in before.paths if path not in after.paths)
    counts = after.counts
    if counts.rows < before.counts.rows:
        lost = f"it had {before.counts.rows} rows before its retry and has {counts.rows} now"
        counts = dataclasses.replace(counts, warnings=(*counts.warnings, lost))
    return dataclasses.replace(after, obsolete=obsolete, counts=counts)


def keeping(before: Marker, token: str, staging: str, work: Work | None = None) -> Marker:
    """The marker of a retry that gave nothing to replace what stands."""
    retry = before.retry + 1
    return dataclasses.replace(before, token=token, staging=staging, retry=retry, kept=True, obsolete=(), work=work)


def notes_of(marker: Marker, counts: UnitCounts) -> list[str]:
    """What a user should know of a retry that gave these counts, and of which this marker came."""
    name, notes = f"unit {marker.unit} ({marker.source})", []
    if marker.kept:
        why = "" if counts.unit_error is None else f" ({counts.unit_error.message})"
        notes.append(f"{name}: its retry gave nothing better{why}; what stood stays")
    return notes + [f"{name}: {warning}" for warning in marker.counts.warnings if warning not in counts.warnings]
