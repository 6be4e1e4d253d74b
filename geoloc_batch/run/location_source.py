"""Stored embeddings location by location: the views of one may stand in any of a folder's pairs.

Shape letters: V views, N rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from geoloc_batch.errors import InputError
from geoloc_batch.records import RowError, Sample, Unit, UnitEnd, UnitError
from geoloc_batch.run.grouping import no_location, row_error
from geoloc_batch.run.sources import FeatureBatch, Items
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.transfer import Features, Landed
from geoloc_batch.run.view_window import ViewWindow, read_pair
from geoloc_batch.store.locations import Locations


class LocationSource:
    """Units of whole locations, as `plan_locations` cuts them.

    Args:
        locations: of all pairs of the folder.
    """

    precision = "fp32"
    wider = None

    def __init__(self, locations: Locations) -> None:
        self._locations = locations
        self._window = ViewWindow(locations)

    def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
        """As the protocol says. A unit is read whole or, where a pair cannot be read, not at all: a unit error."""
        for unit in units:
            if unit is None:
                continue
            try:
                with telemetry.stage("read"):
                    batch = self._views(unit) if unit.start != unit.stop else None
                    errors = () if batch is not None else tuple(self._without_location(unit))
            except (InputError, OSError) as failure:
                yield UnitEnd(unit, 0, unit_error=UnitError(unit.shard, str(failure), -1, None, retryable=True))
                continue
            if batch is not None:
                yield batch
            yield UnitEnd(unit, len(errors) if batch is None else len(batch.samples), errors)
            telemetry.bytes_read += unit.num_bytes

    def _views(self, unit: Unit) -> FeatureBatch:
        """The views of a unit's locations, by location, then as they stand in the pairs."""
        locations = self._locations
        assert unit.stop is not None
        self._window.move(unit.start, unit.stop)
        first, last = locations.offset_L1[[unit.start, unit.stop]].tolist()
        pair_V, row_V = locations.view_pair_V[first:last], locations.view_row_V[first:last]
        features_VD: NDArray[np.float32] | None = None
        by_view: dict[int, Sample] = {}
        for pair in np.unique(pair_V).tolist():
            here = np.flatnonzero(pair_V == pair)
            part = self._window.part(pair)
            of_pair_ND = part.features_at(row_V[here])
            if features_VD is None:
                features_VD = np.empty((last - first, of_pair_ND.shape[1]), dtype=np.float32)
            if of_pair_ND.shape[1] != features_VD.shape[1]:
                raise InputError(
                    f"{part.stored.npy} holds features of {of_pair_ND.shape[1]} numbers, others of its folder "
                    f"{features_VD.shape[1]}; keep the embeddings of each encoder in a folder of their own"
                )
            features_VD[here] = of_pair_ND
            by_view |= zip(here.tolist(), part.samples_at(unit, row_V[here]), strict=True)
        assert features_VD is not None
        counts = np.diff(locations.offset_L1[unit.start : unit.stop + 1])
        names = locations.names.take(np.repeat(np.arange(unit.start, unit.stop), counts)).to_pylist()
        named = tuple(replace(by_view[view], location=name) for view, name in enumerate(names))
        return FeatureBatch(Landed(Features(features_VD, torch.from_numpy(features_VD))), named)

    def _without_location(self, unit: Unit) -> Iterator[RowError]:
        for pair, location_N in enumerate(self._locations.location_of):
            rows = np.flatnonzero(location_N < 0)
            if len(rows):
                for sample in read_pair(self._locations, pair).samples_at(unit, rows):
                    yield row_error(sample, "group", no_location(self._locations.field))
