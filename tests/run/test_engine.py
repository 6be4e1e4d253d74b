"""The engine over sources that overflow: who is set aside, for how long, and what becomes of it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import tree_bytes

from geoloc_batch.records import Sample, Unit, UnitEnd
from geoloc_batch.run import engine
from geoloc_batch.run.engine import Engine, Outputs
from geoloc_batch.run.sources import FeatureBatch, FeatureSource, Items
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.transfer import Features, Landed
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.store.features import read_features
from geoloc_batch.store.goal import Goal
from geoloc_batch.store.ledger import Ledger
from geoloc_batch.store.marker import read_marker

ROWS = 2


class Source:
    """Two photos a unit; reads the next one only when the engine has settled the one before."""

    def __init__(self, precision: str, value: Callable[[int], float], wider: Source | None = None) -> None:
        self.precision, self._value = precision, value
        self.wider: Callable[[], FeatureSource] | None = None if wider is None else lambda: wider
        self.passes: list[list[int]] = []
        self.engine: Engine | None = None
        self.max_aside = 0

    def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
        self.passes.append([])
        for unit in units:
            if unit is None:
                continue
            self.passes[-1].append(unit.index)
            features_BD = np.full((ROWS, 3), 1 + unit.index, np.float32)
            features_BD[1] *= self._value(unit.index)
            samples = tuple(Sample(unit, unit.shard, row, f"{unit.index}-{row}", b"") for row in range(ROWS))
            yield FeatureBatch(Landed(Features(features_BD, torch.from_numpy(features_BD))), samples)
            yield UnitEnd(unit, ROWS)
            self._wait_until_settled()

    def _wait_until_settled(self) -> None:
        assert self.engine is not None
        end = time.monotonic() + 20
        while self.engine._open and time.monotonic() < end:
            time.sleep(0.001)
        self.max_aside = max(self.max_aside, len(self.engine._aside))


def run(out: Path, source: Source, wider: Source, num_units: int, stop: StopSignal | None = None) -> Telemetry:
    units = [Unit(index=index, kind="shard", source=f"{index}.tar", num_bytes=9) for index in range(num_units)]
    telemetry = Telemetry(None, stream=io.StringIO())
    with closing(Ledger(out)) as ledger:
        ledger.open({"precision": source.precision})
        ledger.adopt_plan(units)
        source.engine = wider.engine = Engine(ledger, Outputs(embeddings=True), [], telemetry, stop or StopSignal())
        source.engine.run(source)
    return telemetry


def test_units_are_made_again_before_too_many_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_ASIDE", 3)
    wider = Source("bf16", lambda _index: 2.0)
    source = Source("fp16", lambda index: np.inf if index % 3 else 5.0, wider)
    telemetry = run(tmp_path, source, wider, 16)
    assert source.max_aside == 3
    assert [len(units) for units in wider.passes] == [3, 3, 3, 1]
    assert sorted(chain(*wider.passes)) == [index for index in range(16) if index % 3]
    assert sorted(chain(*source.passes)) == list(range(16))
    for index in range(16):
        features_ND = read_features(tmp_path / "img_emb" / f"img_emb_{index:06d}.npy").features_ND
        np.testing.assert_allclose(features_ND[1, 0] / features_ND[0, 0], 2 if index % 3 else 5, rtol=1e-3)
        marker = read_marker(tmp_path, Goal(index))
        assert marker is not None
        assert bool(marker.counts.warnings) == bool(index % 3)
    assert (telemetry.rows, telemetry.errors, telemetry.units) == (16 * ROWS, 0, 16)


def test_what_overflows_in_the_wider_precision_too_is_an_error_row_and_not_tried_a_third_time(tmp_path: Path) -> None:
    wider = Source("bf16", lambda _index: np.nan)
    run(tmp_path, Source("fp16", lambda _index: np.inf, wider), wider, 2)
    assert sorted(chain(*wider.passes)) == [0, 1]
    for index in range(2):
        marker = read_marker(tmp_path, Goal(index))
        assert marker is not None
        assert (marker.counts.rows, marker.counts.errors) == (1, 1)


def test_a_source_that_cannot_overflow_gives_error_rows_at_once(tmp_path: Path) -> None:
    source = Source("fp32", lambda _index: np.inf)
    run(tmp_path, source, source, 2)
    assert source.passes == [[0, 1]]
    assert [path for path in tree_bytes(tmp_path) if path.startswith("errors/")] == [
        "errors/errors_000000.parquet",
        "errors/errors_000001.parquet",
    ]


def test_a_stop_leaves_what_was_set_aside_to_the_next_run(tmp_path: Path) -> None:
    stop, wider = StopSignal(), Source("bf16", lambda _index: 2.0)

    class Stopping(Source):
        def features(self, units: Iterable[Unit | None], telemetry: Telemetry) -> Items:
            for number, item in enumerate(super().features(units, telemetry)):
                if number == 3:
                    stop.set()
                yield item

    run(tmp_path, Stopping("fp16", lambda _index: np.inf, wider), wider, 5, stop)
    assert wider.passes == []
    assert [path.name for path in (tmp_path / "_leases").glob("0*")] == []
    assert list((tmp_path / "_staging").iterdir()) == []
    run(tmp_path, Source("fp16", lambda _index: np.inf, wider), wider, 5)
    assert len(list((tmp_path / "img_emb").iterdir())) == 5
