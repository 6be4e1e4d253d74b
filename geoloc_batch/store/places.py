"""Places: which file a source means, so that one shard under two spellings is one shard.

A place is the absolute form of a local source, taken when the source was pinned; the working folder may be another
later. Sources that are no files (pipe:, http) have none: they are compared as they are written.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from geoloc_batch.errors import InputError
from geoloc_batch.records import Unit

NO_FILE = re.compile(r"pipe:|https?://", re.IGNORECASE)

Source = tuple[str, str]
"""(kind, source): what the units of one shard, or of one pair, have in common."""


def place_of(unit: Unit) -> str | None:
    """Where a unit's source lies, seen from the working folder; None where it is no file."""
    if unit.kind == "shard" and NO_FILE.match(unit.source):
        return None
    return os.path.abspath(unit.source)


def stored_place(unit: Unit, out: Path) -> str | None:
    """The place as the plan keeps it: below OUT it is relative to that, so that OUT may move with its own shards."""
    place, root = place_of(unit), os.path.abspath(out)
    if place is None:
        return None
    place = os.path.relpath(place, root) if place.startswith(root + os.sep) else place
    try:
        place.encode()
    except UnicodeEncodeError:
        # The working folder's name is not UTF-8: no table holds it.
        return None
    return place


def restored_place(stored: str, out: Path) -> str:
    """What stored_place was given, seen from where OUT is now."""
    return os.path.join(os.path.abspath(out), stored)


class Places:
    """The pinned sources, to be found again under any spelling. The disk is asked only for what is spelt anew.

    Args:
        pinned: the units of each pinned source.
        places: by the index of a unit, where its source lay; without one, as seen from the working folder.
    """

    def __init__(self, pinned: Mapping[Source, Sequence[Unit]], places: Mapping[int, str]) -> None:
        self._units = {source: units[0] for source, units in pinned.items()}
        self._place = {source: places.get(unit.index) or place_of(unit) for source, unit in self._units.items()}
        self._by_place = {(source[0], place): source for source, place in self._place.items() if place}
        self._by_file: dict[Source, Source] | None = None
        self._real_folders: dict[str, str] = {}
        self.moved: list[str] = []
        """Sources found by their name alone, for the files that they once were are gone."""

    def find(self, unit: Unit) -> Source | None:
        """The pinned source that a given unit means, None where it is new.

        Raises:
            InputError: it has a pinned source's name, and is another file.
        """
        source, place = (unit.kind, unit.source), place_of(unit)
        if place is None:
            return source if source in self._units else None
        if unit.kind == "locations":
            # A run has one folder of them, and their hash is pinned: wherever it lies now, it is that.
            return next((pinned for pinned in self._units if pinned[0] == unit.kind), None)
        if self._place.get(source) == place:
            return source
        found = self._by_place.get((unit.kind, place))
        if found is not None:
            return found
        if source in self._units:
            self._check_same(unit, place, self._place[source])
            return source
        return self._files().get((unit.kind, self._real(place)))

    def add(self, unit: Unit) -> None:
        """Note a new source, so that the same file under another spelling finds it."""
        source, place = (unit.kind, unit.source), place_of(unit)
        if place is not None:
            self._by_place[unit.kind, place] = source
            self._files()[unit.kind, self._real(place)] = source

    def _check_same(self, unit: Unit, place: str, pinned: str | None) -> None:
        if pinned is None or not os.path.exists(pinned):
            self.moved.append(unit.source)
        elif os.path.realpath(pinned) != os.path.realpath(place):
            raise InputError(
                f"{unit.source} was planned as {pinned}, and from here it is {place}, another file; give the one that "
                f"is meant by its absolute path"
            )

    def _files(self) -> dict[Source, Source]:
        """The pinned sources by the files that they are now, links resolved."""
        if self._by_file is None:
            self._by_file = {(source[0], self._real(place)): source for source, place in self._place.items() if place}
        return self._by_file

    def _real(self, place: str) -> str:
        """os.path.realpath, which would ask for each folder on the way again, for each of a million shards."""
        if os.path.islink(place):
            return os.path.realpath(place)
        folder, name = os.path.split(place)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], name)


def told_of_moved(pinned: Iterable[Unit], fresh: Iterable[Unit], places: Mapping[int, str]) -> list[str]:
    """A warning where new sources may be pinned ones that were moved. Too little is known to take them for the same.

    Args:
        pinned: the units whose sources are not given now.
        fresh: the new units.
        places: by the index of a unit, where its source lay; without one, as seen from the working folder.
    """
    lost: dict[tuple[str, str, int], list[Unit]] = defaultdict(list)
    for unit, size in _sized(pinned):
        lost[unit.kind, os.path.basename(unit.source), size].append(unit)
    pairs: list[tuple[Unit, Unit]] = []
    for unit, size in _sized(fresh):
        for old in lost.get((unit.kind, os.path.basename(unit.source), size), ()):
            if not os.path.exists(places.get(old.index) or os.path.abspath(old.source)):
                pairs.append((old, unit))
                break
    if not pairs:
        return []
    old, new = pairs[0]
    what = "shards" if new.kind == "shard" else "embedding pairs"
    return [
        f"{len(pairs)} of the {what} have the name and size of {what} that were planned before and are gone; does "
        f"{old.source} now lie at {new.source}? If they were moved, their photos will stand twice: take another --out "
        f"(under their old place they are known)"
    ]


def _sized(units: Iterable[Unit]) -> list[tuple[Unit, int]]:
    """The first unit of each source that is a file of a known size, and that size."""
    sizes: dict[Source, int] = defaultdict(int)
    first: dict[Source, Unit] = {}
    for unit in units:
        source = (unit.kind, unit.source)
        sizes[source] += unit.num_bytes
        first.setdefault(source, unit)
    return [(unit, sizes[source]) for source, unit in first.items() if sizes[source] and place_of(unit) is not None]


def reopened(unit: Unit, place: str | None) -> Unit:
    """A pinned unit as it can be opened now: by its place where its own spelling leads elsewhere.

    Args:
        unit: as it was pinned.
        place: where its source lay then, None where that is not known or it is no file.
    """
    seen_from_here = place_of(unit)
    if place is None or seen_from_here in (None, place) or not os.path.exists(place):
        return unit
    return dataclasses.replace(unit, source=place, pinned_source=unit.source)


def spelling(pinned: str, given: Unit) -> str:
    """How to open a pinned source: as it was pinned, or as it is given now where that does not lead there any more."""
    place = place_of(given)
    if place is None or pinned == given.source or os.path.abspath(pinned) == place:
        return pinned
    return pinned if os.path.realpath(pinned) == os.path.realpath(place) else given.source
