"""Sums: what many units add up to, written once for thousands of ranks that all want to know it at their end.

    _sums/{thousands}.{time}.json   all units of a folder of markers are done, and this came of them
    _sums/total.{units}.{token}.json   the same of all units of a plan
    _sums/{name}.claim              somebody is at work on it

`time` is that of the folder of markers, by the file server's clock, when its names were read: a folder that has another
one now has changed since, by a retry, or by somebody who removed a marker. 0 stands for a folder that had only just
changed, as a later change could have left the same time. So what a rank finds at its start holds where the time does; a
total says nothing to it. What appears later was made while the rank lived, and what is done stays done.

Nothing is lost without sums, and they can be removed at any time: the markers say the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from geoloc_batch.store.execution import Totals
from geoloc_batch.store.files import FilePort
from geoloc_batch.store.goal import THOUSAND, Goal, marker_path
from geoloc_batch.store.lease import SECOND_NS, Leases
from geoloc_batch.store.pin import SUMS
from geoloc_batch.store.publish import canonical_json, remove_file, remove_tree

SUM_NAME = re.compile(r"(?P<thousand>[0-9]+)\.(?P<time>[0-9]+)\.json|total\.(?P<units>[0-9]+)\.[^.]+\.json")
LAYOUT = 1
# The coarsest times of files that are still in use are of two seconds.
YOUNG_S = 3.0
LOOK_S = 5.0
"""Between two looks at the folder."""

What = int | str
"""The number of a folder of markers, or `name_of_total` so many units."""


def name_of_total(num_units: int) -> str:
    """How claims and files of the sum over the first so many units begin."""
    return f"total.{num_units}"


def _num_units(what: What) -> int:
    return THOUSAND if isinstance(what, int) else int(what.removeprefix("total."))


class Sums:
    """The folder of sums, seen by one rank."""

    def __init__(self, files: FilePort, out: Path, leases: Leases) -> None:
        self._files = files
        self._out = out
        self._leases = leases
        self._folder = out / SUMS
        self._known: dict[What, str] = {}
        self._outdated: set[str] = set()
        self._looked_s: float | None = None
        # Claims of others: their times when last seen, and since when, by our own seconds, these have not moved.
        self._unmoved: dict[What, tuple[int, float]] = {}

    def __contains__(self, what: What) -> bool:
        """Whether there is a sum that holds, as far as is known."""
        return what in self._known

    def __len__(self) -> int:
        """How many are known."""
        return len(self._known)

    def look(self, *, now: bool = False) -> list[What]:
        """What is found to have a sum since the last look; looks seldom, unless it shall be `now`."""
        now_s, is_first = self._files.monotonic(), self._looked_s is None
        if self._looked_s is not None and now_s - self._looked_s < LOOK_S and not now:
            return []
        self._looked_s = now_s
        found: list[What] = []
        for name in self._names():
            parsed = SUM_NAME.fullmatch(name)
            if parsed is None or name in self._outdated:
                continue
            what: What = name_of_total(int(parsed["units"])) if parsed["units"] else int(parsed["thousand"])
            if what in self._known:
                continue
            if is_first and not (isinstance(what, int) and self._holds(what, int(parsed["time"]))):
                self._outdated.add(name)
                continue
            self._known[what] = name
            found.append(what)
        return found

    def _names(self) -> list[str]:
        try:
            return self._files.names(self._folder)
        except OSError:
            # Of another user, or no folder: then there are none.
            return []

    def has_changed(self, thousand: int) -> bool:
        """Whether the folder of a sum that was found has changed since; not known, and no, where the time is 0."""
        parsed = SUM_NAME.fullmatch(self._known[thousand])
        time_ns = int(parsed["time"]) if parsed is not None else 0
        return time_ns > 0 and not self._holds(thousand, time_ns)

    def _holds(self, thousand: int, time_ns: int) -> bool:
        found = self._files.stat(self.folder_of(thousand))
        return found is not None and 0 < time_ns == found.mtime_ns

    def folder_of(self, thousand: int) -> Path:
        """The folder of its markers."""
        return marker_path(self._out, Goal(thousand * THOUSAND)).parent

    def read(self, what: What) -> Totals | None:
        """A sum that was found, None where it is none after all and no other is there."""
        while what in self._known:
            try:
                return self._parsed(what)
            except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
                # Another rank has put one with a better time in its place; or somebody has changed it.
                name = self._known.pop(what)
                self._outdated.add(name)
                self._remove(name)
                self.look(now=True)
        return None

    def _parsed(self, what: What) -> Totals:
        fields = json.loads(self._files.read(self._folder / self._known[what]))
        if fields.pop("layout") != LAYOUT or not all(type(value) is int for value in fields.values()):
            raise ValueError
        found = Totals(**fields)
        if not found.units == found.done == _num_units(what):
            raise ValueError
        return found

    def _remove(self, name: str) -> None:
        # What cannot be removed is in nobody's way.
        with contextlib.suppress(OSError):
            remove_file(self._files, self._folder / name)

    def claim(self, what: What) -> bool:
        """Whether this rank is to make a sum, and says so with every beat. It costs work and nothing else if two do."""
        path = self._claim(what)
        try:
            self._create(path)
        except FileExistsError:
            if not self._is_left(what, path):
                return False
            with contextlib.suppress(OSError):
                self._files.touch(path)
        self._leases.keep(path)
        # It may have been made, and its claim given back, since we last looked.
        self.look(now=True)
        if what in self:
            self.let_go(what)
        return what not in self

    def _create(self, path: Path) -> None:
        try:
            self._files.create(path)
        except FileNotFoundError:
            try:
                self._files.make_folder(self._folder)
            except FileExistsError as error:
                # A link to nothing: not to be taken for a claim that another rank has.
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self._folder)) from error
            self._files.create(path)

    def _is_left(self, what: What, path: Path) -> bool:
        """Whether a claim has not been touched for long, by our own count: of the server's clock nothing is asked."""
        found, now_s = self._files.stat(path), self._files.monotonic()
        if found is None:
            return False
        touched_ns, since_s = self._unmoved.get(what, (0, 0.0))
        if touched_ns != found.mtime_ns:
            self._unmoved[what] = (found.mtime_ns, now_s)
            return False
        return now_s - since_s > self._leases.stale_s

    def let_go(self, what: What) -> None:
        """Give a claim back."""
        # What cannot be removed is in nobody's way for long.
        with contextlib.suppress(OSError):
            self._leases.drop(self._claim(what))

    def _claim(self, what: What) -> Path:
        return self._folder / f"{what}.claim"

    def time_of(self, thousand: int, now_ns: int) -> int:
        """The time of a folder of markers, 0 where that has only just changed."""
        found = self._files.stat(self.folder_of(thousand))
        return found.mtime_ns if found is not None and now_ns - found.mtime_ns > YOUNG_S * SECOND_NS else 0

    def write(self, what: What, totals: Totals, time_ns: int = 0) -> None:
        """Make a sum known and give its claim back."""
        token = self._files.token()
        name = f"{what:03d}.{time_ns}.json" if isinstance(what, int) else f"{what}.{token}.json"
        scratch = self._out / "_staging" / f"sum.{token}"
        try:
            self._files.make_folder(scratch)
            self._files.write(scratch / name, canonical_json({"layout": LAYOUT, **asdict(totals)}))
            self._files.sync(scratch / name)
            self._files.rename(scratch / name, self._folder / name)
            self._known[what] = name
            self._outdated.discard(name)
        finally:
            remove_tree(self._files, scratch)
            self.let_go(what)
        for outdated in self._of(what, self._outdated):
            self._remove(outdated)

    @staticmethod
    def _of(what: What, names: Iterable[str]) -> list[str]:
        begin = f"{what:03d}." if isinstance(what, int) else "total."
        return [name for name in names if name.startswith(begin)]
