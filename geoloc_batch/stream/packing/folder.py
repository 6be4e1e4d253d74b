"""The folder that shards are packed into: all of them appear at once, when the last one is whole."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from geoloc_batch.errors import OutputError

_SHARD = re.compile(r"\d{6,}\.tar")


class StagedFolder:
    """A context in which files are written aside, then published together.

    A process that is killed leaves its files in ``.packing``, under names that no reader takes for shards; the next
    pack into the same folder sweeps them.

    Args:
        out: the folder; it is made where it is missing.
        overwrite: replace the shards that stand there.
    Raises:
        OutputError: on entering, ``out`` holds shards already, is being packed into, or cannot be written; on
            leaving, a write had failed.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = out
        self._overwrite = overwrite
        self._staging = out / ".packing"
        self._names: list[str] = []
        self._lock: int | None = None
        self._is_new = False

    def __enter__(self) -> Self:
        if "://" in str(self.out) or ":/" in str(self.out):
            raise OutputError(f"--out {self.out} is an address: pack into a local folder, then copy it there")
        try:
            self._is_new = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            self._lock = os.open(self._staging / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._take_lock(self._lock)
            for left in self._staging.glob("*.part"):
                left.unlink()
        except OSError as error:
            raise OutputError(f"--out {self.out} cannot be written: {error.strerror}; choose another folder") from error
        shards = sorted(self.out.glob("*.tar"))
        if shards and not self._overwrite:
            self._sweep()
            raise OutputError(
                f"--out {self.out} holds {shards[0].name} already: choose another folder, or pass --overwrite"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sweep()
        if isinstance(error, OSError):
            raise OutputError(f"packing into {self.out} failed: {error}; nothing was published") from error

    def stage(self, name: str) -> Path:
        """Where to write what will become ``out/name``."""
        self._names.append(name)
        return self._staging / f"{name}.part"

    def publish(self) -> None:
        """Give every staged file its name; with overwrite, the older shards beside them go."""
        for name in self._names:
            os.replace(self._staging / f"{name}.part", self.out / name)
        if self._overwrite:
            for old in self.out.iterdir():
                if (_SHARD.fullmatch(old.name) or old.name == "skipped.csv") and old.name not in self._names:
                    old.unlink()
        _sync_folder(self.out)

    def _take_lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            self._lock = None
            raise OutputError(f"another pack is writing to {self.out}: wait for it, or choose another folder") from None
        except OSError:
            # Some network file systems have no locks; two packs into one folder at a time are then the user's to avoid.
            return

    def _sweep(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._is_new and not any(self.out.iterdir()):
            self.out.rmdir()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
