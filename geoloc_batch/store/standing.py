"""Standing: what stands of every unit, read from many markers at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from geoloc_batch.store.goal import Goal
from geoloc_batch.store.marker import Marker, read_marker

# Over a network a file's answer takes its time, and several can be waited for at once.
READERS = 16
# What one of them takes at a time.
CHUNK = 32

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Standing:
    """A marker as it was found."""

    marker: Marker
    mtime_s: float
    """When it was written, seconds since 1970 by the file server's clock; another time where the folder was copied."""


def read_standing(out: Path, goals: Iterable[Goal]) -> Generator[Standing]:
    """The markers of goals, in their order, with read_many; those that have gone meanwhile are left out.

    Raises:
        OutputError: one is no marker, or that of another goal.
    """
    yield from (found for found in read_many(lambda goal: _read(out, goal), goals) if found is not None)


def read_many(read: Callable[[Asked], Answer], asked: Iterable[Asked]) -> Generator[Answer]:
    """What `read` gives for many things, in their order, by several threads that wait for the disk at once.

    A few hundred answers are in memory at a time, however many there are.
    """
    pending = iter(asked)
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as readers:
        while chunks := list(itertools.islice(_chunks(pending), READERS)):
            for answers in readers.map(lambda chunk: [read(one) for one in chunk], chunks):
                yield from answers


def _chunks(asked: Iterator[Asked]) -> Iterator[list[Asked]]:
    while chunk := list(itertools.islice(asked, CHUNK)):
        yield chunk


def _read(out: Path, goal: Goal) -> Standing | None:
    times: list[float] = []

    def read(path: Path) -> bytes:
        with open(path, "rb", buffering=0) as file:
            # Of the open file: its time is no further question to the file server.
            times.append(os.fstat(file.fileno()).st_mtime)
            return file.readall()

    marker = read_marker(out, goal, read)
    return None if marker is None else Standing(marker, times[-1])
