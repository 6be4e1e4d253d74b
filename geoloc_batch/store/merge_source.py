"""The run that is merged: its markers and files, each held against the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from geoloc_batch.errors import OutputError
from geoloc_batch.records import Unit
from geoloc_batch.store.done import check_source
from geoloc_batch.store.files import READ_BYTES, stat
from geoloc_batch.store.goal import Goal, marker_path
from geoloc_batch.store.marker import FileRecord, Marker, staged_name
from geoloc_batch.store.pin import RUN_FILE
from geoloc_batch.store.standing import read_standing
from geoloc_batch.store.verification import again

PREDICTIONS, EMBEDDINGS, METADATA = "predictions", "img_emb", "metadata"


@dataclass(frozen=True, slots=True)
class Source:
    """What stands of some units of a run."""

    out: Path
    plan: Sequence[Unit]
    goals: Sequence[Goal]
    """Which results stood when the merge began, in the order of the units."""
    config: str
    """Hash of the pinned config."""

    def markers(self) -> Generator[Marker]:
        """In the order of the units.

        Raises:
            OutputError: one is broken, or of another source or run.
        """
        for standing in read_standing(self.out, self.goals):
            marker = standing.marker
            check_source(self.out, marker, self.plan[marker.unit].source)
            if marker.config != self.config:
                raise OutputError(
                    f"unit {marker.unit} ({marker.source}) was made with config {marker.config}, {self.out / RUN_FILE} "
                    f"says {self.config}: two runs are mixed; {again(self.out, marker.unit)}"
                )
            yield marker

    def open(self, marker: Marker, record: FileRecord) -> BinaryIO:
        """A committed file; OutputError where it is gone."""
        path = self.out / record.path
        try:
            return open(path, "rb")
        except OSError as error:
            # Where a move was cut off the next start brings it there.
            waits = not marker.kept and (self.out / marker.staging / staged_name(record.path)).is_file()
            mend = "run the same command again" if waits else again(self.out, marker.unit)
            raise OutputError(f"{path} cannot be read ({error.strerror or error}); {mend}") from error

    def changed(self, marker: Marker, record: FileRecord, why: object = "size or checksum") -> OutputError:
        """What to raise where a file is not what was committed."""
        path = self.out / record.path
        if stat(marker_path(self.out, Goal(marker.unit, marker.retry + 1))) is not None:
            return OutputError(f"{path} was replaced by a retry meanwhile; run the same command again")
        return OutputError(f"{path} is not what was committed ({why}); {again(self.out, marker.unit)}")

    def pass_on(
        self, marker: Marker, record: FileRecord, file: BinaryIO, take: Callable[[bytes], object] | None = None
    ) -> None:
        """Read an open file to its end, `take` each block, and hold the whole against the marker.

        Whatever takes the file's name meanwhile: what is open stays the same file.

        Raises:
            OutputError: it is not what was committed.
        """
        total, size = hashlib.sha256(), 0
        while block := file.read(READ_BYTES):
            total.update(block)
            size += len(block)
            if take is not None:
                take(block)
        if (size, total.hexdigest()) != (record.size, record.sha256):
            raise self.changed(marker, record)
        file.seek(0)


def folder_of(record: FileRecord) -> str:
    """Of a file, relative to OUT."""
    return str(PurePosixPath(record.path).parent)


def tables_of(marker: Marker, *, embeddings: bool) -> list[FileRecord]:
    """The tables of a unit that may be merged: its predictions, else its metadata; of embeddings always these."""
    by_kind: dict[str, list[FileRecord]] = {PREDICTIONS: [], METADATA: []}
    for record in marker.files:
        by_kind.get(PurePosixPath(record.path).parent.name, []).append(record)
    return by_kind[METADATA] if embeddings else by_kind[PREDICTIONS] or by_kind[METADATA]


def matrices_of(marker: Marker) -> list[FileRecord]:
    """The .npy of a unit: one, or none."""
    return [record for record in marker.files if folder_of(record) == EMBEDDINGS]
