"""Grouping: the photos of a whole unit sorted to the locations that they show, and one place for each location.

Shape letters: V views, sorted by location, L locations, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from geoloc_batch.geo.located import Located, Views
from geoloc_batch.locate.locator import Locator
from geoloc_batch.locate.views import LocatedViews
from geoloc_batch.records import RowError, Sample, Unit
from geoloc_batch.store.locations import location_name
from geoloc_batch.store.metadata import agreed, flatten

log = logging.getLogger("geoloc_batch")

NOT_FINITE = "the head's probabilities are not finite"
_MAX_MEMBERS = 30


class FieldWatch:
    """Tells at once, and once, of a unit in which no photo has the field that names its location.

    Nothing is refused: shards may differ, and those that lack it may have come first.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._has_told = False

    def look(self, unit: Unit, samples: Sequence[Sample]) -> None:
        """Look at the good photos of a whole unit before they are grouped."""
        if self._has_told or not samples or any(_name(sample, self._field) is not None for sample in samples):
            return
        self._has_told = True
        members = list(dict.fromkeys(name for sample in samples for name in flatten(sample.meta) or ()))
        there = f"are {', '.join(members[:_MAX_MEMBERS])}" if members else "is nothing"
        log.warning(
            "none of the %d photos of %s has %r in its json, by which locations are to be told apart; there %s. Each "
            "becomes an error row: if that is not what --group-by was to be, stop, and take another --out",
            len(samples),
            unit.shard,
            self._field,
            there,
        )


@dataclass(frozen=True, slots=True)
class Grouped:
    """The locations of a unit, in the order of their first views."""

    samples: tuple[Sample, ...]
    """[L] the location's name as key, shard and row of its first view, the json on which its views agree."""
    located: tuple[Located, ...]
    """For each locator [L] places."""
    views: tuple[Views, ...]
    """For each locator [L] what they were made from."""
    photos: NDArray[np.intp]
    """[V] which of the given photos stand behind them, in the order in which they were given."""
    errors: tuple[RowError, ...]
    """One for each of the other photos."""


def group(
    samples: Sequence[Sample], features_ND: NDArray[np.float32], locators: Sequence[Locator], field: str
) -> Grouped:
    """Locate the locations of a unit.

    Args:
        samples: the unit's good photos, in the order of their rows.
        features_ND: their raw features.
        locators: one or more.
        field: the member of a photo's json that names its location.
    """
    names = {photo: name for photo, sample in enumerate(samples) if (name := _name(sample, field)) is not None}
    errors = [
        row_error(sample, "group", no_location(field)) for photo, sample in enumerate(samples) if photo not in names
    ]
    while names:
        by_name: dict[str, list[int]] = {}
        for photo, name in names.items():
            by_name.setdefault(name, []).append(photo)
        photo_V = np.concatenate([np.array(photos, dtype=np.intp) for photos in by_name.values()])
        offset_L1 = np.cumsum([0, *map(len, by_name.values())])
        features_VD = torch.from_numpy(features_ND[photo_V])
        found = [locator.locate_views(features_VD, offset_L1) for locator in locators]
        bad_V = _unsound(found, offset_L1)
        if not bad_V.any():
            return Grouped(
                samples=tuple(_location(name, [samples[photo] for photo in by_name[name]]) for name in by_name),
                located=tuple(each.located for each in found),
                views=tuple(each.views for each in found),
                photos=np.sort(photo_V),
                errors=tuple(errors),
            )
        # Once more without them: they would spoil what the other views of their locations say.
        refused = sorted(photo_V[bad_V].tolist())
        errors += [row_error(samples[photo], "locate", NOT_FINITE) for photo in refused]
        for photo in refused:
            del names[photo]
    return Grouped((), (), (), np.empty(0, dtype=np.intp), tuple(errors))


def no_location(field: str) -> str:
    """Why a photo cannot be grouped."""
    return f"its json has no {field!r}, so which location it shows is not known"


def row_error(sample: Sample, stage: str, message: str, *, retryable: bool = False) -> RowError:
    """A photo that gives no row."""
    return RowError(sample.key, sample.shard, sample.row, stage, message, retryable)


def _name(sample: Sample, field: str) -> str | None:
    if sample.location is not None:
        return sample.location
    return location_name((flatten(sample.meta) or {}).get(field))


def _unsound(found: Sequence[LocatedViews], offset_L1: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[V] views without finite probabilities; where a location alone has none, all of its views."""
    bad_V: NDArray[np.bool_] = ~np.all([each.is_sound_V for each in found], axis=0)
    if bad_V.any():
        return bad_V
    bad_L: NDArray[np.bool_] = ~np.all([np.isfinite(each.located.topk_prob).all(axis=1) for each in found], axis=0)
    return np.repeat(bad_L, np.diff(offset_L1))


def _location(name: str, views: Sequence[Sample]) -> Sample:
    return replace(views[0], key=name, meta=agreed([view.meta for view in views]))
