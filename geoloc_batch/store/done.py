"""Done: which units have a marker, asked as seldom as can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from geoloc_batch.store.files import FilePort
from geoloc_batch.store.marker import Marker, marker_path, read_marker

# With more units than this to ask for in one folder of markers, its names are read at once.
MAX_STATS = 8


class Done:
    """Units known to be done, with their markers once they were read. A unit that is done stays done."""

    def __init__(self, files: FilePort, out: Path) -> None:
        self._files = files
        self._out = out
        self._markers: dict[int, Marker | None] = {}

    def __contains__(self, unit: object) -> bool:
        """Whether the unit is known to be done, without a look at the disk."""
        return unit in self._markers

    def add(self, marker: Marker) -> None:
        """Note a marker of our own."""
        self._markers[marker.unit] = marker

    def look(self, unit: int) -> bool:
        """Whether the unit is done, with a look at the disk."""
        if unit not in self._markers and self._files.stat(marker_path(self._out, unit)) is not None:
            self._markers[unit] = None
        return unit in self._markers

    def look_all(self, units: Iterable[int]) -> None:
        """Find out which of many units are done."""
        folders: dict[Path, list[int]] = defaultdict(list)
        for unit in units:
            if unit not in self._markers:
                folders[marker_path(self._out, unit).parent].append(unit)
        for folder, wanted in folders.items():
            if len(wanted) > MAX_STATS:
                there = set(self._files.names(folder))
                wanted = [unit for unit in wanted if marker_path(self._out, unit).name in there]
                self._markers.update(dict.fromkeys(wanted))
            else:
                for unit in wanted:
                    self.look(unit)

    def marker(self, unit: int) -> Marker | None:
        """The marker of a unit, None where it is not known to be done."""
        if unit not in self._markers:
            return None
        marker = self._markers[unit]
        if marker is None:
            marker = read_marker(self._out, unit, self._files.read)
            self._markers[unit] = marker
        return marker
