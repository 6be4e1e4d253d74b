"""OpenUnit: what has been gathered of a unit that is not committed yet, and how it becomes tables.

Shape letters: N rows of a unit, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.geo.located import Located, Views
from geoloc_batch.locate.locator import Locator
from geoloc_batch.records import RowError, Sample, UnitEnd
from geoloc_batch.run.grouping import Grouped, group
from geoloc_batch.store import tables
from geoloc_batch.store.ledger import Execution, UnitCounts
from geoloc_batch.store.places import place_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What a run writes for each unit."""

    embeddings: bool
    trees: tuple[str, ...] = ()
    """Folder of the predictions of each locator below OUT; "" is OUT itself."""
    group_by: str = ""
    """The member of a photo's json that names its location, where predictions have one row for each location."""

    @property
    def keeps_features(self) -> bool:
        """Whether the features of a unit are needed when all of them are there."""
        return self.embeddings or bool(self.group_by)


@dataclass(slots=True)
class OpenUnit:
    """A unit in work. Photos come in any order, in several batches, and beside those of other units."""

    execution: Execution
    located: list[list[Located]]
    """For each locator, the places of `samples` in parts; empty where they are grouped."""
    remark: str = ""
    """Goes to the marker's warnings: how this unit was made otherwise than the others."""
    samples: list[Sample] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)
    """[., D] of `samples`, in parts; none where no embeddings are written and nothing is grouped."""
    errors: list[RowError] = field(default_factory=list)
    end: UnitEnd | None = None
    grouped: Grouped | None = None
    """The locations that `samples` show, where they are grouped and the unit is whole."""
    num_overflowed: int = 0
    """Photos whose features are not finite, which another precision could mend."""
    num_dropped: int = 0
    """Rows and error rows that were forgotten again."""

    @property
    def is_whole(self) -> bool:
        """Whether every photo of the unit has come."""
        num_settled = len(self.samples) + len(self.errors) + self.num_dropped
        return self.end is not None and num_settled == self.end.num_samples

    @property
    def is_cut_off(self) -> bool:
        """Whether a sender (a server, a command) failed in the midst of it: another try can give it whole.

        Unlike a damaged file, where what stands before the damage is all that there will ever be.
        """
        error = None if self.end is None else self.end.unit_error
        return error is not None and error.retryable and place_of(self.execution.unit) is None

    def add(
        self, samples: Sequence[Sample], features_ND: NDArray[np.float32] | None, located: Sequence[Located]
    ) -> None:
        """Photos with their features, where these are kept, and their places."""
        self.samples.extend(samples)
        if features_ND is not None:
            self.features.append(features_ND)
        for gathered, places in zip(self.located, located, strict=True):
            gathered.append(places)

    def group(self, field: str, locators: Sequence[Locator]) -> int:
        """Locate the locations of a whole unit; how many of its photos became error rows by that."""
        if not self.samples:
            return 0
        order = self._order()
        samples, features_ND = [self.samples[row] for row in order], np.concatenate(self.features)[order]
        self.grouped = group(samples, features_ND, locators, field)
        self.samples = [samples[photo] for photo in self.grouped.photos]
        self.features = [features_ND[self.grouped.photos]]
        self.errors.extend(self.grouped.errors)
        return len(self.grouped.errors)

    def _order(self) -> NDArray[np.intp]:
        """Photos come out of order from the stream; stored rows come in theirs, and may belong to several shards."""
        is_shard = self.execution.unit.kind == "shard"
        return np.argsort([sample.row if is_shard else 0 for sample in self.samples], kind="stable")

    def drop(self) -> tuple[int, int]:
        """Forget what has been gathered, since the unit is to be made again; how many rows and error rows that was."""
        dropped = len(self.samples), len(self.errors)
        self.num_dropped += sum(dropped)
        self.samples, self.features, self.errors = [], [], []
        self.located = [[] for _ in self.located]
        return dropped

    @property
    def counts(self) -> UnitCounts:
        """What came out, once the unit is whole."""
        end = self.end
        assert end is not None
        return UnitCounts(
            samples=len(self.samples) + len(self.errors),
            rows=len(self.samples if self.grouped is None else self.grouped.samples),
            errors=len(self.errors),
            unit_error=end.unit_error,
            warnings=(*end.warnings, *([self.remark] if self.remark else [])),
            retryable_errors=sum(error.retryable for error in self.errors),
            errors_by_stage=dict(sorted(Counter(error.stage for error in self.errors).items())),
        )

    def write(self, outputs: Outputs) -> list[str]:
        """Write the tables in the execution's staging folder; their paths below OUT."""
        index, stage = self.execution.unit.index, self.execution.stage
        order = self._order()
        samples = [self.samples[row] for row in order]
        paths: list[str] = []
        if samples and outputs.embeddings:
            npy, parquet = tables.embedding_paths(index)
            tables.write_embeddings(stage(npy), stage(parquet), samples, np.concatenate(self.features)[order])
            paths += [npy, parquet]
        if samples:
            for tree, table in zip(outputs.trees, self._predictions(samples, order), strict=True):
                path = tables.predictions_path(index, tree)
                tables.write_predictions(stage(path), *table)
                paths.append(path)
        if self.errors:
            path = tables.errors_path(index)
            tables.write_errors(stage(path), sorted(self.errors, key=lambda error: error.row))
            paths.append(path)
        return paths

    def _predictions(
        self, samples: Sequence[Sample], order: NDArray[np.intp]
    ) -> Iterator[tuple[Sequence[Sample], Located, Views | None]]:
        """For each locator who the rows are, where, and what is behind them."""
        if self.grouped is None:
            for parts in self.located:
                yield samples, Located.concatenate(parts).take(order), None
        else:
            for located, views in zip(self.grouped.located, self.grouped.views, strict=True):
                yield self.grouped.samples, located, views
